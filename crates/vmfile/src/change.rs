//! A part of a VM that is not as its command line would make it.

use std::fmt;

use serde::Serialize;
use vmfile_qemu::CommandLine;

/// A part of a VM that is not as its command line would make it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Change {
    /// The part.
    pub what: String,
    /// What the VM has.
    pub found: String,
    /// What the command line would make.
    pub expected: String,
    /// The `-device` options that a restore leaves out, counted from 0.
    pub leave_out: Vec<u64>,
    /// The options that a restore adds, each with its value behind it.
    pub add: Vec<String>,
    /// Why a restore with the saved command line cannot make the part.
    pub obstacle: Option<String>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change { what, found, expected, .. } = self;
        write!(f, "{what}: found {found}, the command line makes {expected}")?;
        match &self.obstacle {
            Some(obstacle) => write!(f, " (no option makes it again: {obstacle})"),
            None if !self.add.is_empty() => write!(f, " (made again by {})", shell(&self.add)),
            None if !self.leave_out.is_empty() => write!(f, " (a restore leaves it out)"),
            None => write!(f, " (a restore with the saved command line does as the VM has it)"),
        }
    }
}

/// Returns options, quoted for a shell.
fn shell(words: &[String]) -> String {
    CommandLine::new(words.iter().cloned()).map_or_else(|_| words.join(" "), |line| line.to_shell())
}
