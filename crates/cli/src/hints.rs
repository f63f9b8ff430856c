//! What the user can do, where that hangs on what was found or on what the user gave.

use std::io;

use rustix::io::Errno;
use vmfile::{LaunchError, Mismatch, RestoreError};

/// The hints for limits of a process.
const FILES: &str = "`ulimit -n` says how many files this process may have open";
const PROCESSES: &str = "if a thread or a process could not be started: `ulimit -u` says how many this \
                         user may have";

/// Returns what to look at if the kernel's error may come from a limit of this process or user.
pub(crate) fn limit(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE) => Some(FILES),
        Some(Errno::AGAIN) => Some(PROCESSES),
        _ => None,
    }
}

/// Whether a hint says more than one that fits other causes of the same failure.
pub(crate) fn is_certain(hint: &str) -> bool {
    hint == FILES
}

/// What the user gave a restore to make the VM with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// Nothing: the saved command line makes it.
    Nothing,
    /// A command line.
    Command,
    /// A QEMU that waits.
    Waiting,
}

/// Returns what to do about a VM that is in another run state than running or paused; `state` is
/// QEMU's name for it.
pub(crate) fn run_state(state: &str) -> &'static str {
    match state {
        "prelaunch" => "a VM that was started with -S must run first: `cont` lets it",
        "inmigrate" => "this QEMU waits for a VM, or takes one in: save it once it runs",
        "postmigrate" | "finish-migrate" => {
            "a VM that was migrated cannot be saved; where the other end of the migration does not \
             run, `cont` makes it run again"
        }
        "suspended" => {
            "the guest sleeps, and QEMU before 9.0 cannot stop it then: `system_wakeup` wakes it"
        }
        "shutdown" => {
            "the guest has shut down: `quit` ends QEMU; `system_reset` and then `cont` start it anew"
        }
        "io-error" => "a disk failed: mend it, for example free some space, then `cont`",
        "internal-error" => {
            "QEMU cannot go on with the guest: `system_reset` and then `cont` start it anew"
        }
        "guest-panicked" => {
            "the guest has crashed: `dump-guest-memory` keeps what it was, `system_reset` and then \
             `cont` start it anew"
        }
        "watchdog" => "the watchdog stopped the guest: `cont` lets it run on, if it is sound",
        "debug" => "a debugger stopped the guest: let it run on there",
        "save-vm" | "restore-vm" => "wait until QEMU is done with the snapshot in the disk image",
        _ => "save the VM once it runs or is paused",
    }
}

/// Returns what to do about a restore that failed, where that hangs on what was `given`.
pub(crate) fn restore(error: &RestoreError, given: Given) -> Option<&'static str> {
    match error {
        RestoreError::Incompatible { differ } => Some(incompatible(differ, given)),
        RestoreError::Launch(error) => launch(error, given),
        RestoreError::DeviceState { .. } if given == Given::Nothing => Some(
            "the saved command line made other devices: restore with the QEMU that saved the VM, \
             or give a whole command line after `--`",
        ),
        RestoreError::DeviceState { .. } => {
            Some("QEMU needs the devices that the VM had when it was saved")
        }
        _ => None,
    }
}

fn launch(error: &LaunchError, given: Given) -> Option<&'static str> {
    match error {
        LaunchError::NoVersion { .. } | LaunchError::Spawn { .. } => {
            Some(if given == Given::Nothing {
                "it is the QEMU that saved the VM: put it back, or give a whole command line that \
                 begins with another one after `--`"
            } else {
                "the command line after `--` begins with QEMU's program"
            })
        }
        LaunchError::Directory { .. } => Some(
            "the VM that was saved had it as its working directory: make it again, or give a whole command \
             line after `--`",
        ),
        LaunchError::Ended { .. } => Some(if given == Given::Nothing {
            "QEMU was started as for the VM that was saved: put back what it does not find, or \
             give a changed command line after `--`; `vmfile info -v` prints the saved one"
        } else {
            "QEMU refused the command line after `--`"
        }),
        LaunchError::Monitor { .. } => Some(
            "QEMU may wait for something that its command line names, such as a client of a \
             chardev with wait=on",
        ),
        _ => None,
    }
}

fn incompatible(differ: &[Mismatch], given: Given) -> &'static str {
    let all = |kinds: &[&str]| {
        differ.iter().all(|mismatch| kinds.iter().any(|kind| mismatch.what.starts_with(kind)))
    };
    match given {
        // Only the drives that a saved command line made are compared.
        _ if all(&["drive "]) => {
            "the saved command line opened other images: put images and links back where they \
             were, or give the disks on a whole command line after `--`"
        }
        Given::Nothing => {
            "the saved command line made another VM: restore with the QEMU that saved it, or give \
             a whole command line after `--`"
        }
        Given::Command | Given::Waiting if all(&["devices of type ", "memory device ", "CPU "]) => {
            "start QEMU with the devices, the memory devices and the CPUs that the VM had when it \
             was saved"
        }
        Given::Command | Given::Waiting => {
            "start QEMU with the machine type and the memory that the file names: see `vmfile info`"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn differs(what: &[&str]) -> RestoreError {
        let mismatch = |what: &&str| Mismatch {
            what: (*what).to_owned(),
            file: "1".to_owned(),
            vm: "2".to_owned(),
        };
        RestoreError::Incompatible { differ: what.iter().map(mismatch).collect() }
    }

    fn hint(error: &RestoreError, given: Given) -> &'static str {
        restore(error, given).expect("a hint")
    }

    #[test]
    fn a_state_that_is_no_migration_has_no_hint_about_one() {
        for state in ["io-error", "guest-panicked", "suspended", "shutdown", "internal-error"] {
            let hint = run_state(state);
            assert!(!hint.contains("migrat") && !hint.contains("-S"), "{state}: {hint}");
        }
        assert!(run_state("io-error").contains("mend it"));
        assert!(run_state("prelaunch").contains("-S"));
        assert!(run_state("postmigrate").contains("migrated"));
    }

    #[test]
    fn a_disk_that_differs_has_no_hint_about_memory() {
        let hint = hint(&differs(&["drive \"virtio0\"", "drive \"ide0\""]), Given::Nothing);
        assert!(hint.contains("images") && !hint.contains("memory"), "{hint}");
    }

    #[test]
    fn a_restore_without_a_command_line_has_no_hint_about_the_one_that_was_given() {
        let program = std::path::PathBuf::from("qemu");
        let no_version = RestoreError::Launch(LaunchError::NoVersion { program });
        for error in [differs(&["machine type"]), differs(&["devices of type e1000"]), no_version] {
            let hint = hint(&error, Given::Nothing);
            assert!(hint.contains("give a whole command line"), "{hint}");
            assert!(!hint.contains("the command line after") && !hint.contains("start QEMU with"));
        }
    }

    #[test]
    fn a_command_line_that_was_given_is_told_what_it_lacks() {
        for given in [Given::Command, Given::Waiting] {
            assert!(hint(&differs(&["memory (-m)"]), given).contains("the memory that the file"));
            let parts = differs(&["CPU socket 0", "devices of type e1000"]);
            assert!(hint(&parts, given).contains("the CPUs that the VM had"));
        }
    }
}
