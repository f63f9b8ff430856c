//! A monitor of vmfile's own, which is there for as long as this connection.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};

use super::{Vm, VmError};
use crate::pass_fd;
use crate::qmp::{COMMAND_TIMEOUT, Qmp, QmpError};
use crate::version::Feature;

/// How the names of these monitors begin.
const PREFIX: &str = "vmfile-monitor-";

impl Vm {
    /// Goes on by a monitor that QEMU makes for this connection alone, and leaves the one that was connected
    /// to: another client can connect to that meanwhile, which serves one at a time. QEMU 11.1 and later
    /// remove the new monitor when this connection ends.
    ///
    /// Returns whether it does: an older QEMU cannot, and one behind a proxy gets no descriptors. `stop` ends
    /// every wait, as [`Vm::set_stop`] says.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`]; but for a command that QEMU refuses.
    pub fn take_own_monitor(&mut self, stop: &Arc<AtomicBool>) -> Result<bool, VmError> {
        if !self.version()?.has(Feature::MonitorObject) {
            return Ok(false);
        }
        // The new connection does not tell whose it is.
        let Ok(pid) = self.pid() else { return Ok(false) };
        let pair = UnixStream::pair();
        let (ours, theirs) = pair.map_err(|error| VmError::system("make two sockets", error))?;
        let name = format!("{PREFIX}{}", process::id());
        match self.make_monitor(&name, &theirs) {
            Ok(()) => {}
            Err(VmError::Qmp(QmpError::Refused { .. })) => return Ok(false),
            Err(error) => return Err(error),
        }
        drop(theirs);
        let stop = Some(Arc::clone(stop));
        let mut qmp = Qmp::from_stream(ours, COMMAND_TIMEOUT, stop, Some(pid))?;
        qmp.set_timeout(COMMAND_TIMEOUT);
        self.qmp = qmp;
        self.pid = Some(pid);
        Ok(true)
    }

    /// Removes what a process that was killed while it made a monitor has left of it. QEMU (11.1) removes no
    /// character device that has no monitor yet, and no monitor whose other end was closed before.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn remove_left_monitors(&mut self) -> Result<(), VmError> {
        if !self.version()?.has(Feature::MonitorObject) {
            return Ok(());
        }
        let devices = self.execute("query-chardev", Value::Null)?;
        let text =
            |device: &Value, key: &str| device.get(key).and_then(Value::as_str).map(String::from);
        for device in devices.as_array().into_iter().flatten() {
            let label = text(device, "label").filter(|label| label.starts_with(PREFIX));
            let is_left =
                text(device, "filename").is_some_and(|it| it.starts_with("disconnected:"));
            if let (Some(label), true) = (label, is_left) {
                let id = json!({"id": label});
                for command in ["object-del", "chardev-remove"] {
                    match self.execute(command, id.clone()) {
                        // There was no monitor yet, or QEMU was about to remove it.
                        Ok(_) | Err(QmpError::Refused { .. }) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
        }
        Ok(())
    }

    /// Has QEMU make a monitor at the other end of `theirs`, or leaves nothing there.
    fn make_monitor(&mut self, name: &str, theirs: &UnixStream) -> Result<(), VmError> {
        pass_fd::getfd(&mut self.qmp, name, theirs.as_fd())?;
        let address = json!({"type": "fd", "data": {"str": name}});
        let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
        if let Err(error) = self.execute("chardev-add", json!({"id": name, "backend": backend})) {
            pass_fd::closefd(&mut self.qmp, name)?;
            return Err(error.into());
        }
        let object = json!({
            "qom-type": "monitor-qmp", "id": name, "chardev": name, "close-action": "delete",
        });
        if let Err(error) = self.execute("object-add", object) {
            self.execute("chardev-remove", json!({"id": name}))?;
            return Err(error.into());
        }
        Ok(())
    }
}
