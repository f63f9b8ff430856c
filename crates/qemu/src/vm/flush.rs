//! Disks of a stopped VM made durable, and the answer whether they were.
//!
//! `stop` flushes every disk and says nothing about what came of it (QEMU 10.0). QEMU releases the
//! disks of a VM that is about to end in the same way as at the end of a migration, which flushes
//! them and says whether that was possible.

use serde_json::{Value, json};

use super::{Vm, VmError};
use crate::qmp::QmpError;
use crate::version::Feature;

/// Whether the disks of a stopped VM are durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// QEMU says that they are.
    Yes,
    /// Something uses the disks besides the guest, and QEMU flushes none of them then.
    Unknown {
        /// Why.
        reason: String,
    },
}

impl Vm {
    /// Flushes the disks of a stopped VM and releases them: another QEMU may open them from now on.
    /// QEMU needs [`Feature::BlockdevSetActive`].
    ///
    /// This is for a VM that is about to end. [`Vm::take_back_disks`] makes them this VM's again.
    ///
    /// # Errors
    ///
    /// [`VmError::NotFlushed`] when a disk does not take what the guest wrote; the disks are this VM's
    /// again then.
    pub(super) fn release_disks(&mut self) -> Result<Flushed, VmError> {
        self.has_released_disks = true;
        match self.set_disks_active(false) {
            Ok(()) => Ok(Flushed::Yes),
            Err(QmpError::Refused { desc, .. }) => {
                self.take_back_disks()?;
                // A block job or an export uses a disk: QEMU then releases none, and says so with
                // EPERM, before it flushes any.
                if desc.contains("Operation not permitted") {
                    return Ok(Flushed::Unknown { reason: desc });
                }
                Err(VmError::NotFlushed { reason: desc })
            }
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
