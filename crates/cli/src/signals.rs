//! SIGINT, SIGTERM and SIGHUP stop a verb cleanly; SIGUSR1 asks how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};

use crate::exit_code::Code;

/// What the signals have said so far.
#[derive(Debug)]
pub(crate) struct Signals {
    pub(crate) stop: Arc<AtomicBool>,
    which: Arc<AtomicUsize>,
    pub(crate) asked: Arc<AtomicBool>,
}

impl Signals {
    /// Listens from now on.
    pub(crate) fn listen() -> std::io::Result<Signals> {
        let signals = Signals {
            stop: Arc::new(AtomicBool::new(false)),
            which: Arc::new(AtomicUsize::new(0)),
            asked: Arc::new(AtomicBool::new(false)),
        };
        // A lost connection must not leave the VM paused; under nohup it is nothing.
        let hang_up = (!is_ignored(SIGHUP)).then_some(SIGHUP);
        for signal in [SIGINT, SIGTERM].into_iter().chain(hang_up) {
            let number = usize::try_from(signal).unwrap_or_default();
            // `which` first: whoever sees `stop` finds it set.
            signal_hook::flag::register_usize(signal, Arc::clone(&signals.which), number)?;
            signal_hook::flag::register(signal, Arc::clone(&signals.stop))?;
        }
        signal_hook::flag::register(SIGUSR1, Arc::clone(&signals.asked))?;
        // At the limit of file sizes the kernel would end this process, with the VM paused. Once
        // the signal is caught the write fails instead, as on a full disk.
        signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
        Ok(signals)
    }

    /// Whether a signal has asked to stop.
    pub(crate) fn are_set(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The exit status of a verb that was stopped.
    pub(crate) fn code(&self) -> Code {
        match i32::try_from(self.which.load(Ordering::Relaxed)) {
            Ok(SIGTERM) => Code::Terminated,
            Ok(SIGHUP) => Code::HungUp,
            _ => Code::Interrupted,
        }
    }
}

/// Whether whoever started this process has it ignore `signal`, as nohup does.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    ignored.unwrap_or_default() & (1 << (signal - 1)) != 0
}
