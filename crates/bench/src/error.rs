//! Why nothing was measured.

use std::io;
use std::path::PathBuf;

use vmfile_qemu::{QmpError, VmError};

/// Why a measurement, or all of them, could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The operating system refused.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QEMU refused, or could not be reached.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// QEMU refused.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A program failed.
    #[error("{program}: {said}")]
    Program {
        /// Its name.
        program: String,
        /// What it said.
        said: String,
    },
    /// There is no such QEMU, or it cannot be started.
    #[error("QEMU {program} does not start: {said}", program = program.display())]
    NoQemu {
        /// The program.
        program: PathBuf,
        /// What it or the kernel said.
        said: String,
    },
    /// The guest's RAM is more than this machine has free.
    #[error(
        "a guest of {needed_bytes} bytes needs as much free memory, {available_bytes} are free"
    )]
    NoMemory {
        /// Bytes of the guest's RAM.
        needed_bytes: u64,
        /// Bytes that are free.
        available_bytes: u64,
    },
    /// The files would not fit.
    #[error("the files need {needed_bytes} bytes, the file system has {available_bytes} free")]
    NoRoom {
        /// Bytes that the files may need.
        needed_bytes: u64,
        /// Bytes that are free.
        available_bytes: u64,
    },
    /// No way has such a name.
    #[error("no way has a name with {}: a run without --ways names all", .ways.join(" or "))]
    NoWay {
        /// Parts of names.
        ways: Vec<String>,
    },
    /// Something took too long.
    #[error("{what} has not ended in {seconds} s")]
    TimedOut {
        /// What.
        what: String,
        /// How long was waited, in seconds.
        seconds: u64,
    },
    /// The caller stopped the benchmark.
    #[error("stopped")]
    Stopped,
}

impl BenchError {
    /// Makes an error of a failed system call.
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
        let what = what.into();
        move |source| BenchError::System { what, source }
    }

    /// Makes an error of a program that said why it failed.
    pub(crate) fn program(program: &str, said: impl Into<String>) -> BenchError {
        BenchError::Program { program: program.to_owned(), said: said.into() }
    }

    /// Returns the error and what caused it, in one line.
    pub(crate) fn in_words(&self) -> String {
        in_words(self)
    }
}

/// Returns an error and what caused it, in one line.
pub(crate) fn in_words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words += &format!(": {error}");
        source = error.source();
    }
    words
}
