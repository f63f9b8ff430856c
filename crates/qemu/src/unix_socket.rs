//! Connecting to a Unix socket without waiting in the kernel.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

/// Connects to the socket at `path`.
///
/// A blocking `connect` waits for ever while the listener's backlog is full, and a signal with a
/// handler does not end it (Linux). This function then fails with `EAGAIN`. The socket that it
/// returns does not block.
///
/// # Errors
///
/// The kernel's error.
pub fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = match (SocketAddrUnix::new(path), path.parent(), path.file_name()) {
        (Ok(address), ..) => address,
        // An address has at most 107 bytes: a longer path is shortened by opening its directory.
        (Err(Errno::NAMETOOLONG), Some(directory), Some(name)) => {
            let directory = open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
            let address = SocketAddrUnix::new(short.join(name))?;
            return rustix::net::connect(&socket, &address).map(|()| socket);
        }
        (Err(errno), ..) => return Err(errno),
    };
    rustix::net::connect(&socket, &address).map(|()| socket)
}

/// Tells whether a process listens at `path`.
#[must_use]
pub(crate) fn is_served(path: &Path) -> bool {
    // If the backlog is full, there is a listener.
    matches!(connect(path), Ok(_) | Err(Errno::AGAIN))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_path_longer_than_an_address_is_connected_to() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("x".repeat(60)).join("y".repeat(60));
        std::fs::create_dir_all(&deep).unwrap();
        let short = directory.path().join("s");
        let _listener = UnixListener::bind(&short).unwrap();
        std::fs::rename(&short, deep.join("vm.sock")).unwrap();
        assert!(connect(&deep.join("vm.sock")).is_ok());
        assert_eq!(connect(&deep.join("none")).unwrap_err(), Errno::NOENT);
    }

    #[test]
    fn a_listener_whose_backlog_is_full_is_served_and_does_not_block() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("full.sock");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let clients: Vec<OwnedFd> = std::iter::from_fn(|| connect(&path).ok()).collect();
        assert!(!clients.is_empty());
        assert!(is_served(&path));
        drop(listener);
        assert!(!is_served(&path));
    }
}
