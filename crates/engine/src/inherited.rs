//! Descriptors that another process opened for this one and named by their numbers.

#![expect(unsafe_code, reason = "duplicates a descriptor that is only known by its number")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Returns a new descriptor of what is open as `number`.
///
/// The inherited descriptor stays open: a process that waits until the last writer or reader has
/// closed its end waits until this process has ended.
///
/// # Errors
///
/// Returns the kernel's error: `EBADF` if nothing is open under that number.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers only, and the kernel checks the first of them.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and no other code knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn an_open_number_becomes_a_descriptor_and_a_closed_one_an_error() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = Vec::new();
        File::from(inherited(file.as_raw_fd()).unwrap()).read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"");
        let error = inherited(RawFd::MAX).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
