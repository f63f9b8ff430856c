//! Many pages of a file read once: windows in any order, several in flight on every lane.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use vmfile_engine::{Backend, BackendInUse, DataFile, Direction, Memory, Transfer};
use vmfile_format::mapped_ram::PlacedBlock;

use crate::control::{Control, Progress};
use crate::lane::{Lane, on_lanes};

/// A piece of one block that is read at once; it crosses no multiple of
/// [`WINDOW_LEN`](crate::plan::WINDOW_LEN).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// The block's number.
    pub(crate) block: usize,
    /// Bytes of the block.
    pub(crate) range: Range<u64>,
}

/// What is read, and who may stop it.
#[derive(Debug)]
pub(crate) struct WindowReader<'a> {
    pub(crate) file: &'a DataFile,
    pub(crate) blocks: &'a [PlacedBlock],
    pub(crate) windows: &'a [Window],
    pub(crate) control: &'a Control<'a>,
}

/// Why windows could not be read. That one of them has bytes which the disk does not give is told
/// to whoever takes it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WindowError {
    #[error("the file, with the back end that was asked for")]
    Open(#[source] io::Error),
    #[error("the pages")]
    Read(#[source] io::Error),
    #[error("stopped")]
    Stopped,
}

/// What all workers see.
#[derive(Debug, Default)]
struct Shared {
    next: AtomicUsize,
    done: AtomicU64,
    total_bytes: u64,
    failed: AtomicBool,
}

impl WindowReader<'_> {
    /// Reads all windows and hands each to `take`, with what the worker remembers; returns what all
    /// workers remember in the end, and the back end.
    pub(crate) fn read<T, E>(
        &self,
        width: (Backend, usize),
        take: impl Fn(&mut T, &Window, io::Result<&[u8]>) -> Result<(), E> + Sync,
    ) -> Result<(Vec<T>, BackendInUse), E>
    where
        T: Default + Send,
        E: From<WindowError> + Send,
    {
        let total_bytes = self.windows.iter().map(|window| window.range.end - window.range.start);
        let shared = Shared { total_bytes: total_bytes.sum(), ..Shared::default() };
        let work = |lane: Lane| {
            let result = self.work(&shared, lane, &take);
            if result.is_err() {
                shared.failed.store(true, Ordering::Relaxed);
            }
            result
        };
        let (results, backend) = on_lanes(self.file, width, work).map_err(WindowError::Open)?;
        Ok((results.into_iter().collect::<Result<_, E>>()?, backend))
    }

    fn work<T, E>(
        &self,
        shared: &Shared,
        mut lane: Lane,
        take: &impl Fn(&mut T, &Window, io::Result<&[u8]>) -> Result<(), E>,
    ) -> Result<T, E>
    where
        T: Default,
        E: From<WindowError>,
    {
        let mut remembered = T::default();
        loop {
            while lane.has_room() && self.submit_next(shared, &mut lane)? {}
            let Some(completion) = lane.next_read().map_err(WindowError::Read)? else { break };
            let index = usize::try_from(completion.transfer.tag).expect("an index");
            let window = &self.windows[index];
            let bytes = match &completion.transfer.memory {
                Memory::Owned(buffer, range) => &buffer[range.clone()],
                _ => unreachable!("windows are read into buffers"),
            };
            take(&mut remembered, window, completion.result.map(|()| bytes))?;
            let len = window.range.end - window.range.start;
            let done_bytes = shared.done.fetch_add(len, Ordering::Relaxed) + len;
            self.control.report(Progress { done_bytes, total_bytes: shared.total_bytes });
        }
        Ok(remembered)
    }

    /// Submits the read of the next window; `false` when there is none, or no buffer for it.
    fn submit_next(&self, shared: &Shared, lane: &mut Lane) -> Result<bool, WindowError> {
        if self.control.is_stopped() {
            return Err(WindowError::Stopped);
        }
        if shared.failed.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let Some(buffer) = lane.free_buffer() else { return Ok(false) };
        let index = shared.next.fetch_add(1, Ordering::Relaxed);
        let Some(window) = self.windows.get(index) else { return Ok(false) };
        let placed = &self.blocks[window.block];
        let len = usize::try_from(window.range.end - window.range.start).expect("a window");
        let transfer = Transfer {
            direction: Direction::Read,
            file_offset: placed.pages_offset + window.range.start,
            memory: Memory::Owned(buffer, 0..len),
            tag: index as u64,
        };
        lane.submit(transfer).map_err(WindowError::Read)?;
        Ok(true)
    }
}
