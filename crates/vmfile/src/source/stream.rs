//! A migration stream as it comes from a pipe or a socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::fcntl_setpipe_size;
use vmfile_format::stream::decoder::EVENT_LEN_MAX;

use crate::control::Control;

/// How much is read at once: what a pipe holds when it was widened.
const READ_LEN: usize = 1 << 20;

/// How often a wait looks whether it was told to stop.
const STOP_INTERVAL: Duration = Duration::from_millis(100);

/// How long a peer may be waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience<'a> {
    pub(crate) control: &'a Control<'a>,
    /// Without a byte from a peer.
    pub(crate) stall: Option<Duration>,
    /// Until all has come.
    pub(crate) deadline: Option<Instant>,
}

/// Why no more comes.
#[derive(Debug)]
pub(crate) enum WaitError {
    /// The kernel refused.
    Io(io::Error),
    /// Nothing came for so long.
    Stalled(Duration),
    /// The deadline has passed.
    TimedOut,
    /// The caller stopped it.
    Stopped,
}

impl From<io::Error> for WaitError {
    fn from(error: io::Error) -> WaitError {
        WaitError::Io(error)
    }
}

impl Patience<'_> {
    /// Waits until `fd` has something to read, or has ended.
    pub(crate) fn wait(&self, fd: BorrowedFd<'_>) -> Result<(), WaitError> {
        let begin = Instant::now();
        loop {
            if self.control.is_stopped() {
                return Err(WaitError::Stopped);
            }
            let now = Instant::now();
            if self.deadline.is_some_and(|deadline| now >= deadline) {
                return Err(WaitError::TimedOut);
            }
            if let Some(stall) = self.stall.filter(|&stall| now - begin >= stall) {
                return Err(WaitError::Stalled(stall));
            }
            let interval = Timespec::try_from(STOP_INTERVAL).expect("a tenth of a second");
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&interval)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(WaitError::Io(errno.into())),
            }
        }
    }

    /// Reads what is there into `into`; 0 at the end.
    pub(crate) fn read(&self, fd: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize, WaitError> {
        loop {
            self.wait(fd)?;
            match rustix::io::read(fd, &mut *into) {
                Ok(len) => return Ok(len),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(WaitError::Io(errno.into())),
            }
        }
    }
}

/// A stream of bytes, of which some have been read and not been used yet.
#[derive(Debug)]
pub(crate) struct StreamSource<'a> {
    fd: OwnedFd,
    patience: Patience<'a>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<'a> StreamSource<'a> {
    /// Reads from `fd` from now on.
    pub(crate) fn new(fd: OwnedFd, patience: Patience<'a>) -> StreamSource<'a> {
        // A pipe of 64 KiB costs a factor of four; a socket refuses, and an unprivileged user may
        // have used up what pipes may take together.
        let _ = fcntl_setpipe_size(&fd, READ_LEN);
        let buffer = vec![0; READ_LEN + EVENT_LEN_MAX].into_boxed_slice();
        StreamSource { fd, patience, buffer, start: 0, end: 0 }
    }

    /// Returns what has been read and not been used.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Marks `len` bytes as used.
    pub(crate) fn consume(&mut self, len: usize) {
        assert!(len <= self.end - self.start, "no more than there is");
        self.start += len;
    }

    /// Reads more; `false` at the end of the stream.
    pub(crate) fn fill(&mut self) -> Result<bool, WaitError> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        assert!(self.end < self.buffer.len(), "less is left than one event may need");
        let len = self.patience.read(self.fd.as_fd(), &mut self.buffer[self.end..])?;
        self.end += len;
        Ok(len > 0)
    }
}
