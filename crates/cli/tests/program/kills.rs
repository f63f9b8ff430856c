//! If vmfile is killed in the middle of a save, the VM runs on as before.
//!
//! `cargo xtask chaos vmfile` tries more moments than a test has time for.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmfile_testing::{
    Guest, GuestConfig, Monitor, Qemu, Ram, Random, Release, TestError, TestResult, requires,
};

use crate::guests::{directory, prepare, saved};
use crate::run::{
    EndAllIn, Said, command, names_in, pid, processes_in, program, start, strace, vmfile,
    wait_until,
};
use crate::words;

/// How many moments a test run tries.
const KILLS: u64 = 30;

/// How soon the guest must run again on an idle machine; the test allows `ALLOWANCE` times as long.
const SOON: Duration = Duration::from_secs(1);
const ALLOWANCE: u32 = 5;

/// Stands for the path of a file that was saved before.
const BASE: &str = "BASE";

/// Every route, also live, with disks, and with a base.
const WAYS: [&[&str]; 12] = [
    &["--route", "direct"],
    &["--route", "direct", "--with-disks"],
    &["--route", "stream"],
    &["--route", "stream", "--channels", "2"],
    &["--route", "stream", "--with-disks"],
    &["--route", "native"],
    &["--route", "native", "--with-disks"],
    &["--live"],
    &["--live", "--with-disks"],
    &["--live", "--base", BASE],
    &["--base", BASE],
    &["--route", "direct", "--after", "pause"],
];

/// What a save may change in QEMU, as QEMU reports it.
#[derive(Debug, PartialEq)]
struct State {
    settings: Value,
    parameters: Value,
    sets: Value,
    objects: Vec<String>,
    /// What QEMU's descriptor 0 refers to. QEMU 10.0.2 closes it if a background snapshot fails
    /// before it begins; the next failure then closed the monitor that had got the number 0.
    stdin: PathBuf,
}

impl State {
    fn of(guest: &mut Guest) -> TestResult<State> {
        let objects = guest.qmp("qom-list", json!({ "path": "/objects" }))?;
        let name = |object: &Value| object["name"].as_str().map(str::to_owned);
        // The note of the file that was saved last stays.
        let is_note = |name: &String| name == "vmfile-last";
        Ok(State {
            settings: guest.qmp("query-migrate-capabilities", json!({}))?,
            parameters: guest.qmp("query-migrate-parameters", json!({}))?,
            sets: guest.qmp("query-fdsets", json!({}))?,
            stdin: fs::read_link(format!("/proc/{}/fd/0", guest.pid()?))?,
            objects: objects
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(name)
                .filter(|name| !is_note(name))
                .collect(),
        })
    }
}

/// A guest that writes to its memory and its disk all the time, with its state at the start.
struct Trial {
    guest: Guest,
    directory: TempDir,
    /// Where the base is.
    base: TempDir,
    before: State,
    random: Random,
    /// How long each way takes if it is not killed.
    seconds: BTreeMap<usize, f64>,
    /// The longest time until the guest ran again.
    slowest: Duration,
    finished: u64,
}

impl Trial {
    fn begin(qemu: &Qemu, random: Random) -> TestResult<Trial> {
        let config = Guest::linux(Ram::private(256)).vcpus(2).disk(16).one_moment().fill_mib(120);
        let mut guest = config.busy().boot_to(qemu, 1)?;
        let before = State::of(&mut guest)?;
        let (seconds, slowest) = (BTreeMap::new(), Duration::ZERO);
        let (directory, base) = (directory()?, directory()?);
        let words = words!["save", guest.qmp_path(), base.path().join(BASE), "--after", "resume"];
        vmfile(words).assert(0, &["saved"]);
        Ok(Trial { guest, directory, base, before, random, seconds, slowest, finished: 0 })
    }

    fn words(&self, way: usize, file: &Path) -> Vec<OsString> {
        let mut words = words!["save", self.guest.qmp_path(), file].to_vec();
        words.extend(WAYS[way].iter().map(|&word| match word {
            BASE => self.base.path().join(BASE).into(),
            word => OsString::from(word),
        }));
        if !WAYS[way].contains(&"--after") {
            words.extend(["--after", "resume"].map(OsString::from));
        }
        words
    }

    /// Returns how long a way takes; the first call measures it.
    fn seconds(&mut self, way: usize) -> TestResult<f64> {
        if let Some(seconds) = self.seconds.get(&way) {
            return Ok(*seconds);
        }
        let file = self.directory.path().join("whole.vmf");
        let began = Instant::now();
        vmfile(self.words(way, &file)).assert(0, &["saved"]);
        let seconds = began.elapsed().as_secs_f64();
        fs::remove_file(&file)?;
        self.run_if_paused()?;
        self.seconds.insert(way, seconds);
        Ok(seconds)
    }

    /// Lets the guest run after a save with `--after pause`.
    fn run_if_paused(&mut self) -> TestResult {
        if self.guest.status()? == "paused" { self.guest.resume() } else { Ok(()) }
    }

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

    /// Runs `save`, which kills a save, and checks the VM.
    fn end_a_save(
        &mut self,
        (what, way, file): (&str, usize, &Path),
        save: impl FnOnce(&Trial) -> TestResult<(Said, u32)>,
    ) -> TestResult {
        let image = self.image()?;
        let images = self.images()?;
        let (said, pid) = save(self)?;
        let killed_at = Instant::now();
        let is_there = file.exists();
        self.finished += u64::from(is_there);
        let asked_to_stand = WAYS[way].contains(&"pause") && is_there;
        let is_alive = |guest: &mut Guest| {
            guest
                .status()
                .is_ok_and(|status| status == "running" || asked_to_stand && status == "paused")
        };
        wait_until(&format!("{what}: the guest runs"), || is_alive(&mut self.guest))
            .map_err(|error| self.with_state(error))?;
        let took = killed_at.elapsed();
        self.slowest = self.slowest.max(took);
        assert!(took < SOON * ALLOWANCE, "{what}: the guest ran after {took:?}; {said:?}");
        // The rest may take longer, because an overlay is merged while the guest runs.
        wait_until(&format!("{what}: nothing is left in QEMU"), || {
            State::of(&mut self.guest).is_ok_and(|state| state == self.before)
        })
        .map_err(|error| self.with_state(error))?;
        assert_eq!(self.guest.status()? == "paused", asked_to_stand, "{what}");
        self.run_if_paused()?;
        self.expect_no_trace(what, (file, is_there), (image, images))?;
        let sockets = format!("vmfile-{pid}-");
        let left = names_in(Path::new("/tmp")).into_iter().find(|name| name.starts_with(&sockets));
        assert_eq!(left, None, "{what}");
        self.guest.counts_on(1)?;
        Ok(())
    }

    /// Adds QEMU's state to an error.
    fn with_state(&mut self, error: TestError) -> TestError {
        let status = self.guest.status();
        let migration = self.guest.qmp("query-migrate", json!({}));
        let state = State::of(&mut self.guest);
        let before = &self.before;
        format!("{error}: {status:?}, {migration:?}, {state:?}, expected {before:?}").into()
    }

    /// Expects that the image in use and the files are as before, unless the save completed.
    fn expect_no_trace(
        &mut self,
        what: &str,
        (file, is_there): (&Path, bool),
        (image, images): (String, Vec<String>),
    ) -> TestResult {
        if is_there {
            let said = vmfile(words!["check", file]);
            said.assert(0, &[]);
            fs::remove_file(file)?;
        } else {
            assert_eq!(self.image()?, image, "{what}");
            assert_eq!(self.images()?, images, "{what}");
        }
        assert_eq!(names_in(self.directory.path()), [""; 0], "{what}");
        Ok(())
    }

    /// The top image of the guest's disk, as QEMU reports it.
    fn image(&mut self) -> TestResult<String> {
        let drives = self.guest.qmp("query-block", json!({}))?;
        let mut drives = drives.as_array().into_iter().flatten();
        let disk = drives.find(|drive| drive["device"] == "disk0").ok_or("no disk")?;
        Ok(disk["inserted"]["image"]["filename"].as_str().unwrap_or_default().to_owned())
    }

    fn images(&self) -> TestResult<Vec<String>> {
        let disk = self.guest.config().disk_path();
        let mut names = names_in(disk.parent().ok_or("a directory")?);
        names.sort();
        Ok(names)
    }

    /// Expects that a save which is not killed succeeds.
    fn next_save_is_right(&mut self) -> TestResult {
        let file = self.directory.path().join("next.vmf");
        vmfile(words!["save", self.guest.qmp_path(), file, "--after", "resume"])
            .assert(0, &["saved"]);
        vmfile(words!["check", file]).assert(0, &[]);
        fs::remove_file(&file)?;
        self.guest.counts_on(1)
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
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let kills = number("VMFILE_KILLS").unwrap_or(KILLS);
    let seed = number("VMFILE_SEED").unwrap_or_else(Random::seed_of_now);
    println!("{kills} kills, seed {seed}");
    let mut trial = Trial::begin(&qemu, Random::new(seed))?;
    for kill in 0..kills {
        let signal = if kill % 3 == 2 { Signal::QUIT } else { Signal::KILL };
        trial.kill(kill, signal)?;
        if kill % 10 == 9 {
            trial.next_save_is_right()?;
        }
    }
    trial.next_save_is_right()?;
    println!("{} of {kills} saves had their file; slowest {:?}", trial.finished, trial.slowest);
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
    trial.next_save_is_right()
}

/// Kills a restore with SIGKILL after `moment`; returns whether its VM runs.
fn kill_a_restore(
    (qemu, config, file): (&Qemu, &GuestConfig, &Path),
    mode: &str,
    moment: Duration,
) -> TestResult<bool> {
    let (prepared, EndAllIn(directory)) = &prepare(config, qemu)?;
    let mut command = command();
    command.args(words!["restore", file, "--mode", mode, "--"]).args(prepared.command_line());
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    thread::sleep(moment);
    end(child, Signal::KILL)?;
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
            return Ok(false);
        }
        let oracle = Monitor::connect(&directory.join("oracle"), Duration::from_millis(200));
        let state = oracle.and_then(|mut oracle| oracle.execute("query-status", json!({})));
        if state.is_ok_and(|state| state["status"] == "running") {
            return Ok(true);
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
    let seed = Random::seed_of_now();
    let mut random = Random::new(seed);
    let mut running = 0;
    for mode in ["map", "load", "stream"].into_iter().cycle().take(12) {
        let moment = Duration::from_secs_f64(0.6 * random.next_fraction());
        let runs = kill_a_restore((&qemu, &config, &saved.file), mode, moment)?;
        running += u32::from(runs);
    }
    println!("seed {seed}: {running} of 12 VMs run");
    Ok(())
}
