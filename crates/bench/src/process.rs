//! Runs programs and measures what they use: time, processors, memory.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::error::BenchError;

/// How long to wait between two samples of a program's memory.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(2);

/// How long a process that was killed may take to end: the kernel must free gigabytes.
const EXIT_TIMEOUT: Duration = Duration::from_secs(60);

/// What a program used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) seconds: f64,
    /// CPU time of all its threads, and of its children that it waited for.
    pub(crate) cpu_seconds: f64,
    /// The most anonymous memory that it had at once, in bytes.
    pub(crate) peak_bytes: u64,
}

/// Runs a program to its end. Sends it SIGTERM when `stop` is set.
pub(crate) fn run(command: &mut Command, stop: &AtomicBool) -> Result<(Output, Usage), BenchError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let system = |error| BenchError::system(format!("run {name}"))(error);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let child = command.spawn().map_err(system)?;
    let pid = child.id();
    let ended = pidfd(pid).map_err(system)?;
    let mut peak_bytes = 0;
    let mut is_told = false;
    while !has_ended(&ended, SAMPLE_INTERVAL) {
        peak_bytes = peak_bytes.max(anonymous_bytes(pid).unwrap_or(0));
        if stop.load(Ordering::Relaxed) && !is_told {
            // SIGTERM, as a user would send it, lets the program clean up.
            let _ = kill_process(pid_of(pid), Signal::TERM);
            is_told = true;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    // The process is a zombie until it is waited for, so /proc still has its times.
    let cpu_seconds = cpu_seconds(pid).unwrap_or(0.0);
    let output = child.wait_with_output().map_err(system)?;
    if is_told {
        return Err(BenchError::Stopped);
    }
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let said = if said.is_empty() { output.status.to_string() } else { said };
        return Err(BenchError::program(&name, said));
    }
    Ok((output, Usage { seconds, cpu_seconds, peak_bytes }))
}

/// Measures what a process uses over some time, while it runs on.
#[derive(Debug)]
pub(crate) struct Meter {
    pid: u32,
    cpu_before: Option<f64>,
    memory_before: u64,
    peak: u64,
    started: Instant,
}

impl Meter {
    pub(crate) fn start(pid: u32) -> Meter {
        let memory = anonymous_bytes(pid).unwrap_or(0);
        let cpu_before = cpu_seconds(pid);
        Meter { pid, cpu_before, memory_before: memory, peak: memory, started: Instant::now() }
    }

    /// Samples the memory of the process.
    pub(crate) fn sample(&mut self) {
        self.peak = self.peak.max(anonymous_bytes(self.pid).unwrap_or(0));
    }

    /// Returns what the process used since the start.
    pub(crate) fn finish(mut self) -> Usage {
        let seconds = self.started.elapsed().as_secs_f64();
        self.sample();
        let now = cpu_seconds(self.pid);
        let cpu_seconds = self.cpu_before.zip(now).map_or(0.0, |(before, now)| now - before);
        Usage { seconds, cpu_seconds, peak_bytes: self.peak - self.memory_before }
    }
}

/// Returns the seconds of processors that a process has used, with its children that have ended.
pub(crate) fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    // utime, stime, cutime, cstime are fields 14 to 17 of proc_pid_stat(5); `rest` begins at 3.
    let ticks: u64 = rest.split(' ').skip(11).take(4).filter_map(|t| t.parse::<u64>().ok()).sum();
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Returns the anonymous memory of a process, in bytes.
fn anonymous_bytes(pid: u32) -> Option<u64> {
    number_of(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "RssAnon")
}

/// Returns the proportional set size of a process (PSS), in bytes: shared pages count by its share.
pub(crate) fn proportional_bytes(pid: u32) -> Option<u64> {
    number_of(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, "Pss")
}

/// Reads `NAME:  N kB` from one of the kernel's lists, in bytes.
pub(crate) fn number_of(list: &str, name: &str) -> Option<u64> {
    let line = list.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

/// Kills a process that the benchmark started, and waits until it has ended.
pub(crate) fn end(pid: u32) -> Result<(), BenchError> {
    let Ok(ended) = pidfd(pid) else { return Ok(()) };
    let _ = kill_process(pid_of(pid), Signal::KILL);
    if has_ended(&ended, EXIT_TIMEOUT) {
        return Ok(());
    }
    let what = format!("process {pid}");
    Err(BenchError::TimedOut { what, seconds: EXIT_TIMEOUT.as_secs() })
}

fn pid_of(pid: u32) -> Pid {
    i32::try_from(pid).ok().and_then(Pid::from_raw).expect("the kernel's own number")
}

fn pidfd(pid: u32) -> std::io::Result<OwnedFd> {
    Ok(pidfd_open(pid_of(pid), PidfdFlags::empty())?)
}

/// Waits at most `timeout` for the end of a process.
fn has_ended(pidfd: &OwnedFd, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).expect("a short time");
    matches!(poll(&mut [PollFd::new(&pidfd.as_fd(), PollFlags::IN)], Some(&timeout)), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_s_time_and_memory_are_seen() {
        let mut command = Command::new("sh");
        command.args(["-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"]);
        let (_, usage) = run(&mut command, &AtomicBool::new(false)).unwrap();
        assert!(usage.cpu_seconds > 0.0, "{usage:?}");
        assert!(usage.cpu_seconds <= usage.seconds + 0.05, "{usage:?}");
        assert!(usage.peak_bytes > 0, "{usage:?}");
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo because >&2; exit 3"]);
        let error = run(&mut command, &AtomicBool::new(false)).unwrap_err();
        assert_eq!(error.to_string(), "sh: because");
    }

    #[test]
    fn a_program_is_ended_when_it_is_to_stop() {
        let error = run(Command::new("sleep").arg("60"), &AtomicBool::new(true)).unwrap_err();
        assert!(matches!(error, BenchError::Stopped));
    }

    #[test]
    fn lists_of_the_kernel_are_read() {
        assert_eq!(number_of("VmRSS:\t 8 kB\nRssAnon:\t    12 kB\n", "RssAnon"), Some(12 << 10));
        assert_eq!(number_of("", "Pss"), None);
    }
}
