//! Connections that are kept open, and read, while a will is carried out.
//!
//! As in `steps`, nothing here allocates, locks or panics.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, accept_with, recv, recvmsg,
};

use super::will::LISTENER;

/// How many connections are kept at most; further ones are closed.
const KEPT_MAX: usize = 40;

/// How many bytes are discarded at once, and how often in a row: a fast peer must not delay the
/// will.
const PIECE_LEN: usize = 64 << 10;
const PIECES: usize = 32;

/// How often connections are read: a peer that waits for room goes on after this time.
const SERVED: Duration = Duration::from_millis(2);

/// The same if there are no connections, and nothing is to be read.
const IDLE: Duration = Duration::from_secs(3600);

/// Connections, and a socket by which more may come.
pub(super) struct Kept {
    connections: [Option<OwnedFd>; KEPT_MAX],
    listener: Option<OwnedFd>,
    piece: Box<[u8]>,
}

impl Kept {
    pub(super) fn new() -> Kept {
        let piece = vec![0; PIECE_LEN].into_boxed_slice();
        Kept { connections: [const { None }; KEPT_MAX], listener: None, piece }
    }

    /// Takes the descriptor in the next message.
    pub(super) fn take(&mut self, pipe: BorrowedFd<'_>, kind: u8) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 1];
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(pipe, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC);
        if received.is_err() {
            return;
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    match kind {
                        LISTENER => self.listener = Some(fd),
                        _ => self.keep(fd),
                    }
                }
            }
        }
    }

    /// Returns how long may pass before the next [`Kept::serve`].
    pub(super) fn interval(&self) -> Duration {
        let is_idle = self.listener.is_none() && self.connections.iter().all(Option::is_none);
        if is_idle { IDLE } else { SERVED }
    }

    /// Accepts new connections, and discards what has come by all of them.
    pub(super) fn serve(&mut self) {
        while let Some(new) = self.listener.as_ref().and_then(accept_waiting) {
            self.keep(new);
        }
        for place in &mut self.connections {
            let Some(connection) = place else { continue };
            for _ in 0..PIECES {
                match recv(connection.as_fd(), &mut *self.piece, RecvFlags::DONTWAIT) {
                    Ok((0, _)) => {
                        *place = None;
                        break;
                    }
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
    }

    fn keep(&mut self, fd: OwnedFd) {
        if let Some(place) = self.connections.iter_mut().find(|place| place.is_none()) {
            *place = Some(fd);
        }
    }
}

/// Accepts a connection if one waits. The socket itself may be a blocking one.
fn accept_waiting(listener: &OwnedFd) -> Option<OwnedFd> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&now)) {
        Ok(1..) => accept_with(listener, SocketFlags::CLOEXEC).ok(),
        _ => None,
    }
}
