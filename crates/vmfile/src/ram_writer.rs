//! Guest RAM into the file: copied, tested for zeros, hashed, written where it belongs.
//!
//! Workers take units of 16 MiB from a shared counter, in the order of the file. Each page is copied
//! once, and the copy is looked at once, while it is in the cache: is it zero, and what is its hash. The
//! copy is what is written: whatever another process does to the memory meanwhile, the bytes in the file
//! are those that were hashed. Runs of data go out as large writes; the hashes of a unit follow as one.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use vmfile_engine::{BackendInUse, Direction, Memory, SharedBuffer, Transfer, is_zero, page_hash};
use vmfile_format::manifest::{HASH_LEN, encode_hash};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex};

use crate::control::{Control, Meter};
use crate::lane::{Lane, Workers};
use crate::plan::{BRIDGE_LEN, UNIT_LEN, Unit, Units, WINDOW_LEN, pieces};
use crate::source::process::BlockMemory;

/// Target pages of x86, the guests that the direct route knows.
pub(crate) const PAGE_LEN: u64 = 4096;
const PAGE: usize = 4096;
const UNIT_PAGES: usize = 4096;
const _: () = assert!(UNIT_PAGES as u64 * PAGE_LEN == UNIT_LEN);
/// The hashes of one unit, in bytes: they fit into one buffer.
const UNIT_HASHES: usize = UNIT_PAGES * 16;
const _: () = assert!(UNIT_HASHES as u64 == UNIT_PAGES as u64 * HASH_LEN);

/// Where one block's pages and hashes go, and where they come from.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) placed: PlacedBlock,
    pub(crate) hashes_offset: u64,
    pub(crate) memory: BlockMemory,
}

/// What was written.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) bitmaps: Vec<PageBitmap>,
    pub(crate) backend: BackendInUse,
}

/// Why RAM could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RamError {
    #[error("read {len} bytes of guest RAM at {block_offset:#x} of RAM block {block:?}")]
    Read { block: String, block_offset: u64, len: u64, source: io::Error },
    #[error("write guest RAM")]
    Write { source: io::Error },
    #[error("stopped")]
    Stopped,
}

/// Writes the data of all blocks by `workers`, whose lanes lead to the file; `total_bytes` is how much
/// there may be, for the progress.
///
/// # Errors
///
/// Returns the first [`RamError`] that any worker met, after all of them have stopped.
pub(crate) fn write_ram(
    workers: Workers,
    targets: &[Target],
    total_bytes: u64,
    control: &Control<'_>,
) -> Result<Written, RamError> {
    let bitmap = |target: &Target| Mutex::new(PageBitmap::new(target.placed.block.page_count()));
    let lens = targets.iter().map(|target| target.placed.block.used_length());
    let shared = Shared {
        targets,
        units: Units::new(lens, UNIT_LEN),
        bitmaps: targets.iter().map(bitmap).collect(),
        meter: Meter::new(control, total_bytes),
        control,
    };
    let work = |_, lane| shared.units.work(|| Worker { shared: &shared, lane }.units());
    let backend = workers.backend().clone();
    let results = workers.run(work).map_err(|source| RamError::Write { source })?;
    results.into_iter().collect::<Result<(), RamError>>()?;
    // Pages that were there and held nothing were part of the whole.
    shared.meter.finish();
    let bitmap = |bitmap: Mutex<_>| bitmap.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Written { bitmaps: shared.bitmaps.into_iter().map(bitmap).collect(), backend })
}

/// What all workers see.
#[derive(Debug)]
struct Shared<'a> {
    targets: &'a [Target],
    units: Units,
    bitmaps: Vec<Mutex<PageBitmap>>,
    meter: Meter<'a>,
    control: &'a Control<'a>,
}

#[derive(Debug)]
struct Worker<'a> {
    shared: &'a Shared<'a>,
    lane: Lane,
}

impl Worker<'_> {
    fn units(mut self) -> Result<(), RamError> {
        let shared = self.shared;
        let first = |block: usize, range: Range<u64>| {
            let target = &shared.targets[block];
            target.memory.first_data(&range).map_err(|source| target.read_error(&range, source))
        };
        while let Some(unit) = shared.units.take(first)? {
            if shared.control.is_stopped() {
                return Err(RamError::Stopped);
            }
            let done_bytes = self.unit(&unit)?;
            shared.meter.add(done_bytes);
        }
        self.lane.drain().map_err(|source| RamError::Write { source })
    }

    /// Writes a unit; returns how many bytes of data.
    fn unit(&mut self, unit: &Unit) -> Result<u64, RamError> {
        let target = &self.shared.targets[unit.block];
        let mut scan = Scan::new(unit.range.start);
        for window in pieces(unit.range.clone(), WINDOW_LEN) {
            self.window(target, &window, &mut scan)?;
        }
        if scan.pages_data > 0 {
            self.hashes(target, &scan)?;
        }
        let mut bitmap =
            self.shared.bitmaps[unit.block].lock().unwrap_or_else(PoisonError::into_inner);
        let words = in_window((unit.range.end - unit.range.start).div_ceil(PAGE_LEN * 64));
        bitmap.replace_words(PageIndex(unit.range.start / PAGE_LEN), &scan.words[..words]);
        Ok(scan.pages_data * PAGE_LEN)
    }

    /// Copies a window into a buffer of ours, looks at it there and writes its data.
    fn window(
        &mut self,
        target: &Target,
        window: &Range<u64>,
        scan: &mut Scan,
    ) -> Result<(), RamError> {
        let mut buffer = self.lane.buffer().map_err(|source| RamError::Write { source })?;
        let len = in_window(window.end - window.start);
        let read = target.memory.read(window, &mut buffer[..len]);
        if !read.map_err(|source| target.read_error(window, source))? {
            return Ok(());
        }
        let runs = scan.window(window.start, &buffer[..len]);
        let buffer: SharedBuffer = buffer.freeze();
        for run in runs {
            let file_offset = target.placed.pages_offset + window.start + run.start as u64;
            self.submit(file_offset, Memory::Shared(buffer.clone(), run))?;
        }
        Ok(())
    }

    fn hashes(&mut self, target: &Target, scan: &Scan) -> Result<(), RamError> {
        let first_page = scan.start / PAGE_LEN;
        let pages = target.placed.block.page_count().0 - first_page;
        // The table ends in zeros up to a multiple of 4096 bytes: whole pages of hashes.
        let len = (pages * HASH_LEN).next_multiple_of(PAGE_LEN);
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(UNIT_HASHES);
        let mut buffer = self.lane.buffer().map_err(|source| RamError::Write { source })?;
        buffer[..len].copy_from_slice(&scan.hashes[..len]);
        let memory = Memory::Shared(buffer.freeze(), 0..len);
        self.submit(target.hashes_offset + first_page * HASH_LEN, memory)
    }

    fn submit(&mut self, file_offset: u64, memory: Memory) -> Result<(), RamError> {
        let transfer = Transfer { direction: Direction::Write, file_offset, memory, tag: 0 };
        self.lane.submit(transfer).map_err(|source| RamError::Write { source })
    }
}

impl Target {
    fn read_error(&self, range: &Range<u64>, source: io::Error) -> RamError {
        RamError::Read {
            block: self.placed.block.name().to_owned(),
            block_offset: range.start,
            len: range.end - range.start,
            source,
        }
    }
}

/// What is known of a unit's pages so far.
#[derive(Debug)]
struct Scan {
    start: u64,
    words: Box<[u64; UNIT_PAGES / 64]>,
    hashes: Box<[u8; UNIT_HASHES]>,
    pages_data: u64,
}

impl Scan {
    fn new(start: u64) -> Scan {
        Scan {
            start,
            words: Box::new([0; UNIT_PAGES / 64]),
            hashes: Box::new([0; UNIT_HASHES]),
            pages_data: 0,
        }
    }

    /// Looks at the pages of a window that begins at `start` in the block; returns what is to be
    /// written: runs of data, and the gaps between them that are cheaper written than left out.
    fn window(&mut self, start: u64, bytes: &[u8]) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        let first = in_window((start - self.start) / PAGE_LEN);
        for (index, page) in bytes.chunks(PAGE).enumerate() {
            if !self.look(first + index, page) {
                continue;
            }
            let page = index * PAGE..(index + 1) * PAGE;
            match runs.last_mut() {
                Some(run) if (page.start - run.end) as u64 <= BRIDGE_LEN => run.end = page.end,
                _ => runs.push(page),
            }
        }
        runs
    }

    fn look(&mut self, index: usize, page: &[u8]) -> bool {
        if is_zero(page) {
            return false;
        }
        self.words[index / 64] |= 1 << (index % 64);
        let hash = encode_hash(page_hash(page));
        self.hashes[index * hash.len()..(index + 1) * hash.len()].copy_from_slice(&hash);
        self.pages_data += 1;
        true
    }
}

/// A length or an offset inside a window or a unit.
fn in_window(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a window")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest with every other page zero made a write of each page: the save ran at a sixth of the
    /// disk's speed, with the guest paused.
    #[test]
    fn short_gaps_of_zero_pages_are_written_and_long_ones_are_not() {
        let bridge = in_window(BRIDGE_LEN);
        let mut bytes = vec![0; in_window(WINDOW_LEN)];
        let after_gap = 3 * PAGE + bridge;
        let after_long_gap = after_gap + PAGE + bridge + PAGE;
        for start in [0, 2 * PAGE, after_gap, after_long_gap] {
            bytes[start + 9] = 1;
        }
        let mut scan = Scan::new(UNIT_LEN);
        let runs = scan.window(UNIT_LEN + WINDOW_LEN, &bytes);
        assert_eq!(runs, [0..after_gap + PAGE, after_long_gap..after_long_gap + PAGE]);
        assert_eq!(scan.pages_data, 4);
        let first = in_window(WINDOW_LEN / PAGE_LEN);
        let bit = |page: usize| scan.words[page / 64] >> (page % 64) & 1;
        assert_eq!([0, 1, 2, 3].map(|page| bit(first + page)), [1, 0, 1, 0]);
    }
}
