//! Reconnecting to QEMU's monitor after the connection broke while QEMU may still run.

use std::thread;
use std::time::{Duration, Instant};

use super::{SaveRecord, Vm, VmError};
use crate::qmp::QmpError;

/// How long a reconnect may take in all.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The wait between two attempts to reconnect.
const INTERVAL: Duration = Duration::from_millis(20);

impl Vm {
    /// Tells whether the connection to the monitor has ended.
    pub fn is_cut_off(&mut self) -> bool {
        let state = self.unstoppable(RECONNECT_TIMEOUT, Vm::run_state);
        state.is_err_and(|error| error.is_closed())
    }

    /// Connects to the monitor again, by the path of its socket, if the QEMU there holds the record
    /// of this save. The new connection has no stop flag: it is for putting the VM back.
    ///
    /// # Errors
    ///
    /// [`VmError::NotStill`] if the VM has no socket path, or if the QEMU there does not hold this
    /// save's record; otherwise the kernel's or QEMU's error.
    pub fn reconnect(&mut self, record: &SaveRecord) -> Result<(), VmError> {
        let not_it = |what: &str| Err(VmError::NotStill { what: what.to_owned() });
        let Some(socket) = self.socket().map(ToOwned::to_owned) else {
            return not_it("its monitor has no socket to connect to again");
        };
        let deadline = Instant::now() + RECONNECT_TIMEOUT;
        let (mut again, found) = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let asked = Vm::connect_within(&socket, left)
                .and_then(|mut again| again.record().map(|found| (again, found)));
            match asked {
                // The cause that ended the first connection may end the next one too. And QEMU
                // (10.0.2) may send an answer meant for the old connection on the new one, before
                // its greeting.
                Err(error)
                    if (error.is_closed()
                        || matches!(error, VmError::Qmp(QmpError::NotQmp { .. })))
                        && Instant::now() < deadline =>
                {
                    thread::sleep(INTERVAL);
                }
                asked => break asked?,
            }
        };
        if found.is_none_or(|found| !found.is_of(record)) {
            return not_it("the record of this save is not in QEMU any more");
        }
        if let Some(pid) = self.pid {
            again.pid = Some(pid);
            again.qmp.set_process(pid);
        }
        *self = again;
        Ok(())
    }
}
