//! If vmfile is killed in the middle of a save, the VM runs on as before.
//!
//! `cargo xtask chaos vmfile` tries more moments than a test has time for.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::json;
use vmfile::Vm;
use vmfile_testing::{
    Case, Guest, GuestConfig, Monitor, Qemu, Ram, Random, Release, TestResult, cases, given,
    requires,
};

use crate::guests::{directory, prepare, saved};
use crate::run::{EndAllIn, Said, command, pid, processes_in, program, start, strace, wait_until};
use crate::trial::{State, Trial, WAYS};
use crate::words;

/// How many moments a test run tries.
const KILLS: u64 = 20;

impl Trial {
    /// Kills a save with `signal` at a random moment, and checks the VM.
    fn kill(&mut self, number: u64, signal: Signal) -> TestResult {
        let way = usize::try_from(number)? % WAYS.len();
        let seconds = self.seconds(way)?;
        let moment = Duration::from_secs_f64(seconds * 1.1 * self.random.next_fraction());
        let what = format!("kill {number}: {:?} after {moment:?} by {signal:?}", WAYS[way]);
        let file = self.directory.path().join(format!("{number}.vmf"));
        self.end_a_save((&what, way, &file), |trial| {
            let child = start(trial.words(way, &file))?;
            let pid = child.id();
            thread::sleep(moment);
            Ok((end(child, signal)?, pid))
        })
    }

    /// Kills a save at call `number` of the system call `name`, before the kernel executes it. The
    /// guardian is not killed. Returns whether the save made that many calls.
    fn kill_at_call(&mut self, way: usize, name: &str, number: u32) -> TestResult<bool> {
        self.signal_at_call(way, ("KILL", "killed by SIGKILL"), name, number)
    }

    /// Sends a signal to a save at call `number` of the system call `name`; strace writes `told` then.
    fn signal_at_call(
        &mut self,
        way: usize,
        (signal, told_by): (&str, &str),
        name: &str,
        number: u32,
    ) -> TestResult<bool> {
        let what = format!("{:?} at {name} number {number}, SIG{signal}", WAYS[way]);
        let file = self.directory.path().join("call.vmf");
        let mut is_killed = false;
        self.end_a_save((&what, way, &file), |trial| {
            let trace = trial.directory.path().join("trace");
            let mut strace = Command::new("strace");
            strace.args(words!["-qq", "-o", trace, "-e", &format!("trace={name},getpid")]);
            strace.args(["-e", &format!("inject={name}:signal={signal}:when={number}")]);
            let said = strace.arg(program()).args(trial.words(way, &file)).output()?;
            let told = fs::read_to_string(&trace)?;
            fs::remove_file(&trace)?;
            is_killed = told.contains(told_by);
            let own = told.lines().filter_map(|line| line.strip_prefix("getpid()"));
            let pid = own.filter_map(|line| line.split_once("= ")?.1.trim().parse().ok()).next();
            Ok((said.into(), pid.unwrap_or_default()))
        })?;
        Ok(is_killed)
    }
}

/// Sends `signal` to a process unless it has ended; returns its output.
fn end(mut child: Child, signal: Signal) -> TestResult<Said> {
    if child.try_wait()?.is_none() {
        kill_process(pid(child.id()), signal)?;
    }
    Ok(child.wait_with_output()?.into())
}

/// A save that was killed, by SIGKILL or SIGQUIT for example, left the VM paused for ever. A killed
/// live save left `background-snapshot` on, and the next migration by any client "completed" while
/// the source ran on. With disks, the VM was left in the overlay of a file that does not exist.
#[test]
fn a_vm_whose_save_is_killed_at_any_moment_is_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let kills = given("VMFILE_KILLS").unwrap_or(KILLS);
    println!("{kills} kills");
    let mut trial = Trial::begin(&qemu, Random::of_this_run())?;
    for kill in 0..kills {
        let signal = if kill % 3 == 2 { Signal::QUIT } else { Signal::KILL };
        trial.kill(kill, signal)?;
        if kill % 10 == 9 {
            trial.next_save_is_right()?;
        }
    }
    trial.next_save_is_right()?;
    println!("{} of {kills} saves had their file; slowest {:?}", trial.finished, trial.slowest);
    cases(trial.ended, Case::Kill);
    Ok(())
}

/// The system calls with which a save sends to QEMU and to its guardian.
const CALLS: [&str; 2] = ["sendmsg", "sendto"];

/// A save was killed after it had put its record into QEMU and before its guardian knew of it: the
/// record was left.
#[test]
fn a_vm_whose_save_is_killed_before_any_of_its_words_is_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    requires!(strace());
    let mut trial = Trial::begin(&qemu, Random::new(0))?;
    // A test run has time for one way: the one with the most commands.
    let ways = if std::env::var_os("VMFILE_KILLS").is_some() { 0..WAYS.len() } else { 1..2 };
    for (way, call) in ways.flat_map(|way| CALLS.map(|call| (way, call))) {
        let mut number = 1;
        while trial.kill_at_call(way, call, number)? {
            number += 1;
        }
        assert!(number > 3, "{:?} uses {call}", WAYS[way]);
        println!("{:?}: killed before each of {} {call}", WAYS[way], number - 1);
    }
    cases(trial.ended, Case::Kill);
    trial.next_save_is_right()
}

/// A live save that was stopped right after it had changed QEMU's capabilities left them changed.
#[test]
fn a_vm_whose_live_save_is_stopped_before_any_of_its_words_is_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    requires!(strace());
    let mut trial = Trial::begin(&qemu, Random::new(0))?;
    let way = WAYS.iter().position(|words| *words == ["--live"]).ok_or("a way")?;
    let mut number = 1;
    while trial.signal_at_call(way, ("INT", "--- SIGINT"), "sendmsg", number)? {
        number += 1;
    }
    assert!(number > 10, "{number} messages");
    cases(trial.ended, Case::Signal);
    trial.next_save_is_right()
}

/// The save told its guardian that the file has its name before that was so. If it was killed in
/// between, the overlays stayed on the disks, with `--after pause` the guest stayed paused, and
/// there was no file.
#[test]
fn a_vm_whose_save_is_killed_before_the_file_has_its_name_is_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    requires!(strace());
    let mut trial = Trial::begin(&qemu, Random::new(0))?;
    for (way, words) in WAYS.iter().enumerate() {
        assert!(trial.kill_at_call(way, "linkat", 1)?, "{words:?} names a file by `linkat`");
    }
    cases(trial.ended, Case::Kill);
    trial.next_save_is_right()
}

/// If a background snapshot of QEMU 7.2 fails or is cancelled, guest CPUs whose writes wait for it
/// never run again. So vmfile uses pre-copy there.
#[test]
fn a_live_save_by_the_oldest_qemu_that_is_killed_leaves_the_guest_running() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    requires!(strace());
    let mut trial = Trial::begin(&qemu, Random::new(0))?;
    // The command that starts the stream is about number 35.
    let live = WAYS.iter().position(|way| *way == ["--live"]).ok_or("a live save")?;
    for number in 32..46 {
        assert!(trial.kill_at_call(live, "sendmsg", number)?, "a live save has {number} words");
    }
    cases(trial.ended, Case::Kill);
    trial.next_save_is_right()
}

/// Kills a restore with SIGKILL after `moment`; returns whether it had not ended, and whether its VM runs.
fn kill_a_restore(
    (qemu, config, file): (&Qemu, &GuestConfig, &Path),
    mode: &str,
    moment: Duration,
) -> TestResult<(bool, bool)> {
    let (prepared, EndAllIn(directory)) = &prepare(config, qemu)?;
    let mut command = command();
    command.args(words!["restore", file, "--mode", mode, "--"]).args(prepared.command_line());
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    thread::sleep(moment);
    let was_killed = end(child, Signal::KILL)?.code.is_none();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let processes = processes_in(directory);
        // The guardian has the command line of the process that forked it.
        let is_guardian = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() == "vm-guardian")
        };
        let left: Vec<i32> = processes.into_iter().filter(|pid| !is_guardian(pid)).collect();
        if left.is_empty() {
            return Ok((was_killed, false));
        }
        let oracle = Monitor::connect(&directory.join("oracle"), Duration::from_millis(200));
        let state = oracle.and_then(|mut oracle| oracle.execute("query-status", json!({})));
        if state.is_ok_and(|state| state["status"] == "running") {
            return Ok((was_killed, true));
        }
        if Instant::now() > deadline {
            return Err(format!("{mode}, killed after {moment:?}: {left:?} is left").into());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A restore that was killed with SIGKILL left `qemu -S -incoming defer` behind in 9 of 12 tries.
#[test]
fn a_restore_that_is_killed_leaves_no_qemu_or_a_vm_that_runs() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(600)).seed(54).data_share(200);
    let saved = saved(&qemu, &config)?;
    let mut random = Random::of_this_run();
    let (mut killed, mut running) = (0, 0);
    for mode in ["map", "load", "stream"].into_iter().cycle().take(12) {
        let moment = Duration::from_secs_f64(0.6 * random.next_fraction());
        let (was_killed, runs) = kill_a_restore((&qemu, &config, &saved.file), mode, moment)?;
        killed += u32::from(was_killed);
        running += u32::from(runs);
    }
    println!("{running} of 12 VMs run");
    cases(killed, Case::Kill);
    Ok(())
}

/// The guardian let a guest run that another client had stopped while the save copied its memory.
#[test]
fn a_guest_that_another_client_stopped_stays_stopped_if_its_save_is_killed() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = directory()?;
    let (file, monitor) = (directory.path().join("vm.vmf"), directory.path().join("other"));
    let socket = format!("unix:{},server=on,wait=off", monitor.display());
    let config = Guest::boot_sector(Ram::private(256)).seed(141).busy();
    let mut guest = config.arguments(["-qmp", &socket]).boot_to(&qemu, 1)?;
    let before = State::of(&mut guest)?;
    for _ in 0..20 {
        let mut other = Vm::connect(&monitor)?;
        let mut child = start(words!["save", guest.qmp_path(), file, "--live"])?;
        // QEMU lets the guest run once it has protected the memory, and vmfile after the moment.
        while child.try_wait()?.is_none() && other.resumes() < 2 {
            other.run_state()?;
        }
        let is_after = other.resumes() == 2 && other.stop_if_running()?;
        // The guardian knows of the moment as soon as the save can tell it.
        thread::sleep(Duration::from_millis(20));
        end(child, Signal::KILL)?;
        drop(other);
        wait_until("the guardian is through", || {
            State::of(&mut guest).is_ok_and(|state| state == before)
        })?;
        let was_killed = !file.exists();
        if is_after {
            assert_eq!(guest.status()?, "paused");
            guest.resume()?;
        }
        cases(u32::from(was_killed), Case::Kill);
        cases(u32::from(is_after), Case::Interference);
        if is_after && was_killed {
            return guest.counts_on(1);
        }
        fs::remove_file(&file)?;
    }
    Err("no save was killed while it copied".into())
}
