//! A part of a VM that is not what its command line would make, and how to change the command line.

use crate::command_line::redact_image;
use std::fmt;

use crate::command_line::Pin;

/// A part of a VM that is not what its command line would make.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// The part.
    pub what: String,
    /// What the VM has.
    pub found: String,
    /// What the command line would make.
    pub expected: String,
    /// How to change the command line, so that it makes what the VM has.
    pub remedy: Remedy,
}

/// How to change a command line, so that it makes what a VM has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// A change of the command line.
    Change {
        /// The `-device` options to leave out, counted from 0.
        leave_out: Vec<usize>,
        /// Properties to add to other devices, so that they stay where they are.
        pins: Vec<Pin>,
        /// Options to add, with their values.
        add: Vec<(String, String)>,
    },
    /// It cannot be changed so, for this reason.
    Missing(String),
}

impl Difference {
    /// Describes what the VM has (`found`) where the command line would make something else
    /// (`expected`); passwords in the names of images are left out.
    #[must_use]
    pub fn new(what: String, found: &str, expected: &str, remedy: Remedy) -> Difference {
        let [found, expected] = [found, expected].map(|text| redact_image(text).into_owned());
        Difference { what, found, expected, remedy }
    }
}

impl Remedy {
    pub(super) fn add(add: Vec<(String, String)>) -> Remedy {
        Remedy::Change { leave_out: Vec::new(), pins: Vec::new(), add }
    }

    pub(super) fn leave_out(numbers: Vec<usize>) -> Remedy {
        Remedy::Change { leave_out: numbers, pins: Vec::new(), add: Vec::new() }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} in the VM, {} on the command line", self.what, self.found, self.expected)
    }
}
