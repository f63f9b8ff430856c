//! Writes pages that come in any order, and more than once, each to its place in the file.
//!
//! The pages of one window, two MiB of a block, are collected and written together, so that a
//! stream in the order of memory goes out as large writes. A caller that gets many pages at once
//! reads them into a buffer of the writer, and they are written from there. Short gaps of pages
//! without data between them are written as zeros (decision 14). A page that comes again overwrites
//! its place; one that becomes zero loses its bit and its hash, and its place is emptied at the
//! end.

use std::collections::HashMap;
use std::io;
use std::ops::{AddAssign, Range};

use vmfile_engine::{Direction, Memory, PooledBuffer, Transfer};
use vmfile_format::PageIndex;

use crate::lane::Lane;
use crate::plan::WINDOW_LEN;
use crate::received_ram::ReceivedRam;
use crate::runs::{Looked, PageRuns, Run};

/// The smallest page: two transfers in flight must not touch one 4096-byte page of the file.
pub const PAGE_LEN_MIN: u64 = 4096;

/// Words of the bitmap of a window.
const WINDOW_WORDS: usize = (WINDOW_LEN / PAGE_LEN_MIN / 64) as usize;

/// How many windows a writer remembers as in flight before it waits for all transfers. An entry
/// takes 80 bytes.
const IN_FLIGHT_MAX: usize = 1 << 16;

/// Writes the pages of one thread.
#[derive(Debug)]
pub struct PageWriter<'a> {
    ram: &'a ReceivedRam,
    lane: Lane,
    /// Whether this is the file's only writer: then no other one can write into a gap.
    is_alone: bool,
    open: Option<Window>,
    /// Pages whose transfers may be in flight, by block and window.
    in_flight: HashMap<(usize, u64), [u64; WINDOW_WORDS]>,
    counts: Counts,
}

/// How much a writer has written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Bytes of pages that were written; a page counts each time that it is written.
    pub written_bytes: u64,
    /// Bytes of pages whose places had been written before.
    pub rewritten_bytes: u64,
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
    /// Returns a writer by `lane`, which leads to the file of `ram`; `is_alone` says that it is the
    /// only writer.
    pub fn new(ram: &'a ReceivedRam, lane: Lane, is_alone: bool) -> PageWriter<'a> {
        let (open, in_flight, counts) = (None, HashMap::new(), Counts::default());
        PageWriter { ram, lane, is_alone, open, in_flight, counts }
    }

    /// Adds a page; `data` has the length of a page.
    pub fn page(&mut self, block: usize, page: PageIndex, data: &[u8]) -> io::Result<()> {
        let slot = self.slot(block, page);
        let window = self.window(block, slot.window)?;
        window.buffer[slot.start()..slot.start() + slot.page_len].copy_from_slice(data);
        window.present[slot.index / 64] |= 1 << (slot.index % 64);
        if slot.start() + slot.page_len == window.buffer.len() {
            self.close_window()?;
        }
        Ok(())
    }

    /// Returns a buffer of [`WINDOW_LEN`] bytes, for [`PageWriter::pages`].
    pub fn buffer(&mut self) -> io::Result<PooledBuffer> {
        self.lane.buffer()
    }

    /// Writes pages of a block in ascending order, each once, with its place in `buffer`, in pages.
    ///
    /// Where two pages are as far apart in `buffer` as in the block, the pages between them must be
    /// zero, and no other writer may have them in this round.
    pub fn pages(
        &mut self,
        block: usize,
        places: &[(usize, PageIndex)],
        buffer: PooledBuffer,
    ) -> io::Result<()> {
        self.write(block, places, buffer, true)
    }

    /// Adds a zero page.
    pub fn zero_page(&mut self, block: usize, page: PageIndex) -> io::Result<()> {
        let slot = self.slot(block, page);
        if let Some(window) = self.open.as_mut().filter(|window| window.is(block, slot.window)) {
            window.present[slot.index / 64] &= !(1 << (slot.index % 64));
        }
        self.ram.forget(block, page)
    }

    /// Drains, and returns the current bytes of a page.
    pub fn current(&mut self, block: usize, page: PageIndex) -> io::Result<Vec<u8>> {
        self.drain()?;
        let mut data = vec![0; self.slot(block, page).page_len];
        if self.ram.has_data(block, page) {
            self.ram.read(block, page, &mut data)?;
        }
        Ok(data)
    }

    /// Waits until everything that was added is in the file.
    pub fn drain(&mut self) -> io::Result<()> {
        self.close_window()?;
        self.in_flight.clear();
        self.lane.drain()
    }

    /// Returns how much was written so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn slot(&self, block: usize, page: PageIndex) -> Slot {
        let page_len = self.ram.page_len(block);
        let pages = WINDOW_LEN / page_len;
        let index = usize::try_from(page.0 % pages).expect("512 at most");
        let page_len = usize::try_from(page_len).expect("64 KiB at most");
        Slot { window: page.0 / pages, index, page_len }
    }

    /// Returns the window; if another one is open, writes that first.
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
        let pages = WINDOW_LEN / self.ram.page_len(window.block);
        let first = window.number * pages;
        let all = (0..).zip(first..first + pages).map(|(index, page)| (index, PageIndex(page)));
        let places: Vec<_> = all.filter(|&(index, _)| window.has(index)).collect();
        self.write(window.block, &places, window.buffer, self.is_alone)
    }

    /// Writes pages of a block, as [`PageWriter::pages`] takes them; gaps between them only if
    /// `bridges`.
    fn write(
        &mut self,
        block: usize,
        places: &[(usize, PageIndex)],
        mut buffer: PooledBuffer,
        bridges: bool,
    ) -> io::Result<()> {
        let page_len = self.ram.page_len(block);
        let page_size = usize::try_from(page_len).expect("64 KiB at most");
        let mut runs = PageRuns::new(page_size, buffer.len() / page_size, self.ram.key());
        let ram = self.ram;
        let may_bridge =
            |gap: Range<u64>| bridges && !gap.map(PageIndex).any(|page| ram.has_data(block, page));
        for &(slot, page) in places {
            let bytes = &buffer[slot * page_size..(slot + 1) * page_size];
            if runs.look((slot, page.0), bytes, |_| false, may_bridge) == Looked::Data {
                self.remember(block, page, page_len);
            } else {
                self.ram.forget(block, page)?;
            }
        }
        for gap in runs.gaps() {
            buffer[runs.bytes(gap)].fill(0);
        }
        self.await_earlier(block, runs.runs())?;
        let buffer = buffer.freeze();
        for run in runs.runs() {
            let first = PageIndex(run.first);
            self.ram.put_hashes(block, first, runs.hashes(run.slots.clone()))?;
            let offset = self.ram.placed(block).page_offset(first);
            self.lane.submit(Transfer {
                direction: Direction::Write,
                file_offset: offset.expect("a page of the block"),
                memory: Memory::Shared(buffer.clone(), runs.bytes(&run.slots)),
                tag: 0,
            })?;
        }
        Ok(())
    }

    /// Waits if a page of these runs is in flight: the kernel may do two writes to one place in
    /// either order.
    fn await_earlier(&mut self, block: usize, runs: &[Run]) -> io::Result<()> {
        let key = |writer: &PageWriter<'_>, page| {
            let slot = writer.slot(block, page);
            ((block, slot.window), slot.index / 64, 1 << (slot.index % 64))
        };
        let pages = || runs.iter().flat_map(|run| run.first..run.first + run.slots.len() as u64);
        let is_in_flight = pages().any(|page| {
            let (window, word, bit) = key(self, PageIndex(page));
            self.in_flight.get(&window).is_some_and(|words| words[word] & bit != 0)
        });
        if is_in_flight || self.in_flight.len() >= IN_FLIGHT_MAX {
            self.in_flight.clear();
            self.lane.drain()?;
        }
        for page in pages() {
            let (window, word, bit) = key(self, PageIndex(page));
            self.in_flight.entry(window).or_default()[word] |= bit;
        }
        Ok(())
    }

    fn remember(&mut self, block: usize, page: PageIndex, page_len: u64) {
        self.counts.written_bytes += page_len;
        if self.ram.remember(block, page) {
            self.counts.rewritten_bytes += page_len;
        }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use vmfile_engine::{Backend, DataFile, DirectIo};
    use vmfile_format::stream::configuration::Configuration;
    use vmfile_format::{PageSize, RamBlock, RamLayout};

    use super::*;
    use crate::draft::FileLayout;
    use crate::lane::on_lanes;

    const PAGES: u64 = WINDOW_LEN / PAGE_LEN_MIN;

    /// Writes `pages` of a block of one window, in this order; returns what the file holds at their
    /// places, a byte for each page, and how many pages of it are no holes.
    fn written(pages: &[u64], is_alone: bool) -> (Vec<u8>, u64) {
        let file = tempfile::tempfile().unwrap();
        let data_file = DataFile::new(file.try_clone().unwrap(), DirectIo::Off).unwrap();
        let block = RamBlock::new("ram".to_owned(), WINDOW_LEN, PageSize::KIB_4).unwrap();
        let ram = RamLayout::new(vec![block]).unwrap();
        let places = FileLayout::new(&Configuration::default(), ram, 1, 0).unwrap();
        let ram =
            ReceivedRam::new(data_file.clone(), places.blocks(), (places.hashes(), places.key()));
        let offset = places.blocks()[0].pages_offset;
        // The tables of hashes, which follow, are no part of what is counted.
        file.set_len(offset + 2 * WINDOW_LEN).unwrap();
        let work = |lane| {
            let mut writer = PageWriter::new(&ram, lane, is_alone);
            for &page in pages {
                writer.page(0, PageIndex(page), &[1; 4096]).unwrap();
            }
            writer.drain().unwrap();
        };
        on_lanes(&data_file, (Backend::Threads, 1), work).unwrap();
        let mut bytes = vec![0; usize::try_from(WINDOW_LEN).unwrap()];
        file.read_exact_at(&mut bytes, offset).unwrap();
        let blocks = file.metadata().unwrap().blocks();
        (bytes.chunks(4096).map(|page| page[4095]).collect(), blocks * 512 / 4096)
    }

    /// With every other page zero, each page was a write of its own: a save by stream took 28
    /// seconds, and as much data in one piece took 0.8, with the guest paused.
    #[test]
    fn short_gaps_are_written_by_a_writer_that_is_alone() {
        let every_other: Vec<u64> = (0..PAGES).step_by(2).collect();
        let (bytes, allocated) = written(&every_other, true);
        assert!(allocated >= PAGES - 1, "{allocated} pages");
        assert!((0..).zip(bytes).all(|(page, byte): (u64, u8)| byte == u8::from(page % 2 == 0)));
        // Another writer may have the page in the gap.
        let (_, allocated) = written(&every_other, false);
        assert!((PAGES / 2..PAGES * 3 / 4).contains(&allocated), "{allocated} pages");
    }

    #[test]
    fn a_page_that_came_before_those_beside_it_is_no_gap() {
        let (bytes, _) = written(&[5, PAGES - 1, 4, 6, PAGES - 1], true);
        assert_eq!(bytes[3..8], [0, 1, 1, 1, 0]);
    }

    /// Writes pages of a block, each list at once and in a buffer of its own; returns how many of
    /// the writes the writer has not waited for.
    fn not_awaited(lists: &[(usize, &[u64])]) -> usize {
        let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
        let block =
            |name: &str| RamBlock::new(name.to_owned(), 2 * WINDOW_LEN, PageSize::KIB_4).unwrap();
        let ram = RamLayout::new(vec![block("ram"), block("rom")]).unwrap();
        let places = FileLayout::new(&Configuration::default(), ram, 1, 0).unwrap();
        let ram = ReceivedRam::new(file.clone(), places.blocks(), (places.hashes(), places.key()));
        let work = |lane| {
            let mut writer = PageWriter::new(&ram, lane, false);
            for &(block, pages) in lists {
                let mut buffer = writer.buffer().unwrap();
                buffer.fill(1);
                let pages = pages.iter().map(|&page| PageIndex(page));
                let places: Vec<_> = (0..).zip(pages).collect();
                writer.pages(block, &places, buffer).unwrap();
            }
            let reaped = std::iter::from_fn(|| writer.lane.next_read().unwrap());
            reaped.count()
        };
        on_lanes(&file, (Backend::Threads, 1), work).unwrap().0[0]
    }

    /// The kernel may do two writes to one place in either order: the older page would stay.
    #[test]
    fn a_page_that_comes_again_waits_for_its_earlier_write() {
        assert_eq!(not_awaited(&[(0, &[5]), (0, &[5])]), 1);
        assert_eq!(not_awaited(&[(0, &[5]), (0, &[6]), (0, &[5])]), 1);
        for page in [3, 4, 5] {
            assert_eq!(not_awaited(&[(0, &[3, 4, 5]), (0, &[page])]), 1, "page {page}");
        }
        assert_eq!(not_awaited(&[(1, &[PAGES + 70]), (1, &[PAGES + 69, PAGES + 70])]), 1);
    }

    #[test]
    fn other_pages_do_not_wait() {
        for page in [2, 6, 64 + 3, PAGES + 3] {
            assert_eq!(not_awaited(&[(0, &[3, 4, 5]), (0, &[page])]), 2, "page {page}");
        }
        assert_eq!(not_awaited(&[(0, &[3]), (1, &[3])]), 2);
    }
}
