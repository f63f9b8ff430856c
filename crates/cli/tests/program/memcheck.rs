//! The program under valgrind's memcheck: what it does with its memory.
//!
//! `cargo xtask memory memcheck` runs all verbs, a test run only those that no VM is needed for.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use vmfile_testing::{Guest, Missing, Ram, TestResult, requires};

use crate::guests::{directory, prepare};
use crate::run::{Said, program, vmfile};
use crate::words;

/// Set by `cargo xtask memory memcheck`: the long test is asked for.
const ALL: &str = "VMFILE_MEMCHECK";

/// What memcheck says of system calls that it does not know: valgrind 3.19 of Debian 12 has no `openat2`,
/// `pidfd_open`, `landlock_create_ruleset` nor `cachestat`, and returns `ENOSYS`.
const UNKNOWN_CALL: [&str; 5] = [
    "WARNING: unhandled amd64-linux syscall",
    "You may be able to write your own handler",
    "Read the file README_MISSING_SYSCALL_OR_IOCTL",
    "Nevertheless we consider this a bug",
    "it at http://valgrind.org/support",
];

fn valgrind() -> Result<(), Missing> {
    let output = Command::new("valgrind").arg("--version").output();
    let is_there = output.is_ok_and(|output| output.status.success());
    is_there.then_some(()).ok_or_else(|| Missing::new("no valgrind: run `cargo xtask setup`"))
}

/// Runs the program under memcheck, and expects that it succeeds and that neither it nor its guardian uses
/// memory wrongly.
fn is_sound(words: &[OsString]) -> TestResult<Said> {
    let logs = tempfile::tempdir()?;
    let mut command = Command::new("valgrind");
    command.args(["--tool=memcheck", "--quiet", "--error-exitcode=99", "--fair-sched=yes"]);
    // What a thread may still refer to when the program ends is no loss.
    command.args(["--leak-check=full", "--show-leak-kinds=definite"]);
    command.arg("--errors-for-leak-kinds=definite");
    command.arg(format!("--log-file={}/%p", logs.path().display()));
    command.arg(program()).args(words).stdin(Stdio::null());
    let said = Said::from(command.output()?);
    for entry in fs::read_dir(logs.path())? {
        let text = fs::read_to_string(entry?.path())?;
        let is_finding = |line: &&str| UNKNOWN_CALL.iter().all(|known| !line.contains(known));
        let found: Vec<&str> = text.lines().filter(is_finding).collect();
        assert!(found.is_empty(), "{words:?}:\n{}", found.join("\n"));
    }
    said.assert(0, &[]);
    Ok(said)
}

/// Reads a file in every way. By direct I/O or by the page cache is always said: to choose, vmfile would ask
/// for the size of a page where there is no `cachestat`, and rustix 1.1 then reads the vDSO, which valgrind
/// takes away.
fn is_read(file: &Path, other: &Path) -> TestResult {
    is_sound(&words!["info", file])?;
    for direct_io in ["required", "off"] {
        for io in ["io-uring", "threads"] {
            is_sound(&words!["check", file, "--direct-io", direct_io, "--io", io])?;
        }
    }
    is_sound(&words!["convert", file, other, "--to", "stream", "--direct-io", "required"])?;
    Ok(())
}

/// Unsafe code is in one crate, and here is what the kernel and the compiler made of it.
#[test]
fn no_verb_uses_memory_wrongly() -> TestResult {
    let qemu = requires!(qemu >= "10.0");
    requires!(valgrind());
    let directory = directory()?;
    let file = |name: &str| directory.path().join(name);
    let config = Guest::boot_sector(Ram::private(32)).seed(471);
    let mut guest = config.boot_to(&qemu, 1)?;
    let first = file("first.vmf");
    vmfile(words!["save", guest.qmp_path(), first, "--after", "resume"]).assert(0, &["saved"]);
    if env::var_os(ALL).is_none() {
        is_sound(&words!["info", first])?;
        is_sound(&words!["check", first, "--direct-io", "required"])?;
        return Ok(());
    }
    is_read(&first, &file("first.mig"))?;
    let words = words!["convert", file("first.mig"), file("back.vmf"), "--to", "mapped-ram"];
    is_sound(&words)?;
    let ways = [
        &["--route", "stream"][..],
        &["--route", "stream", "--channels", "2", "--io", "threads"],
        &["--route", "native", "--direct-io", "required"],
        &["--live"],
        // By the memory of QEMU's process, if this valgrind knows `pidfd_open`.
        &[],
    ];
    for (number, way) in ways.iter().enumerate() {
        let saved = file(&format!("{number}.vmf"));
        let words = words!["save", guest.qmp_path(), saved, "--after", "resume"];
        let said =
            is_sound(&words.into_iter().chain(way.iter().map(OsString::from)).collect::<Vec<_>>())?;
        println!("{way:?}: {}", said.stdout);
        vmfile(words!["check", saved]).assert(0, &["0 findings"]);
        guest.runs_on(1)?;
    }
    let (prepared, _end) = prepare(&config, &qemu)?;
    let words = words!["restore", first, "--mode", "stream", "--direct-io", "required", "--"];
    is_sound(&words.into_iter().chain(prepared.command_line()).collect::<Vec<_>>())?;
    prepared.attach()?.counts_on(1)?;
    is_sound(&words!["list"])?;
    Ok(())
}
