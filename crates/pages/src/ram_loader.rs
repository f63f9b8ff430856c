//! Loads pages of a file into the RAM of another process, or into the caller's own.
//!
//! A page is read into a buffer of this process, compared with its hash, and copied from there to
//! its place: the guest gets the bytes that were verified. The destination has not run yet. Its
//! memory is zero where nothing touched it; where the file has a zero page and the destination has
//! bytes (firmware it loaded itself, a file that was used before), zeros are written.

use std::io;
use std::ops::Range;

use vmfile_engine::BackendInUse;
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex, PageRange};

use crate::control::Control;
use crate::error::PagesError;
use crate::lane::Workers;
use crate::memory::PageSink;
use crate::page_hashes::PageHashes;
use crate::plan::{in_window, pieces};
use crate::snapshot::Snapshot;
use crate::window_reader::{MorePlaces, Window, WindowReader};

/// Loads all pages with data of `blocks` of the file into `sink`, and writes zeros where `sink` has
/// bytes and the file has none; returns how many bytes of data were read, and the back end.
///
/// # Errors
///
/// Returns the first [`PagesError`] that any worker met.
pub fn load_ram<'a>(
    (snapshot, workers): (&'a Snapshot, Workers),
    blocks: &[usize],
    sink: &dyn PageSink,
    control: &Control<'_>,
) -> Result<(u64, BackendInUse), PagesError> {
    let placed: Vec<PlacedBlock> =
        blocks.iter().map(|&block| snapshot.structure().blocks[block].clone()).collect();
    let bitmaps: Vec<PageBitmap> =
        placed.iter().map(|placed| snapshot.bitmap(placed)).collect::<Result<_, _>>()?;
    let non_zero = NonZeroWindows { sink };
    let reader =
        WindowReader { blocks: &placed, bitmaps: &bitmaps, more: Some(&non_zero), control };
    let take = |hashes: &mut Option<PageHashes<'a>>, window: &Window, read: io::Result<&[u8]>| {
        let bytes = read.map_err(PagesError::reading("guest RAM from the file"))?;
        let (number, bitmap) = (window.block, &bitmaps[window.block]);
        let block = LoadedBlock { number, placed: &placed[number], bitmap, sink };
        let hashes = hashes.get_or_insert_with(|| PageHashes::new(snapshot));
        let first = PageIndex(window.range.start / block.page_len());
        hashes.verify(blocks[number], bitmap, first, bytes)?;
        block.clear_stale(window)?;
        block.copy(window, bytes)
    };
    let (_, backend) = reader.read(workers, take)?;
    Ok((reader.data_bytes(), backend))
}

/// Adds the windows in which the memory already has bytes: zeros are written where the file has
/// none.
struct NonZeroWindows<'a> {
    sink: &'a dyn PageSink,
}

impl MorePlaces for NonZeroWindows<'_> {
    fn first(&self, block: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        self.sink.first_data(block, range)
    }

    fn to_read(&self, _: usize, _: &Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }
}

/// A block that is loaded.
struct LoadedBlock<'a> {
    /// Its number in the memory.
    number: usize,
    placed: &'a PlacedBlock,
    bitmap: &'a PageBitmap,
    sink: &'a dyn PageSink,
}

impl LoadedBlock<'_> {
    fn page_len(&self) -> u64 {
        self.placed.block.page_size().bytes()
    }

    fn pages(&self, range: &Range<u64>) -> PageRange {
        PageRange::new(range.start / self.page_len(), range.end / self.page_len())
    }

    /// Writes zeros where the memory has bytes and the file has a zero page.
    fn clear_stale(&self, window: &Window) -> Result<(), PagesError> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let page_len = self.page_len();
        for gap in self.bitmap.gaps_within(self.pages(&window.whole)) {
            let gap = gap.start.0 * page_len..gap.end.0 * page_len;
            for stale in self
                .sink
                .data(self.number, &gap)
                .map_err(PagesError::reading("which parts hold bytes"))?
            {
                for piece in pieces(stale, ZEROS.len() as u64) {
                    let zeros = 0..in_window(piece.end - piece.start);
                    self.write(piece.start, &[zeros], &ZEROS)?;
                }
            }
        }
        Ok(())
    }

    /// Copies the pages with data of a window, of which `bytes` were read, into the block.
    fn copy(&self, window: &Window, bytes: &[u8]) -> Result<(), PagesError> {
        let (page_len, start) = (self.page_len(), window.range.start);
        let place = |page: u64| in_window(page * page_len - start);
        let runs = self.bitmap.runs_within(self.pages(&window.range));
        let parts: Vec<_> = runs.map(|run| place(run.start.0)..place(run.end.0)).collect();
        self.write(start, &parts, bytes)
    }

    fn write(&self, start: u64, parts: &[Range<usize>], bytes: &[u8]) -> Result<(), PagesError> {
        let written = self.sink.write(self.number, start, parts, bytes);
        written.map_err(|source| PagesError::WriteRam {
            block: self.placed.block.name().to_owned(),
            block_offset: start,
            len: bytes.len(),
            source,
        })
    }
}
