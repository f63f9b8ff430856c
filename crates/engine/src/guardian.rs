//! A process that outlives this one and carries out its will.
//!
//! A [`Guardian`] is forked, has a session of its own, and holds a copy of one socket. It gets a
//! [`Will`], which says what to do over that socket, and waits. When this process ends in any way
//! (`SIGKILL`, the kernel's out-of-memory killer, an abort), the kernel closes the other end of the
//! guardian's pipe, and the guardian carries out the will. When all is well, this process dismisses
//! the guardian, which then does nothing.
//!
//! The child of a process with several threads may only call what is safe in a signal handler
//! (fork(2)): another thread may have held the allocator's lock. So the guardian allocates nothing:
//! a will is bytes, and the child carries it out with system calls on memory that was allocated
//! before.

#![expect(unsafe_code, reason = "forks, and calls what rustix has no safe wrapper for")]

mod kept;
mod steps;
mod will;

use std::io::{self, IoSlice};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, send, sendmsg, socketpair,
};
use rustix::process::{Pid, WaitOptions, waitpid};

pub use will::{Step, Will};

use self::steps::Workspace;
use self::will::{CONNECTION, DISMISSED, LISTENER, WILL_LEN_MAX};

/// What a guardian sends when it has a session of its own.
const READY: u8 = 0;

/// The name of the process, as `ps` shows it: not the program's own, by which a user may end the
/// program.
const NAME: &[u8; 16] = b"vm-guardian\0\0\0\0\0";

/// A process that carries out a will when this one has ended without dismissing it.
///
/// A guardian that is dropped carries out the will too: call [`Guardian::dismiss`] if nothing is
/// left to do.
#[derive(Debug)]
pub struct Guardian {
    /// `None` after [`Guardian::leave`].
    pipe: Option<OwnedFd>,
    child: Pid,
}

impl Guardian {
    /// Starts a guardian that holds `socket`; its will is empty.
    ///
    /// Start it before large memory is allocated: the child has a copy of this process's memory,
    /// which the kernel shares until this process writes to it.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error; `EAGAIN` if the user may have no further process.
    pub fn start(socket: BorrowedFd<'_>) -> io::Result<Guardian> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let workspace = Workspace::new();
        let blocked = BlockedSignals::block_all()?;
        // SAFETY:
        // - The child calls `guard`, which never returns and calls only what fork(2) allows in the
        //   child of a process with several threads: it allocates nothing and takes no lock.
        // - What it reads was made before the fork: `workspace`, and two descriptors.
        let child = unsafe { libc::fork() };
        if child == 0 {
            guard(theirs.as_raw_fd(), socket.as_raw_fd(), workspace);
        }
        // Read before another call changes it.
        let refused = io::Error::last_os_error();
        drop(blocked);
        // -1 says that the kernel refused; `Pid::from_raw` must not get it.
        let child = Pid::from_raw(child.max(0)).ok_or(refused)?;
        // Only the child may have this end: otherwise this process could not notice that the child
        // has ended.
        drop(theirs);
        let guardian = Guardian { pipe: Some(ours), child };
        guardian.wait_until_ready()?;
        Ok(guardian)
    }

    /// Waits until no signal for this process's terminal or group reaches the guardian any more.
    fn wait_until_ready(&self) -> io::Result<()> {
        let pipe = self.pipe.as_ref().expect("taken with the guardian");
        loop {
            match recv(pipe, &mut [0; 1][..], RecvFlags::empty()) {
                Ok((1.., _)) => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Replaces the will, which the guardian carries out if this process ends from now on.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error: `EPIPE` if the guardian has ended, and
    /// [`io::ErrorKind::InvalidInput`] for a will that is too long.
    pub fn replace_will(&self, will: &Will) -> io::Result<()> {
        if will.bytes().len() > WILL_LEN_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.send(will.bytes())
    }

    /// Makes the guardian keep a connection open, and read and discard what comes by it, while it
    /// carries out a will. The peer then sees no end of the connection before the will has told it
    /// to stop.
    ///
    /// # Errors
    ///
    /// As for [`Guardian::replace_will`].
    pub fn keep_open(&self, connection: BorrowedFd<'_>) -> io::Result<()> {
        self.send_with(CONNECTION, connection)
    }

    /// Makes the guardian accept new connections to a listening socket, and keep them open as well.
    ///
    /// # Errors
    ///
    /// As for [`Guardian::replace_will`].
    pub fn keep_listening(&self, listener: BorrowedFd<'_>) -> io::Result<()> {
        self.send_with(LISTENER, listener)
    }

    fn send_with(&self, what: u8, fd: BorrowedFd<'_>) -> io::Result<()> {
        let pipe = self.pipe.as_ref().expect("taken with the guardian");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        let fits = control.push(SendAncillaryMessage::ScmRights(&fds));
        assert!(fits, "the buffer was made for one descriptor");
        sendmsg(pipe, &[IoSlice::new(&[what])], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Ends the guardian; it does not carry out its will.
    pub fn dismiss(self) {
        // An error means that the guardian has ended already.
        drop(self.send(&[DISMISSED]));
    }

    /// Makes the guardian carry out its will at once, and does not wait for it.
    ///
    /// The kernel keeps its exit status until this process ends.
    pub fn leave(mut self) {
        drop(self.pipe.take());
    }

    /// Returns the guardian's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_raw_nonzero().get().unsigned_abs()
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        let pipe = self.pipe.as_ref().expect("taken with the guardian");
        let sent = send(pipe, message, SendFlags::NOSIGNAL)?;
        // The kernel takes a packet whole.
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        // The guardian waits for the end of the pipe.
        if self.pipe.take().is_none() {
            return;
        }
        loop {
            match waitpid(Some(self.child), WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                // The child has ended; a caller that waits for all children may have reaped it.
                _ => return,
            }
        }
    }
}

/// All signals are blocked for this thread while this lives, so that a child inherits the block.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn block_all() -> io::Result<BlockedSignals> {
        // SAFETY: a set of signals is plain bytes, and the next call fills it.
        let mut all: libc::sigset_t = unsafe { mem::zeroed() };
        // SAFETY: `all` is valid for writes.
        unsafe { libc::sigfillset(&raw mut all) };
        // SAFETY: a set of signals is plain bytes, and the next call fills it.
        let mut before: libc::sigset_t = unsafe { mem::zeroed() };
        // SAFETY: both sets are valid; the call changes the mask of this thread only.
        let code =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
        if code == 0 { Ok(BlockedSignals(before)) } else { Err(io::Error::from_raw_os_error(code)) }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by the same call, which cannot fail with a valid set.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut());
        }
    }
}

/// Runs the child: waits until the other process ends, and carries out its will.
fn guard(pipe: RawFd, socket: RawFd, mut workspace: Workspace) -> ! {
    become_a_process_of_its_own();
    close_all_but(pipe, socket);
    // SAFETY: the descriptor was inherited, and stays open until the process ends.
    let pipe = unsafe { BorrowedFd::borrow_raw(pipe) };
    // SAFETY: as above.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    // If this fails, the other process waits for it in vain, and has changed nothing yet: it sees the end
    // of the pipe as soon as this process ends.
    let is_ready = send(pipe, &[READY], SendFlags::NOSIGNAL).is_ok();
    if is_ready && !workspace.wait_for_the_end(pipe) {
        workspace.carry_out(socket);
    }
    // No destructor runs, and no handler that the other process registered: `workspace` is never
    // freed.
    //
    // SAFETY: the call takes a number.
    unsafe { libc::_exit(0) }
}

fn become_a_process_of_its_own() {
    // Signals for the terminal's processes, or for the process group, do not reach it.
    //
    // SAFETY: the call takes nothing. It fails only for the leader of a process group, which a
    // child that was just forked is not.
    unsafe { libc::setsid() };
    // SAFETY: the name is 16 bytes with their terminator, as PR_SET_NAME wants.
    unsafe { libc::prctl(libc::PR_SET_NAME, NAME.as_ptr()) };
    // Makes the out-of-memory killer choose other processes first. Without the permission for that,
    // the value stays as it is.
    //
    // SAFETY: the path is a C string.
    let file = unsafe { libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY) };
    if file >= 0 {
        // SAFETY: the bytes are a constant of that length.
        unsafe { libc::write(file, b"-1000".as_ptr().cast(), 5) };
        // SAFETY: it was opened above.
        unsafe { libc::close(file) };
    }
}

/// Closes every descriptor but two, so that the guardian does not keep the other process's files
/// open.
fn close_all_but(one: RawFd, other: RawFd) {
    let number = |fd: RawFd| u32::try_from(fd).unwrap_or_default();
    let (low, high) = (number(one.min(other)), number(one.max(other)));
    let ranges = [
        (0, low.checked_sub(1)),
        (low.saturating_add(1), high.checked_sub(1)),
        (high.saturating_add(1), Some(libc::c_uint::MAX)),
    ];
    for (first, last) in ranges {
        let Some(last) = last.filter(|&last| first <= last) else { continue };
        // A kernel before 5.9 has no such call; the descriptors then stay open as long as the
        // guardian lives, a second after the other process at most.
        //
        // SAFETY: the descriptors of this process belong to no value that is used again: the child
        // never returns from `guard`.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) };
    }
}
