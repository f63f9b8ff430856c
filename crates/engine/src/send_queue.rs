//! How much lies in a socket that the other end has not read.

#![expect(unsafe_code, reason = "SIOCOUTQ has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Returns how much of the room of a Unix socket is taken by what was sent and not read: the kernel's
/// buffers count, which are larger than the bytes in them. A sender waits for room as soon as this is
/// as much as the socket's send buffer (`SO_SNDBUF`); the last buffer may exceed it (Linux 2.6 to 6.18).
///
/// # Errors
///
/// Returns the kernel's error: `ENOTTY` or `EINVAL` if this is no socket.
pub fn queued_len(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut len: libc::c_int = 0;
    // `SIOCOUTQ` of a Unix socket is `TIOCOUTQ` (Linux's `unix_ioctl`).
    let request = libc::TIOCOUTQ;
    // SAFETY: the kernel writes one `int`, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut len) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(len).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_was_sent_counts_until_it_is_read() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(queued_len(theirs.as_fd()).unwrap(), 0);
        theirs.write_all(&[7; 100]).unwrap();
        assert!(queued_len(theirs.as_fd()).unwrap() >= 100);
        ours.read_exact(&mut [0; 100]).unwrap();
        assert_eq!(queued_len(theirs.as_fd()).unwrap(), 0);
        assert!(queued_len(tempfile::tempfile().unwrap().as_fd()).is_err());
    }
}
