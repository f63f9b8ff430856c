//! One build of vmfile, and what it is made to do.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use rustix::fs::syncfs;
use serde_json::Value;
use tempfile::TempDir;
use vmfile_bench::page_cache::{make_cold, make_warm};
use vmfile_testing::{Guest, TestResult};

use crate::Guests;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    SaveShared,
    SavePrivate,
    CheckCold,
    CheckCached,
    RestoreByLoad,
    RestoreByMap,
}

impl Task {
    /// In this order: those that come later read what the saves of the same round wrote.
    pub(crate) const ALL: [Task; 6] = [
        Task::SavePrivate,
        Task::SaveShared,
        Task::CheckCold,
        Task::CheckCached,
        Task::RestoreByLoad,
        Task::RestoreByMap,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Task::SaveShared => "save, shared RAM",
            Task::SavePrivate => "save, private RAM",
            Task::CheckCold => "check, cold",
            Task::CheckCached => "check, cached",
            Task::RestoreByLoad => "restore by load, cold",
            Task::RestoreByMap => "restore by map, cold",
        }
    }
}

/// A program, and a directory for its files on the file system of the build directory.
#[derive(Debug)]
pub(crate) struct Build {
    name: &'static str,
    program: PathBuf,
    directory: TempDir,
}

/// What a verb did: its report, and the time from its start to its end.
#[derive(Debug)]
struct Run {
    report: Value,
    seconds: f64,
}

impl Build {
    /// Copies a program, so that a cargo that builds meanwhile does not change what is measured.
    pub(crate) fn copy(program: &str, name: &'static str) -> TestResult<Build> {
        let here = env::current_exe()?;
        let near = here.parent().ok_or("this program has no directory")?;
        let directory = tempfile::Builder::new().prefix("compare-").tempdir_in(near)?;
        let copy = directory.path().join("vmfile");
        fs::copy(program, &copy).map_err(|error| format!("{program}: {error}"))?;
        Ok(Build { name, program: copy, directory })
    }

    /// Does `task` and returns how long it took.
    pub(crate) fn seconds(&self, task: Task, guests: &Guests) -> TestResult<f64> {
        let (private, shared) = (self.file("private.vmf"), self.file("shared.vmf"));
        // So that nobody pays for what another has written or removed.
        syncfs(File::open(self.directory.path())?)?;
        match task {
            Task::SavePrivate => self.save(&guests.private, &private),
            Task::SaveShared => self.save(&guests.shared, &shared),
            Task::CheckCold => {
                make_cold(&shared)?;
                self.check(&shared)
            }
            Task::CheckCached => {
                make_warm(&shared, &AtomicBool::new(false))?;
                self.check(&shared)
            }
            Task::RestoreByLoad => {
                make_cold(&shared)?;
                self.restore(guests, &shared, "load")
            }
            Task::RestoreByMap => {
                make_cold(&shared)?;
                self.restore(guests, &shared, "map")
            }
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Saves the guest over the file of the round before, and leaves the guest as it is.
    fn save(&self, guest: &Guest, file: &Path) -> TestResult<f64> {
        let socket = guest.qmp_path();
        let words = ["save", "--after", "pause", "--force"].map(OsStr::new);
        Ok(self.run(&[&words[..], &[socket.as_os_str(), file.as_os_str()]].concat())?.seconds)
    }

    fn check(&self, file: &Path) -> TestResult<f64> {
        Ok(self.run(&[OsStr::new("check"), file.as_os_str()])?.seconds)
    }

    /// Restores into a QEMU of its own, whose start is QEMU's time and does not count.
    fn restore(&self, guests: &Guests, file: &Path, mode: &str) -> TestResult<f64> {
        let prepared = guests.shared.config().prepare(&guests.qemu)?;
        let mut words = ["restore", "--paused", "--mode", mode].map(OsString::from).to_vec();
        words.extend([file.into(), "--".into()]);
        words.extend(prepared.command_line());
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        let run = self.run(&words)?;
        // Ends the restored VM.
        drop(prepared.attach()?);
        let start_seconds = run.report["qemu_start_seconds"].as_f64();
        Ok(run.seconds - start_seconds.ok_or("the report has no qemu_start_seconds")?)
    }

    /// Runs a verb to its end.
    fn run(&self, arguments: &[&OsStr]) -> TestResult<Run> {
        let started = Instant::now();
        let output = Command::new(&self.program).arg("--json").args(arguments).output()?;
        let seconds = started.elapsed().as_secs_f64();
        match serde_json::from_slice(&output.stdout) {
            Ok(report) if output.status.success() => Ok(Run { report, seconds }),
            _ => Err(format!(
                "vmfile {} of {}: {}, no report: {}{}",
                OsStr::to_string_lossy(arguments.first().ok_or("no verb")?),
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
            .into()),
        }
    }
}
