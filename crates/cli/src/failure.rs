//! What the program says when it fails: code, kind, message, hint.

use std::error::Error;

use vmfile::check::CheckError;
use vmfile::error::SaveError;
use vmfile::{PublishError, RestoreError, SnapshotError};

use crate::exit_code::Code;

/// A failure, as the user sees it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: Code, kind: &'static str, error: &dyn Error) -> Failure {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            message.push_str(": ");
            message.push_str(&error.to_string());
            source = error.source();
        }
        Failure { code, kind, message, hint: None }
    }

    pub(crate) fn usage(message: String) -> Failure {
        Failure { code: Code::Usage, kind: "usage", message, hint: None }
    }

    pub(crate) fn hint(mut self, hint: &str) -> Failure {
        self.hint = Some(hint.to_owned());
        self
    }

    pub(crate) fn system(what: &str, error: &std::io::Error) -> Failure {
        let message = format!("{what}: {error}");
        Failure { code: Code::System, kind: "io", message, hint: None }
    }
}

impl From<&SnapshotError> for Failure {
    fn from(error: &SnapshotError) -> Failure {
        match error {
            SnapshotError::Format { .. } => Failure::new(Code::File, "damaged", error),
            SnapshotError::LostEnd { .. } => Failure::new(Code::File, "truncated", error)
                .hint("the file was cut, or is still being copied"),
            SnapshotError::NotAFile { .. } => Failure::new(Code::File, "not_a_file", error),
            _ => Failure::new(Code::System, "io", error),
        }
    }
}

impl From<&SaveError> for Failure {
    fn from(error: &SaveError) -> Failure {
        match error {
            SaveError::Publish(PublishError::Exists { .. }) => {
                Failure::new(Code::System, "exists", error).hint("--force replaces it")
            }
            SaveError::Publish(PublishError::NoDirectory { .. }) => {
                Failure::new(Code::System, "no_directory", error).hint("create the directory first")
            }
            SaveError::Vm(_) => Failure::new(Code::Vm, "vm", error),
            SaveError::RunState { .. } => Failure::new(Code::Vm, "run_state", error).hint(
                "a VM that QEMU has already migrated or that has ended cannot be saved; \
                 after a migration, `cont` makes it run again",
            ),
            SaveError::Blocked { .. } => Failure::new(Code::Vm, "blocked", error),
            SaveError::NoAddress { .. } => Failure::new(Code::Vm, "no_address", error)
                .hint("the route `direct` needs a QEMU that prints addresses: 8.0 or later"),
            SaveError::DeviceState(_) | SaveError::NoRunState => {
                Failure::new(Code::Vm, "device_state", error)
            }
            SaveError::Process(_) => Failure::new(Code::System, "process", error).hint(
                "reading another process's memory needs its user and the right to trace it, \
                 or root",
            ),
            SaveError::NoSpace { .. } => Failure::new(Code::System, "no_space", error)
                .hint("free some space, or save to another file system"),
            SaveError::LeftPaused { cause, .. } => {
                let failure = Failure::from(cause.as_ref());
                Failure {
                    message: Failure::new(failure.code, "left_paused", error).message,
                    ..failure
                }
                .hint("`cont` on the VM's monitor makes it run again")
            }
            SaveError::Release { .. } => Failure::new(Code::LeftPaused, "left_paused", error),
            SaveError::Stopped => Failure::new(Code::Interrupted, "stopped", error),
            SaveError::Publish(_) => Failure::new(Code::System, "publish", error),
            _ => Failure::new(Code::System, "io", error),
        }
    }
}

impl From<&RestoreError> for Failure {
    fn from(error: &RestoreError) -> Failure {
        match error {
            RestoreError::Snapshot(error) => Failure::from(error),
            RestoreError::Incompatible { .. } => Failure::new(Code::Incompatible, "incompatible", error)
                .hint("start QEMU with the machine type and the memory that the file names: see `vmfile info`"),
            RestoreError::CannotMap { .. } => Failure::new(Code::Incompatible, "cannot_map", error)
                .hint("--mode load works with every file and every QEMU since 8.0"),
            RestoreError::NoSavedCommand => Failure::new(Code::Usage, "no_command", error)
                .hint("give QEMU's command line after `--`"),
            RestoreError::CannotRecreate { .. } => Failure::new(Code::Usage, "cannot_recreate", error)
                .hint("give a whole command line after `--`"),
            RestoreError::CommandLine(_) | RestoreError::NoCommand => {
                Failure::new(Code::Usage, "command_line", error)
            }
            RestoreError::SocketInUse { .. } => Failure::new(Code::Vm, "socket_in_use", error)
                .hint("the VM that was saved may still run; give other sockets after `--`"),
            RestoreError::File(_) | RestoreError::Process(_) | RestoreError::Load(_) => {
                Failure::new(Code::System, "io", error)
            }
            RestoreError::Stopped => Failure::new(Code::Interrupted, "stopped", error),
            _ => Failure::new(Code::Vm, "vm", error),
        }
    }
}

impl From<&CheckError> for Failure {
    fn from(error: &CheckError) -> Failure {
        match error {
            CheckError::Snapshot(error) => Failure::from(error),
            CheckError::Stopped => Failure::new(Code::Interrupted, "stopped", error),
            _ => Failure::new(Code::System, "io", error),
        }
    }
}
