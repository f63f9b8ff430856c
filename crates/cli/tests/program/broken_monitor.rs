//! The connection to QEMU's monitor breaks, is slow, or brings what QEMU does not say, while QEMU
//! runs on.
//!
//! `cargo xtask chaos monitor` tries more cases than a test has time for.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::json;
use vmfile::save::SaveOptions;
use vmfile_testing::{
    Case, Guest, GuestConfig, Qemu, Ram, Random, Release, Saved, TestResult, cases, given, requires,
};

use crate::guests::directory;
use crate::proxy::{Fault, Nonsense, Plan, Proxy};
use crate::run::{Said, names_in, pid, start, vmfile};
use crate::trial::{Trial, WAYS};
use crate::words;

/// How many cases a test run tries.
const CASES: u64 = 17;

/// How soon a save ends after a signal if its monitor is silent: it waits ten seconds for what it puts back,
/// and a minute for QEMU to end if the file has its name.
const OBEYS_WITHIN: Duration = Duration::from_secs(15);
const NAMED_WITHIN: Duration = Duration::from_secs(65);

/// How long a save may take that gets no signal.
const SAVE_TIMEOUT: Duration = Duration::from_secs(100);

/// How much more memory a save may take than one by an undisturbed monitor, in KiB: QEMU's longest line,
/// and what a parser makes of it.
const MORE_MEMORY_KIB: u64 = 24 << 10;

/// What happens to a connection, one after another.
const FAULTS: [Fault; 17] = [
    Fault::Cut,
    Fault::Slow,
    Fault::Silent,
    Fault::Bytewise,
    Fault::Before(Nonsense::Text),
    Fault::Before(Nonsense::NoObject),
    Fault::Before(Nonsense::OtherId),
    Fault::Before(Nonsense::Huge),
    Fault::Before(Nonsense::Deep),
    Fault::Before(Nonsense::NotUtf8),
    Fault::Before(Nonsense::Events),
    Fault::Instead(Nonsense::Text),
    Fault::Instead(Nonsense::NoObject),
    Fault::Instead(Nonsense::OtherId),
    Fault::Instead(Nonsense::Number),
    Fault::Instead(Nonsense::Huge),
    Fault::Instead(Nonsense::Deep),
];

impl Fault {
    /// Tells whether QEMU is only slow, or says what a client has to skip.
    fn is_harmless(self) -> bool {
        matches!(
            self,
            Fault::None
                | Fault::Slow
                | Fault::Bytewise
                | Fault::Before(Nonsense::OtherId | Nonsense::Events)
        )
    }

    /// Tells whether the save waits for an answer that does not come, as it does for a QEMU that
    /// waits for its disk.
    fn is_silence(self) -> bool {
        matches!(self, Fault::Silent | Fault::Instead(Nonsense::OtherId))
    }
}

/// A proxy between vmfile and the monitor closed the connection after `stop`: the save said "QEMU
/// is gone", and the guest stayed paused for ever.
#[test]
fn a_vm_whose_monitor_is_cut_off_is_put_back_by_a_new_connection() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(31).fill_mib(32).boot_to(&qemu, 1)?;
    let settings = guest.qmp("query-migrate-parameters", json!({}))?;
    let sockets = directory()?;
    let proxy = Proxy::start(&mut guest, &sockets.path().join("proxy"))?;
    // The last command that QEMU gets: `stop`, a change of its settings, the start of the stream.
    for last in ["\"stop\"", "migrate-set-parameters", "\"migrate\""] {
        let directory = directory()?;
        let file = directory.path().join("vm.vmf");
        proxy.disturb_next(Fault::CutAfter(last), 0);
        let route = ["--route", "stream", "--channels", "2"];
        let words = words!["save", proxy.socket(), file, "--after", "resume"];
        let said = vmfile(words.iter().chain(&route.map(Into::into)));
        said.assert(3, &["the connection to QEMU's monitor broke", "the VM is as it was"]);
        assert_eq!(names_in(directory.path()), [""; 0], "{last}");
        assert_eq!(guest.status()?, "running", "{last}");
        assert_eq!(guest.qmp("query-migrate-parameters", json!({}))?, settings, "{last}");
        guest.counts_on(1)?;
        cases(1, Case::Monitor);
    }
    let file = directory()?;
    let file = file.path().join("vm.vmf");
    vmfile(words!["save", guest.qmp_path(), file, "--after", "resume"]).assert(0, &["saved"]);
    Ok(())
}

/// What a run of the program was.
struct Run {
    said: Said,
    pid: u32,
    /// The most memory that it had, in KiB.
    peak_kib: u64,
    /// How long it took after a signal.
    obeyed_after: Option<Duration>,
}

/// Waits for a save. If it waits for an answer that does not come, SIGINT ends it.
fn watch(mut child: Child, plan: &Plan, is_silence: bool) -> TestResult<Run> {
    let (began, mut peak_kib, mut signaled) = (Instant::now(), 0, None);
    let mut reached_at = None;
    while child.try_wait()?.is_none() {
        peak_kib = peak_kib.max(peak_of(child.id()));
        if plan.is_reached() && is_silence && signaled.is_none() {
            let since = *reached_at.get_or_insert_with(Instant::now);
            if since.elapsed() > Duration::from_millis(100) {
                kill_process(pid(child.id()), Signal::INT)?;
                signaled = Some(Instant::now());
            }
        }
        if began.elapsed() > SAVE_TIMEOUT {
            child.kill()?;
            let said = Said::from(child.wait_with_output()?);
            return Err(format!("it does not end: {said:?}").into());
        }
        thread::sleep(Duration::from_millis(2));
    }
    let obeyed_after = signaled.map(|at| at.elapsed());
    let pid = child.id();
    plan.release();
    Ok(Run { said: child.wait_with_output()?.into(), pid, peak_kib, obeyed_after })
}

/// Returns the most memory that a process has had, in KiB; 0 if it has ended.
fn peak_of(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Saves through the proxy, by one of the ways.
fn save_through(trial: &Trial, proxy: &Proxy, way: usize, file: &Path) -> TestResult<Child> {
    let mut words = trial.words(way, file);
    words[1] = proxy.socket().into();
    start(words)
}

/// What a save is like by an undisturbed monitor.
#[derive(Clone, Copy)]
struct Undisturbed {
    lines: u64,
    peak_kib: u64,
}

fn undisturbed(trial: &mut Trial, proxy: &Proxy, way: usize) -> TestResult<Undisturbed> {
    let file = trial.directory.path().join("whole.vmf");
    let plan = proxy.disturb_next(Fault::None, 0);
    let run = watch(save_through(trial, proxy, way, &file)?, &plan, false)?;
    run.said.assert(0, &["saved"]);
    fs::remove_file(&file)?;
    trial.run_if_paused()?;
    Ok(Undisturbed { lines: plan.lines(), peak_kib: run.peak_kib })
}

#[test]
fn a_vm_whose_monitor_is_slow_or_talks_nonsense_is_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let count = given("VMFILE_CASES").unwrap_or(CASES);
    println!("{count} faults");
    let mut trial = Trial::begin(&qemu, Random::of_this_run())?;
    let sockets = directory()?;
    let proxy = Proxy::start(&mut trial.guest, &sockets.path().join("proxy"))?;
    let mut known: BTreeMap<usize, Undisturbed> = BTreeMap::new();
    let (mut most_kib, mut slowest) = (0, Duration::ZERO);
    for case in 0..count {
        let fault = FAULTS[usize::try_from(case)? % FAULTS.len()];
        let way = usize::try_from(trial.random.next_number())? % WAYS.len();
        let found = match known.get(&way) {
            Some(found) => *found,
            None => undisturbed(&mut trial, &proxy, way)?,
        };
        known.insert(way, found);
        let at = 1 + trial.random.next_number() % found.lines;
        let what = format!("{:?}: {fault:?} from line {at} of {}", WAYS[way], found.lines);
        let run = disturb(&mut trial, &proxy, (&what, way), (fault, at))?;
        let more_kib = run.peak_kib.saturating_sub(found.peak_kib);
        assert!(more_kib < MORE_MEMORY_KIB, "{what}: {more_kib} KiB more");
        most_kib = most_kib.max(more_kib);
        slowest = slowest.max(run.obeyed_after.unwrap_or_default());
        cases(1, Case::Monitor);
    }
    trial.next_save_is_right()?;
    println!("at most {most_kib} KiB more; the slowest signal took {slowest:?}");
    println!("{} of {count} saves had their file; slowest {:?}", trial.finished, trial.slowest);
    Ok(())
}

/// Saves while the connection is disturbed, and checks the VM.
fn disturb(
    trial: &mut Trial,
    proxy: &Proxy,
    (what, way): (&str, usize),
    (fault, at): (Fault, u64),
) -> TestResult<Run> {
    let file = trial.directory.path().join("monitor.vmf");
    let mut ended = None;
    trial.end_a_save((what, way, &file), |trial| {
        let plan = proxy.disturb_next(fault, at);
        let child = save_through(trial, proxy, way, &file)?;
        let run = watch(child, &plan, fault.is_silence());
        let run = run.map_err(|error| format!("{what}: {error}"))?;
        let Run { said, pid, .. } = &run;
        // Only a VM whose file is whole may be left to its guardian.
        assert!(said.code != Some(7) || fault.is_silence() || file.exists(), "{what}: {said:?}");
        let told = (
            Said { code: said.code, stdout: said.stdout.clone(), stderr: said.stderr.clone() },
            *pid,
        );
        ended = Some((run, file.exists()));
        Ok(told)
    })?;
    let (run, is_named) = ended.ok_or("a run")?;
    let Run { said, obeyed_after, .. } = &run;
    let codes: &[i32] = if fault.is_harmless() {
        &[0]
    } else if obeyed_after.is_some() {
        &[0, 3, 7, 130]
    } else {
        &[0, 3, 5, 7]
    };
    assert!(said.code.is_some_and(|code| codes.contains(&code)), "{what}: {said:?}");
    assert!(said.code == Some(0) || said.stderr.contains("vmfile: "), "{what}: {said:?}");
    assert!(!said.stderr.contains("panicked"), "{what}: {said:?}");
    let after = obeyed_after.unwrap_or_default();
    let limit = if is_named { NAMED_WITHIN } else { OBEYS_WITHIN };
    assert!(after < limit, "{what}: it obeyed after {after:?}; {said:?}");
    Ok(run)
}

/// Restores into a QEMU that waits, while the connection to its monitor is disturbed; checks the guest in
/// whatever state that QEMU is then.
fn restore_disturbed(
    (qemu, config, saved): (&Qemu, &GuestConfig, &Saved),
    mode: &str,
    (fault, at): (Fault, u64),
) -> TestResult<u64> {
    let what = format!("{mode}: {fault:?} from line {at}");
    let mut waiting = config.incoming(qemu, "defer")?;
    let sockets = directory()?;
    let proxy = Proxy::start(&mut waiting, &sockets.path().join("proxy"))?;
    let plan = proxy.disturb_next(fault, at);
    let words = |socket: &Path| {
        words!["restore", saved.file, "--disks-changed-ok", "--mode", mode, "--qmp", socket]
    };
    let child = start(words(proxy.socket()))?;
    let run =
        watch(child, &plan, fault.is_silence()).map_err(|error| format!("{what}: {error}"))?;
    let said = &run.said;
    assert!(!said.stderr.contains("panicked"), "{what}: {said:?}");
    assert!(run.obeyed_after.unwrap_or_default() < OBEYS_WITHIN, "{what}: {said:?}");
    if said.code == Some(0) {
        saved.goes_on_in(&waiting).map_err(|error| format!("{what}: {error}: {said:?}"))?;
        return Ok(plan.lines());
    }
    assert!(!fault.is_harmless(), "{what}: {said:?}");
    assert!(matches!(said.code, Some(3 | 130)), "{what}: {said:?}");
    assert!(said.stderr.contains("vmfile: "), "{what}: {said:?}");
    // A QEMU that could not take the device state has ended.
    let Ok(state) = waiting.status() else { return Ok(plan.lines()) };
    match state.as_str() {
        "running" => {}
        "paused" => waiting.resume()?,
        "inmigrate" => {
            let again = vmfile(words(&waiting.qmp_path()));
            if again.code != Some(0) {
                again.assert(3, &["vmfile: "]);
                return Ok(plan.lines());
            }
        }
        other => return Err(format!("{what}: the VM is {other}: {said:?}").into()),
    }
    saved.goes_on_in(&waiting).map_err(|error| format!("{what}: {error}: {said:?}"))?;
    Ok(plan.lines())
}

/// What a restore leaves in the QEMU that waits runs right, takes the VM once more, or has ended.
#[test]
fn a_restore_whose_monitor_is_slow_or_talks_nonsense_makes_no_wrong_guest() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let count = given("VMFILE_CASES").unwrap_or(CASES);
    println!("{count} faults");
    let mut random = Random::of_this_run();
    let config = Guest::boot_sector(Ram::private(64)).seed(33);
    let saved = config.boot_to(&qemu, 1)?.save(&SaveOptions::default())?;
    let mut lines = BTreeMap::new();
    for case in 0..count {
        let fault = FAULTS[usize::try_from(case)? % FAULTS.len()];
        let mode = ["load", "stream"][usize::try_from(random.next_number() % 2)?];
        let of = (&qemu, &config, &saved);
        let most = match lines.get(mode) {
            Some(&most) => most,
            None => restore_disturbed(of, mode, (Fault::None, 0))?,
        };
        lines.insert(mode, most);
        restore_disturbed(of, mode, (fault, 1 + random.next_number() % most))?;
        cases(1, Case::Monitor);
    }
    Ok(())
}
