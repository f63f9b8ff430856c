//! Pages of a file in their order, read ahead and verified.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use vmfile_engine::{Completion, Direction, Memory, PooledBuffer, Transfer};
use vmfile_pages::lane::Lane;
use vmfile_pages::page_hashes::PageHashes;
use vmfile_pages::snapshot::SnapshotError;

use crate::contents::{StreamContents, Window};
use crate::error::{SendError, reading};

/// Reads windows, several in flight, and returns them in their order. Each page is compared with
/// its hash first.
pub(crate) struct PagesInOrder<'a, I> {
    contents: &'a StreamContents<'a>,
    hashes: PageHashes<'a>,
    lane: Lane,
    /// The windows that are still to be read.
    ahead: I,
    /// Those that were submitted and not yet returned; the first has the number `taken`.
    underway: VecDeque<Window>,
    taken: u64,
    /// Reads that completed before their turn, by number.
    early: BTreeMap<u64, Read>,
}

/// The bytes of a window; the buffer goes back when this is dropped.
#[derive(Debug)]
pub(crate) struct Read {
    buffer: PooledBuffer,
    range: Range<usize>,
}

impl Read {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.buffer[self.range.clone()]
    }
}

impl AsRef<[u8]> for Read {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

impl<'a, I: Iterator<Item = Window>> PagesInOrder<'a, I> {
    /// Returns a reader of those of `windows` that have data.
    pub(crate) fn new(
        contents: &'a StreamContents<'a>,
        lane: Lane,
        windows: I,
    ) -> PagesInOrder<'a, I> {
        let (underway, early) = (VecDeque::new(), BTreeMap::new());
        let hashes = PageHashes::new(contents.snapshot());
        PagesInOrder { contents, hashes, lane, ahead: windows, underway, taken: 0, early }
    }

    /// Returns the next window that has data and its bytes, and goes on reading ahead; `None` after
    /// the last.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`], and [`SnapshotError::DamagedPage`] if a page differs from
    /// its hash.
    pub(crate) fn next(&mut self) -> Result<Option<(Window, Read)>, SendError> {
        self.read_ahead()?;
        let Some(window) = self.underway.pop_front() else { return Ok(None) };
        loop {
            if let Some(mut read) = self.early.remove(&self.taken) {
                self.taken += 1;
                self.contents.complete(&window, read.bytes(), &mut self.hashes)?;
                return Ok(Some((window, read)));
            }
            let completion = self.lane.next_read().map_err(reading)?;
            let completion = completion.expect("what is underway is in flight, or has come early");
            let number = completion.transfer.tag;
            self.early.insert(number, self.whole(completion)?);
        }
    }

    /// Submits reads as long as there are buffers and room.
    fn read_ahead(&mut self) -> Result<(), SendError> {
        while self.lane.has_room() {
            let Some(buffer) = self.lane.free_buffer() else { return Ok(()) };
            let Some(window) = self.ahead.find(|window| !window.bytes.is_empty()) else {
                return Ok(());
            };
            let placed = self.contents.blocks[window.block].placed;
            let transfer = Transfer {
                direction: Direction::Read,
                file_offset: placed.pages_offset + window.bytes.start,
                memory: Memory::Owned(buffer, 0..window.read_len()),
                tag: self.taken + self.underway.len() as u64,
            };
            self.lane.submit(transfer).map_err(reading)?;
            self.underway.push_back(window);
        }
        Ok(())
    }

    fn whole(&self, completion: Completion) -> Result<Read, SendError> {
        let (offset, len) = (completion.transfer.file_offset, completion.transfer.memory.len());
        let path = || self.contents.layers.main().path().to_path_buf();
        completion.result.map_err(|source| SnapshotError::Read {
            path: path(),
            offset,
            len,
            source,
        })?;
        match completion.transfer.memory {
            Memory::Owned(buffer, range) => Ok(Read { buffer, range }),
            _ => unreachable!("reads go into buffers"),
        }
    }
}
