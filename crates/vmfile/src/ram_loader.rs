//! Pages of a file into the RAM of another process.
//!
//! The destination has not run yet. Its memory is zero where nothing touched it; where the file has
//! a zero page and the destination has bytes (firmware it loaded itself, a file that was used
//! before), zeros are written. Every page that is read is compared with its hash.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use vmfile_engine::{
    Backend, BackendInUse, DataFile, Direction, Memory, PooledBuffer, ProcessMemory, Region,
    Transfer,
};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex};

use crate::control::{Control, Progress};
use crate::lane::{Lane, on_lanes};
use crate::page_hashes::PageHashes;
use crate::plan::{Unit, WINDOW_LEN, pieces, units};
use crate::ranges;
use crate::snapshot::{Snapshot, SnapshotError};

/// Where the bytes of one block go.
#[derive(Clone, Debug)]
pub(crate) enum Writer {
    /// The block's memory is mapped here as well: read into where it lies.
    Region(Arc<Region>),
    /// The block is shared memory, from this offset of its file on: copied, which makes its pages
    /// without zeroing and mapping each of them first, and costs half of reading into a mapping
    /// (Linux 6.18).
    File(Arc<File>, u64),
    /// The block lies in another process, from this address on: copied.
    Process(Arc<ProcessMemory>, u64),
}

/// One block to load.
#[derive(Debug)]
pub(crate) struct LoadTarget {
    /// The block's number in the file.
    pub(crate) block: usize,
    pub(crate) placed: PlacedBlock,
    pub(crate) bitmap: PageBitmap,
    pub(crate) writer: Writer,
    /// Byte ranges of the destination's block that may not be zero.
    pub(crate) touched: Vec<Range<u64>>,
}

/// Why RAM could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("read guest RAM from the file")]
    Read(#[source] io::Error),
    /// A page is not what was written, or its hash could not be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The destination's memory could not be written.
    #[error("write {len} bytes of guest RAM at {block_offset:#x} of RAM block {block:?}")]
    Write {
        /// The block.
        block: String,
        /// Offset in the block, in bytes.
        block_offset: u64,
        /// How much, in bytes.
        len: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The caller stopped it.
    #[error("stopped")]
    Stopped,
}

/// Loads all pages with data, and zeros over what must be zero; returns the bytes that were read
/// and the back end.
///
/// # Errors
///
/// Returns the first [`LoadError`] that any worker met.
pub(crate) fn load_ram(
    (snapshot, file): (&Snapshot, &DataFile),
    targets: &[LoadTarget],
    width: (Backend, usize),
    control: &Control<'_>,
) -> Result<(u64, BackendInUse), LoadError> {
    let data: Vec<_> = targets.iter().map(data_ranges).collect();
    let units = units(&data);
    let total_bytes = crate::plan::total_len(&data);
    let loader = Loader {
        snapshot,
        targets,
        units: &units,
        next: AtomicUsize::new(0),
        done: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        total_bytes,
        control,
    };
    for target in targets {
        loader.clear_stale(target)?;
    }
    let (results, backend) =
        on_lanes(file, width, |lane| loader.work(lane)).map_err(LoadError::Read)?;
    results.into_iter().collect::<Result<(), LoadError>>()?;
    Ok((total_bytes, backend))
}

/// Returns the byte ranges of the block whose pages are in the file.
fn data_ranges(target: &LoadTarget) -> Vec<Range<u64>> {
    let page = target.placed.block.page_size().bytes();
    target.bitmap.data_runs().map(|run| run.start.0 * page..run.end.0 * page).collect()
}

struct Loader<'a> {
    snapshot: &'a Snapshot,
    targets: &'a [LoadTarget],
    units: &'a [Unit],
    next: AtomicUsize,
    done: AtomicU64,
    failed: AtomicBool,
    total_bytes: u64,
    control: &'a Control<'a>,
}

impl Loader<'_> {
    fn work(&self, lane: Lane) -> Result<(), LoadError> {
        let result = self.units(lane);
        if result.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    fn units(&self, mut lane: Lane) -> Result<(), LoadError> {
        let mut hashes = PageHashes::new(self.snapshot);
        while !self.failed.load(Ordering::Relaxed) {
            if self.control.is_stopped() {
                return Err(LoadError::Stopped);
            }
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = self.units.get(index) else { break };
            let windows = unit.ranges.iter().flat_map(|range| pieces(range.clone(), WINDOW_LEN));
            for window in windows {
                self.submit(&mut lane, &mut hashes, unit.block, window)?;
            }
            let len: u64 = unit.ranges.iter().map(|range| range.end - range.start).sum();
            let done_bytes = self.done.fetch_add(len, Ordering::Relaxed) + len;
            self.control.report(Progress { done_bytes, total_bytes: self.total_bytes });
        }
        while self.complete_one(&mut lane, &mut hashes)?.is_some() {}
        Ok(())
    }

    fn submit(
        &self,
        lane: &mut Lane,
        hashes: &mut PageHashes<'_>,
        block: usize,
        window: Range<u64>,
    ) -> Result<(), LoadError> {
        while !lane.has_room() {
            self.complete_one(lane, hashes)?;
        }
        let target = &self.targets[block];
        let len = usize::try_from(window.end - window.start).expect("a window");
        let memory = match &target.writer {
            Writer::Region(region) => Memory::Region(Arc::clone(region), window.clone()),
            Writer::File(..) | Writer::Process(..) => {
                Memory::Owned(self.buffer(lane, hashes)?, 0..len)
            }
        };
        let file_offset = target.placed.pages_offset + window.start;
        let direction = Direction::Read;
        // The completion says which block: its offset says the rest.
        let transfer = Transfer { direction, file_offset, memory, tag: block as u64 };
        lane.submit(transfer).map_err(LoadError::Read)
    }

    /// Returns a free buffer, after completing reads that hold all of them.
    fn buffer(
        &self,
        lane: &mut Lane,
        hashes: &mut PageHashes<'_>,
    ) -> Result<PooledBuffer, LoadError> {
        loop {
            if let Some(buffer) = lane.free_buffer() {
                return Ok(buffer);
            }
            let completed = self.complete_one(lane, hashes)?;
            assert!(completed.is_some(), "a buffer is free or in flight");
        }
    }

    /// Waits for one read, verifies its pages and hands their bytes on; `None` if nothing is in flight.
    fn complete_one(
        &self,
        lane: &mut Lane,
        hashes: &mut PageHashes<'_>,
    ) -> Result<Option<()>, LoadError> {
        let Some(completion) = lane.next_read().map_err(LoadError::Read)? else { return Ok(None) };
        completion.result.map_err(LoadError::Read)?;
        let transfer = completion.transfer;
        let target = &self.targets[usize::try_from(transfer.tag).expect("a block's number")];
        let page_len = target.placed.block.page_size().bytes();
        let block_offset = transfer.file_offset - target.placed.pages_offset;
        match transfer.memory {
            Memory::Owned(buffer, range) => {
                let first = PageIndex(block_offset / page_len);
                hashes.verify(target.block, &target.bitmap, first, &buffer[range.clone()])?;
                target.copy(block_offset, &buffer[range])?;
            }
            Memory::Region(region, range) => {
                let mut page = vec![0; usize::try_from(page_len).expect("64 KiB at most")];
                for offset in pieces(range, page_len).map(|piece| piece.start) {
                    region.load(offset, &mut page);
                    hashes.verify_page(target.block, PageIndex(offset / page_len), &page)?;
                }
            }
            Memory::Shared(..) => unreachable!("reads go into memory that may be written"),
        }
        Ok(Some(()))
    }

    /// Writes zeros where the destination has bytes and the file has a zero page.
    fn clear_stale(&self, target: &LoadTarget) -> Result<(), LoadError> {
        let zeros = vec![0; usize::try_from(WINDOW_LEN).expect("a window")];
        for stale in ranges::subtract(&target.touched, &data_ranges(target)) {
            for piece in pieces(stale, WINDOW_LEN) {
                let len = usize::try_from(piece.end - piece.start).expect("a window");
                target.copy(piece.start, &zeros[..len])?;
            }
        }
        Ok(())
    }
}

impl LoadTarget {
    /// Copies `bytes` to where the block has them.
    fn copy(&self, block_offset: u64, bytes: &[u8]) -> Result<(), LoadError> {
        let copied = match &self.writer {
            Writer::Region(region) => {
                region.store(block_offset, bytes);
                Ok(())
            }
            Writer::File(file, offset) => file.write_all_at(bytes, offset + block_offset),
            Writer::Process(process, address) => process.write(address + block_offset, bytes),
        };
        let block = || self.placed.block.name().to_owned();
        let len = bytes.len();
        copied.map_err(|source| LoadError::Write { block: block(), block_offset, len, source })
    }
}
