//! SIGINT, SIGTERM, SIGQUIT and SIGHUP stop a verb cleanly; SIGUSR1 prints its progress; SIGTSTP is
//! delayed until the VM runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGXFSZ};

use crate::exit_code::Code;
use crate::failure::Failure;

/// The signals that came so far.
#[derive(Debug)]
pub(crate) struct Signals {
    pub(crate) stop: Arc<AtomicBool>,
    which: Arc<AtomicUsize>,
    pub(crate) asked: Arc<AtomicBool>,
}

impl Signals {
    /// Registers the signals.
    pub(crate) fn listen() -> std::io::Result<Signals> {
        let signals = Signals {
            stop: Arc::new(AtomicBool::new(false)),
            which: Arc::new(AtomicUsize::new(0)),
            asked: Arc::new(AtomicBool::new(false)),
        };
        // SIGHUP stops the verb, because a lost terminal must not leave the VM paused. But nohup
        // makes a process ignore SIGHUP, and a shell without job control makes its background
        // processes ignore SIGQUIT.
        let others = [SIGHUP, SIGQUIT].into_iter().filter(|&signal| !is_ignored(signal));
        for signal in [SIGINT, SIGTERM].into_iter().chain(others) {
            let number = usize::try_from(signal).unwrap_or_default();
            // Registers `which` first, so that a thread that sees `stop` finds it set.
            signal_hook::flag::register_usize(signal, Arc::clone(&signals.which), number)?;
            signal_hook::flag::register(signal, Arc::clone(&signals.stop))?;
        }
        signal_hook::flag::register(SIGUSR1, Arc::clone(&signals.asked))?;
        // At the limit of file sizes the kernel would end this process, with the VM paused. If the
        // signal is caught, the write fails instead, as on a full disk.
        signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
        Ok(signals)
    }

    /// If a signal caused `failure`, gives it the status of that signal, and the hint `left`, which
    /// says what is unchanged.
    pub(crate) fn explain(&self, failure: Failure, left: &str) -> Failure {
        if failure.code == Code::Interrupted {
            Failure { code: self.code(), ..failure }.hint(left)
        } else {
            failure
        }
    }

    /// Whether a signal told this process to stop.
    pub(crate) fn are_set(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The exit status of a verb that was stopped.
    pub(crate) fn code(&self) -> Code {
        match i32::try_from(self.which.load(Ordering::Relaxed)) {
            Ok(SIGTERM) => Code::Terminated,
            Ok(SIGHUP) => Code::HungUp,
            Ok(SIGQUIT) => Code::Quit,
            _ => Code::Interrupted,
        }
    }
}

/// Delays SIGTSTP (Ctrl-Z) until this is dropped: a suspended process could not resume the VM that
/// it has paused.
#[derive(Debug)]
pub(crate) struct NoSuspend {
    asked: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
}

impl NoSuspend {
    /// Delays the signal from now on.
    pub(crate) fn begin() -> std::io::Result<NoSuspend> {
        let held = NoSuspend { asked: Arc::default(), is_over: Arc::default() };
        if !is_ignored(SIGTSTP) {
            let is_over = Arc::clone(&held.is_over);
            signal_hook::flag::register_conditional_default(SIGTSTP, is_over)?;
            signal_hook::flag::register(SIGTSTP, Arc::clone(&held.asked))?;
        }
        Ok(held)
    }
}

impl Drop for NoSuspend {
    /// Suspends this process now if the signal has come; SIGCONT resumes it.
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if self.asked.load(Ordering::Relaxed) {
            // It cannot fail for a signal that has a default.
            let _ = signal_hook::low_level::emulate_default_handler(SIGTSTP);
        }
    }
}

/// Whether the parent process made this one ignore `signal`, as nohup does.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    ignored.unwrap_or_default() & (1 << (signal - 1)) != 0
}
