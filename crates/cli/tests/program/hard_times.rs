//! If a save fails or is interrupted, the VM runs on and no file is left.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use vmfile::restore::Mode;
use vmfile_testing::verbs::restore;
use vmfile_testing::{
    Case, Guest, Monitor, Mount, Qemu, Ram, SlowDisk, TestResult, cases, requires,
};

use crate::guests::{begin_to_save, directory, large, prepare, save};
use crate::run::{
    Begun, Said, names_in, pid, processes_in, program, start, strace, vmfile, wait_until,
    wait_until_it_catches,
};
use crate::words;

#[test]
fn a_signal_in_the_middle_of_a_save_leaves_the_vm_running_and_no_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = large(&qemu, &[])?;
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let save = begin_to_save(&guest, &file)?;
        kill_process(pid(save.id()), signal)?;
        let said = save.finish()?;
        assert_eq!(said.code, Some(status), "{said:?}");
        let error: Value = serde_json::from_str(said.stderr.lines().last().ok_or("it says why")?)?;
        assert_eq!(error["kind"], "stopped", "{error}");
        assert_eq!(error["hint"], "the VM is as it was, and there is no file");
        assert_eq!(guest.status()?, "running");
        assert_eq!(names_in(directory.path()), [""; 0]);
        cases(1, Case::Signal);
    }
    guest.counts_on(1)
}

#[test]
fn progress_is_told_in_lines_and_when_sigusr1_asks() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let guest = large(&qemu, &[])?;
    let directory = directory()?;
    let said = begin_to_save(&guest, &directory.path().join("json.vmf"))?.finish()?;
    said.assert(0, &[]);
    let mut progress: Vec<Value> =
        said.stderr.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    // The save warns, because the guest has a disk and goes on.
    let is_warning = |line: &Value| line["type"] == "warning";
    assert!(progress.iter().any(is_warning), "{said:?}");
    progress.retain(|line| line["type"] == "progress");
    let done: Vec<u64> = progress.iter().filter_map(|line| line["done_bytes"].as_u64()).collect();
    assert!(!done.is_empty() && done.is_sorted(), "{done:?}");
    assert_eq!(done.last().copied(), progress.last().and_then(|p| p["total_bytes"].as_u64()));

    let arguments =
        words!["check", directory.path().join("json.vmf"), "--jobs", "1", "--io", "threads"];
    let child = start(arguments)?;
    wait_until_it_catches(child.id(), Signal::USR1)?;
    kill_process(pid(child.id()), Signal::USR1)?;
    let said = Said::from(child.wait_with_output()?);
    said.assert(0, &["vmfile check: ", " GiB/s"]);
    assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    Ok(())
}

#[test]
fn a_signal_in_the_middle_of_a_restore_leaves_no_qemu() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let guest = large(&qemu, &[])?;
    let saved = save(&guest, &[])?;
    saved.said.assert(0, &[]);
    let (prepared, end) = prepare(guest.config(), &qemu)?;
    drop(guest);
    let words = words!["restore", saved.file, "--mode", "load", "--progress", "json"];
    let slow = words!["--jobs", "1", "--io", "threads", "--direct-io", "required", "--"];
    let line = prepared.command_line();
    let restore = Begun::start(words.iter().chain(&slow).chain(&line))?;
    assert_eq!(restore.progress["verb"], "restore", "{}", restore.progress);
    kill_process(pid(restore.id()), Signal::TERM)?;
    restore.finish()?.assert(143, &[]);
    wait_until("QEMU is gone", || processes_in(&end.0).is_empty())?;
    cases(1, Case::Signal);
    Ok(())
}

#[test]
fn a_qemu_that_ends_in_the_middle_of_a_save_is_an_error_and_no_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let guest = large(&qemu, &[])?;
    let directory = directory()?;
    let save = begin_to_save(&guest, &directory.path().join("vm.vmf"))?;
    drop(guest);
    let said = save.finish()?;
    assert!(matches!(said.code, Some(3 | 5)), "{said:?}");
    assert!(!said.stderr.contains("panicked"), "{said:?}");
    assert_eq!(names_in(directory.path()), [""; 0]);
    cases(1, Case::QemuEnd);
    Ok(())
}

/// The output of a failed save, and how often it paused the VM.
type Failed = (Said, usize);

/// Runs `save`, which must fail for a reason of this kind, on a small guest. Expects that the guest runs
/// on, that no file is left, and that a later save succeeds.
fn fails(
    qemu: &Qemu,
    directory: &Path,
    case: Case,
    save: impl FnOnce(&Path, &Path) -> TestResult<Said>,
) -> TestResult<Failed> {
    let sockets = tempfile::tempdir()?;
    let watch = sockets.path().join("watch");
    let socket = format!("unix:{},server=on,wait=off", watch.display());
    let config = Guest::boot_sector(Ram::private(64)).seed(52).data_share(200);
    let mut guest = config.arguments(["-qmp", &socket]).boot(qemu)?;
    let mut watch = Monitor::connect(&watch, Duration::from_secs(10))?;
    guest.wait_for_count(1)?;
    let said = save(&guest.qmp_path(), &directory.join("vm.vmf"))?;
    assert_eq!(guest.status()?, "running", "{said:?}");
    assert_eq!(names_in(directory), [""; 0]);
    guest.counts_on(1)?;
    watch.execute("query-status", json!({}))?;
    let stops = watch.events().iter().filter(|event| event["event"] == "STOP").count();
    // A save without the fault succeeds.
    let elsewhere = guest.directory().join("vm.vmf");
    vmfile(words!["save", guest.qmp_path(), elsewhere]).assert(0, &["saved"]);
    cases(1, case);
    Ok((said, stops))
}

#[test]
fn too_small_a_disk_is_refused_before_the_vm_stops() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mount = requires!(Mount::tmpfs(8));
    let (said, stops) = fails(&qemu, mount.path(), Case::Shortage, |qmp, file| {
        Ok(vmfile(words!["save", "--json", qmp, file]))
    })?;
    assert_eq!(stops, 0, "{said:?}");
    said.assert(5, &["\"kind\":\"no_space\"", "free some space"]);
    Ok(())
}

#[test]
fn a_limit_on_file_sizes_leaves_the_vm_running() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let (said, stops) = fails(&qemu, directory.path(), Case::Shortage, |qmp, file| {
        let script = "ulimit -f 2048; exec \"$@\"";
        let arguments = words!["-c", script, "sh", program(), "save", qmp, file];
        Ok(Command::new("sh").args(arguments).output()?.into())
    })?;
    assert_eq!(stops, 1, "{said:?}");
    said.assert(5, &["File too large"]);
    Ok(())
}

/// A disk may report a write that it has not done. Here strace makes the first write of each thread
/// report 64 bytes without writing any. Such a save exited with 0 and ended QEMU, and its file was
/// useless.
#[test]
fn a_write_that_only_was_claimed_is_found_before_the_vm_ends() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let directory = directory()?;
    let (said, stops) = fails(&qemu, directory.path(), Case::Fault, |qmp, file| {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64"]);
        strace.args(["-e", "inject=pwrite64:retval=64:when=1"]);
        strace.args(words![program(), "save", qmp, file, "--io", "threads", "--jobs", "1"]);
        Ok(strace.output()?.into())
    })?;
    assert_eq!(stops, 1, "{said:?}");
    said.assert(5, &["does not read back as it was written", "hint: "]);
    Ok(())
}

/// Runs a save in which the system call `call` fails with `error`.
fn with_fault(qmp: &Path, file: &Path, call: &str, error: &str) -> TestResult<Said> {
    let arguments = words![
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        format!("trace={call}"),
        "-e",
        format!("inject={call}:error={error}"),
        program(),
        "save",
        qmp,
        file,
    ];
    Ok(Command::new("strace").args(arguments).output()?.into())
}

/// Threads were started while the VM was paused. If one could not be started, vmfile panicked with
/// status 101 and left the VM as it was in the middle of the save.
#[test]
fn a_thread_that_cannot_be_started_is_refused_before_the_vm_stops() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let directory = directory()?;
    let path = directory.path();
    for number in ["when=1", "when=2"] {
        for io in ["auto", "threads"] {
            let (said, stops) = fails(&qemu, path, Case::Fault, |qmp, file| {
                let fault = format!("inject=clone3:error=EAGAIN:{number}");
                let mut strace = Command::new("strace");
                strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=clone3", "-e", &fault]);
                strace.arg(program()).args(["save", "--jobs", "2", "--io", io]);
                Ok(strace.args([qmp, file]).output()?.into())
            })?;
            assert_eq!(stops, 0, "{said:?}");
            said.assert(5, &["take threads and memory for the save"]);
        }
    }
    Ok(())
}

/// Buffers were allocated while the VM was paused, and a failed allocation aborted vmfile.
#[test]
fn memory_that_is_not_there_is_refused_before_the_vm_stops() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let (said, stops) = fails(&qemu, directory.path(), Case::Shortage, |qmp, file| {
        let limited = "ulimit -v 40000 && exec \"$@\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", limited, "sh"]).arg(program()).args(["save", "--jobs", "2"]);
        Ok(shell.args([qmp, file]).output()?.into())
    })?;
    assert_eq!(stops, 0, "{said:?}");
    said.assert(5, &["take threads and memory for the save", "out of memory"]);
    Ok(())
}

#[test]
fn a_disk_that_fails_to_sync_leaves_the_vm_running_and_no_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let directory = directory()?;
    let path = directory.path();
    let (said, stops) =
        fails(&qemu, path, Case::Fault, |qmp, file| with_fault(qmp, file, "fsync", "EIO"))?;
    assert_eq!(stops, 1, "{said:?}");
    said.assert(5, &["sync", "Input/output error"]);
    Ok(())
}

/// A save syncs the directory after the file has its name. If that fails, the save fails but the
/// whole file stays. No other failed save leaves a file, and how a failed save treats its disks
/// depends on that.
#[test]
fn a_directory_that_fails_to_sync_leaves_the_vm_running_and_a_whole_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(53).boot_to(&qemu, 1)?;
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    // The first call syncs the file itself.
    let said = with_fault(&guest.qmp_path(), &file, "fsync", "EIO:when=2")?;
    said.assert(5, &["vm.vmf is whole, but its directory cannot be synced", "Input/output error"]);
    assert_eq!(guest.status()?, "running");
    vmfile(words!["check", file]).assert(0, &["ok: "]);
    cases(1, Case::Fault);
    guest.counts_on(1)
}

#[test]
fn a_disk_that_fills_up_meanwhile_leaves_the_vm_running_and_no_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let directory = directory()?;
    let path = directory.path();
    let (said, stops) =
        fails(&qemu, path, Case::Fault, |qmp, file| with_fault(qmp, file, "ftruncate", "ENOSPC"))?;
    assert_eq!(stops, 1, "{said:?}");
    said.assert(5, &["the length of the file", "No space left on device"]);
    Ok(())
}

/// The guest writes faster than the disk takes it: it waits for the disk, goes on after every
/// window, and the file has one moment all the same.
#[test]
fn a_busy_guest_that_is_saved_live_to_a_slow_disk_waits_and_goes_on() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let disk = requires!(SlowDisk::ext4(700, 40));
    let config = Guest::boot_sector(Ram::private(256)).seed(58).busy();
    let mut guest = config.boot_to(&qemu, 1)?;
    let file = disk.path().join("vm.vmf");
    let words = words!["save", guest.qmp_path(), file, "--live", "--route", "direct", "--json"];
    let said: Said = disk.command(program()).args(words).stdin(Stdio::null()).output()?.into();
    said.assert(0, &[]);
    let report = said.json()?;
    let waits = &report["guest_waits"];
    let number = |key: &str| waits[key].as_f64().ok_or(format!("no {key}: {waits}"));
    let (longest, all) = (number("longest_seconds")?, number("total_seconds")?);
    assert!(number("count")? > 32.0 && number("aside_bytes")? > 0.0, "{waits}");
    let took = report["total_seconds"].as_f64().ok_or("no total_seconds")?;
    assert!(longest < took && all > longest, "it went on in between: {report}");
    guest.runs_on(1)?;
    vmfile(words!["check", file]).assert(0, &["ok: "]);
    let restored = restore(&qemu, &config, &file, Mode::Load)?;
    restored.wait_for_passes(1).map(drop)
}

#[test]
fn a_name_that_is_taken_meanwhile_is_not_replaced() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let directory = directory()?;
    let path = directory.path();
    let (said, stops) =
        fails(&qemu, path, Case::Fault, |qmp, file| with_fault(qmp, file, "linkat", "EEXIST"))?;
    assert_eq!(stops, 1, "{said:?}");
    said.assert(5, &["exists", "--force replaces it"]);
    Ok(())
}

#[test]
fn a_vm_that_another_client_holds_is_not_touched() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(16)).seed(53).boot(&qemu)?;
    let timeout = Duration::from_secs(10);
    let mut other = Monitor::connect(&guest.qmp_path(), timeout)?;
    let said = vmfile(words!["save", guest.qmp_path(), guest.directory().join("vm.vmf")]);
    said.assert(3, &["no QMP greeting", "another client may hold this monitor"]);
    other.execute("query-status", json!({}))?;
    assert_eq!(guest.status()?, "running");
    Ok(())
}
