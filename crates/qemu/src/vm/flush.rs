//! Disks of a stopped VM: flushing them with a reported result, and releasing them before QEMU
//! ends.

use serde_json::{Value, json};

use super::{Drive, Vm, VmError};
use crate::qmp::QmpError;
use crate::version::Feature;

/// The name of a block node that no VM has.
const NO_NODE: &str = "vmfile-flush";

impl Vm {
    /// Flushes every disk that the guest can write. Returns one sentence for each disk whose flush
    /// result QEMU does not report.
    ///
    /// `stop` flushes the disks too, but does not report errors (QEMU 10.0), and neither does any
    /// other command that leaves the disk unchanged. But `blockdev-snapshot` first flushes the
    /// disk, fails if the flush fails, and only then looks up the overlay node. So this method
    /// names an overlay node that does not exist: QEMU's error message shows whether the flush
    /// worked (tried on 7.2, 10.0 and 11.1; half a millisecond per disk if there is nothing to
    /// flush).
    ///
    /// # Errors
    ///
    /// [`VmError::NotFlushed`] when QEMU could not flush a disk.
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

    /// Releases the disks of a stopped VM that is about to end. QEMU writes each image's pending
    /// format metadata, so that its exit changes no image any more, and another QEMU may open them.
    /// [`Vm::take_back_disks`] makes them this VM's again.
    ///
    /// QEMU refuses if something besides the guest, such as a block job, uses one of the disks;
    /// this VM then keeps all of them.
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
    /// QEMU's error: for example, another QEMU has one of the disks open now.
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

/// Returns the command that takes (`active`) or releases all of the VM's disks.
pub(crate) fn taking(active: bool) -> (&'static str, Value) {
    ("blockdev-set-active", json!({ "active": active }))
}

/// Whether QEMU's text says that a flush failed: `An IO error has occurred` up to 9.2, later
/// `Write to node 'd0' failed: ` and the kernel's reason, such as `Input/output error`.
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
