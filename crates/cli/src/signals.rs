//! SIGINT and SIGTERM stop a verb cleanly; SIGUSR1 asks how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

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
        for signal in [SIGINT, SIGTERM] {
            let number = usize::try_from(signal).unwrap_or_default();
            // `which` first: whoever sees `stop` finds it set.
            signal_hook::flag::register_usize(signal, Arc::clone(&signals.which), number)?;
            signal_hook::flag::register(signal, Arc::clone(&signals.stop))?;
        }
        signal_hook::flag::register(SIGUSR1, Arc::clone(&signals.asked))?;
        Ok(signals)
    }

    /// The exit status of a verb that was stopped.
    pub(crate) fn code(&self) -> Code {
        match i32::try_from(self.which.load(Ordering::Relaxed)) {
            Ok(SIGTERM) => Code::Terminated,
            _ => Code::Interrupted,
        }
    }
}
