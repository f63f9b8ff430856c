//! What every measurement uses: the options, a directory, the program.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use rustix::fs::syncfs;
use serde_json::Value;
use tempfile::TempDir;

use crate::error::BenchError;
use crate::options::BenchOptions;
use crate::process;
use crate::report::NotMeasured;

/// What every measurement uses.
#[derive(Debug)]
pub(crate) struct Bench<'a> {
    pub(crate) options: &'a BenchOptions,
    pub(crate) stop: &'a AtomicBool,
    /// The directory of the files; dropping it removes all of them.
    pub(crate) directory: TempDir,
    pub(crate) not_measured: Vec<NotMeasured>,
}

impl<'a> Bench<'a> {
    /// Makes a directory for the files.
    pub(crate) fn new(
        options: &'a BenchOptions,
        stop: &'a AtomicBool,
    ) -> Result<Bench<'a>, BenchError> {
        let directory = tempfile::Builder::new()
            .prefix("vmfile-bench-")
            .tempdir_in(&options.directory)
            .map_err(BenchError::system(format!("write to {}", options.directory.display())))?;
        Ok(Bench { options, stop, directory, not_measured: Vec::new() })
    }
}

impl Bench<'_> {
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Whether the way with this name is to be measured.
    pub(crate) fn measures(&self, name: &str) -> bool {
        let chosen = &self.options.ways;
        let name = name.to_lowercase();
        chosen.is_empty() || chosen.iter().any(|part| name.contains(&part.to_lowercase()))
    }

    /// Removes `file` and waits until the file system is synced, so that no way pays for the file
    /// of another.
    pub(crate) fn remove_and_sync(&self, file: &Path) -> Result<(), BenchError> {
        let removed = fs::remove_file(file);
        if removed.as_ref().is_err_and(|error| error.kind() != std::io::ErrorKind::NotFound) {
            removed.map_err(BenchError::system("remove a file"))?;
        }
        let synced = File::open(self.directory.path())
            .and_then(|directory| syncfs(&directory).map_err(Into::into));
        synced.map_err(BenchError::system("wait for the disk"))
    }

    /// Notes that something could not be measured.
    pub(crate) fn note(&mut self, what: &str, why: impl Into<String>) {
        let note = NotMeasured { what: what.to_owned(), why: why.into() };
        if !self.not_measured.contains(&note) {
            self.not_measured.push(note);
        }
    }

    /// Runs the program with `arguments`, and returns its report and what it used.
    pub(crate) fn vmfile(
        &self,
        arguments: &[&OsStr],
    ) -> Result<(Value, process::Usage), BenchError> {
        let mut command = Command::new(&self.options.program);
        command.arg("--json").args(arguments);
        let (output, usage) = process::run(&mut command, self.stop)?;
        Ok((serde_json::from_slice(&output.stdout).unwrap_or_default(), usage))
    }
}
