//! Pages that come in any order, and come again: each to its place in the file.
//!
//! The pages of one window, a MiB of a block, are collected and written together, so that a stream
//! in the order of memory goes out as large writes. Pages that come many at once are read into a
//! buffer that was borrowed here, and go out from there. A page that comes again overwrites its place; one
//! that becomes zero loses its bit and its hash, and its place is emptied at the end.

use std::collections::HashMap;
use std::io;
use std::ops::{AddAssign, Range};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use vmfile_engine::{
    DataFile, Direction, Memory, PooledBuffer, Transfer, is_zero, page_hash, punch_hole,
};
use vmfile_format::manifest::{HASH_LEN, encode_hash};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex};

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

/// Windows that may be in flight before a writer waits for all of them. Each takes 48 bytes to
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
    let zeros = vec![0; usize::try_from(WINDOW_LEN).expect("a window")];
    for piece in pieces(range, WINDOW_LEN) {
        let len = usize::try_from(piece.end - piece.start).expect("a window");
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
    /// Pages whose transfers may be in flight, by block and window.
    in_flight: HashMap<(usize, u64), [u64; WINDOW_WORDS]>,
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

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.written_bytes += other.written_bytes;
        self.rewritten_bytes += other.rewritten_bytes;
    }
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
    /// Takes `lane`, which leads to the file of `ram`.
    pub(crate) fn new(ram: &'a ReceivedRam, lane: Lane) -> PageWriter<'a> {
        let (open, in_flight, counts) = (None, HashMap::new(), Counts::default());
        PageWriter { ram, lane, open, in_flight, counts }
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

    /// Lends a buffer of a window's length.
    pub(crate) fn buffer(&mut self) -> io::Result<PooledBuffer> {
        self.lane.buffer()
    }

    /// Takes `pages`, in ascending order and each once, whose data stand one after another in
    /// `buffer`.
    pub(crate) fn pages(
        &mut self,
        block: usize,
        pages: &[PageIndex],
        buffer: PooledBuffer,
    ) -> io::Result<()> {
        let places: Vec<(usize, PageIndex)> = pages.iter().copied().enumerate().collect();
        self.write(block, &places, buffer)
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
        let page_len = self.ram.blocks[window.block].placed.block.page_size().bytes();
        let pages = WINDOW_LEN / page_len;
        let first = window.number * pages;
        let all = (0..).zip(first..first + pages).map(|(index, page)| (index, PageIndex(page)));
        let places: Vec<_> = all.filter(|&(index, _)| window.has(index)).collect();
        self.write(window.block, &places, window.buffer)
    }

    /// Writes pages of a block in ascending order, each with its place in `buffer`, in pages.
    fn write(
        &mut self,
        block: usize,
        places: &[(usize, PageIndex)],
        buffer: PooledBuffer,
    ) -> io::Result<()> {
        self.await_earlier(block, places)?;
        let page_len = self.ram.blocks[block].placed.block.page_size().bytes();
        let page_size = usize::try_from(page_len).expect("64 KiB at most");
        let mut runs: Vec<Run> = Vec::new();
        for &(index, page) in places {
            let data = &buffer[index * page_size..(index + 1) * page_size];
            if is_zero(data) {
                self.forget(block, page)?;
                continue;
            }
            self.remember(block, page, page_len);
            let hash = encode_hash(page_hash(data));
            match runs.last_mut().filter(|run| run.goes_on_with(index, page)) {
                Some(run) => run.hashes.extend_from_slice(&hash),
                None => runs.push(Run { index, page, hashes: hash.to_vec() }),
            }
        }
        let buffer = buffer.freeze();
        let block = &self.ram.blocks[block];
        for run in runs {
            let hash_offset = block.hashes_offset + run.page.0 * HASH_LEN;
            self.ram.file.buffered().write_all_at(&run.hashes, hash_offset)?;
            let bytes = run.index * page_size..(run.index + run.pages()) * page_size;
            self.lane.submit(Transfer {
                direction: Direction::Write,
                file_offset: block.placed.page_offset(run.page).expect("a page of the block"),
                memory: Memory::Shared(buffer.clone(), bytes),
                tag: 0,
            })?;
        }
        Ok(())
    }

    /// Waits if one of these pages is in flight: the kernel takes two writes to one place in any
    /// order.
    fn await_earlier(&mut self, block: usize, places: &[(usize, PageIndex)]) -> io::Result<()> {
        let key = |writer: &PageWriter<'_>, page| {
            let slot = writer.slot(block, page);
            ((block, slot.window), slot.index / 64, 1 << (slot.index % 64))
        };
        let is_in_flight = places.iter().any(|&(_, page)| {
            let (window, word, bit) = key(self, page);
            self.in_flight.get(&window).is_some_and(|words| words[word] & bit != 0)
        });
        if is_in_flight || self.in_flight.len() >= IN_FLIGHT_MAX {
            self.in_flight.clear();
            self.lane.drain()?;
        }
        for &(_, page) in places {
            let (window, word, bit) = key(self, page);
            self.in_flight.entry(window).or_default()[word] |= bit;
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

/// Pages that follow one another in a buffer and in a block.
#[derive(Debug)]
struct Run {
    /// Where they begin in the buffer, in pages.
    index: usize,
    page: PageIndex,
    hashes: Vec<u8>,
}

impl Run {
    fn pages(&self) -> usize {
        self.hashes.len() / NO_HASH.len()
    }

    fn goes_on_with(&self, index: usize, page: PageIndex) -> bool {
        let pages = self.pages();
        self.index + pages == index && self.page.0 + pages as u64 == page.0
    }
}
