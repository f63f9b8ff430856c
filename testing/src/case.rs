//! The kinds of cases that tests try and count. `cargo xtask test` reads the names, and docs/reliability.md
//! explains them; xtask compiles this file as well.

use std::fmt;

/// What a test tries again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Case {
    /// vmfile or its guardian is killed.
    Kill,
    /// vmfile gets a signal that it catches.
    Signal,
    /// QEMU ends or stops.
    QemuEnd,
    /// The connection to QEMU's monitor breaks, or brings what QEMU does not say.
    Monitor,
    /// Another client of QEMU acts in the middle.
    Interference,
    /// A system call or a transfer fails.
    Fault,
    /// Something of the host runs out.
    Shortage,
    /// The power fails.
    PowerCut,
    /// A byte of a file changes.
    Flip,
    /// A file or a stream is cut.
    Truncation,
    /// A property test makes an input.
    Mutation,
    /// A fuzzer makes an input.
    FuzzedInput,
    /// What is passed to vmfile is not what it should be.
    WrongInput,
    /// A file is compared with the memory that it was made from.
    Save,
    /// Memory that comes back is compared with what was saved.
    Restore,
    /// A guest is saved and restored.
    Round,
}

impl Case {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [Case; 16] = [
        Case::Kill,
        Case::Signal,
        Case::QemuEnd,
        Case::Monitor,
        Case::Interference,
        Case::Fault,
        Case::Shortage,
        Case::PowerCut,
        Case::Flip,
        Case::Truncation,
        Case::Mutation,
        Case::FuzzedInput,
        Case::WrongInput,
        Case::Save,
        Case::Restore,
        Case::Round,
    ];

    /// Returns the name in the line that a test prints.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Case::Kill => "kills",
            Case::Signal => "signals",
            Case::QemuEnd => "ends of QEMU",
            Case::Monitor => "disturbed monitors",
            Case::Interference => "interferences",
            Case::Fault => "faults",
            Case::Shortage => "shortages",
            Case::PowerCut => "power cuts",
            Case::Flip => "flips",
            Case::Truncation => "truncations",
            Case::Mutation => "mutations",
            Case::FuzzedInput => "fuzzed inputs",
            Case::WrongInput => "wrong inputs",
            Case::Save => "saves",
            Case::Restore => "restores",
            Case::Round => "rounds",
        }
    }

    /// Says what one of them is.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Case::Kill => "vmfile or its guardian is killed in the middle of a save or a restore",
            Case::Signal => "vmfile gets a signal that it catches, and must obey it",
            Case::QemuEnd => "QEMU is killed or stopped while vmfile works with it",
            Case::Monitor => {
                "the connection to QEMU's monitor breaks, is late or silent, or brings what QEMU does not say"
            }
            Case::Interference => "another client of QEMU acts in the middle of a save",
            Case::Fault => "a system call or a transfer fails, is torn or comes late",
            Case::Shortage => "there is no more room on the disk, memory or length of a file",
            Case::PowerCut => "a disk is left as a power failure at one moment leaves it",
            Case::Flip => "a byte of a file is changed, and the file is read in one way",
            Case::Truncation => "a file or a stream is cut, and is read in one way",
            Case::Mutation => "a property test makes an input at random, and the code reads it",
            Case::FuzzedInput => "a fuzzer makes an input, and a decoder reads it",
            Case::WrongInput => {
                "arguments, a file, a stream or a monitor are not what they should be"
            }
            Case::Save => "a file is compared with the memory that it was made from",
            Case::Restore => "memory that comes back from a file is compared with what was saved",
            Case::Round => "a guest is saved, restored and found right, again and again",
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
