//! What a save checks during the pause and before the file gets its name.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmfile_testing::{Case, Guest, Monitor, Qemu, Ram, Release, TestResult, cases, requires};

use crate::guests::{self, begin_to_save, directory};
use crate::run::{Said, names_in, pid, start, strace, vmfile, wait_until};
use crate::words;

/// Boots a guest with a second monitor, whose save takes so long that a test can act in the middle
/// of it.
fn large(qemu: &Qemu, second: &Path) -> TestResult<Guest> {
    let socket = format!("unix:{},server=on,wait=off", second.display());
    guests::large(qemu, &["-qmp", &socket])
}

/// Another client sent `cont` in the middle of a direct save: the save exited with 0, its report
/// said "paused 1.81 s", and the memory in the file was not from one moment.
#[test]
fn a_guest_that_another_client_lets_run_is_not_saved() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let mut guest = large(&qemu, &directory.path().join("second"))?;
    let file = directory.path().join("vm.vmf");
    let save = begin_to_save(&guest, &file)?;
    guest.resume()?;
    let said = save.finish()?;
    said.assert(3, &["another client of QEMU let the guest run", "see to it that no other client"]);
    assert!(!file.exists());
    cases(1, Case::Interference);
    guest.runs_on(1)
}

/// Two saves of one VM at the same time, over two monitors, both exited with 0; the second recorded
/// the pause of the first as the guest's own state.
#[test]
fn a_second_save_of_a_vm_says_who_holds_it() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let second = directory.path().join("second");
    let mut guest = large(&qemu, &second)?;
    let first = begin_to_save(&guest, &directory.path().join("1.vmf"))?;
    let holder = format!("process {} saves this VM", first.id());
    let said = vmfile(words!["save", second, directory.path().join("2.vmf"), "--after", "resume"]);
    said.assert(3, &[&holder, "wait for that save to end"]);
    first.finish()?.assert(0, &["saved"]);
    assert!(!directory.path().join("2.vmf").exists());
    vmfile(words!["save", second, directory.path().join("2.vmf"), "--after", "resume"])
        .assert(0, &["saved"]);
    guest.runs_on(1)
}

/// The save queried the RAM blocks before the pause: a DIMM that was plugged in between was not in
/// the file, and the save exited with 0. During the pause, the save now repeats the queries whose
/// answers it compared with the command line.
#[test]
fn memory_that_is_plugged_in_right_before_the_pause_is_noticed() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let config = Guest::boot_sector(Ram::private(64)).seed(62);
    let mut guest = config.dimm(16).boot_to(&qemu, 1)?;
    for number in 1..40 {
        let file = directory.path().join(format!("{number}.vmf"));
        let mut child = start(words!["save", guest.qmp_path(), file, "--after", "resume"])?;
        let pid = pid(child.id());
        // Putting the record into QEMU is the last step before the pause.
        while child.try_wait()?.is_none() && !has_record(&mut guest)? {}
        let is_stopped = kill_process(pid, Signal::STOP).is_ok();
        if !is_stopped || guest.status()? != "running" || !has_record(&mut guest)? {
            kill_process(pid, Signal::CONT).ok();
            Said::from(child.wait_with_output()?).assert(0, &["saved"]);
            continue;
        }
        let memory = json!({ "qom-type": "memory-backend-ram", "id": "late", "size": 16 << 20 });
        guest.qmp("object-add", memory)?;
        let dimm = json!({ "driver": "pc-dimm", "id": "late-dimm", "memdev": "late" });
        guest.qmp("device_add", dimm)?;
        kill_process(pid, Signal::CONT)?;
        Said::from(child.wait_with_output()?)
            .assert(3, &["device late-dimm (pc-dimm) came, went or changed", "save again once"]);
        assert!(!file.exists());
        assert_eq!(guest.status()?, "running");
        guest.wait_for_passes(1)?;
        cases(1, Case::Interference);
        return guest.judge_counts();
    }
    Err("40 saves, and none was met between its record and its pause".into())
}

/// A save looked once whether the guest runs, and QEMU aborts if it then sends a background snapshot of a
/// guest that has panicked meanwhile.
#[test]
fn a_guest_that_panics_right_before_its_live_save_stays_as_it_is() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    for route in ["auto", "stream"] {
        panics_before_it_is_sent(&qemu, route)?;
    }
    Ok(())
}

fn panics_before_it_is_sent(qemu: &Qemu, route: &str) -> TestResult {
    let directory = directory()?;
    let panics = ["-device", "pvpanic", "-action", "panic=pause"];
    let config = Guest::boot_sector(Ram::private(64)).seed(67).arguments(panics);
    for _ in 0..20 {
        let mut guest = config.boot_to(qemu, 1)?;
        let file = directory.path().join("vm.vmf");
        let words = words!["save", guest.qmp_path(), file, "--live", "--route", route, "--force"];
        let mut child = start(words)?;
        while child.try_wait()?.is_none() && !has_record(&mut guest)? {}
        let is_stopped = kill_process(pid(child.id()), Signal::STOP).is_ok();
        let is_sent = guest.qmp("query-migrate", json!({}))?.get("status").is_some();
        let is_met = is_stopped && !is_sent && has_record(&mut guest)?;
        if is_met {
            let panic = json!({ "command-line": "o /b 0x505 1" });
            guest.qmp("human-monitor-command", panic)?;
        }
        kill_process(pid(child.id()), Signal::CONT).ok();
        let said = Said::from(child.wait_with_output()?);
        if is_met {
            assert_eq!(said.code, Some(3), "{said:?}");
            assert!(said.stderr.contains("it is guest-panicked, and stays so"), "{said:?}");
            assert_eq!(guest.status()?, "guest-panicked");
            return Ok(());
        }
    }
    Err("20 saves, and none was met before QEMU sent the guest".into())
}

/// A client let a VM run that was paused, and QEMU stopped it at the end of the migration: it stood still for
/// ever.
#[test]
fn a_paused_guest_that_another_client_lets_run_while_qemu_sends_it_runs_on() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let mut guest = Guest::boot_sector(Ram::private(128)).seed(68).boot_to(&qemu, 1)?;
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    for way in [&["--route", "native"][..], &["--route", "stream", "--channels", "2"]].repeat(4) {
        guest.stop()?;
        let words = words!["save", guest.qmp_path(), file, "--after", "resume", "--force"];
        let mut child = start(words.into_iter().chain(way.iter().map(Into::into)))?;
        let under_way = ["setup", "active", "device"];
        while child.try_wait()?.is_none()
            && !under_way.contains(
                &guest.qmp("query-migrate", json!({}))?["status"].as_str().unwrap_or_default(),
            )
        {}
        guest.resume()?;
        let said = Said::from(child.wait_with_output()?);
        assert!(matches!(said.code, Some(0 | 3)), "{said:?}");
        guest.runs_on(1).map_err(|error| format!("{error}: {said:?}"))?;
    }
    Ok(())
}

fn has_record(guest: &mut Guest) -> TestResult<bool> {
    let objects = guest.qmp("qom-list", json!({ "path": "/objects" }))?;
    Ok(objects.as_array().into_iter().flatten().any(|object| object["name"] == "vmfile-save"))
}

/// QEMU's `fdatasync` failed, `stop` did not report it, and the save ended QEMU and exited with 0.
fn disks_that_cannot_be_flushed(qemu: &Qemu) -> TestResult {
    let directory = directory()?;
    let disk = directory.path().join("disk.raw");
    fs::write(&disk, vec![0; 1 << 20])?;
    let drive = format!("file={},format=raw,if=none,id=d1", disk.display());
    let config = Guest::boot_sector(Ram::private(64)).seed(63);
    let mut guest = config.arguments(["-drive", &drive]).boot_to(qemu, 1)?;
    let inject = "inject=fdatasync:error=EIO";
    let mut strace = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", inject])
        .args(["-p", &guest.pid()?.to_string()])
        .spawn()?;
    // strace is attached once QEMU's status names a tracer.
    let status = format!("/proc/{}/status", guest.pid()?);
    let is_traced = || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        text.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    };
    wait_until("strace is attached", is_traced)?;
    // Gives strace time to attach to each of QEMU's threads.
    thread::sleep(Duration::from_millis(500));
    // Writes as the guest would, so that there is something to flush.
    let write = json!({ "command-line": "qemu-io d1 \"write 0 4k\"" });
    guest.qmp("human-monitor-command", write)?;
    let file = directory.path().join("vm.vmf");
    let said = vmfile(words!["save", guest.qmp_path(), file]);
    strace.kill()?;
    strace.wait()?;
    said.assert(3, &["disk \"d1\" could not be flushed", "look at the disk's file system"]);
    assert_eq!(names_in(directory.path()), ["disk.raw"]);
    cases(1, Case::Fault);
    guest.runs_on(1)
}

#[test]
fn disks_that_cannot_be_flushed_are_said_to_be_before_the_vm_ends() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    requires!(strace());
    disks_that_cannot_be_flushed(&qemu)
}

#[test]
fn disks_of_the_newest_that_cannot_be_flushed_are_said_to_be() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    requires!(strace());
    disks_that_cannot_be_flushed(&qemu)
}

#[test]
fn disks_of_the_oldest_that_cannot_be_flushed_are_said_to_be() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    requires!(strace());
    disks_that_cannot_be_flushed(&qemu)
}

/// After vmfile and its guardian were both killed, no later save noticed: one exited with 0,
/// reported "paused", and left the VM paused.
#[test]
fn what_a_save_left_that_was_killed_with_its_guardian_is_put_right_by_the_next() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let mut guest = large(&qemu, &directory.path().join("second"))?;
    let settings = guest.qmp("query-migrate-capabilities", json!({}))?;
    let parameters = guest.qmp("query-migrate-parameters", json!({}))?;
    let file = directory.path().join("vm.vmf");
    for (route, verb) in [("direct", "list"), ("stream", "save"), ("direct", "save")] {
        let slow = words!["--route", route, "--jobs", "1", "--io", "threads"];
        let words = words!["save", guest.qmp_path(), file, "--after", "resume"];
        let child = start(words.iter().chain(&slow))?;
        wait_until("the guest stands", || guest.status().is_ok_and(|status| status != "running"))?;
        kill_with_guardian(child)?;
        // QEMU may need a moment to end the stream.
        thread::sleep(Duration::from_millis(300));
        assert_ne!(guest.status()?, "running", "nothing lets it run by itself");
        let said = match verb {
            "list" => vmfile(words!["list", "--json"]),
            _ => vmfile(words!["save", guest.qmp_path(), file, "--after", "resume"]),
        };
        said.assert(0, &["had left the VM changed"]);
        assert_eq!(guest.status()?, "running", "{route}, {verb}");
        assert_eq!(guest.qmp("query-migrate-capabilities", json!({}))?, settings);
        assert_eq!(guest.qmp("query-migrate-parameters", json!({}))?, parameters);
        assert_eq!(guest.qmp("query-fdsets", json!({}))?, json!([]));
        assert!(!has_record(&mut guest)?);
        fs::remove_file(&file).ok();
    }
    guest.counts_on(1)
}

/// `list` resumed a VM because of a save that had been killed long before. The guest had been
/// migrated away by then, so it ran twice.
#[test]
fn a_vm_that_was_migrated_away_after_a_killed_save_is_not_let_run() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let mut guest = large(&qemu, &directory.path().join("second"))?;
    let slow = words!["--route", "direct", "--jobs", "1", "--io", "threads"];
    let words = words!["save", guest.qmp_path(), directory.path().join("vm.vmf")];
    let child = start(words.iter().chain(&words!["--after", "resume"]).chain(&slow))?;
    wait_until("the guest stands", || guest.status().is_ok_and(|status| status == "paused"))?;
    kill_with_guardian(child)?;
    guest.resume()?;
    let fast = json!({ "max-bandwidth": 8_u64 << 30, "downtime-limit": 60_000 });
    guest.qmp("migrate-set-parameters", fast)?;
    guest.qmp("migrate", json!({ "uri": "exec:cat > /dev/null" }))?;
    wait_until("migrated", || guest.status().is_ok_and(|status| status == "postmigrate"))?;
    vmfile(words!["list", "--json"]).assert(0, &["had left the VM changed"]);
    assert_eq!(guest.status()?, "postmigrate");
    assert!(!has_record(&mut guest)?);
    Ok(())
}

/// Kills a save and its guardian; the guardian first, or it would restore the VM.
fn kill_with_guardian(mut save: Child) -> TestResult {
    kill_process(guardian_of(save.id())?, Signal::KILL)?;
    save.kill()?;
    save.wait()?;
    cases(1, Case::Kill);
    Ok(())
}

/// Returns the guardian of a process.
pub(crate) fn guardian_of(pid: u32) -> TestResult<Pid> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        for child in children.split_whitespace() {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if name.trim() == "vm-guardian" {
                return Ok(Pid::from_raw(child.parse()?).ok_or("a pid")?);
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err("it has no guardian".into())
}

/// The guardian is killed while the save goes on: the save fails, and the VM runs on.
#[test]
fn a_save_whose_guardian_is_ended_fails_and_the_vm_runs_on() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let second = directory.path().join("second");
    let guest = large(&qemu, &second)?;
    let file = directory.path().join("vm.vmf");
    let save = begin_to_save(&guest, &file)?;
    kill_process(guardian_of(save.id())?, Signal::KILL)?;
    let said = save.finish()?;
    // Before the file gets its name, the save sends the guardian new orders, which fails.
    said.assert(5, &["start or reach the guardian process"]);
    let mut monitor = Monitor::connect(&second, Duration::from_secs(10))?;
    let status: Value = monitor.execute("query-status", json!({}))?;
    assert_eq!(status["status"], "running");
    cases(1, Case::Kill);
    Ok(())
}
