//! Watches QEMU while it waits for room in its stream: ends a stream that keeps it waiting for too long, and
//! notices that QEMU has ended it.
//!
//! QEMU's migration thread holds an RCU read lock while it waits for room in the socket. If another client
//! sends a command that waits for RCU, QEMU's main loop waits for that thread, and every command after it:
//! a `device_add` that fails (QEMU 10.0.2 and 11.1, `drain_call_rcu`). The main loop then waits for a
//! thread; while it flushes a slow disk it does not.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};
use vmfile_engine::ProcessMemory;
use vmfile_stream::held::has_ended;

use crate::error::{SaveError, UserfaultError};

/// How long QEMU's main loop may wait for a thread.
const STUCK_TIMEOUT: Duration = Duration::from_secs(10);

/// How often its main loop is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Runs `work` while QEMU, in `process`, waits for room in a socket; `ours` is our end of that. If QEMU's
/// main loop waits for another thread for ten seconds, ends the stream: QEMU's migration fails, and QEMU
/// goes on. Calls `ended` once the stream has ended.
pub(super) fn unless_stuck<T>(
    (process, ours): (&ProcessMemory, BorrowedFd<'_>),
    ended: impl Fn() + Send,
    work: impl FnOnce() -> Result<T, SaveError>,
) -> Result<T, SaveError> {
    let has_hung_up = AtomicBool::new(false);
    let (done, is_done) = channel::<()>();
    let hung_up = &has_hung_up;
    let watch = move || {
        let mut waits_since = None;
        while is_done.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            // If it cannot be asked, it is asked once more when all is copied.
            if has_ended(ours).unwrap_or(false) {
                return ended();
            }
            // Who may read the memory may look at this as well; if not, every command has its own limit.
            if !process.main_thread_waits().unwrap_or(false) {
                waits_since = None;
            } else if waits_since.get_or_insert_with(Instant::now).elapsed() >= STUCK_TIMEOUT {
                hung_up.store(true, Ordering::Relaxed);
                // If it fails, QEMU has closed its end, and does not wait.
                let _ = shutdown(ours, Shutdown::Both);
                return ended();
            }
        }
    };
    let result = thread::scope(|scope| {
        thread::Builder::new().spawn_scoped(scope, watch).map_err(SaveError::Workers)?;
        let result = work();
        drop(done);
        result
    });
    if has_hung_up.into_inner() {
        return Err(UserfaultError::Stuck { limit: STUCK_TIMEOUT }.into());
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
        let process = ProcessMemory::open(std::process::id()).unwrap();
        assert_eq!(unless_stuck((&process, ours.as_fd()), || (), || Ok(7)).unwrap(), 7);
        theirs.write_all(b"more").unwrap();
    }
}
