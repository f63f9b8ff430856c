//! A connection to QEMU's monitor that broke. QEMU may live on behind it.

use std::thread;
use std::time::{Duration, Instant};

use super::{SaveRecord, Vm, VmError};
use crate::qmp::QmpError;

/// How long QEMU may take to greet once more.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection waits that comes after one that has ended as well.
const INTERVAL: Duration = Duration::from_millis(20);

impl Vm {
    /// Tells whether the connection to the monitor has ended.
    pub fn is_cut_off(&mut self) -> bool {
        let state = self.unstoppable(RECONNECT_TIMEOUT, Vm::run_state);
        state.is_err_and(|error| error.is_closed())
    }

    /// Connects to the monitor again, by the path of its socket, if QEMU there has the record of this
    /// save. The new connection heeds no stop flag: it is for putting the VM back.
    ///
    /// # Errors
    ///
    /// [`VmError::NotStill`] where it is another VM or another save; whatever the kernel or QEMU says.
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
                // What has ended the first connection may end another one; and QEMU (10.0.2) may give
                // the next connection an answer that was meant for the last, before it greets.
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
