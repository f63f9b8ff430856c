//! A migration stream as it comes from a pipe or a socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::fcntl_setpipe_size;
use vmfile_format::stream::decoder::EVENT_LEN_MAX;

use vmfile_pages::control::Control;

/// How many bytes are read at once: what a widened pipe holds.
const READ_LEN: usize = 1 << 20;

/// How often a wait checks whether it has to stop.
pub const STOP_INTERVAL: Duration = Duration::from_millis(100);

/// How long a peer may be silent before a wait checks whether its process is stopped.
const STILL_TIMEOUT: Duration = Duration::from_secs(3);

/// How long to wait for a peer.
#[derive(Clone, Copy, Debug)]
pub struct WaitLimits<'a> {
    /// Says whether the caller has stopped the receive.
    pub control: &'a Control<'a>,
    /// The longest time without a byte from any peer.
    pub stall: Option<Duration>,
    /// The peer's process, where it is known: one that is stopped sends nothing.
    pub process: Option<PeerProcess>,
    /// When the whole stream must have arrived.
    pub deadline: Option<Instant>,
}

/// The process at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct PeerProcess {
    /// Its id.
    pub pid: u32,
    /// Says whether the process with this id is stopped, by SIGSTOP or a debugger.
    pub is_stopped: fn(u32) -> bool,
}

/// Why reading the stream ended early.
#[derive(Debug)]
pub enum WaitError {
    /// The kernel returned an error.
    Io(io::Error),
    /// No byte came for this long.
    Stalled(Duration),
    /// The peer's process is stopped, by SIGSTOP or a debugger.
    ProcessStopped(u32),
    /// The deadline has passed.
    TimedOut,
    /// The caller stopped it.
    Stopped,
    /// Another connection of the same receive has failed; that failure is the cause.
    GivenUp,
}

impl From<io::Error> for WaitError {
    fn from(error: io::Error) -> WaitError {
        WaitError::Io(error)
    }
}

/// What the connections of one receive share: when one of them was last active, and whether one has
/// failed.
#[derive(Debug)]
pub struct Activity {
    begin: Instant,
    /// When one of them last began to wait, or got a byte, in milliseconds since `begin`.
    moved_ms: AtomicU64,
    is_given_up: AtomicBool,
}

impl Default for Activity {
    fn default() -> Activity {
        let (moved_ms, is_given_up) = (AtomicU64::new(0), AtomicBool::new(false));
        Activity { begin: Instant::now(), moved_ms, is_given_up }
    }
}

impl Activity {
    /// Notes that a connection begins to wait, or got a byte.
    pub fn note(&self) {
        let now_ms = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved_ms.fetch_max(now_ms, Ordering::Relaxed);
    }

    /// Ends all waits, with [`WaitError::GivenUp`].
    pub fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        let moved = Duration::from_millis(self.moved_ms.load(Ordering::Relaxed));
        self.begin.elapsed().saturating_sub(moved)
    }
}

impl WaitLimits<'_> {
    /// Returns an error if the wait has to end.
    pub fn check(&self, activity: &Activity) -> Result<(), WaitError> {
        if self.control.is_stopped() {
            return Err(WaitError::Stopped);
        }
        if activity.is_given_up.load(Ordering::Relaxed) {
            return Err(WaitError::GivenUp);
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(WaitError::TimedOut);
        }
        if let Some(peer) = self.process.filter(|_| activity.silence() >= STILL_TIMEOUT) {
            if (peer.is_stopped)(peer.pid) {
                return Err(WaitError::ProcessStopped(peer.pid));
            }
        }
        match self.stall.filter(|&stall| activity.silence() >= stall) {
            Some(stall) => Err(WaitError::Stalled(stall)),
            None => Ok(()),
        }
    }

    /// Waits until `fd` has something to read, or has ended.
    ///
    /// A byte that comes by another connection with the same `activity` counts like one from `fd`.
    pub fn wait(&self, fd: BorrowedFd<'_>, activity: &Activity) -> Result<(), WaitError> {
        activity.note();
        loop {
            self.check(activity)?;
            let interval = Timespec::try_from(STOP_INTERVAL).expect("a tenth of a second");
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&interval)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(WaitError::Io(errno.into())),
            }
        }
    }

    /// Waits, and reads what is there into `into`; returns the length, which is 0 at the end.
    pub fn read(
        &self,
        fd: BorrowedFd<'_>,
        into: &mut [u8],
        activity: &Activity,
    ) -> Result<usize, WaitError> {
        loop {
            self.wait(fd, activity)?;
            match rustix::io::read(fd, &mut *into) {
                Ok(len) => return Ok(len),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(WaitError::Io(errno.into())),
            }
        }
    }
}

/// A stream of bytes, with a buffer of those that have been read and not used yet.
#[derive(Debug)]
pub struct StreamSource<'a> {
    fd: OwnedFd,
    limits: WaitLimits<'a>,
    activity: &'a Activity,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<'a> StreamSource<'a> {
    /// Returns the stream that `fd` reads; `begun` are its first bytes, which the caller has read
    /// already.
    pub fn new(
        fd: OwnedFd,
        begun: &[u8],
        limits: WaitLimits<'a>,
        activity: &'a Activity,
    ) -> StreamSource<'a> {
        // With the 64 KiB of a new pipe, a receive takes four times as long. The call fails on a
        // socket, and may fail if the user's pipes have used up their pages.
        let _ = fcntl_setpipe_size(&fd, READ_LEN);
        let mut buffer = vec![0; READ_LEN + EVENT_LEN_MAX].into_boxed_slice();
        buffer[..begun.len()].copy_from_slice(begun);
        StreamSource { fd, limits, activity, buffer, start: 0, end: begun.len() }
    }

    /// Returns what has been read and not used yet.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Marks `len` bytes as used.
    pub fn consume(&mut self, len: usize) {
        assert!(len <= self.end - self.start, "no more than there is");
        self.start += len;
    }

    /// Reads more; `false` at the end of the stream.
    pub fn fill(&mut self) -> Result<bool, WaitError> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        assert!(self.end < self.buffer.len(), "less is left than one event may need");
        let into = &mut self.buffer[self.end..];
        let len = self.limits.read(self.fd.as_fd(), into, self.activity)?;
        self.end += len;
        Ok(len > 0)
    }
}
