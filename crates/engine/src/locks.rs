//! Tests whether another program holds a lock on a file, as some do on a disk image.

#![expect(unsafe_code, reason = "rustix has no F_OFD_GETLK")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Returns whether any byte of `file` is locked, by another open file description (Linux 3.15) or
/// by a process.
///
/// # Errors
///
/// Returns the kernel's error; a file system that knows no locks is one (`EINVAL`, `ENOLCK`).
pub fn is_locked(file: &File) -> io::Result<bool> {
    // A lock for writing conflicts with every other lock; length 0 means up to the end of the file.
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK.try_into().expect("a small number"),
        l_whence: libc::SEEK_SET.try_into().expect("a small number"),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY:
    // - The descriptor is open as long as `file` lives.
    // - The kernel reads and writes `lock`, a live value of its type, and does not keep the
    //   pointer.
    let result =
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, std::ptr::from_mut(&mut lock)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a lock for reading on one byte, which belongs to the open file description.
    fn lock(file: &File) {
        let mut lock = libc::flock {
            l_type: libc::F_RDLCK.try_into().unwrap(),
            l_whence: libc::SEEK_SET.try_into().unwrap(),
            l_start: 100,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: as in `is_locked`.
        let result = unsafe {
            libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, std::ptr::from_mut(&mut lock))
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn a_lock_of_another_description_is_seen_and_an_own_one_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = File::open(file.path()).unwrap();
        assert!(!is_locked(file.as_file()).unwrap());
        lock(&other);
        assert!(is_locked(file.as_file()).unwrap());
        assert!(!is_locked(&other).unwrap());
        drop(other);
        assert!(!is_locked(file.as_file()).unwrap());
    }
}
