//! Guest RAM into the file: read or mapped, tested for zeros, hashed, written where it belongs.
//!
//! Workers take units of 16 MiB from a shared counter, in the order of the file. Each page is
//! looked at once, while it is in the cache: is it zero, and what is its hash. Runs of data go out
//! as large writes; the hashes of a unit follow as one.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use vmfile_engine::{
    Backend, BackendInUse, DataFile, Direction, Memory, ProcessMemory, Region, SharedBuffer,
    Transfer, is_zero, page_hash,
};
use vmfile_format::manifest::{HASH_LEN, encode_hash};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex};

use crate::control::{Control, Progress};
use crate::lane::{Lane, on_lanes};
use crate::plan::{UNIT_LEN, Unit, WINDOW_LEN, pieces};

/// Target pages of x86, the guests that the direct route knows.
pub(crate) const PAGE_LEN: u64 = 4096;
const PAGE: usize = 4096;
const UNIT_PAGES: usize = 4096;
const _: () = assert!(UNIT_PAGES as u64 * PAGE_LEN == UNIT_LEN);
/// The hashes of one unit, in bytes: they fit into one buffer.
const UNIT_HASHES: usize = UNIT_PAGES * 16;
const _: () = assert!(UNIT_HASHES as u64 == UNIT_PAGES as u64 * HASH_LEN);

/// How the bytes of one block are read.
#[derive(Clone, Debug)]
pub(crate) enum Reader {
    /// The block's memory is mapped here as well: written from where it lies.
    Region(Arc<Region>),
    /// The block lies in another process, from this address on: copied.
    Process(Arc<ProcessMemory>, u64),
    /// The block lies in a file that is better read than mapped, from this offset on: copied.
    File(Arc<File>, u64),
}

/// Where one block's pages and hashes go.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) placed: PlacedBlock,
    pub(crate) hashes_offset: u64,
    pub(crate) reader: Reader,
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
    Read { block: String, block_offset: u64, len: usize, source: io::Error },
    #[error("write guest RAM")]
    Write { source: io::Error },
    #[error("stopped")]
    Stopped,
}

/// Writes the data of all blocks; what lies outside `units` is known to be zero.
///
/// # Errors
///
/// Returns the first [`RamError`] that any worker met, after all of them have stopped.
pub(crate) fn write_ram(
    file: &DataFile,
    targets: &[Target],
    units: &[Unit],
    width: (Backend, usize),
    control: &Control<'_>,
) -> Result<Written, RamError> {
    let total_bytes = units.iter().flat_map(|unit| &unit.ranges).map(|r| r.end - r.start).sum();
    let shared = Shared {
        targets,
        units,
        next: AtomicUsize::new(0),
        done: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        total_bytes,
        control,
    };
    let (results, backend) = on_lanes(file, width, |lane| Worker::new(&shared, lane).run())
        .map_err(|source| RamError::Write { source })?;
    let mut bitmaps: Vec<PageBitmap> =
        targets.iter().map(|target| PageBitmap::new(target.placed.block.page_count())).collect();
    for result in results {
        for unit in result? {
            let first = unit.start / PAGE_LEN;
            let bitmap = &mut bitmaps[unit.block];
            let room = bitmap.page_count().0.saturating_sub(first).div_ceil(64);
            let words =
                &unit.words[..unit.words.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
            bitmap.replace_words(PageIndex(first), words);
        }
    }
    Ok(Written { bitmaps, backend })
}

/// What all workers see.
#[derive(Debug)]
struct Shared<'a> {
    targets: &'a [Target],
    units: &'a [Unit],
    next: AtomicUsize,
    done: AtomicU64,
    failed: AtomicBool,
    total_bytes: u64,
    control: &'a Control<'a>,
}

/// What became of one unit.
#[derive(Debug)]
struct UnitDone {
    block: usize,
    start: u64,
    words: Box<[u64; UNIT_PAGES / 64]>,
}

#[derive(Debug)]
struct Worker<'a> {
    shared: &'a Shared<'a>,
    lane: Lane,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared<'a>, lane: Lane) -> Worker<'a> {
        Worker { shared, lane }
    }

    fn run(mut self) -> Result<Vec<UnitDone>, RamError> {
        let result = self.units();
        if result.is_err() {
            self.shared.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    fn units(&mut self) -> Result<Vec<UnitDone>, RamError> {
        let mut results = Vec::new();
        while !self.shared.failed.load(Ordering::Relaxed) {
            if self.shared.control.is_stopped() {
                return Err(RamError::Stopped);
            }
            let index = self.shared.next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = self.shared.units.get(index) else { break };
            results.push(self.unit(unit)?);
            let len: u64 = unit.ranges.iter().map(|range| range.end - range.start).sum();
            let done_bytes = self.shared.done.fetch_add(len, Ordering::Relaxed) + len;
            let total_bytes = self.shared.total_bytes;
            self.shared.control.report(Progress { done_bytes, total_bytes });
        }
        self.lane.drain().map_err(|source| RamError::Write { source })?;
        Ok(results)
    }

    fn unit(&mut self, unit: &Unit) -> Result<UnitDone, RamError> {
        let target = &self.shared.targets[unit.block];
        let mut scan = Scan::new(unit.start);
        for window in unit.ranges.iter().flat_map(|range| pieces(range.clone(), WINDOW_LEN)) {
            let runs = match &target.reader {
                Reader::Region(region) => self.region_window(target, region, window, &mut scan),
                Reader::Process(..) | Reader::File(..) => {
                    self.copied_window(target, window, &mut scan)
                }
            };
            runs?;
        }
        if scan.has_data {
            self.hashes(target, &scan)?;
        }
        Ok(UnitDone { block: unit.block, start: unit.start, words: scan.words })
    }

    /// Looks at a window that is mapped here and writes its data from where it lies.
    fn region_window(
        &mut self,
        target: &Target,
        region: &Arc<Region>,
        window: Range<u64>,
        scan: &mut Scan,
    ) -> Result<(), RamError> {
        let mut page = [0; PAGE];
        let runs = scan.window(window, |block_offset, look| {
            region.load(block_offset, &mut page);
            look(&page);
        });
        for run in runs {
            let memory = Memory::Region(Arc::clone(region), run.clone());
            self.write(target, run.start, memory)?;
        }
        Ok(())
    }

    /// Copies a window into a buffer of ours, looks at it there and writes its data.
    fn copied_window(
        &mut self,
        target: &Target,
        window: Range<u64>,
        scan: &mut Scan,
    ) -> Result<(), RamError> {
        let mut buffer = self.lane.buffer().map_err(|source| RamError::Write { source })?;
        let len = in_window(window.end - window.start);
        let read = match &target.reader {
            Reader::Process(process, address) => {
                process.read(address + window.start, &mut buffer[..len])
            }
            Reader::File(file, offset) => {
                file.read_exact_at(&mut buffer[..len], offset + window.start)
            }
            Reader::Region(_) => unreachable!("mapped windows are not copied"),
        };
        read.map_err(|source| RamError::Read {
            block: target.placed.block.name().to_owned(),
            block_offset: window.start,
            len,
            source,
        })?;
        let first = window.start;
        let runs = scan.window(window, |block_offset, look| {
            let start = in_window(block_offset - first);
            look(&buffer[start..start + PAGE]);
        });
        let buffer: SharedBuffer = buffer.freeze();
        for run in runs {
            let range = in_window(run.start - first)..in_window(run.end - first);
            self.write(target, run.start, Memory::Shared(buffer.clone(), range))?;
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

    fn write(
        &mut self,
        target: &Target,
        block_offset: u64,
        memory: Memory,
    ) -> Result<(), RamError> {
        self.submit(target.placed.pages_offset + block_offset, memory)
    }

    fn submit(&mut self, file_offset: u64, memory: Memory) -> Result<(), RamError> {
        let transfer = Transfer { direction: Direction::Write, file_offset, memory, tag: 0 };
        self.lane.submit(transfer).map_err(|source| RamError::Write { source })
    }
}

/// What is known of a unit's pages so far.
#[derive(Debug)]
struct Scan {
    start: u64,
    words: Box<[u64; UNIT_PAGES / 64]>,
    hashes: Box<[u8; UNIT_HASHES]>,
    has_data: bool,
}

impl Scan {
    fn new(start: u64) -> Scan {
        Scan {
            start,
            words: Box::new([0; UNIT_PAGES / 64]),
            hashes: Box::new([0; UNIT_HASHES]),
            has_data: false,
        }
    }

    /// Looks at the pages of `window`, a range of bytes of the block; returns the runs of data.
    ///
    /// `show` hands each page at its offset to the function that it is given.
    fn window(
        &mut self,
        window: Range<u64>,
        mut show: impl FnMut(u64, &mut dyn FnMut(&[u8])),
    ) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for page in pieces(window, PAGE_LEN) {
            let mut has_data = false;
            show(page.start, &mut |bytes| has_data = self.look(page.start, bytes));
            if has_data {
                match runs.last_mut() {
                    Some(run) if run.end == page.start => run.end = page.end,
                    _ => runs.push(page),
                }
            }
        }
        runs
    }

    fn look(&mut self, block_offset: u64, page: &[u8]) -> bool {
        if is_zero(page) {
            return false;
        }
        let index = usize::try_from((block_offset - self.start) / PAGE_LEN).expect("in the unit");
        self.words[index / 64] |= 1 << (index % 64);
        let hash = encode_hash(page_hash(page));
        self.hashes[index * hash.len()..(index + 1) * hash.len()].copy_from_slice(&hash);
        self.has_data = true;
        true
    }
}

/// A length or an offset inside a window.
fn in_window(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a window")
}
