//! The program's exit status. A status that is not listed means failure.

use std::process::ExitCode;

/// Why the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// `check` found something.
    Found = 1,
    /// Wrong usage.
    Usage = 2,
    /// No such VM, or the VM or QEMU refused.
    Vm = 3,
    /// The file is damaged or not one of ours.
    File = 4,
    /// The operating system refused: space, permission, I/O.
    System = 5,
    /// The file and the VM do not fit: machine type, RAM size, QEMU version.
    Incompatible = 6,
    /// The VM was left paused, whether the file is whole or not.
    LeftPaused = 7,
    /// Stopped by SIGHUP.
    HungUp = 129,
    /// Stopped by SIGINT.
    Interrupted = 130,
    /// Stopped by SIGQUIT.
    Quit = 131,
    /// Stopped by SIGTERM.
    Terminated = 143,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> ExitCode {
        ExitCode::from(code as u8)
    }
}
