//! How the tests run the program, and how they find every QEMU that it started.

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

/// What a run of the program said.
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

    /// The one JSON object on stderr.
    pub(crate) fn json_error(&self) -> TestResult<Value> {
        serde_json::from_str(&self.stderr).map_err(|error| format!("{error}: {self:?}").into())
    }

    /// Asserts the status, and that the words are there.
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

/// The program, with nothing of the terminal or shell that the tests may run in: under `nohup`, or in
/// the background of a script, the tests ignore signals, and so would the program.
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

/// Starts the program, with what it says in pipes.
pub(crate) fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> TestResult<Child> {
    let mut command = command();
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command.spawn()?)
}

/// A run of the program that has told how far it is, by `--progress json`.
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

    /// Waits for its end; returns what it said after its first progress.
    pub(crate) fn finish(self) -> TestResult<Said> {
        let lines: Vec<String> = self.stderr.lines().collect::<Result<_, _>>()?;
        let said = Said::from(self.child.wait_with_output()?);
        Ok(Said { stderr: lines.join("\n"), ..said })
    }
}

/// Returns the id of a process as signals want it.
pub(crate) fn pid(process: u32) -> Pid {
    i32::try_from(process).ok().and_then(Pid::from_raw).expect("the id of a process")
}

/// Waits until a process catches `signal`: before that it would end it.
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

/// Ends every process whose command line names a file in this directory: whatever a test that
/// failed in the middle has left.
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

/// Waits until `is_so`.
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

/// Requires that system calls can be made to fail.
pub(crate) fn strace() -> Result<(), Missing> {
    let output = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err(Missing::beyond_setup("no strace, or it may not trace")),
    }
}
