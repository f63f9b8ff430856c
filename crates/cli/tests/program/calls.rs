//! If any system call of a save fails, the VM runs on as before.
//!
//! `cargo xtask chaos calls` lets more calls fail than a test has time for.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use vmfile_testing::{Case, Qemu, Random, Release, TestResult, cases, given, requires};

use crate::run::{Said, program, strace};
use crate::trial::{Trial, WAYS};
use crate::words;

/// How many calls a test run lets fail.
const FAULTS: u64 = 12;

/// The calls that can fail, and how. `EINTR` and `EAGAIN` are no reason to give up.
const ERRORS: [(&str, &[&str]); 34] = [
    ("openat", &["EMFILE", "EACCES", "EINTR"]),
    ("read", &["EIO", "EINTR"]),
    ("pread64", &["EIO", "EINTR"]),
    ("write", &["EIO", "ENOSPC"]),
    ("pwrite64", &["EIO", "ENOSPC", "EINTR"]),
    ("pwritev", &["EIO", "ENOSPC"]),
    ("fallocate", &["ENOSPC", "EOPNOTSUPP", "EINTR"]),
    ("ftruncate", &["ENOSPC", "EIO"]),
    ("fsync", &["EIO", "ENOSPC"]),
    ("fdatasync", &["EIO", "ENOSPC"]),
    ("linkat", &["EIO", "ENOSPC", "ENOENT"]),
    ("renameat2", &["EIO", "ENOSPC"]),
    ("statx", &["EIO"]),
    ("lseek", &["EIO"]),
    ("ioctl", &["EIO", "ENOTTY"]),
    ("fcntl", &["EINVAL"]),
    ("flock", &["EINTR"]),
    ("io_uring_setup", &["EPERM", "ENOMEM"]),
    ("io_uring_register", &["ENOMEM"]),
    ("io_uring_enter", &["EIO", "EINTR", "EAGAIN"]),
    ("mmap", &["ENOMEM"]),
    ("madvise", &["EINVAL"]),
    ("clone3", &["EAGAIN"]),
    ("process_vm_readv", &["EPERM", "EFAULT"]),
    ("sendmsg", &["EPIPE", "ENOBUFS", "EINTR"]),
    ("sendto", &["EPIPE"]),
    ("recvfrom", &["ECONNRESET", "EINTR"]),
    ("ppoll", &["ENOMEM", "EINTR"]),
    ("poll", &["ENOMEM", "EINTR"]),
    ("memfd_create", &["EMFILE"]),
    ("socketpair", &["EMFILE"]),
    ("pidfd_open", &["EMFILE"]),
    ("pidfd_getfd", &["EPERM"]),
    ("getdents64", &["EIO"]),
];

/// One call that fails.
struct Fault {
    way: usize,
    call: &'static str,
    error: &'static str,
    /// Which of the calls of a thread.
    number: u64,
}

impl Fault {
    fn what(&self) -> String {
        let Fault { way, call, error, number } = self;
        format!("{:?}: {call} number {number} fails with {error}", WAYS[*way])
    }

    /// Runs a save in which it fails. Returns whether the save made the call.
    fn inject(&self, trial: &Trial, words: &[OsString]) -> TestResult<(Said, bool)> {
        let Fault { call, error, number, .. } = self;
        let trace = trial.directory.path().join("trace");
        // A save that hangs is a fault as well.
        let mut strace = Command::new("timeout");
        strace.args(["--kill-after=5", "60", "strace"]);
        // Also in threads and in the guardian.
        strace.args(words!["-f", "-qq", "-o", trace, "-e", &format!("trace={call}")]);
        strace.args(["-e", &format!("inject={call}:error={error}:when={number}")]);
        let said = strace.arg(program()).args(words).output()?;
        let is_injected = fs::read_to_string(&trace)?.contains("(INJECTED)");
        fs::remove_file(&trace)?;
        Ok((said.into(), is_injected))
    }
}

/// Returns how often each call is made in a save that succeeds.
fn count_calls(trial: &Trial, words: &[OsString]) -> TestResult<BTreeMap<String, u64>> {
    let trace = trial.directory.path().join("trace");
    let names = ERRORS.map(|(name, _)| name).join(",");
    let mut strace = Command::new("strace");
    strace.args(words!["-f", "-qq", "-c", "-o", trace, "-e", &format!("trace={names}")]);
    let said: Said = strace.arg(program()).args(words).output()?.into();
    said.assert(0, &["saved"]);
    let table = fs::read_to_string(&trace)?;
    fs::remove_file(&trace)?;
    let rows = table.lines().filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        Some(((*columns.last()?).to_owned(), columns.get(3)?.parse().ok()?))
    });
    Ok(rows.collect())
}

#[test]
fn a_vm_whose_save_has_a_system_call_that_fails_is_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    requires!(strace());
    let faults = given("VMFILE_FAULTS").unwrap_or(FAULTS);
    println!("{faults} calls that fail");
    let mut trial = Trial::begin(&qemu, Random::of_this_run())?;
    let mut counts: BTreeMap<usize, BTreeMap<String, u64>> = BTreeMap::new();
    let (mut injected, mut failed) = (0, 0);
    for fault in 0..faults {
        let way = usize::try_from(fault)? % WAYS.len();
        let file = trial.directory.path().join("call.vmf");
        let words = trial.words(way, &file);
        if let Entry::Vacant(vacant) = counts.entry(way) {
            vacant.insert(count_calls(&trial, &words)?);
            fs::remove_file(&file)?;
            trial.run_if_paused()?;
        }
        let made: Vec<_> =
            ERRORS.iter().filter(|(name, _)| counts[&way].contains_key(*name)).collect();
        let &&(call, errors) = trial.random.one_of(&made);
        let error = *trial.random.one_of(errors);
        let number = 1 + trial.random.next_number() % counts[&way][call];
        let fault = Fault { way, call, error, number };
        let (is_injected, has_failed) = save_with_fault(&mut trial, &fault, &file)?;
        injected += u64::from(is_injected);
        failed += u64::from(has_failed);
    }
    trial.next_save_is_right()?;
    println!("{failed} of {faults} saves failed; slowest {:?}", trial.slowest);
    cases(injected, Case::Fault);
    Ok(())
}

/// Returns whether the save made the call, and whether it failed.
fn save_with_fault(trial: &mut Trial, fault: &Fault, file: &Path) -> TestResult<(bool, bool)> {
    let what = fault.what();
    let (mut is_injected, mut has_failed) = (false, false);
    trial.end_a_save((&what, fault.way, file), |trial| {
        let said;
        (said, is_injected) = fault.inject(trial, &trial.words(fault.way, file))?;
        has_failed = said.code != Some(0);
        // Without memory for a thread or a buffer, a program ends; otherwise it says what failed.
        let is_fatal = fault.call == "mmap";
        let is_said = matches!(said.code, Some(1..=9)) && said.stderr.contains("vmfile: ");
        assert!(!has_failed || is_said || is_fatal, "{what}: {said:?}");
        Ok((said, 0))
    })?;
    Ok((is_injected, has_failed))
}
