//! Ends a stream that keeps QEMU waiting for too long.
//!
//! QEMU's migration thread holds an RCU read lock while it waits for room in the socket. If another client
//! sends a command that waits for RCU, QEMU's main loop waits for that thread, and every command after it:
//! a `device_add` that fails (QEMU 10.0.2 and 11.1, `drain_call_rcu`).

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};

use crate::error::{SaveError, UserfaultError};

/// How long QEMU may be kept waiting while it has commands of ours to carry out.
const HOLD_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs `work`, whose commands QEMU carries out while it waits for room in a socket; `ours` is our end of
/// that. If it takes longer than ten seconds, ends the stream: QEMU's migration fails, and QEMU goes on.
pub(super) fn within_time<T>(
    ours: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, SaveError>,
) -> Result<T, SaveError> {
    let has_hung_up = AtomicBool::new(false);
    let (done, is_done) = channel::<()>();
    let hung_up = &has_hung_up;
    let watch = move || {
        if is_done.recv_timeout(HOLD_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            hung_up.store(true, Ordering::Relaxed);
            // If it fails, QEMU has closed its end, and does not wait.
            let _ = shutdown(ours, Shutdown::Both);
        }
    };
    let result = thread::scope(|scope| {
        thread::Builder::new().spawn_scoped(scope, watch).map_err(SaveError::Workers)?;
        let result = work();
        drop(done);
        result
    });
    if has_hung_up.into_inner() {
        return Err(UserfaultError::Stuck { limit: HOLD_TIMEOUT }.into());
    }
    result
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_is_done_in_time_keeps_the_stream() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(within_time(ours.as_fd(), || Ok(7)).unwrap(), 7);
        theirs.write_all(b"more").unwrap();
    }
}
