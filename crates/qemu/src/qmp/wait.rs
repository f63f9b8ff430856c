//! How long a connection may wait, and what ends a wait early.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::proc::is_process_stopped;

/// How often a wait looks at the stop flag.
const STOP_INTERVAL: Duration = Duration::from_millis(100);

/// After the stop flag is set, how much longer to wait for the answer to a command already sent.
///
/// A QEMU that answers at all answers sooner, and then we know what the command did.
const ANSWER_GRACE: Duration = Duration::from_millis(300);

/// How long QEMU's process may be stopped before waiting for its answer ends.
pub(crate) const STILL_TIMEOUT: Duration = Duration::from_secs(3);

/// How long each command may still take when the time for putting things back is over.
const LAST_CHANCE: Duration = Duration::from_millis(100);

/// What limits the waits of a connection, besides the timeout of each command.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    stop: Option<Arc<AtomicBool>>,
    /// QEMU's process, if it is known.
    process: Option<u32>,
    /// How the last wait for an answer ended; the next one may be shorter.
    last: LastWait,
    /// Set while things are put back: the stop flag is ignored, and the waits end at this instant.
    put_back_until: Option<Instant>,
}

/// How a wait for an answer has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LastWait {
    /// With an answer, or with an error that says nothing about the next wait.
    Answered,
    /// QEMU's process was stopped.
    ProcessStopped,
    /// QEMU did not answer within the limit of what was put back.
    SilentPutBack,
}

impl Limits {
    pub(super) fn new(stop: Option<Arc<AtomicBool>>) -> Limits {
        Limits { stop, process: None, last: LastWait::Answered, put_back_until: None }
    }

    /// Makes every wait end when `stop` is set.
    pub(super) fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.stop = Some(stop);
    }

    /// Makes every wait for an answer end when this process, QEMU's, has been stopped for a while.
    pub(super) fn set_process(&mut self, pid: u32) {
        self.process = Some(pid);
    }

    /// Returns QEMU's process, where it is known.
    pub(super) fn process(&self) -> Option<u32> {
        self.process
    }

    /// Notes how a wait for an answer has ended.
    pub(super) fn note(&mut self, last: LastWait) {
        self.last = last;
    }

    /// Ignores the stop flag from now on, for `limit` in all; returns the value for
    /// [`Limits::leave`].
    ///
    /// If the flag is ignored already, the end that was set first stays.
    pub(super) fn ignore_stop(&mut self, limit: Duration) -> Option<Instant> {
        let before = self.put_back_until;
        self.put_back_until = before.or_else(|| Some(after(limit)));
        before
    }

    /// Ends what [`Limits::ignore_stop`] began.
    pub(super) fn leave(&mut self, before: Option<Instant>) {
        self.put_back_until = before;
    }

    /// Tells whether things are put back.
    pub(super) fn is_putting_back(&self) -> bool {
        self.put_back_until.is_some()
    }

    /// Tells whether the stop flag is set and is not ignored.
    pub(super) fn is_stopped(&self) -> bool {
        let is_set = self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
        is_set && self.put_back_until.is_none()
    }

    /// Begins a wait that does not depend on an answer, such as for an event.
    pub(super) fn wait(&self, timeout: Duration) -> Wait {
        let deadline = match self.put_back_until {
            None => after(timeout),
            Some(end) => after(timeout).min(end.max(after(LAST_CHANCE))),
        };
        let stop = self.stop.clone().filter(|_| self.put_back_until.is_none());
        Wait {
            stop,
            process: None,
            started: Instant::now(),
            deadline,
            grace: Duration::ZERO,
            stopped_until: None,
            still_timeout: STILL_TIMEOUT,
            still_until: None,
        }
    }

    /// Begins a wait for the answer to a command.
    pub(super) fn wait_for_answer(&self, timeout: Duration) -> Wait {
        let was_still = self.last == LastWait::ProcessStopped;
        let still_timeout = if was_still { LAST_CHANCE } else { STILL_TIMEOUT };
        // What is put back waits for its limit once, and not for each of its commands.
        let is_silent = self.put_back_until.is_some() && self.last == LastWait::SilentPutBack;
        let timeout = if is_silent { LAST_CHANCE } else { timeout };
        let process = self.process;
        Wait { grace: ANSWER_GRACE, process, still_timeout, ..self.wait(timeout) }
    }
}

/// A wait that has begun.
#[derive(Debug)]
pub(super) struct Wait {
    stop: Option<Arc<AtomicBool>>,
    process: Option<u32>,
    started: Instant,
    deadline: Instant,
    /// How long the wait goes on after the stop flag was set.
    grace: Duration,
    stopped_until: Option<Instant>,
    still_timeout: Duration,
    /// When the process will have been stopped for too long.
    still_until: Option<Instant>,
}

/// Why a wait ended without what it waited for.
#[derive(Debug)]
pub(super) enum WaitEnd {
    /// The time is over.
    TimedOut,
    /// The caller asked to stop.
    Stopped,
    /// QEMU's process was stopped, by SIGSTOP or a debugger, and still is.
    ProcessStopped {
        /// The process.
        pid: u32,
    },
    /// The kernel refused to wait.
    Io(io::Error),
}

impl Wait {
    /// Checks the limits; returns how long the caller may wait until the next check.
    pub(super) fn check(&mut self) -> Result<Duration, WaitEnd> {
        let now = Instant::now();
        let mut until = self.deadline.min(now + STOP_INTERVAL);
        if self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            let end = *self.stopped_until.get_or_insert(now + self.grace);
            if now >= end {
                return Err(WaitEnd::Stopped);
            }
            until = until.min(end);
        }
        // An answer that comes soon costs no look into /proc: the guest may stand still meanwhile.
        let is_due = self.still_timeout < STILL_TIMEOUT || now >= self.started + STOP_INTERVAL;
        match self.process.filter(|&pid| is_due && is_process_stopped(pid)) {
            Some(pid) if now >= *self.still_until.get_or_insert(now + self.still_timeout) => {
                return Err(WaitEnd::ProcessStopped { pid });
            }
            Some(_) => {}
            None => self.still_until = None,
        }
        if now >= self.deadline { Err(WaitEnd::TimedOut) } else { Ok(until - now) }
    }

    /// Waits until `fd` is ready for `what`, or has ended.
    pub(super) fn until_ready(&mut self, fd: impl AsFd, what: PollFlags) -> Result<(), WaitEnd> {
        loop {
            let slice = Timespec::try_from(self.check()?).expect("a tenth of a second");
            match poll(&mut [PollFd::new(&fd, what)], Some(&slice)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(WaitEnd::Io(errno.into())),
            }
        }
    }

    /// Sleeps before a retry, for at most `interval`.
    pub(super) fn pause(&mut self, interval: Duration) -> Result<(), WaitEnd> {
        thread::sleep(self.check()?.min(interval));
        self.check().map(drop)
    }

    /// Returns how long it has lasted, in tenths of a second.
    pub(super) fn lasted(&self) -> Duration {
        let tenths = (self.started.elapsed().as_millis() + 50) / 100;
        Duration::from_millis(u64::try_from(tenths * 100).unwrap_or(u64::MAX))
    }
}

/// Returns the instant `timeout` from now. A timeout past the end of the clock means a day.
fn after(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(86_400))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped() -> Limits {
        Limits::new(Some(Arc::new(AtomicBool::new(true))))
    }

    #[test]
    fn a_set_flag_ends_a_wait_at_once_and_an_answer_s_after_a_grace() {
        let limits = stopped();
        let hour = Duration::from_secs(3600);
        assert!(matches!(limits.wait(hour).check(), Err(WaitEnd::Stopped)));
        let mut answer = limits.wait_for_answer(hour);
        assert!(answer.check().unwrap() <= ANSWER_GRACE);
        thread::sleep(ANSWER_GRACE);
        assert!(matches!(answer.check(), Err(WaitEnd::Stopped)));
    }

    #[test]
    fn what_puts_things_back_ignores_the_flag_and_has_one_limit_in_all() {
        let mut limits = stopped();
        let outer = limits.ignore_stop(Duration::ZERO);
        let inner = limits.ignore_stop(Duration::from_secs(3600));
        assert!(!limits.is_stopped());
        // The time is over, and the command is waited for a moment all the same.
        let mut wait = limits.wait(Duration::from_secs(3600));
        assert!(wait.check().is_ok());
        thread::sleep(LAST_CHANCE);
        assert!(matches!(wait.check(), Err(WaitEnd::TimedOut)));
        limits.leave(inner);
        assert!(!limits.is_stopped());
        limits.leave(outer);
        assert!(limits.is_stopped());
    }
}
