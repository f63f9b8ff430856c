//! Reads many pages of a file, each once: windows in any order, several in flight on every lane.

use std::io;
use std::ops::Range;

use vmfile_engine::{BackendInUse, Direction, Memory, Transfer};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageRange};

use crate::control::{Control, Meter};
use crate::error::PagesError;
use crate::lane::{Lane, Workers};
use crate::plan::{Unit, Units};

/// A window of one block, and the part of it that is read at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The block's number.
    pub block: usize,
    /// The window's bytes of the block: up to the next multiple of a window's length.
    pub whole: Range<u64>,
    /// The bytes that are read, from the first place to the last: a hole between them costs nothing
    /// to read. Empty if the window is of interest although no byte of it is to be read.
    pub range: Range<u64>,
}

/// Windows that are of interest although no page in them has data.
pub trait MorePlaces: Sync {
    /// Returns the first byte of `range`, a range of a block, that is of interest.
    fn first(&self, block: usize, range: &Range<u64>) -> io::Result<Option<u64>>;

    /// Returns the bytes to read of a window of a block, besides those of pages with data.
    fn to_read(&self, block: usize, window: &Range<u64>) -> io::Result<Option<Range<u64>>>;
}

/// Adds to bytes that were read the pages that are in other files: the block's number, the offset of the
/// first byte in the block, and the bytes.
pub type Fill<'a> = dyn Fn(usize, u64, &mut [u8]) -> io::Result<()> + Sync + 'a;

/// Reads windows with data, each from its first such page to its last, and those that `more` adds.
#[expect(
    missing_debug_implementations,
    reason = "the trait has none, and a reader lives in one call"
)]
pub struct WindowReader<'a> {
    /// The blocks, and their places in the file.
    pub blocks: &'a [PlacedBlock],
    /// Which pages of each block have data.
    pub bitmaps: &'a [PageBitmap],
    /// How long a window is, in bytes: [`WINDOW_LEN`](crate::plan::WINDOW_LEN) at most. Each is read at once, also what lies between
    /// its data.
    pub window_len: u64,
    /// Places that are of interest besides pages with data.
    pub more: Option<&'a dyn MorePlaces>,
    /// Adds to the bytes of a block, from an offset on, the pages that are in other files.
    pub fill: Option<&'a Fill<'a>>,
    /// How the caller stops the work and hears of its progress.
    pub control: &'a Control<'a>,
}

/// What is read, for errors.
const PAGES: &str = "the pages";
const HOLES: &str = "which parts hold bytes";

/// What all workers share.
struct Shared<'a> {
    units: Units,
    meter: Meter<'a>,
}

impl WindowReader<'_> {
    /// Reads all windows by `workers`, whose lanes lead to the file, and calls `take` with each,
    /// and with a value that the worker keeps; returns these values of all workers, and the back
    /// end.
    ///
    /// A read error does not end the other windows: `take` gets it in place of the bytes.
    ///
    /// # Errors
    ///
    /// Returns the first [`PagesError`] that any worker met or `take` returned.
    pub fn read<T: Default + Send>(
        &self,
        workers: Workers,
        take: impl Fn(&mut T, &Window, io::Result<&[u8]>) -> Result<(), PagesError> + Sync,
    ) -> Result<(Vec<T>, BackendInUse), PagesError> {
        let lens = self.blocks.iter().map(|placed| placed.block.used_length());
        let units = Units::new(lens, self.window_len);
        let shared = Shared { units, meter: Meter::new(self.control, self.data_bytes()) };
        let part = |lane| self.work(&shared, lane, &take);
        workers.drive(&shared.units, part, PagesError::reading(PAGES))
    }

    /// Returns how many bytes of data there are.
    pub fn data_bytes(&self) -> u64 {
        let blocks = self.blocks.iter().zip(self.bitmaps);
        blocks.map(|(placed, bitmap)| bitmap.data_count().0 * page_len(placed)).sum()
    }

    fn work<T: Default>(
        &self,
        shared: &Shared<'_>,
        mut lane: Lane,
        take: &impl Fn(&mut T, &Window, io::Result<&[u8]>) -> Result<(), PagesError>,
    ) -> Result<T, PagesError> {
        let mut remembered = T::default();
        loop {
            while let Some(window) = self.submit_next(shared, &mut lane)? {
                if window.range.is_empty() {
                    take(&mut remembered, &window, Ok(&[]))?;
                }
            }
            let Some(completion) = lane.next_read().map_err(PagesError::reading(PAGES))? else {
                break;
            };
            let Transfer { file_offset, memory, tag, .. } = completion.transfer;
            let Memory::Owned(mut buffer, range) = memory else {
                unreachable!("windows are read into buffers");
            };
            let block = usize::try_from(tag).expect("a block's number");
            let start = file_offset - self.blocks[block].pages_offset;
            let window = self.window(block, start..start + range.len() as u64);
            let bytes = &mut buffer[range];
            let read = completion.result.and_then(|()| match self.fill {
                Some(fill) => fill(block, start, bytes),
                None => Ok(()),
            });
            take(&mut remembered, &window, read.map(|()| &*bytes))?;
            shared.meter.add(self.data_bytes_of(&window));
        }
        Ok(remembered)
    }

    /// Submits the read of the next window and returns the window; `None` if there is none, or no
    /// room for it.
    fn submit_next(
        &self,
        shared: &Shared<'_>,
        lane: &mut Lane,
    ) -> Result<Option<Window>, PagesError> {
        if self.control.is_stopped() {
            return Err(PagesError::Stopped);
        }
        let buffer = if lane.has_room() { lane.free_buffer() } else { None };
        let Some(buffer) = buffer else { return Ok(None) };
        let Some(unit) = shared.units.take(|block, range| self.first(block, &range))? else {
            return Ok(None);
        };
        let window = self.to_read(unit)?;
        let len = usize::try_from(window.range.end - window.range.start).expect("a window");
        if len > 0 {
            let file_offset = self.blocks[window.block].pages_offset + window.range.start;
            let memory = Memory::Owned(buffer, 0..len);
            // The tag of the completion is the block; its offset gives the rest.
            let tag = window.block as u64;
            let transfer = Transfer { direction: Direction::Read, file_offset, memory, tag };
            lane.submit(transfer).map_err(PagesError::reading(PAGES))?;
        }
        Ok(Some(window))
    }

    /// Returns the first byte of `range`, a range of a block, at which there is something.
    fn first(&self, block: usize, range: &Range<u64>) -> Result<Option<u64>, PagesError> {
        let page_len = page_len(&self.blocks[block]);
        let first = self.bitmaps[block].first_within(self.pages(block, range));
        let data = first.map(|page| (page.0 * page_len).max(range.start));
        let more = match self.more {
            // If the range begins with data, nothing can come before it.
            Some(more) if data != Some(range.start) => {
                let before = range.start..data.unwrap_or(range.end);
                more.first(block, &before).map_err(PagesError::reading(HOLES))?
            }
            _ => None,
        };
        Ok(more.or(data))
    }

    fn to_read(&self, Unit { block, range: whole }: Unit) -> Result<Window, PagesError> {
        let page_len = page_len(&self.blocks[block]);
        let runs = self.bitmaps[block].runs_within(self.pages(block, &whole));
        let data = runs.reduce(|all, run| PageRange::new(all.start.0, run.end.0));
        let data = data.map(|pages| pages.start.0 * page_len..pages.end.0 * page_len);
        let more = match self.more {
            Some(more) => more.to_read(block, &whole).map_err(PagesError::reading(HOLES))?,
            None => None,
        };
        let both = data.into_iter().chain(more);
        let range = both.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
        let range = range.unwrap_or(whole.start..whole.start);
        Ok(Window { block, whole, range })
    }

    /// Returns the window in which `range`, which was read, lies.
    fn window(&self, block: usize, range: Range<u64>) -> Window {
        let start = range.start - range.start % self.window_len;
        let end = (start + self.window_len).min(self.blocks[block].block.used_length());
        Window { block, whole: start..end, range }
    }

    fn data_bytes_of(&self, window: &Window) -> u64 {
        let runs = self.bitmaps[window.block].runs_within(self.pages(window.block, &window.whole));
        runs.map(|run| run.count().0).sum::<u64>() * page_len(&self.blocks[window.block])
    }

    fn pages(&self, block: usize, range: &Range<u64>) -> PageRange {
        let page_len = page_len(&self.blocks[block]);
        PageRange::new(range.start / page_len, range.end.div_ceil(page_len))
    }
}

fn page_len(placed: &PlacedBlock) -> u64 {
    placed.block.page_size().bytes()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;

    use vmfile_engine::{Backend, DataFile, DirectIo};
    use vmfile_format::{PageIndex, PageSize, RamBlock};

    use super::*;
    use crate::plan::WINDOW_LEN;

    struct Page(u64);

    impl MorePlaces for Page {
        fn first(&self, _: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
            Ok(range.contains(&(self.0 * 4096)).then_some(self.0 * 4096))
        }

        fn to_read(&self, _: usize, _: &Range<u64>) -> io::Result<Option<Range<u64>>> {
            Ok(None)
        }
    }

    fn windows(pages: &[u64], more: Option<&dyn MorePlaces>) -> Vec<(u64, Range<u64>)> {
        let file: File = tempfile::tempfile().unwrap();
        file.write_all_at(&[0], (17 << 20) - 1).unwrap();
        let block = RamBlock::new("pc.ram".to_owned(), 16 << 20, PageSize::KIB_4).unwrap();
        let mut bitmap = PageBitmap::new(block.page_count());
        for &page in pages {
            bitmap.set(PageIndex(page), true);
        }
        let placed =
            PlacedBlock { block, record_offset: 0, bitmap_offset: 64, pages_offset: 1 << 20 };
        let reader = WindowReader {
            blocks: &[placed],
            bitmaps: &[bitmap],
            window_len: WINDOW_LEN,
            more,
            fill: None,
            control: &Control::none(),
        };
        let found = Mutex::new(Vec::new());
        let take = |(): &mut (), window: &Window, read: io::Result<&[u8]>| {
            assert_eq!(read.unwrap().len() as u64, window.range.end - window.range.start);
            let read = window.range.start / 4096..window.range.end / 4096;
            found.lock().unwrap().push((window.whole.start / 4096, read));
            Ok::<_, PagesError>(())
        };
        let file = DataFile::new(file, DirectIo::Off).unwrap();
        let workers = Workers::start(&file, (Backend::Threads, 2)).unwrap();
        reader.read(workers, take).unwrap();
        let mut found = found.into_inner().unwrap();
        found.sort_by_key(|(start, _)| *start);
        found
    }

    #[test]
    fn a_window_spans_its_data_and_crosses_no_border() {
        let found = windows(&[3, 9, 511, 512, 2048], None);
        assert_eq!(found, [(0, 3..512), (512, 512..513), (2048, 2048..2049)]);
    }

    #[test]
    fn a_window_of_interest_without_data_is_taken_and_not_read() {
        let found = windows(&[3, 2048], Some(&Page(1030)));
        assert_eq!(found, [(0, 3..4), (1024, 1024..1024), (2048, 2048..2049)]);
        let found = windows(&[3, 2048], Some(&Page(5)));
        assert_eq!(found, [(0, 3..4), (2048, 2048..2049)]);
    }
}
