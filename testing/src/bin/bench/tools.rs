//! The program under test, run as a user runs it, and the files it works on.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use rustix::fs::syncfs;
use serde_json::Value;
use tempfile::TempDir;
use vmfile_testing::{Guest, GuestConfig, Qemu, TestResult};

/// The program, and a directory for its files on the file system of the build directory.
#[derive(Debug)]
pub(crate) struct Tools {
    program: PathBuf,
    directory: TempDir,
}

/// What a verb did: its report, and the time from its start to its end.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) report: Value,
    pub(crate) seconds: f64,
}

impl Run {
    /// Returns a number of the report.
    pub(crate) fn number(&self, name: &str) -> TestResult<f64> {
        self.report[name].as_f64().ok_or_else(|| format!("the report has no {name}").into())
    }

    /// Returns a count of the report.
    pub(crate) fn count(&self, name: &str) -> TestResult<u64> {
        self.report[name].as_u64().ok_or_else(|| format!("the report has no {name}").into())
    }
}

impl Tools {
    /// Finds the program beside this one: both were built by the same cargo.
    pub(crate) fn find() -> TestResult<Tools> {
        let here = env::current_exe()?;
        let build = here.parent().ok_or("this program has no directory")?;
        let program = build.join("vmfile");
        if !program.exists() {
            return Err(format!("no {}: run `cargo xtask bench`", program.display()).into());
        }
        let directory = tempfile::Builder::new().prefix("bench-").tempdir_in(build)?;
        // A copy, so that a cargo that builds meanwhile does not change what is measured.
        let copy = directory.path().join("vmfile");
        fs::copy(&program, &copy)?;
        Ok(Tools { program: copy, directory })
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns the path of the program under test.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    pub(crate) fn vmfile(&self) -> Command {
        Command::new(&self.program)
    }

    /// Runs a verb to its end.
    pub(crate) fn run(&self, arguments: &[&OsStr]) -> TestResult<Run> {
        let started = Instant::now();
        let output = self.vmfile().arg("--json").args(arguments).output()?;
        let seconds = started.elapsed().as_secs_f64();
        if !output.status.success() {
            return Err(format!(
                "vmfile {}: {}{}",
                OsStr::to_string_lossy(arguments.first().ok_or("no verb")?),
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
            .into());
        }
        Ok(Run { report: serde_json::from_slice(&output.stdout)?, seconds })
    }

    /// Saves the guest to a new file and leaves it as it is.
    pub(crate) fn save(&self, guest: &Guest, file: &Path) -> TestResult<Run> {
        self.make_way(file)?;
        let socket = guest.qmp_path();
        let words = ["save", "--after", "pause", "--direct-io", "required"].map(OsStr::new);
        self.run(&[&words[..], &[socket.as_os_str(), file.as_os_str()]].concat())
    }

    /// Restores the guest of `config` from `file` into a QEMU of its own.
    pub(crate) fn restore(
        &self,
        qemu: &Qemu,
        config: &GuestConfig,
        file: &Path,
        mode: &str,
    ) -> TestResult<(Run, Guest)> {
        let prepared = config.prepare(qemu)?;
        let command_line = prepared.command_line();
        let mut words = ["restore", "--mode", mode].map(OsString::from).to_vec();
        words.extend([file.into(), "--".into()]);
        words.extend(command_line);
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        let run = self.run(&words)?;
        Ok((run, prepared.attach()?))
    }

    /// Removes `file` and waits until the disk is at rest, so that nobody pays for another's file.
    pub(crate) fn make_way(&self, file: &Path) -> TestResult {
        if file.exists() {
            fs::remove_file(file)?;
        }
        Ok(syncfs(File::open(self.directory())?)?)
    }
}
