//! Disks of a stopped VM: made durable, with an answer whether they were; and released at its end.

use serde_json::{Value, json};

use super::{Drive, Vm, VmError};
use crate::qmp::QmpError;
use crate::version::Feature;

/// The id of a block node that no VM has.
const NO_NODE: &str = "vmfile-flush";

impl Vm {
    /// Flushes every disk that the guest can write; returns why QEMU could not say what came of it,
    /// a sentence for each disk of which that is so.
    ///
    /// `stop` flushes them as well, and tells of no error (QEMU 10.0); nor does any other command that
    /// leaves the disk as it is. But before QEMU puts a snapshot on top of a disk it flushes it, and
    /// refuses if that fails; and only then does it look for the node that is to be put there. So it
    /// is asked for one that is not there, and which of the two it says is the answer (tried on 7.2,
    /// 10.0 and 11.1; half a millisecond a disk with nothing to flush).
    ///
    /// # Errors
    ///
    /// [`VmError::NotFlushed`] when a disk does not take what the guest wrote.
    pub fn flush_disks(&mut self) -> Result<Vec<String>, VmError> {
        let mut unknown = Vec::new();
        for drive in self.drives()?.into_iter().filter(Drive::is_writable) {
            let Some(node) = &drive.node else { continue };
            let arguments = json!({ "node": node, "overlay": NO_NODE });
            match self.execute("blockdev-snapshot", arguments) {
                Err(QmpError::Refused { desc, .. }) if desc.contains(NO_NODE) => {}
                Err(QmpError::Refused { desc, .. }) if is_io_error(&desc) => {
                    return Err(VmError::NotFlushed {
                        disk: drive.name().to_owned(),
                        reason: desc,
                    });
                }
                Err(QmpError::Refused { desc, .. }) => unknown.push(format!(
                    "QEMU does not say whether disk {:?} is durable: {desc}",
                    drive.name()
                )),
                Ok(_) => unreachable!("there is no node {NO_NODE}"),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(unknown)
    }

    /// Releases the disks of a stopped VM that is about to end, where this QEMU can: it writes what
    /// an image's format still has to say, so that ending QEMU changes no image any more, and another
    /// QEMU may open them. [`Vm::take_back_disks`] makes them this VM's again.
    ///
    /// A disk that something uses besides the guest, such as a block job, is not released; nor is any
    /// other then.
    ///
    /// # Errors
    ///
    /// As for [`Vm::take_back_disks`].
    pub(super) fn release_disks(&mut self) -> Result<(), VmError> {
        self.has_released_disks = true;
        match self.set_disks_active(false) {
            Ok(()) => Ok(()),
            Err(QmpError::Refused { .. }) => self.take_back_disks(),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the disks of a stopped VM its own again, so that it can run on.
    ///
    /// # Errors
    ///
    /// Whatever QEMU says: another QEMU may have one of them now.
    pub fn take_back_disks(&mut self) -> Result<(), VmError> {
        if self.version()?.has(Feature::BlockdevSetActive) {
            self.set_disks_active(true)?;
        }
        self.has_released_disks = false;
        Ok(())
    }

    fn set_disks_active(&mut self, active: bool) -> Result<(), QmpError> {
        let (command, arguments) = taking(active);
        self.execute(command, arguments).map(drop)
    }
}

/// Returns the command that makes all disks the VM's own, or releases them.
pub(crate) fn taking(active: bool) -> (&'static str, Value) {
    ("blockdev-set-active", json!({ "active": active }))
}

/// Whether QEMU says that a disk could not be flushed: `An IO error has occurred` up to 9.2, and
/// `Write to node 'd0' failed: Input/output error` later, or another of the kernel's reasons.
fn is_io_error(desc: &str) -> bool {
    desc.contains("IO error") || desc.starts_with("Write to node")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_flush_is_told_from_a_disk_that_is_in_use() {
        for desc in [
            "An IO error has occurred",
            "Write to node 'd0' failed: Input/output error",
            "Write to node 'd0' failed: No space left on device",
        ] {
            assert!(is_io_error(desc), "{desc}");
        }
        assert!(!is_io_error("Node 'd0' is busy: block device is in use by block job: commit"));
    }
}
