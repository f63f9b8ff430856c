//! Where a stream goes: a socket, a pipe or a file, written without copying pages together.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg, sockopt};
use rustix::pipe::fcntl_setpipe_size;
use vmfile_pages::PagesError;

use crate::error::SendError;

/// The length that a pipe is widened to, in bytes: the most that Linux lets an unprivileged user
/// have by default. With the 64 KiB of a new pipe, writer and reader take turns every sixteen
/// pages.
const PIPE_LEN: usize = 1 << 20;

/// The send buffer that a socket is set to, in bytes; the kernel may grant less.
const SOCKET_LEN: usize = 1 << 20;

/// How many pieces the kernel takes in one call.
const SLICES_MAX: usize = 1024;

/// How long a wait for room lasts before it checks whether to stop.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Where a stream goes, and how many of its bytes were sent.
pub struct Outlet<'a> {
    descriptor: OwnedFd,
    kind: Kind,
    sent: Arc<AtomicU64>,
    is_stopped: &'a (dyn Fn() -> bool + Sync),
}

/// How a write is kept from blocking, which would delay a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Each call has MSG_DONTWAIT.
    Socket,
    /// The descriptor has O_NONBLOCK.
    Pipe,
    /// Writes may block: a file, or a pipe that this process may not open once more.
    Waiting,
}

impl<'a> Outlet<'a> {
    /// Returns the outlet into `descriptor`; `is_stopped` is called before each write and while one
    /// waits for room.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error if it does not tell what kind of file the descriptor is.
    pub fn new(
        descriptor: OwnedFd,
        is_stopped: &'a (dyn Fn() -> bool + Sync),
    ) -> io::Result<Outlet<'a>> {
        let mode = fstat(&descriptor)?.st_mode;
        let (descriptor, kind) = match FileType::from_raw_mode(mode) {
            FileType::Socket => {
                // Not essential: a smaller buffer costs more calls.
                let _ = sockopt::set_socket_send_buffer_size(&descriptor, SOCKET_LEN);
                (descriptor, Kind::Socket)
            }
            FileType::Fifo => {
                // Not essential either; it fails if the user's pipes have used up their pages.
                let _ = fcntl_setpipe_size(&descriptor, PIPE_LEN);
                match reopen_without_waiting(&descriptor) {
                    Ok(reopened) => (reopened, Kind::Pipe),
                    Err(_) => (descriptor, Kind::Waiting),
                }
            }
            _ => (descriptor, Kind::Waiting),
        };
        Ok(Outlet { descriptor, kind, sent: Arc::default(), is_stopped })
    }

    /// Returns the counter of the bytes that were sent; it keeps growing.
    pub fn sent(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.sent)
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    ///
    /// As [`Outlet::send_all`].
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), SendError> {
        self.send_all(&mut [IoSlice::new(bytes)])
    }

    /// Sends all bytes of all `slices`, which are used up.
    ///
    /// # Errors
    ///
    /// Returns [`SendError::PeerClosed`] if the reader has gone, [`PagesError::Stopped`], or
    /// [`SendError::Write`].
    pub fn send_all(&mut self, mut slices: &mut [IoSlice<'_>]) -> Result<(), SendError> {
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            if (self.is_stopped)() {
                return Err(PagesError::Stopped.into());
            }
            match self.send_some(&slices[..slices.len().min(SLICES_MAX)]) {
                Ok(len) => {
                    self.sent.fetch_add(len as u64, Ordering::Relaxed);
                    IoSlice::advance_slices(&mut slices, len);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_for_room()?,
                Err(errno) => return Err(self.error(errno)),
            }
        }
        Ok(())
    }

    fn send_some(&self, slices: &[IoSlice<'_>]) -> Result<usize, Errno> {
        match self.kind {
            Kind::Socket => {
                // No SIGPIPE: a library cannot know what its program does with that signal.
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                sendmsg(&self.descriptor, slices, &mut SendAncillaryBuffer::default(), flags)
            }
            Kind::Pipe | Kind::Waiting => rustix::io::writev(&self.descriptor, slices),
        }
    }

    fn wait_for_room(&self) -> Result<(), SendError> {
        let mut waiting = [PollFd::new(&self.descriptor, PollFlags::OUT)];
        match poll(&mut waiting, Some(&POLL_INTERVAL)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(self.error(errno)),
        }
    }

    fn error(&self, errno: Errno) -> SendError {
        let offset = self.sent.load(Ordering::Relaxed);
        match errno {
            Errno::PIPE | Errno::CONNRESET => SendError::PeerClosed { offset },
            _ => SendError::Write { offset, source: errno.into() },
        }
    }
}

impl fmt::Debug for Outlet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlet").field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// Opens a pipe's end once more: O_NONBLOCK belongs to the open file description, which other
/// processes may share.
fn reopen_without_waiting(pipe: &OwnedFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", pipe.as_fd().as_raw_fd());
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("a flag of open");
    let file = File::options().write(true).custom_flags(flags).open(path)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::Duration;

    use rustix::pipe::pipe;

    use super::*;

    const GO_ON: &(dyn Fn() -> bool + Sync) = &|| false;

    #[test]
    fn pieces_arrive_in_order_however_little_room_there_is() {
        let (read, write) = pipe().unwrap();
        let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| i.to_le_bytes()[1]).collect();
        let expected = bytes.clone();
        let reader = thread::spawn(move || {
            let mut found = Vec::new();
            File::from(read).read_to_end(&mut found).unwrap();
            assert!(found == expected);
        });
        let mut outlet = Outlet::new(write, GO_ON).unwrap();
        let mut slices: Vec<IoSlice<'_>> = bytes.chunks(1000).map(IoSlice::new).collect();
        assert!(slices.len() > SLICES_MAX);
        outlet.send_all(&mut slices).unwrap();
        assert_eq!(outlet.sent().load(Ordering::Relaxed), bytes.len() as u64);
        drop(outlet);
        reader.join().unwrap();
    }

    #[test]
    fn a_reader_that_has_gone_is_an_error_with_the_offset() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut outlet = Outlet::new(ours.into(), GO_ON).unwrap();
        outlet.send(&[0; 100]).unwrap();
        drop(theirs);
        let error = outlet.send(&[0; 100]).unwrap_err();
        assert_eq!(error.to_string(), "the reader closed its end at offset 0x64 of the stream");
    }

    #[test]
    fn a_reader_that_takes_nothing_does_not_keep_a_stop_from_working() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (_read, write) = pipe().unwrap();
        for descriptor in [OwnedFd::from(ours), write] {
            let stop = AtomicBool::new(false);
            let is_stopped = || stop.load(Ordering::Relaxed);
            let mut outlet = Outlet::new(descriptor, &is_stopped).unwrap();
            thread::scope(|scope| {
                let sender = scope.spawn(move || outlet.send(&vec![0; 8 << 20]));
                thread::sleep(Duration::from_millis(20));
                stop.store(true, Ordering::Relaxed);
                assert!(matches!(
                    sender.join().unwrap(),
                    Err(SendError::Pages(PagesError::Stopped))
                ));
            });
        }
    }
}
