//! QEMU is killed or stopped in the middle of a save or a restore.
//!
//! `cargo xtask chaos qemu` tries more moments than a test has time for.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use vmfile_testing::{
    Case, Guest, GuestConfig, Qemu, Ram, Random, TestResult, cases, given, requires,
};

use crate::guests::{directory, prepare};
use crate::run::{self, EndAllIn, Said, names_in, processes_in, start, vmfile, wait_until};
use crate::words;

/// How many moments of saves a test run tries; it tries a third as many of restores.
const MOMENTS: u64 = 12;

/// How soon vmfile must report that QEMU is gone. An idle machine needs no time, but writes that
/// were submitted to the disk must complete first.
const GONE_SOON: Duration = Duration::from_secs(15);

/// How soon vmfile must report that QEMU's process is stopped. vmfile waits three seconds for it to
/// go on when QEMU does not answer, and again when it resumes the guest.
const STOPPED_SOON: Duration = Duration::from_secs(20);

/// Every route.
const WAYS: [&[&str]; 5] = [
    &["--route", "direct"],
    &["--route", "stream"],
    &["--route", "stream", "--channels", "2"],
    &["--route", "native"],
    &["--live"],
];

const MODES: [&str; 3] = ["map", "load", "stream"];

fn config() -> GuestConfig {
    Guest::boot_sector(Ram::private(200)).seed(91).data_share(200)
}

fn send(pid: u32, signal: Signal, what: &str) -> TestResult {
    kill_process(run::pid(pid), signal)
        .map_err(|errno| format!("{what}: {signal:?} to {pid}: {errno}").into())
}

/// Waits for the program to end and returns its output; fails if that took longer than `soon`.
fn end(child: Child, since: Instant, soon: Duration, what: &str) -> TestResult<Said> {
    let said = Said::from(child.wait_with_output()?);
    assert!(since.elapsed() < soon, "{what}: {:?}: {said:?}", since.elapsed());
    assert!(!said.stderr.contains("panicked"), "{what}: {said:?}");
    Ok(said)
}

/// Runs a save of `guest`, and sends `signal` to its QEMU in the middle of it. Returns whether the save had
/// not ended.
fn save(guest: &mut Guest, number: u64, random: &mut Random, signal: Signal) -> TestResult<bool> {
    let way = WAYS[usize::try_from(number)? % WAYS.len()];
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let moment = Duration::from_secs_f64(0.5 * random.next_fraction());
    let what = format!("save {number}: {way:?}, {signal:?} after {moment:?}");
    let mut words = words!["save", guest.qmp_path(), file, "--after", "resume"].to_vec();
    words.extend(way.iter().map(std::ffi::OsString::from));
    let qemu = guest.pid()?;
    let child = start(words)?;
    let sockets = format!("vmfile-{}-", child.id());
    thread::sleep(moment);
    let sent = Instant::now();
    send(qemu, signal, &what)?;
    let soon = if signal == Signal::KILL { GONE_SOON } else { STOPPED_SOON };
    let said = end(child, sent, soon, &what)?;
    if signal == Signal::KILL {
        assert!(matches!(said.code, Some(0 | 3)), "{what}: {said:?}");
        // A QEMU that has ended is not paused.
        assert!(!said.stderr.contains("left paused"), "{what}: {said:?}");
    } else {
        assert!(matches!(said.code, Some(0 | 3 | 7)), "{what}: {said:?}");
        assert!(said.code == Some(0) || said.stderr.contains("stopped"), "{what}: {said:?}");
        send(qemu, Signal::CONT, &what)?;
        let mut status = guest.status();
        wait_until(&format!("{what}: the guest runs: {said:?}"), || {
            status = guest.status();
            status.as_ref().map_or(true, |status| status == "running")
        })?;
        status.map_err(|error| format!("{what}: {error}; {said:?}"))?;
        guest.counts_on(1)?;
    }
    let left = names_in(directory.path());
    // QEMU may end after the file got its name and before vmfile sent it the last command; the
    // error then says that the file is whole.
    let is_whole = said.code == Some(0) || said.stderr.contains("vm.vmf is whole");
    let expected = if is_whole { vec!["vm.vmf".to_owned()] } else { Vec::new() };
    assert_eq!(left, expected, "{what}: {said:?}");
    let sockets = names_in(Path::new("/tmp")).into_iter().find(|name| name.starts_with(&sockets));
    assert_eq!(sockets, None, "{what}: {said:?}");
    Ok(said.code != Some(0))
}

/// Returns the QEMU that a restore has started.
fn qemu_in(directory: &Path) -> Option<u32> {
    let is_qemu = |pid: &i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.starts_with("qemu-system")
    };
    processes_in(directory).into_iter().find(is_qemu).and_then(|pid| u32::try_from(pid).ok())
}

/// Runs a restore, and kills or stops the QEMU that it started in the middle of it. Returns whether the
/// restore had not ended.
fn restore(qemu: &Qemu, file: &Path, number: u64, random: &mut Random) -> TestResult<bool> {
    let signal = if number % 2 == 0 { Signal::KILL } else { Signal::STOP };
    let mode = MODES[usize::try_from(number)? % MODES.len()];
    let (prepared, EndAllIn(directory)) = &prepare(&config(), qemu)?;
    let mut words = words!["restore", file, "--mode", mode, "--"].to_vec();
    words.extend(prepared.command_line().iter().map(std::ffi::OsString::from));
    let child = start(words)?;
    let mut found = None;
    wait_until("QEMU is started", || {
        found = qemu_in(directory);
        found.is_some()
    })?;
    let moment = Duration::from_secs_f64(0.4 * random.next_fraction());
    let what = format!("restore {number}: {mode}, {signal:?} after {moment:?}");
    thread::sleep(moment);
    let sent = Instant::now();
    if let Err(error) = send(found.ok_or("found")?, signal, &what) {
        // The restore has ended already: the error shows its output.
        let said = Said::from(child.wait_with_output()?);
        return Err(format!("{error}; {said:?}").into());
    }
    let said = end(child, sent, STOPPED_SOON, &what)?;
    assert!(matches!(said.code, Some(0 | 3)), "{what}: {said:?}");
    if said.code != Some(0) {
        let words: &[&str] = match signal {
            Signal::KILL => &["ended", "gone"],
            _ => &["is stopped"],
        };
        assert!(words.iter().any(|word| said.stderr.contains(word)), "{what}: {said:?}");
        wait_until(&format!("{what}: QEMU is gone"), || qemu_in(directory).is_none())?;
    }
    Ok(said.code != Some(0))
}

/// The message was "left paused, `cont` makes it run again", or "the file is damaged" with status
/// 4; and vmfile waited up to ten minutes for a stopped QEMU.
#[test]
fn a_qemu_that_ends_or_stands_still_at_any_moment_is_said_to() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let moments = given("VMFILE_MOMENTS").unwrap_or(MOMENTS);
    println!("{moments} moments");
    let mut random = Random::of_this_run();
    let mut guest = config().boot_to(&qemu, 1)?;
    let whole = crate::guests::save(&guest, &["--after", "resume"])?;
    whole.said.assert(0, &[]);
    let mut ends = 0;
    for number in 0..moments {
        if number % 2 == 1 {
            ends += u32::from(save(&mut guest, number / 2, &mut random, Signal::STOP)?);
            continue;
        }
        ends += u32::from(save(&mut guest, number / 2, &mut random, Signal::KILL)?);
        if guest.status().is_err() {
            guest = config().boot(&qemu)?;
            guest.wait_for_count(1)?;
        }
    }
    for number in 0..moments / 3 {
        ends += u32::from(restore(&qemu, &whole.file, number, &mut random)?);
    }
    vmfile(words!["check", whole.file]).assert(0, &[]);
    cases(ends, Case::QemuEnd);
    Ok(())
}
