//! Completes a mapped-ram file that QEMU wrote, so that it is a vmfile.
//!
//! ```text
//! structure - run state - stale places - hashes - mark and checksums - manifest
//! ```
//!
//! QEMU's bitmap says which pages have data. The place of a page whose bit is clear is emptied; a
//! page of zeros whose bit is set counts as data.

use std::io;
use std::os::fd::AsFd;

use vmfile_engine::BackendInUse;
use vmfile_engine::{DataSeeker, page_hash};
use vmfile_format::error::FormatErrorKind;
use vmfile_format::manifest::{CpuSectionMeta, ExtentMeta, HASH_LEN, encode_hash};
use vmfile_format::mapped_ram::{MARK, PlacedBlock};
use vmfile_format::{FormatError, PageBitmap, PageIndex, PageRange};
use vmfile_pages::PagesError;
use vmfile_pages::control::Progress;
use vmfile_pages::draft::{HashTables, StreamParts};
use vmfile_pages::lane::Workers;
use vmfile_pages::plan::WINDOW_LEN;
use vmfile_pages::received_ram::empty;
use vmfile_pages::snapshot::Snapshot;
use vmfile_pages::window_reader::{Window, WindowReader};

use super::{RouteUsed, Work, Written, describe};
use crate::error::SaveError;

/// Completes the file that QEMU wrote, except for its name; `ram_bytes` is the length of all RAM.
pub(super) fn complete(
    work: &mut Work<'_>,
    workers: Workers,
    ram_bytes: u64,
) -> Result<Written, SaveError> {
    let snapshot = work.draft.snapshot().map_err(SaveError::Written)?;
    let structure = snapshot.structure();
    let stream_end = structure.device_state.stream_end;
    if snapshot.file_len() != stream_end {
        let (what, name) = ("data after", "the end of the stream".to_owned());
        let kind = FormatErrorKind::Unsupported { what, name };
        return Err(SaveError::DeviceState(FormatError { offset: stream_end, kind }));
    }
    let tail = tail(work, &snapshot)?;
    let bitmaps: Vec<PageBitmap> = structure
        .blocks
        .iter()
        .map(|placed| snapshot.bitmap(placed))
        .collect::<Result<_, _>>()
        .map_err(SaveError::Written)?;
    let tables = HashTables::new(structure.ram(), stream_end)?;
    work.draft.reserve(&tables)?;
    let file = NativeFile { work, snapshot: &snapshot, bitmaps: &bitmaps, tables: &tables };
    file.empty_stale_places()?;
    let io = file.hash(workers, ram_bytes)?;
    let extents = file.extents(&tail)?;
    let state = &structure.device_state;
    let cpu_sections = CpuSectionMeta::find(state, state.start);
    let parts = StreamParts { extents, tables: Vec::new(), cpu_sections };
    let facts = work.facts(RouteUsed::Native, work.seconds_paused(), false);
    work.draft.put_manifest(&tables, stream_end, &bitmaps, parts, facts)?;
    let pages_data = |bitmap: &PageBitmap| bitmap.data_count().0;
    let bytes_data = |(placed, bitmap): (&PlacedBlock, &PageBitmap)| {
        pages_data(bitmap) * placed.block.page_size().bytes()
    };
    Ok(Written {
        pages_total: tables.pages_total(),
        pages_data: bitmaps.iter().map(pages_data).sum(),
        bytes_written: structure.blocks.iter().zip(&bitmaps).map(bytes_data).sum(),
        pages_of_base: 0,
        bytes_read: 0,
        bytes_rewritten: 0,
        io,
        live: None,
    })
}

/// Everything that follows RAM in the stream.
struct Tail {
    /// The end of the section "ram" and all other sections, to EOF.
    device_state: Vec<u8>,
    vm_description: Vec<u8>,
}

/// Reads what follows RAM, and corrects the run state in the file: QEMU recorded a pause, because
/// the VM was paused for the save.
fn tail(work: &mut Work<'_>, snapshot: &Snapshot) -> Result<Tail, SaveError> {
    let offset = snapshot.structure().ram_end_offset;
    let state = &snapshot.structure().device_state;
    let read = snapshot.read(offset, state.stream_end - offset);
    let mut device_state = read.map_err(SaveError::Written)?;
    let in_tail = |file_offset: u64| usize::try_from(file_offset - offset).expect("in memory");
    let vm_description = device_state.split_off(in_tail(state.end));
    describe::write_run_state(work, state, &mut device_state)?;
    work.draft.put("device_state", offset, &device_state)?;
    Ok(Tail { device_state, vm_description })
}

struct NativeFile<'a> {
    work: &'a Work<'a>,
    snapshot: &'a Snapshot,
    bitmaps: &'a [PageBitmap],
    tables: &'a HashTables,
}

impl NativeFile<'_> {
    fn blocks(&self) -> &[PlacedBlock] {
        &self.snapshot.structure().blocks
    }

    /// Empties the places of zero pages: QEMU may have written there before the pages became zero.
    fn empty_stale_places(&self) -> Result<(), SaveError> {
        let file = self.work.draft.file();
        let failed = PagesError::writing("the places of zero pages");
        let seeker = DataSeeker::open(file.as_fd()).map_err(&failed)?;
        for (placed, bitmap) in self.blocks().iter().zip(self.bitmaps) {
            let page_len = placed.block.page_size().bytes();
            let mut rest = placed.pages_offset..placed.pages_end();
            while let Some(found) = seeker.next(&rest).map_err(&failed)? {
                rest.start = found.end;
                let in_block = |offset: u64| offset - placed.pages_offset;
                let (start, end) = (in_block(found.start), in_block(found.end));
                let found = PageRange::new(start / page_len, end.div_ceil(page_len));
                for stale in bitmap.gaps_within(found) {
                    let at = |page: PageIndex| placed.pages_offset + page.0 * page_len;
                    empty(file, at(stale.start)..at(stale.end)).map_err(&failed)?;
                }
            }
        }
        Ok(())
    }

    /// Reads every page with data and writes its hash; returns the I/O back end.
    fn hash(&self, workers: Workers, ram_bytes: u64) -> Result<BackendInUse, SaveError> {
        // Progress counts all RAM twice, and QEMU's writing was the first half.
        let second_half = |progress: Progress| {
            let Progress { done_bytes, total_bytes: all } = progress;
            let share = u128::from(ram_bytes) * u128::from(done_bytes) / u128::from(all.max(1));
            let done_bytes = ram_bytes + u64::try_from(share).expect("at most ram_bytes");
            self.work.control.report(Progress { done_bytes, total_bytes: total_bytes(ram_bytes) });
        };
        let reader = WindowReader {
            blocks: self.blocks(),
            bitmaps: self.bitmaps,
            window_len: WINDOW_LEN,
            more: None,
            fill: None,
            control: &self.work.control.with_progress(&second_half),
        };
        let take = |(): &mut (), window: &Window, read: io::Result<&[u8]>| {
            let bytes = read.map_err(PagesError::reading("the pages that QEMU wrote"))?;
            self.put_hashes(window, bytes)
        };
        let (_, backend) = reader.read(workers, take)?;
        Ok(backend)
    }

    /// Writes the hashes of a window's pages, and zeros for those that have no data.
    fn put_hashes(&self, window: &Window, bytes: &[u8]) -> Result<(), PagesError> {
        let (bitmap, page_size) = (&self.bitmaps[window.block], self.page_size(window.block));
        let page_len = usize::try_from(page_size).expect("64 KiB at most");
        let (first, key) = (window.range.start / page_size, self.tables.key());
        let hashes: Vec<u8> = (first..)
            .zip(bytes.chunks(page_len))
            .flat_map(|(page, bytes)| {
                let has_data = bitmap.contains(PageIndex(page));
                if has_data { encode_hash(page_hash(bytes, key)) } else { [0; 16] }
            })
            .collect();
        let offset = self.tables.hashes()[window.block] + first * HASH_LEN;
        self.work.draft.put("hashes of pages", offset, &hashes)
    }

    fn page_size(&self, block: usize) -> u64 {
        self.blocks()[block].block.page_size().bytes()
    }

    /// Writes the mark, where there is room, and returns the checksums of everything but pages.
    fn extents(&self, tail: &Tail) -> Result<Vec<ExtentMeta>, SaveError> {
        let structure = self.snapshot.structure();
        let read = |offset, len| self.snapshot.read(offset, len).map_err(SaveError::Written);
        let mut extents = vec![ExtentMeta::of("head", 0, &read(0, structure.head_end)?)];
        if let Some(offset) = self.blocks().first().and_then(PlacedBlock::mark_offset) {
            self.work.draft.put("mark", offset, MARK)?;
            extents.push(ExtentMeta::of("mark", offset, MARK));
        }
        for placed in self.blocks() {
            let record_len = placed.encode_record().len() as u64;
            for (what, offset, len) in [
                ("record", placed.record_offset, record_len),
                ("bitmap", placed.bitmap_offset, placed.bitmap_len()),
            ] {
                extents.push(ExtentMeta::of(what, offset, &read(offset, len)?));
            }
        }
        let state = &structure.device_state;
        let offset = structure.ram_end_offset;
        extents.push(ExtentMeta::of("device_state", offset, &tail.device_state));
        if !tail.vm_description.is_empty() {
            extents.push(ExtentMeta::of("vm_description", state.end, &tail.vm_description));
        }
        Ok(extents)
    }
}

/// The total for progress: QEMU goes through all RAM once, and the threads that hash it once more.
pub(super) fn total_bytes(ram_bytes: u64) -> u64 {
    ram_bytes.saturating_mul(2)
}
