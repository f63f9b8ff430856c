//! Writes streams; no other code does.
//!
//! ```text
//! header, configuration without capabilities
//! START "ram"   all blocks
//! PART, ...     pages in the order of the file, or zero pages only beside multifd channels
//! END           nothing more
//! device sections and EOF as they are in the file, description
//! ```

use std::io::IoSlice;
use std::ops::Range;
use std::sync::Mutex;

use vmfile_engine::{Backend, BackendInUse, DataFile};
use vmfile_format::PageIndex;
use vmfile_format::stream::encoder::RamSection;
use vmfile_pages::control::{Control, Progress};
use vmfile_pages::lane::{Lane, on_lanes};
use vmfile_pages::page_hashes::PageHashes;
use vmfile_pages::plan::UNIT_LEN;

use crate::contents::{StreamContents, Window};
use crate::error::{SendError, reading};
use crate::outlet::Outlet;
use crate::pages_in_order::PagesInOrder;

/// Where the pages of a stream are read from, and how.
#[derive(Clone, Debug)]
pub struct Source {
    /// The file.
    pub file: DataFile,
    /// What moves the bytes.
    pub io: Backend,
}

/// Writes all of `contents` into `outlet`; returns the back end that read the pages.
///
/// # Errors
///
/// Returns [`SendError`] if the file cannot be read or is damaged, if the reader of the stream has
/// gone, or if the caller stopped it.
pub fn write_stream(
    contents: &StreamContents<'_>,
    source: &Source,
    outlet: &mut Outlet<'_>,
    control: &Control<'_>,
) -> Result<BackendInUse, SendError> {
    // The closure runs on another thread, and the outlet with it.
    let outlet = Mutex::new(outlet);
    let write = |lane: Lane| {
        let mut outlet = outlet.lock().expect("the only thread that has it");
        let mut reader = PagesInOrder::new(contents, lane, contents.windows());
        let next = |_: &Window| {
            let read = reader.next()?;
            Ok(read.expect("the reader has the same windows").1)
        };
        write_windows(contents, next, &mut outlet, control)
    };
    let (results, backend) = on_lanes(&source.file, (source.io, 1), write).map_err(reading)?;
    results.into_iter().collect::<Result<(), SendError>>()?;
    Ok(backend)
}

/// Writes all of `contents` into `outlet` and reads one window after another through the page
/// cache: for the few pages of a restore by mapping, a ring and its buffers took longer than all
/// the rest (4 ms).
///
/// # Errors
///
/// As [`write_stream`].
pub fn write_short_stream(
    contents: &StreamContents<'_>,
    outlet: &mut Outlet<'_>,
    control: &Control<'_>,
) -> Result<(), SendError> {
    let mut hashes = PageHashes::new(contents.snapshot());
    let next = |window: &Window| {
        let offset = contents.blocks[window.block].placed.pages_offset + window.bytes.start;
        let main = contents.layers.main();
        let mut read = main.read(offset, window.bytes.end - window.bytes.start)?;
        contents.complete(window, &mut read, &mut hashes)?;
        Ok(read)
    };
    write_windows(contents, next, outlet, control)
}

/// Writes a stream; `next` reads and verifies each window that has data. If a page differs from its
/// hash, the stream ends before it, and QEMU refuses the stream.
fn write_windows<B: AsRef<[u8]>>(
    contents: &StreamContents<'_>,
    mut next: impl FnMut(&Window) -> Result<B, SendError>,
    outlet: &mut Outlet<'_>,
    control: &Control<'_>,
) -> Result<(), SendError> {
    let mut writer = StreamWriter::begin(contents, outlet, Parts::Plain)?;
    let (_, total_bytes) = contents.data();
    let mut done_bytes = 0;
    for window in contents.windows() {
        if window.bytes.is_empty() {
            writer.pages(&window, Some(&[]))?;
        } else {
            let read = next(&window)?;
            writer.pages(&window, Some(read.as_ref()))?;
            done_bytes += contents.data_len(&window);
            control.report(Progress { done_bytes, total_bytes });
        }
    }
    writer.finish()
}

/// How the parts of the "ram" section end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// After every [`UNIT_LEN`] bytes of pages, and with nothing.
    Plain,
    /// Three times, each with MULTIFD_FLUSH.
    Flushing,
    /// Three times, with nothing: a destination waits for its multifd channels at each end.
    Counted,
}

/// How many parts the "ram" section has beside multifd channels: START, PART and END.
pub const COUNTED_PARTS: usize = 3;

/// Writes a stream, a window of pages at a time.
#[derive(Debug)]
pub struct StreamWriter<'w, 'o> {
    contents: &'w StreamContents<'w>,
    outlet: &'w mut Outlet<'o>,
    section: RamSection,
    parts: Parts,
    /// What stands between the pages of a window, reused.
    words: Vec<u8>,
    part_len: u64,
}

impl<'w, 'o> StreamWriter<'w, 'o> {
    /// Writes everything up to the first page.
    pub fn begin(
        contents: &'w StreamContents<'w>,
        outlet: &'w mut Outlet<'o>,
        parts: Parts,
    ) -> Result<StreamWriter<'w, 'o>, SendError> {
        let structure = contents.snapshot().structure();
        let mut words = contents.configuration().encode();
        let begin = match parts {
            Parts::Flushing => RamSection::begin_flushing,
            Parts::Plain | Parts::Counted => RamSection::begin,
        };
        let section = begin(&mut words, structure.device_state.unused_id(), &structure.ram());
        outlet.send(&words)?;
        Ok(StreamWriter { contents, outlet, section, parts, words, part_len: 0 })
    }

    /// Returns what the stream is made of.
    pub fn contents(&self) -> &'w StreamContents<'w> {
        self.contents
    }

    /// Writes the pages of a window; `bytes` are those from the first page with data to the last,
    /// or `None` if channels carry the pages with data.
    pub fn pages(&mut self, window: &Window, bytes: Option<&[u8]>) -> Result<(), SendError> {
        let block = &self.contents.blocks[window.block];
        let placed = (block.index, &block.placed.block);
        let page_len = block.placed.block.page_size().bytes();
        self.words.clear();
        if self.parts == Parts::Plain && self.part_len >= UNIT_LEN {
            self.section.next_part(&mut self.words);
            self.part_len = 0;
        }
        // All words are written before slices of them are taken: a vector that is borrowed cannot
        // grow.
        let mut pieces: Vec<(usize, Range<usize>)> = Vec::new();
        for page in (window.pages.start.0..window.pages.end.0).map(PageIndex) {
            if block.bitmap.contains(page) {
                if bytes.is_none() {
                    continue;
                }
                self.section.page_header(&mut self.words, placed, page);
                let start = usize::try_from(page.0 * page_len - window.bytes.start);
                let start = start.expect("inside a window");
                let end = start + usize::try_from(page_len).expect("64 KiB at most");
                pieces.push((self.words.len(), start..end));
            } else if block.zero_pages {
                self.section.zero_page(&mut self.words, placed, page);
            }
        }
        let bytes = bytes.unwrap_or_default();
        let mut slices = Vec::with_capacity(2 * pieces.len() + 1);
        let mut cut = 0;
        for (words_end, page) in pieces {
            slices.push(IoSlice::new(&self.words[cut..words_end]));
            slices.push(IoSlice::new(&bytes[page]));
            cut = words_end;
        }
        slices.push(IoSlice::new(&self.words[cut..]));
        self.part_len += bytes.len() as u64;
        self.outlet.send_all(&mut slices)
    }

    /// Writes everything after the last page.
    pub fn finish(self) -> Result<(), SendError> {
        let mut end = Vec::new();
        self.section.finish(&mut end);
        let parts = [&end, &self.contents.devices, &self.contents.description];
        self.outlet.send_all(&mut parts.map(|part| IoSlice::new(part)))
    }
}
