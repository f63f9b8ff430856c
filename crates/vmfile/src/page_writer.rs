//! Pages that come in any order, and come again: each to its place in the file.
//!
//! The pages of one window, a MiB of a block, are collected and written together, so that a stream
//! in the order of memory goes out as large writes. A page that comes again overwrites its place; one
//! that becomes zero loses its bit and its hash, and its place is emptied at the end.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use vmfile_engine::{
    BackendInUse, DataFile, Direction, Memory, PooledBuffer, Transfer, is_zero, page_hash,
    punch_hole,
};
use vmfile_format::manifest::{HASH_LEN, encode_hash};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex};

use crate::jobs::Jobs;
use crate::lane::Lane;
use crate::plan::{WINDOW_LEN, pieces};
use crate::shared_bitmap::SharedBitmap;

/// The smallest page: two transfers in flight must not touch one 4096-byte page of the file.
pub(crate) const PAGE_LEN_MIN: u64 = 4096;

/// The hash of a page that has none: a zero page.
const NO_HASH: [u8; 16] = [0; 16];
const _: () = assert!(NO_HASH.len() as u64 == HASH_LEN);

/// Words of the bitmap of a window.
const WINDOW_WORDS: usize = (WINDOW_LEN / PAGE_LEN_MIN / 64) as usize;

/// Windows that may be in flight before a writer waits for all of them. Each takes 16 bytes to
/// remember; a stream in the order of memory never comes so far back.
const IN_FLIGHT_MAX: usize = 1 << 16;

/// The RAM of a file that is being received, seen by all its writers.
#[derive(Debug)]
pub(crate) struct ReceivedRam {
    file: DataFile,
    blocks: Vec<ReceivedBlock>,
}

#[derive(Debug)]
struct ReceivedBlock {
    placed: PlacedBlock,
    hashes_offset: u64,
    /// Pages whose data is in the file.
    data: SharedBitmap,
    /// Pages whose places were written, at any time.
    written: SharedBitmap,
}

impl ReceivedRam {
    /// Prepares to write the blocks at these places, with their tables of hashes.
    pub(crate) fn new(file: DataFile, blocks: &[PlacedBlock], hashes: &[u64]) -> ReceivedRam {
        let blocks = blocks.iter().zip(hashes).map(|(placed, &hashes_offset)| ReceivedBlock {
            data: SharedBitmap::new(placed.block.page_count()),
            written: SharedBitmap::new(placed.block.page_count()),
            placed: placed.clone(),
            hashes_offset,
        });
        ReceivedRam { file, blocks: blocks.collect() }
    }

    /// Empties the places of pages that were written and are zero now.
    pub(crate) fn empty_stale_places(&self) -> io::Result<()> {
        for block in &self.blocks {
            let page_len = block.placed.block.page_size().bytes();
            for run in block.written.without(&block.data).data_runs() {
                let start = block.placed.pages_offset + run.start.0 * page_len;
                let range = start..start + run.count().0 * page_len;
                empty(&self.file, range)?;
            }
        }
        Ok(())
    }

    /// Returns which pages of each block have their data in the file.
    pub(crate) fn bitmaps(&self) -> Vec<PageBitmap> {
        self.blocks.iter().map(|block| block.data.snapshot()).collect()
    }
}

/// The file system cannot make holes.
const EOPNOTSUPP: i32 = rustix::io::Errno::OPNOTSUPP.raw_os_error();

/// Makes `range` of the file a hole, or zeros where the file system has no holes.
pub(crate) fn empty(file: &DataFile, range: Range<u64>) -> io::Result<()> {
    match punch_hole(file.as_fd(), range.clone()) {
        Err(error) if error.raw_os_error() == Some(EOPNOTSUPP) => {}
        result => return result,
    }
    let zeros = vec![0; usize::try_from(WINDOW_LEN).expect("1 MiB")];
    for piece in pieces(range, WINDOW_LEN) {
        let len = usize::try_from(piece.end - piece.start).expect("1 MiB at most");
        file.buffered().write_all_at(&zeros[..len], piece.start)?;
    }
    Ok(())
}

/// One thread's way of writing pages.
#[derive(Debug)]
pub(crate) struct PageWriter<'a> {
    ram: &'a ReceivedRam,
    lane: Lane,
    open: Option<Window>,
    /// Windows of which transfers may be in flight.
    in_flight: HashSet<(usize, u64)>,
    counts: Counts,
}

/// What a writer has seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Bytes of pages that were written, those that came again as often as they came.
    pub(crate) written_bytes: u64,
    /// Bytes of pages that were written again.
    pub(crate) rewritten_bytes: u64,
}

/// The pages of a window that have come so far.
#[derive(Debug)]
struct Window {
    block: usize,
    number: u64,
    present: [u64; WINDOW_WORDS],
    buffer: PooledBuffer,
}

/// A page's window, and its place in it.
#[derive(Clone, Copy, Debug)]
struct Slot {
    window: u64,
    index: usize,
    page_len: usize,
}

impl Slot {
    fn start(self) -> usize {
        self.index * self.page_len
    }
}

impl<'a> PageWriter<'a> {
    /// Opens one of `writers` ways to the file of `ram`.
    pub(crate) fn open(
        ram: &'a ReceivedRam,
        backend: vmfile_engine::Backend,
        writers: Jobs,
    ) -> io::Result<(PageWriter<'a>, BackendInUse)> {
        let (lane, backend) = Lane::open(&ram.file, backend, writers.count())?;
        let (open, in_flight, counts) = (None, HashSet::new(), Counts::default());
        Ok((PageWriter { ram, lane, open, in_flight, counts }, backend))
    }

    /// Takes a page; `data` has its length.
    pub(crate) fn page(&mut self, block: usize, page: PageIndex, data: &[u8]) -> io::Result<()> {
        let slot = self.slot(block, page);
        let window = self.window(block, slot.window)?;
        window.buffer[slot.start()..slot.start() + slot.page_len].copy_from_slice(data);
        window.present[slot.index / 64] |= 1 << (slot.index % 64);
        if slot.start() + slot.page_len == window.buffer.len() {
            self.close_window()?;
        }
        Ok(())
    }

    /// Takes a page of zeros.
    pub(crate) fn zero_page(&mut self, block: usize, page: PageIndex) -> io::Result<()> {
        let slot = self.slot(block, page);
        if let Some(window) = self.open.as_mut().filter(|window| window.is(block, slot.window)) {
            window.present[slot.index / 64] &= !(1 << (slot.index % 64));
        }
        self.forget(block, page)
    }

    /// Returns the bytes of a page as they are now.
    pub(crate) fn current(&mut self, block: usize, page: PageIndex) -> io::Result<Vec<u8>> {
        self.drain()?;
        let mut data = vec![0; self.slot(block, page).page_len];
        let received = &self.ram.blocks[block];
        if received.data.contains(page) {
            let offset = received.placed.page_offset(page).expect("a page of the block");
            self.ram.file.buffered().read_exact_at(&mut data, offset)?;
        }
        Ok(data)
    }

    /// Waits until everything that was taken is in the file.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        self.close_window()?;
        self.in_flight.clear();
        self.lane.drain()
    }

    /// Returns what was written so far.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    fn slot(&self, block: usize, page: PageIndex) -> Slot {
        let page_len = self.ram.blocks[block].placed.block.page_size().bytes();
        let pages = WINDOW_LEN / page_len;
        let index = usize::try_from(page.0 % pages).expect("256 at most");
        let page_len = usize::try_from(page_len).expect("64 KiB at most");
        Slot { window: page.0 / pages, index, page_len }
    }

    /// Returns the window, after writing another one that was open.
    fn window(&mut self, block: usize, number: u64) -> io::Result<&mut Window> {
        if !self.open.as_ref().is_some_and(|window| window.is(block, number)) {
            self.close_window()?;
            let buffer = self.lane.buffer()?;
            self.open = Some(Window { block, number, present: [0; WINDOW_WORDS], buffer });
        }
        Ok(self.open.as_mut().expect("opened above"))
    }

    /// Writes the pages of the open window.
    fn close_window(&mut self) -> io::Result<()> {
        let Some(window) = self.open.take() else { return Ok(()) };
        let key = (window.block, window.number);
        if self.in_flight.contains(&key) || self.in_flight.len() >= IN_FLIGHT_MAX {
            // The kernel takes two writes to one place in any order.
            self.in_flight.clear();
            self.lane.drain()?;
        }
        self.in_flight.insert(key);
        let page_len = self.ram.blocks[window.block].placed.block.page_size().bytes();
        let page_size = usize::try_from(page_len).expect("64 KiB at most");
        let first = window.number * (WINDOW_LEN / page_len);
        let mut runs: Vec<(usize, Vec<u8>)> = Vec::new();
        for index in (0..window.buffer.len() / page_size).filter(|&index| window.has(index)) {
            let page = PageIndex(first + index as u64);
            let data = &window.buffer[index * page_size..(index + 1) * page_size];
            if is_zero(data) {
                self.forget(window.block, page)?;
                continue;
            }
            self.remember(window.block, page, page_len);
            let hash = encode_hash(page_hash(data));
            match runs.last_mut() {
                Some((start, hashes)) if *start + hashes.len() / hash.len() == index => {
                    hashes.extend_from_slice(&hash);
                }
                _ => runs.push((index, hash.to_vec())),
            }
        }
        let buffer = window.buffer.freeze();
        let block = &self.ram.blocks[window.block];
        for (start, hashes) in runs {
            let page = PageIndex(first + start as u64);
            let hash_offset = block.hashes_offset + page.0 * HASH_LEN;
            self.ram.file.buffered().write_all_at(&hashes, hash_offset)?;
            let pages = hashes.len() as u64 / HASH_LEN;
            let bytes = start * page_size..start * page_size + pages_len(pages, page_size);
            self.lane.submit(Transfer {
                direction: Direction::Write,
                file_offset: block.placed.page_offset(page).expect("a page of the block"),
                memory: Memory::Shared(buffer.clone(), bytes),
                tag: 0,
            })?;
        }
        Ok(())
    }

    fn remember(&mut self, block: usize, page: PageIndex, page_len: u64) {
        let block = &self.ram.blocks[block];
        block.data.set(page);
        self.counts.written_bytes += page_len;
        if block.written.set(page) {
            self.counts.rewritten_bytes += page_len;
        }
    }

    /// Makes a page zero that may have had data.
    fn forget(&self, block: usize, page: PageIndex) -> io::Result<()> {
        let block = &self.ram.blocks[block];
        if !block.data.clear(page) {
            return Ok(());
        }
        let offset = block.hashes_offset + page.0 * HASH_LEN;
        self.ram.file.buffered().write_all_at(&NO_HASH, offset)
    }
}

impl Window {
    fn is(&self, block: usize, number: u64) -> bool {
        self.block == block && self.number == number
    }

    fn has(&self, index: usize) -> bool {
        self.present[index / 64] & (1 << (index % 64)) != 0
    }
}

fn pages_len(pages: u64, page_size: usize) -> usize {
    usize::try_from(pages).expect("256 at most") * page_size
}
