//! Writes RAM into the file: copies it, tests it for zeros, hashes it, and writes each page to its
//! place.
//!
//! Workers take units of 16 MiB from a shared counter, in the order of the file. Each page is
//! copied once, and the copy is tested for zeros and hashed while it is in the processor's cache.
//! The copy is what is written: whatever another process does to the memory meanwhile, the bytes in
//! the file are those that were hashed. Runs of data go out as large writes; the hashes of a unit
//! follow as one.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use vmfile_engine::{BackendInUse, Direction, Memory, SharedBuffer, Transfer};
use vmfile_format::manifest::HASH_LEN;
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex};

use crate::control::{Control, Meter};
use crate::draft::FileLayout;
use crate::error::PagesError;
use crate::lane::{Lane, Workers};
use crate::memory::PageSource;
use crate::plan::{UNIT_LEN, Unit, Units, WINDOW_LEN, in_window, pieces};
use crate::protected_ram::ProtectedRam;
use crate::runs::PageRuns;

/// What was written.
#[derive(Debug)]
pub struct Written {
    /// The pages of each block that have data.
    pub bitmaps: Vec<PageBitmap>,
    /// How many bytes the pages with data have.
    pub data_bytes: u64,
    /// The back end that wrote them.
    pub backend: BackendInUse,
}

/// Writes the data of all blocks of `source` to their `places` by `workers`, whose lanes lead to
/// the file; `total_bytes` is how much there may be, for the progress.
///
/// # Errors
///
/// Returns the first [`PagesError`] that any worker met, after all of them have stopped.
pub fn write_ram(
    workers: Workers,
    places: &FileLayout,
    source: &dyn PageSource,
    total_bytes: u64,
    control: &Control<'_>,
) -> Result<Written, PagesError> {
    let order = Order { unit_len: UNIT_LEN, urgent: &|| None };
    write(workers, places, (source, &order), total_bytes, control)
}

/// As [`write_ram`], for the RAM of a process that runs: what its threads wait for goes first.
///
/// # Errors
///
/// As for [`write_ram`].
pub fn write_protected_ram(
    workers: Workers,
    places: &FileLayout,
    source: &ProtectedRam<'_>,
    total_bytes: u64,
    control: &Control<'_>,
) -> Result<Written, PagesError> {
    // A window copied aside keeps a buffer until its unit is written.
    let order = Order { unit_len: WINDOW_LEN, urgent: &|| source.urgent() };
    write(workers, places, (source, &order), total_bytes, control)
}

/// In which order units are written.
struct Order<'a> {
    unit_len: u64,
    /// Returns a unit that goes before all others: the block's number, and a byte of it.
    urgent: &'a (dyn Fn() -> Option<(usize, u64)> + Sync),
}

fn write(
    workers: Workers,
    places: &FileLayout,
    (source, order): (&dyn PageSource, &Order<'_>),
    total_bytes: u64,
    control: &Control<'_>,
) -> Result<Written, PagesError> {
    let blocks = places.blocks();
    let bitmap = |placed: &PlacedBlock| Mutex::new(PageBitmap::new(placed.block.page_count()));
    let lens = blocks.iter().map(|placed| placed.block.used_length());
    let units = Units::new(lens, order.unit_len);
    let shared = Shared {
        places,
        source,
        order,
        units: &units,
        bitmaps: blocks.iter().map(bitmap).collect(),
        meter: Meter::new(control, total_bytes),
        control,
    };
    let part = |lane| Worker { shared: &shared, lane }.units();
    let (_, backend) = workers.drive(&units, part, failed)?;
    // `total_bytes` may count pages that turned out to be zero.
    shared.meter.finish();
    let bitmap = |bitmap: Mutex<_>| bitmap.into_inner().unwrap_or_else(PoisonError::into_inner);
    let bitmaps: Vec<PageBitmap> = shared.bitmaps.into_iter().map(bitmap).collect();
    let data_bytes = places.data_bytes(&bitmaps);
    Ok(Written { bitmaps, data_bytes, backend })
}

fn failed(source: io::Error) -> PagesError {
    PagesError::WriteFile { what: "guest RAM", source }
}

/// What all workers share.
struct Shared<'a> {
    places: &'a FileLayout,
    source: &'a dyn PageSource,
    order: &'a Order<'a>,
    units: &'a Units,
    bitmaps: Vec<Mutex<PageBitmap>>,
    meter: Meter<'a>,
    control: &'a Control<'a>,
}

struct Worker<'a> {
    shared: &'a Shared<'a>,
    lane: Lane,
}

impl Worker<'_> {
    fn units(mut self) -> Result<(), PagesError> {
        let shared = self.shared;
        while let Some(unit) = shared.next_unit()? {
            if shared.control.is_stopped() {
                return Err(PagesError::Stopped);
            }
            let done_bytes = self.unit(&unit)?;
            shared.meter.add(done_bytes);
        }
        self.lane.drain().map_err(failed)
    }

    /// Writes a unit; returns how many bytes of data it has.
    fn unit(&mut self, unit: &Unit) -> Result<u64, PagesError> {
        let mut pages = UnitPages::new(unit, &self.shared.places.blocks()[unit.block]);
        for window in pieces(unit.range.clone(), WINDOW_LEN) {
            self.window(unit.block, &window, &mut pages)?;
        }
        if pages.data > 0 {
            self.hashes(unit.block, &pages)?;
        }
        let bitmap = &self.shared.bitmaps[unit.block];
        let mut bitmap = bitmap.lock().unwrap_or_else(PoisonError::into_inner);
        bitmap.replace_words(PageIndex(pages.first), &pages.words);
        Ok(pages.data * pages.page_len)
    }

    /// Copies a window into a buffer, tests and hashes its pages there, and writes those with data.
    fn window(
        &mut self,
        block: usize,
        window: &Range<u64>,
        pages: &mut UnitPages,
    ) -> Result<(), PagesError> {
        let shared = self.shared;
        let mut buffer = self.lane.buffer().map_err(failed)?;
        let len = in_window(window.end - window.start);
        let read = shared.source.read(block, window, &mut buffer[..len]);
        if !read.map_err(|source| shared.read_error(block, window, source))? {
            return Ok(());
        }
        let runs = pages.look(window.start, &buffer[..len]);
        let buffer: SharedBuffer = buffer.freeze();
        let pages_offset = shared.places.blocks()[block].pages_offset;
        for run in runs.runs() {
            let file_offset = pages_offset + run.first * pages.page_len;
            self.submit(file_offset, Memory::Shared(buffer.clone(), runs.bytes(&run.slots)))?;
        }
        Ok(())
    }

    fn hashes(&mut self, block: usize, pages: &UnitPages) -> Result<(), PagesError> {
        // The table ends in zeros up to a multiple of 4096 bytes: whole pages of hashes.
        let len = pages.hashes.len().next_multiple_of(4096);
        let mut buffer = self.lane.table().map_err(failed)?;
        let (hashes, rest) = buffer[..len].split_at_mut(pages.hashes.len());
        hashes.copy_from_slice(&pages.hashes);
        rest.fill(0);
        let memory = Memory::Shared(buffer.freeze(), 0..len);
        self.submit(self.shared.places.hashes()[block] + pages.first * HASH_LEN, memory)
    }

    fn submit(&mut self, file_offset: u64, memory: Memory) -> Result<(), PagesError> {
        let transfer = Transfer { direction: Direction::Write, file_offset, memory, tag: 0 };
        self.lane.submit(transfer).map_err(failed)
    }
}

impl Shared<'_> {
    fn next_unit(&self) -> Result<Option<Unit>, PagesError> {
        while let Some((block, offset)) = (self.order.urgent)() {
            let unit = self.units.take_at(block, offset);
            if unit.is_some() {
                return Ok(unit);
            }
        }
        self.units.take(|block, range| {
            let found = self.source.first_data(block, &range);
            found.map_err(|source| self.read_error(block, &range, source))
        })
    }

    fn read_error(&self, block: usize, range: &Range<u64>, source: io::Error) -> PagesError {
        PagesError::ReadRam {
            block: self.places.blocks()[block].block.name().to_owned(),
            block_offset: range.start,
            len: range.end - range.start,
            source,
        }
    }
}

/// What is known of a unit's pages so far.
#[derive(Debug)]
struct UnitPages {
    page_len: u64,
    /// The index in the block of the unit's first page.
    first: u64,
    words: Vec<u64>,
    hashes: Vec<u8>,
    /// How many pages have data.
    data: u64,
}

impl UnitPages {
    fn new(unit: &Unit, placed: &PlacedBlock) -> UnitPages {
        let page_len = placed.block.page_size().bytes();
        let pages = (unit.range.end - unit.range.start).div_ceil(page_len);
        UnitPages {
            page_len,
            first: unit.range.start / page_len,
            words: vec![0; in_window(pages.div_ceil(64))],
            hashes: vec![0; in_window(pages * HASH_LEN)],
            data: 0,
        }
    }

    /// Tests and hashes the pages of a window that begins at `start` in the block.
    fn look(&mut self, start: u64, bytes: &[u8]) -> PageRuns {
        let page_len = in_window(self.page_len);
        let first = start / self.page_len;
        let mut runs = PageRuns::new(page_len, bytes.len() / page_len);
        for ((slot, page), bytes) in (first..).enumerate().zip(bytes.chunks(page_len)) {
            // What lies between two pages with data was copied as well, and is zero.
            if runs.look((slot, page), bytes, |_| true) {
                let index = page - self.first;
                self.words[in_window(index / 64)] |= 1 << (index % 64);
                self.data += 1;
            }
        }
        let hashes = runs.hashes(0..bytes.len() / page_len);
        let at = in_window((first - self.first) * HASH_LEN);
        self.hashes[at..at + hashes.len()].copy_from_slice(hashes);
        runs
    }
}

#[cfg(test)]
mod tests {
    use vmfile_format::{PageSize, RamBlock};

    use super::*;

    #[test]
    fn the_pages_of_a_window_are_counted_from_the_start_of_the_unit() {
        for page_size in [4096, 16384] {
            let size = PageSize::new(page_size).unwrap();
            let block = RamBlock::new("ram".to_owned(), 2 * UNIT_LEN, size).unwrap();
            let placed =
                PlacedBlock { block, record_offset: 0, bitmap_offset: 64, pages_offset: 1 << 20 };
            let unit = Unit { block: 0, range: UNIT_LEN..2 * UNIT_LEN };
            let mut pages = UnitPages::new(&unit, &placed);
            let mut bytes = vec![0; in_window(WINDOW_LEN)];
            bytes[in_window(2 * page_size) + 9] = 1;
            let runs = pages.look(UNIT_LEN + WINDOW_LEN, &bytes);
            let first = (UNIT_LEN + WINDOW_LEN) / page_size;
            assert_eq!(runs.runs()[0].first, first + 2);
            assert_eq!(pages.data, 1);
            let bit = in_window(WINDOW_LEN / page_size) + 2;
            assert_eq!(pages.words[bit / 64], 1 << (bit % 64));
            assert_ne!(pages.hashes[bit * 16..(bit + 1) * 16], [0; 16]);
        }
    }
}
