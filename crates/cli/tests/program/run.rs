//! Runs the program, and finds every QEMU that it started.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmfile_testing::{Missing, TestResult};

/// The exit status and output of a run of the program.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    pub(crate) fn json(&self) -> TestResult<Value> {
        serde_json::from_str(&self.stdout).map_err(|error| format!("{error}: {self:?}").into())
    }

    /// Parses stderr, which must be one JSON object.
    pub(crate) fn json_error(&self) -> TestResult<Value> {
        serde_json::from_str(&self.stderr).map_err(|error| format!("{error}: {self:?}").into())
    }

    /// Asserts the exit status, and that stdout or stderr has each of the words.
    #[track_caller]
    pub(crate) fn assert(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word) || self.stdout.contains(word), "{word:?}: {self:?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        Said {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Returns a command for the program that inherits nothing from the terminal or shell of the tests.
/// Under `nohup`, or in the background of a script, the tests ignore signals, and the program would
/// ignore them too.
pub(crate) fn command() -> Command {
    let mut command = Command::new("/usr/bin/env");
    command.arg("--default-signal").arg(program());
    command.env_remove("COLUMNS").stdin(Stdio::null());
    command
}

pub(crate) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmfile"))
}

/// Runs the program to its end.
pub(crate) fn vmfile<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Said {
    command().args(arguments).output().expect("the program runs").into()
}

/// Starts the program with its output in pipes.
pub(crate) fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> TestResult<Child> {
    let mut command = command();
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command.spawn()?)
}

/// A run of the program that has printed its first progress, by `--progress json`.
#[derive(Debug)]
pub(crate) struct Begun {
    child: Child,
    stderr: BufReader<ChildStderr>,
    pub(crate) progress: Value,
}

impl Begun {
    pub(crate) fn start<S: AsRef<OsStr>>(
        arguments: impl IntoIterator<Item = S>,
    ) -> TestResult<Begun> {
        let mut child = start(arguments)?;
        let mut stderr = BufReader::new(child.stderr.take().ok_or("piped")?);
        let mut line = String::new();
        stderr.read_line(&mut line)?;
        let progress: Value = serde_json::from_str(&line)?;
        assert_eq!(progress["type"], "progress", "{line}");
        Ok(Begun { child, stderr, progress })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the program ends; returns its output after the first progress.
    pub(crate) fn finish(self) -> TestResult<Said> {
        let lines: Vec<String> = self.stderr.lines().collect::<Result<_, _>>()?;
        let said = Said::from(self.child.wait_with_output()?);
        Ok(Said { stderr: lines.join("\n"), ..said })
    }
}

/// Converts a process id to the type that signals need.
pub(crate) fn pid(process: u32) -> Pid {
    i32::try_from(process).ok().and_then(Pid::from_raw).expect("the id of a process")
}

/// Waits until a process catches `signal`: before that, the signal would end it.
pub(crate) fn wait_until_it_catches(process: u32, signal: Signal) -> TestResult {
    wait_until("the program catches signals", || {
        let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        caught.unwrap_or(0) & (1 << (signal.as_raw() - 1)) != 0
    })
}

/// Makes a list of arguments of different types.
#[macro_export]
macro_rules! words {
    ($($word:expr),* $(,)?) => { [$(std::ffi::OsString::from(&$word)),*] };
}

/// Runs `vmfile VERB FILE -- COMMAND`.
pub(crate) fn restore(arguments: &[OsString], qemu: &[OsString]) -> Said {
    let separator = OsString::from("--");
    let verb = OsString::from("restore");
    vmfile([&verb].into_iter().chain(arguments).chain([&separator]).chain(qemu))
}

/// When dropped, kills every process whose command line names a file in this directory, which a
/// failed test may have left.
#[derive(Debug)]
pub(crate) struct EndAllIn(pub(crate) PathBuf);

impl Drop for EndAllIn {
    fn drop(&mut self) {
        for pid in processes_in(&self.0) {
            // It may have ended by itself.
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

/// Returns the processes whose command line names a file in `directory`.
pub(crate) fn processes_in(directory: &Path) -> Vec<i32> {
    let needle = format!("{}/", directory.display());
    let myself = i32::try_from(std::process::id()).unwrap_or(0);
    let names = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_there = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        *pid != myself && String::from_utf8_lossy(&line).contains(&needle)
    };
    pids.filter(is_there).collect()
}

/// Waits up to a minute until `is_so` returns true.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) -> TestResult {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        if Instant::now() > deadline {
            return Err(format!("not in time: {what}").into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Returns the names of all files in `directory`, hidden ones as well.
pub(crate) fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory").filter_map(Result::ok);
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Requires strace, with which the tests make system calls fail.
pub(crate) fn strace() -> Result<(), Missing> {
    let output = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err(Missing::beyond_setup("no strace, or it may not trace")),
    }
}
