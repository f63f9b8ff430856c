//! Connecting to a monitor's socket without blocking in the kernel.
//!
//! QEMU serves one client of a monitor at a time, and two more can wait (its backlog is 1, QEMU 7.2
//! to 11.1). If the backlog is full, `connect` fails, and we retry for a while.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;

use super::error::QmpError;
use super::holders::Holders;
use super::wait::{Wait, WaitEnd};
use crate::{proc, unix_socket};

/// The pause between two attempts when the backlog is full.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Connects to the socket at `path`.
pub(super) fn connect_within(path: &Path, wait: &mut Wait) -> Result<UnixStream, QmpError> {
    if is_of_libvirt(path) {
        return Err(QmpError::OfLibvirt { path: path.to_owned() });
    }
    loop {
        match unix_socket::connect(path) {
            Ok(socket) => return Ok(UnixStream::from(socket)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => {
                return Err(QmpError::Connect { path: path.to_owned(), source: errno.into() });
            }
        }
        match wait.pause(RETRY_INTERVAL) {
            Ok(()) => {}
            Err(WaitEnd::Stopped) => {
                let when = "while connecting to the monitor".to_owned();
                return Err(QmpError::Stopped { when, is_sent: false });
            }
            Err(WaitEnd::TimedOut | WaitEnd::ProcessStopped { .. } | WaitEnd::Io(_)) => {
                let path = path.to_owned();
                let (after, holders) = (wait.lasted(), Holders::of(&path));
                return Err(QmpError::NoRoom { path, after, holders });
            }
        }
    }
}

/// Tells whether this is libvirt's own monitor of a VM, of the system or of a user: its socket is
/// `.../libvirt/qemu/.../domain-ID-NAME/monitor.sock` (libvirt 11.3).
///
/// libvirt keeps it as long as the VM runs. If libvirtd restarts, a waiting client gets the monitor
/// instead, and libvirtd believes that the VM has crashed.
pub(crate) fn is_of_libvirt(path: &Path) -> bool {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let words: Vec<&str> = path.iter().filter_map(|word| word.to_str()).collect();
    let is_below = words.windows(2).any(|pair| pair == ["libvirt", "qemu"]);
    matches!(words.as_slice(), [.., domain, "monitor.sock"] if domain.starts_with("domain-"))
        && is_below
}

/// Returns the QEMU that made the listening socket of `stream`; `None` if another process made it,
/// as libvirt may have.
pub(super) fn process_of(stream: &UnixStream) -> Option<u32> {
    let peer = rustix::net::sockopt::socket_peercred(stream).ok()?;
    let pid = peer.pid.as_raw_pid().unsigned_abs();
    proc::is_qemu(pid).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitors_of_libvirt_are_known_by_their_paths() {
        for path in [
            "/var/lib/libvirt/qemu/domain-3-web/monitor.sock",
            "/run/user/1000/libvirt/qemu/run/domain-1-a b/monitor.sock",
            "/proc/77/root/var/lib/libvirt/qemu/domain-3-web/monitor.sock",
        ] {
            assert!(is_of_libvirt(Path::new(path)), "{path}");
        }
        for path in ["/run/domain-3-web/monitor.sock", "/var/lib/libvirt/qemu/web/monitor.sock"] {
            assert!(!is_of_libvirt(Path::new(path)), "{path}");
        }
    }
}
