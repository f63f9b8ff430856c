//! Incoming migration: a waiting QEMU loads a stream.
//!
//! QEMU must have been started with `-incoming defer`. The stream arrives on a descriptor: a socket
//! or a pipe whose other end is ours, or a file.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::pass_fd;
use crate::qmp::{QmpError, STILL_TIMEOUT};
use crate::version::Feature;
use crate::vm::{PUT_BACK_TIMEOUT, RunState, Vm, VmError};

/// The name under which QEMU keeps the stream's descriptor until it reads it.
const STREAM_NAME: &str = "vmfile-stream";

/// Shortest and longest pause between two polls of a loading QEMU.
///
/// The first is short because a small stream loads in a few milliseconds; the last keeps a load
/// of minutes from costing a CPU.
const POLL_INTERVALS: (Duration, Duration) =
    (Duration::from_micros(250), Duration::from_millis(20));

/// How long one poll may take: QEMU may be unable to answer while it loads a device. It is longer
/// than `STILL_TIMEOUT`, so that a stopped process is reported as such and not as a timeout.
const POLL_TIMEOUT: Duration = STILL_TIMEOUT.saturating_mul(2);

/// A stream was not loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The query of QEMU's state failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// QEMU does not wait for a stream.
    #[error("QEMU is {found}, expected inmigrate, waiting for a stream")]
    NotWaiting {
        /// The state QEMU reports.
        found: RunState,
    },
    /// QEMU refused the stream. Its log (standard error) usually says more.
    #[error("QEMU did not load the stream: {reason}")]
    Failed {
        /// QEMU's own words.
        reason: String,
    },
    /// QEMU ended while it loaded, as versions before 9.1 do when they refuse a stream.
    #[error("QEMU ended while it loaded the stream")]
    Ended,
    /// The load took too long.
    #[error("QEMU has not loaded the stream in time")]
    TimedOut,
    /// The caller asked to stop.
    #[error("stopped while QEMU loaded the stream")]
    Cancelled,
}

impl From<QmpError> for LoadError {
    fn from(error: QmpError) -> LoadError {
        if error.is_closed() { LoadError::Ended } else { LoadError::Vm(error.into()) }
    }
}

impl Vm {
    /// Checks that QEMU waits for [`Vm::load_stream`].
    ///
    /// # Errors
    ///
    /// [`LoadError::NotWaiting`] when it was not started with `-incoming defer`, or loads already.
    pub fn incoming_ready(&mut self) -> Result<(), LoadError> {
        let found = self.run_state()?;
        let migration = self.execute("query-migrate", Value::Null)?;
        if found == RunState::InMigrate && migration.get("status").is_none() {
            Ok(())
        } else {
            Err(LoadError::NotWaiting { found })
        }
    }

    /// Makes QEMU read a migration stream from `stream`; returns before it has read it.
    ///
    /// The descriptor is closed here once QEMU has it, so that QEMU sees the end when the caller
    /// closes the other end of a socket or pipe. Call [`Vm::wait_loaded`] next.
    ///
    /// # Errors
    ///
    /// [`LoadError::NotWaiting`], and whatever QEMU says about the descriptor.
    pub fn load_stream(&mut self, stream: OwnedFd) -> Result<(), LoadError> {
        self.incoming_ready()?;
        pass_fd::getfd(&mut self.qmp, STREAM_NAME, stream.as_fd())?;
        drop(stream);
        // QEMU 9.1 and later can stay after a failure, so that we can query the reason.
        let arguments = if self.version()?.has(Feature::ExitOnError) {
            json!({"uri": format!("fd:{STREAM_NAME}"), "exit-on-error": false})
        } else {
            json!({"uri": format!("fd:{STREAM_NAME}")})
        };
        if let Err(error) = self.execute("migrate-incoming", arguments) {
            // Return the reason for the refusal; this QEMU cannot be used any more anyway.
            let _ =
                self.unstoppable(PUT_BACK_TIMEOUT, |vm| pass_fd::closefd(&mut vm.qmp, STREAM_NAME));
            return Err(error.into());
        }
        Ok(())
    }

    /// Waits until QEMU has loaded the stream, `deadline` passes, or `cancelled` returns `true`.
    ///
    /// Afterwards the VM is paused, provided that QEMU was started with `-S`; `cont` lets it run.
    ///
    /// # Errors
    ///
    /// [`LoadError::Failed`] with QEMU's reason, [`LoadError::Ended`] when QEMU ended.
    pub fn wait_loaded(
        &mut self,
        deadline: Instant,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), LoadError> {
        let (mut interval, interval_max) = POLL_INTERVALS;
        loop {
            match self.qmp.execute_within("query-migrate", Value::Null, POLL_TIMEOUT) {
                Ok(answer) => match progress(&answer) {
                    Progress::Loaded => return Ok(()),
                    Progress::Failed(reason) => return Err(LoadError::Failed { reason }),
                    Progress::Loading => {}
                },
                Err(QmpError::Timeout { .. }) => {}
                Err(QmpError::Stopped { .. }) => return Err(LoadError::Cancelled),
                Err(error) => return Err(error.into()),
            }
            if cancelled() {
                return Err(LoadError::Cancelled);
            }
            if Instant::now() >= deadline {
                return Err(LoadError::TimedOut);
            }
            thread::sleep(interval);
            interval = interval.saturating_mul(2).min(interval_max);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Loading,
    Loaded,
    Failed(String),
}

fn progress(answer: &Value) -> Progress {
    let text = |key| answer.get(key).and_then(Value::as_str);
    match text("status") {
        Some("completed") => Progress::Loaded,
        Some("failed" | "cancelled") => {
            let reason = text("error-desc").unwrap_or("it gave no reason");
            Progress::Failed(reason.to_owned())
        }
        // No status yet, setup, active, device, and whatever a newer QEMU adds on the way.
        _ => Progress::Loading,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_load_carries_qemu_s_reason() {
        // From QEMU 10.0.2, given bytes that are no stream.
        let reason = "load of migration failed: Invalid argument";
        let answer = json!({"status": "failed", "error-desc": reason});
        assert_eq!(progress(&answer), Progress::Failed(reason.to_owned()));
    }

    #[test]
    fn an_unknown_status_is_progress() {
        for answer in [json!({}), json!({"status": "active"}), json!({"status": "from-the-future"})]
        {
            assert_eq!(progress(&answer), Progress::Loading);
        }
        assert_eq!(progress(&json!({"status": "completed"})), Progress::Loaded);
    }
}
