//! The errors of a running VM.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::{Holder, RunState};
use crate::qmp::QmpError;

/// An error of a running VM: the monitor's, its process's, or an answer that makes no sense.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// An error of the monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A file of `/proc` or a descriptor of ours could not be used.
    #[error("{what}")]
    System {
        /// The operation and its object.
        what: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// No process was found that answers on the monitor.
    #[error("cannot tell which process answers on the monitor: {reason}")]
    ProcessUnknown {
        /// Why not.
        reason: String,
    },
    /// `x-query-ramblock` printed a line that we do not understand.
    #[error("line {line} of x-query-ramblock: {reason}")]
    RamBlocks {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The VM is in a run state that the call does not allow.
    #[error("the VM is {found}, expected {expected}")]
    WrongState {
        /// The state QEMU reports.
        found: RunState,
        /// The states allowed.
        expected: &'static str,
    },
    /// QEMU's device state has a form that we do not know.
    #[error("the device state from QEMU: {reason}")]
    DeviceState {
        /// What is wrong with it.
        reason: String,
    },
    /// QEMU did not commit an overlay into the image below it.
    #[error("{overlay} was not merged into the image below it", overlay = overlay.display())]
    NotMerged {
        /// The overlay, which the disk still needs.
        overlay: PathBuf,
    },
    /// The guest ran or its RAM blocks changed during a save, or the VM no longer holds its record.
    #[error("the VM did not stand still: {what}")]
    NotStill {
        /// What happened.
        what: String,
    },
    /// A save of this VM is running, or one was killed and its record is still in QEMU.
    #[error("{by} saves this VM")]
    Held {
        /// The process.
        by: Holder,
    },
    /// QEMU holds the record of a save, and this version does not understand it.
    #[error("the record of another save, in QEMU's object \"vmfile-save\"")]
    UnknownRecord {
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// A disk's newest data could not be made durable.
    #[error("disk {disk:?} could not be flushed: {reason}")]
    NotFlushed {
        /// The drive.
        disk: String,
        /// QEMU's own words.
        reason: String,
    },
    /// The VM was stopped, and could not be resumed after an error.
    #[error("{cause}; and the VM is left paused")]
    LeftPaused {
        /// The error.
        cause: Box<VmError>,
        /// Why the VM could not be resumed.
        source: Box<VmError>,
    },
    /// QEMU accepted `quit` and still runs.
    #[error("QEMU still runs {after:?} after it was told to quit")]
    StillRunning {
        /// How long vmfile waited.
        after: Duration,
    },
}

impl VmError {
    /// Whether the connection to the monitor has ended, usually because QEMU has.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self, VmError::Qmp(error) if error.is_closed())
    }

    /// Whether QEMU has refused a command.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self, VmError::Qmp(error) if error.is_refused())
    }

    /// Returns what the user could try, where we know it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            VmError::Qmp(error) => error.hint(),
            VmError::System { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run as the user who owns the VM, or as root")
            }
            VmError::ProcessUnknown { reason } if reason.contains("PID namespace") => {
                Some("run vmfile on the host of the container, or inside it")
            }
            VmError::ProcessUnknown { .. } => Some("name the VM by its process id"),
            VmError::NotStill { .. } => {
                Some("see to it that no other client of QEMU changes the VM while it is saved")
            }
            VmError::Held { by } if by.is_alive().is_none() => Some(
                "wait for that save to end; if its process is gone with its container, \
                 `object_del vmfile-save` and `cont` on the VM's monitor end what it left",
            ),
            VmError::Held { .. } => Some("wait for that save to end, or end its process"),
            VmError::UnknownRecord { .. } => Some(
                "use the version of vmfile that left it, or remove it by `object_del vmfile-save` \
                 on the VM's monitor",
            ),
            VmError::NotFlushed { .. } => {
                Some("look at the disk's file system: what the guest wrote last may be lost")
            }
            VmError::LeftPaused { .. } => Some("`cont` on the VM's monitor makes it run again"),
            _ => None,
        }
    }

    /// Tells whether the cause is that the caller asked to stop.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self, VmError::Qmp(error) if error.is_stopped())
    }

    /// Whether QEMU's process cannot be found or inspected, so that only its monitor can be used.
    #[must_use]
    pub fn is_out_of_reach(&self) -> bool {
        match self {
            VmError::ProcessUnknown { .. } => true,
            VmError::System { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            _ => false,
        }
    }

    /// Makes an error of a failed system call.
    pub(crate) fn system(what: impl Into<String>, source: impl Into<io::Error>) -> VmError {
        VmError::System { what: what.into(), source: source.into() }
    }
}
