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
use crate::layers::Layers;
use crate::memory::PageSink;
use crate::page_hashes::PageHashes;
use crate::plan::{WINDOW_LEN, in_window, pieces};
use crate::snapshot::SnapshotError;
use crate::window_reader::{MorePlaces, Window, WindowReader};

/// Loads all pages with data of `blocks` of the file of `layers` into `sink`, and writes zeros where
/// `sink` has bytes and the file has none; returns how many bytes of data were read, and the back end.
/// The lanes of `workers` lead to [`Layers::main`] and can read [`WINDOW_LEN`] at once.
///
/// # Errors
///
/// Returns the first [`PagesError`] that any worker met.
pub fn load_ram<'a>(
    (layers, workers): (&'a Layers<'a>, Workers),
    blocks: &[usize],
    sink: &dyn PageSink,
    control: &Control<'_>,
) -> Result<(u64, BackendInUse), PagesError> {
    let bitmaps: Vec<PageBitmap> =
        blocks.iter().map(|&block| layers.bitmap(block).clone()).collect();
    let non_zero = NonZeroWindows { sink };
    let load = Load { layers, blocks, bitmaps: &bitmaps, sink, control };
    load.read((workers, WINDOW_LEN), Some(&non_zero), |block, window, bytes| {
        block.clear_stale(window)?;
        block.copy(window, bytes)
    })
}

/// Brings the pages of `blocks` that newer files of a chain changed into `sink`, which has the pages of
/// the lowest file: it was mapped. `changes` is what [`Layers::changes`] returns; the lanes of `workers`
/// lead to its [`Layers::main`] and can read [`CHANGES_LEN`] at once. Returns how many bytes of data were
/// read.
///
/// # Errors
///
/// As [`load_ram`].
pub fn load_changes<'a>(
    (changes, workers): (&'a (Layers<'a>, Vec<PageBitmap>), Workers),
    blocks: &[usize],
    sink: &dyn PageSink,
    control: &Control<'_>,
) -> Result<u64, PagesError> {
    let (layers, zero) = changes;
    let bitmaps: Vec<PageBitmap> =
        blocks.iter().map(|&block| layers.bitmap(block).clone()).collect();
    let load = Load { layers, blocks, bitmaps: &bitmaps, sink, control };
    for (number, &block) in blocks.iter().enumerate() {
        let loaded = load.block(number);
        let page_len = loaded.page_len();
        for run in zero[block].data_runs() {
            loaded.clear(run.start.0 * page_len..run.end.0 * page_len)?;
        }
    }
    // Between the changes lies what is there already.
    let take = |block: &LoadedBlock<'_>, window: &Window, bytes: &[u8]| block.copy(window, bytes);
    Ok(load.read((workers, CHANGES_LEN), None, take)?.0)
}

/// Of a chain's changes, at most so many bytes are read at once.
pub const CHANGES_LEN: u64 = 64 << 10;

/// A load at work.
struct Load<'a, 'l> {
    layers: &'a Layers<'a>,
    /// The number in the file of each block in the memory.
    blocks: &'l [usize],
    /// The pages that are brought.
    bitmaps: &'l [PageBitmap],
    sink: &'l dyn PageSink,
    control: &'l Control<'l>,
}

impl<'a> Load<'a, '_> {
    fn block(&self, number: usize) -> LoadedBlock<'_> {
        let placed = self.layers.placed(self.blocks[number]);
        LoadedBlock { number, placed, bitmap: &self.bitmaps[number], sink: self.sink }
    }

    /// Reads and verifies all windows of `window_len` bytes with pages of the bitmaps or of `more`, and
    /// calls `take` with each.
    fn read(
        &self,
        (workers, window_len): (Workers, u64),
        more: Option<&dyn MorePlaces>,
        take: impl Fn(&LoadedBlock<'_>, &Window, &[u8]) -> Result<(), PagesError> + Sync,
    ) -> Result<(u64, BackendInUse), PagesError> {
        let (layers, blocks) = (self.layers, self.blocks);
        let placed: Vec<PlacedBlock> =
            blocks.iter().map(|&block| layers.placed(block).clone()).collect();
        let fill = |number: usize, start: u64, bytes: &mut [u8]| {
            layers.fill(blocks[number], start, bytes).map_err(io::Error::other)
        };
        let reader = WindowReader {
            blocks: &placed,
            bitmaps: self.bitmaps,
            window_len,
            more,
            fill: Some(&fill),
            control: self.control,
        };
        let take =
            |hashes: &mut Option<PageHashes<'a>>, window: &Window, read: io::Result<&[u8]>| {
                let bytes = read.map_err(|source| match source.downcast::<SnapshotError>() {
                    // Of another file of the chain.
                    Ok(error) => error.into(),
                    Err(source) => PagesError::reading("guest RAM from the file")(source),
                })?;
                let block = self.block(window.block);
                let hashes = hashes.get_or_insert_with(|| PageHashes::new(layers.snapshot()));
                let first = PageIndex(window.range.start / block.page_len());
                layers.verify(hashes, blocks[window.block], first, bytes)?;
                take(&block, window, bytes)
            };
        let (_, backend) = reader.read(workers, take)?;
        Ok((reader.data_bytes(), backend))
    }
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
        let page_len = self.page_len();
        for gap in self.bitmap.gaps_within(self.pages(&window.whole)) {
            let gap = gap.start.0 * page_len..gap.end.0 * page_len;
            for stale in self
                .sink
                .data(self.number, &gap)
                .map_err(PagesError::reading("which parts hold bytes"))?
            {
                self.clear(stale)?;
            }
        }
        Ok(())
    }

    /// Writes zeros to a range of the block.
    fn clear(&self, range: Range<u64>) -> Result<(), PagesError> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        for piece in pieces(range, ZEROS.len() as u64) {
            let zeros = 0..in_window(piece.end - piece.start);
            self.write(piece.start, &[zeros], &ZEROS)?;
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
