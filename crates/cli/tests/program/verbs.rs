//! Every verb with a real guest.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmfile_testing::migration::qemu_writes;
use vmfile_testing::{Guest, GuestConfig, Machine, Monitor, Ram, TestResult, requires};

use crate::guests::{directory, prepare, save, saved};
use crate::help::fields_of;
use crate::run::{EndAllIn, Said, pid, processes_in, restore, start, vmfile, wait_until};
use crate::words;

fn small(seed: u32) -> GuestConfig {
    Guest::boot_sector(Ram::private(32)).seed(seed)
}

/// Asserts that the fields of `value` are exactly those that docs/cli.md names.
#[track_caller]
pub(crate) fn assert_documented(chapter: &str, value: &Value) {
    let mut found: Vec<&String> = value.as_object().expect("an object").keys().collect();
    let documented = fields_of(chapter);
    let mut documented: Vec<&String> = documented.iter().collect();
    found.sort();
    documented.sort();
    assert_eq!(found, documented, "fields of {chapter}");
}

#[test]
fn a_vm_that_is_saved_ends_and_its_file_says_all_about_it() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = small(31).arguments(["-name", "cli-31"]).boot_to(&qemu, 1)?;
    let saved = save(&guest, &["--json"])?;
    saved.said.assert(0, &[]);
    guest.wait_for_exit()?;

    let report = saved.said.json()?;
    assert_documented("save", &report);
    assert_eq!(report["file"], saved.file.display().to_string());
    assert_eq!(report["route"], "direct");
    assert_eq!(report["live"], false);
    assert!(report["pages_total"].as_u64() >= Some(32 << 8), "{report}");
    assert!(report["pause_seconds"].as_f64() > Some(0.0), "{report}");
    assert!(report["pause_seconds"].as_f64() <= report["total_seconds"].as_f64(), "{report}");

    let info = vmfile(words!["info", "--json", saved.file]).json()?;
    assert_documented("info", &info);
    assert_eq!(info["format"], "vmfile");
    assert_eq!(info["vm"]["name"], "cli-31");
    assert_eq!(info["vm"]["run_state"], "running");
    assert_eq!(info["vm"]["command_line"][1], "-nodefaults");
    assert!(info["machine"].as_str().is_some_and(|name| name.starts_with("pc-i440fx-")), "{info}");
    assert_eq!(info["qemu_version"], qemu.version().to_string());
    assert!(info["saved_at"].as_str().is_some_and(|time| time.ends_with('Z')), "{info}");
    assert_eq!(info["blocks"][0]["name"], "pc.ram");
    assert_eq!(info["blocks"][0]["bytes"], 32 << 20);
    let sections = info["device_sections"].as_array().ok_or("sections")?;
    assert!(sections.iter().any(|section| section["name"] == "timer"), "{info}");
    assert_eq!(info["disks"].as_array().map(Vec::len), Some(1), "the boot disk");

    let check = vmfile(words!["check", "--json", saved.file]);
    check.assert(0, &[]);
    assert_documented("check", &check.json()?);
    assert_eq!(check.json()?["findings"], json!([]));
    let verbose = vmfile(words!["info", "--verbose", saved.file]);
    verbose.assert(0, &["pc.ram", "32.0 MiB", "device sections", "command line", "cli-31"]);
    Ok(())
}

#[test]
fn a_vm_is_listed_and_saved_by_its_process_and_by_its_name() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = small(32).arguments(["-name", "cli-32"]).boot_to(&qemu, 1)?;
    let list = vmfile(["list", "--json"]).json()?;
    let pid = guest.pid()?;
    let vms = list.as_array().ok_or("an array")?;
    let vm = vms.iter().find(|vm| vm["pid"] == pid).ok_or("the VM is listed")?;
    assert_documented("list", vm);
    assert_eq!(vm["name"], "cli-32");
    assert_eq!(vm["routes"], json!(["direct", "stream", "native"]));
    assert_eq!(vm["qmp"], guest.qmp_path().display().to_string());
    assert!(vm["ram_bytes"].as_u64() > Some(32 << 20), "{vm}");
    vmfile(["list"]).assert(0, &["PID", "cli-32", "direct"]);

    let directory = directory()?;
    let (one, two) = (directory.path().join("1.vmf"), directory.path().join("2.vmf"));
    let by_pid = vmfile(words!["save", pid.to_string(), one, "--after", "resume"]);
    by_pid.assert(0, &["saved", "memory", "took", "route", "engine"]);
    assert_eq!(guest.status()?, "running");
    vmfile(words!["save", "cli-32", one, "--after", "pause"]).assert(5, &["exists", "--force"]);
    assert_eq!(guest.status()?, "running");
    vmfile(words!["save", "cli-32", two, "--after", "pause", "--quiet"]).assert(0, &[]);
    assert_eq!(guest.status()?, "paused");
    vmfile(words!["save", "cli-32", two, "--after", "pause", "--force"]).assert(0, &[]);
    guest.resume()?;
    guest.wait_for_passes(2)?;
    for file in [one, two] {
        vmfile(words!["check", file]).assert(0, &["ok: "]);
    }
    guest.judge_counts()
}

/// Restores with the saved command line, and lets the guest judge.
fn restore_as_saved(qemu: &vmfile_testing::Qemu, seed: u32, mode: &str) -> TestResult {
    let config = small(seed);
    let mut guest = config.boot_to(qemu, 1)?;
    let _end = EndAllIn(guest.directory().to_path_buf());
    let saved = save(&guest, &[])?;
    saved.said.assert(0, &[]);
    guest.wait_for_exit()?;
    let seen = guest.counts().len();

    let said = vmfile(words!["restore", "--json", "--mode", mode, saved.file]);
    said.assert(0, &[]);
    let report = said.json()?;
    assert_documented("restore", &report);
    assert_eq!(report["mode"], mode);
    assert_eq!(report["running"], true);
    assert_eq!(report["qmp"], guest.qmp_path().display().to_string());
    // The new QEMU goes on with the serial log, where no pass is missing.
    wait_until("two passes", || guest.counts().len() >= seen + 2)?;
    guest.judge_counts()?;
    let again = vmfile(words!["restore", saved.file]);
    again.assert(3, &["is in use", "the VM that was saved may still run"]);
    let mut monitor = Monitor::connect(&guest.directory().join("oracle"), Duration::from_secs(10))?;
    monitor.execute("quit", json!({}))?;
    Ok(())
}

#[test]
fn a_vm_comes_back_mapped_as_it_was_started() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    restore_as_saved(&qemu, 33, "map")
}

#[test]
fn a_vm_comes_back_loaded_as_it_was_started() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    restore_as_saved(&qemu, 34, "load")
}

#[test]
fn a_vm_comes_back_paused_when_that_was_asked_for() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = small(35);
    let saved = saved(&qemu, &config)?;
    let (prepared, _end) = prepare(&config, &qemu)?;
    let said = restore(&words![saved.file, "--paused"], &prepared.command_line());
    said.assert(0, &["restored  paused, pid "]);
    let mut guest = prepared.attach()?;
    assert_eq!(guest.status()?, "paused");
    guest.resume()?;
    guest.counts_on(2)
}

#[test]
fn a_paused_vm_stays_paused_through_save_and_restore() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = small(36);
    let mut guest = config.boot_to(&qemu, 1)?;
    guest.stop()?;
    let saved = save(&guest, &["--after", "resume"])?;
    saved.said.assert(0, &[]);
    assert_eq!(guest.status()?, "paused");
    drop(guest);
    assert_eq!(vmfile(words!["info", "--json", saved.file]).json()?["vm"]["run_state"], "paused");
    let (prepared, _end) = prepare(&config, &qemu)?;
    restore(&words![saved.file], &prepared.command_line()).assert(0, &["restored  paused"]);
    let mut guest = prepared.attach()?;
    assert_eq!(guest.status()?, "paused");
    guest.resume()?;
    guest.counts_on(1)
}

#[test]
fn a_qemu_that_waits_takes_the_vm() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = small(37);
    let saved = saved(&qemu, &config)?;
    let mut guest = config.incoming(&qemu, "defer")?;
    let qmp = guest.qmp_path();
    let mapped = vmfile(words!["restore", saved.file, "--qmp", qmp, "--mode", "map"]);
    mapped.assert(6, &["cannot be mapped", "hint: --mode load"]);
    assert_eq!(guest.status()?, "inmigrate");
    let said = vmfile(words!["restore", saved.file, "--qmp", qmp, "--json"]);
    said.assert(0, &[]);
    assert_eq!(said.json()?["pid"], guest.pid()?);
    assert_eq!(said.json()?["mode"], "load");
    guest.counts_on(2)?;
    let said = vmfile(words!["restore", saved.file, "--qmp", qmp]);
    said.assert(3, &["running", "inmigrate", "-incoming defer"]);
    let said = vmfile(words!["restore", saved.file, "--qmp", "/nonexistent/qmp"]);
    said.assert(3, &["/nonexistent/qmp"]);
    Ok(())
}

#[test]
fn the_foreground_ends_as_qemu_ends() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = small(38);
    let saved = saved(&qemu, &config)?;
    let ended_by = |end: &dyn Fn(&mut Guest, Pid) -> TestResult| -> TestResult<Said> {
        let (prepared, _end) = prepare(&config, &qemu)?;
        let words = words!["restore", "--foreground", saved.file, "--"];
        let child = start(words.iter().chain(&prepared.command_line()))?;
        let mut guest = prepared.attach()?;
        guest.wait_for_passes(2)?;
        end(&mut guest, pid(child.id()))?;
        Ok(child.wait_with_output()?.into())
    };
    let quit = ended_by(&|guest, _| guest.qmp("quit", json!({})).map(drop))?;
    quit.assert(0, &["restored  running"]);
    let terminated = ended_by(&|_, vmfile| Ok(kill_process(vmfile, Signal::TERM)?))?;
    terminated.assert(0, &["terminating on signal 15"]);
    let killed = ended_by(&|guest, _| Ok(kill_process(pid(guest.pid()?), Signal::KILL)?))?;
    killed.assert(128 + 9, &["restored  running"]);
    Ok(())
}

#[test]
fn a_vm_that_does_not_fit_is_refused_with_both_values_and_no_qemu_is_left() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &small(39))?;
    let other_ram = Guest::boot_sector(Ram::private(48));
    let other_machine = small(39).machine(Machine::Q35);
    for mode in ["map", "load", "stream"] {
        for (config, words) in
            [(&other_ram, ["33554432", "50331648"]), (&other_machine, ["pc-i440fx-", "pc-q35-"])]
        {
            let (prepared, EndAllIn(directory)) = &prepare(config, &qemu)?;
            let said = restore(&words![saved.file, "--mode", mode], &prepared.command_line());
            said.assert(6, &["in the file", "in this VM", "hint: "]);
            said.assert(6, &words);
            wait_until("QEMU is gone", || processes_in(directory).is_empty())?;
        }
    }
    Ok(())
}

#[test]
fn a_command_that_is_no_qemu_is_refused() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &small(40))?;
    restore(&words![saved.file], &words!["/nonexistent/qemu"])
        .assert(3, &["No such file", "hint: the command line after `--` begins with QEMU"]);
    restore(&words![saved.file], &words!["/bin/true"]).assert(3, &["/bin/true"]);
    let lacks_value = words![qemu.program(), "-no-such-option"];
    restore(&words![saved.file], &lacks_value).assert(2, &["-no-such-option has no value"]);
    let unknown = words![qemu.program(), "-no-such-option", "x"];
    restore(&words![saved.file], &unknown).assert(3, &["QEMU ended", "no-such-option"]);
    Ok(())
}

#[test]
fn a_file_that_qemu_wrote_is_loaded_and_not_mapped() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = small(41);
    let mut guest = config.boot_to(&qemu, 1)?;
    let directory = directory()?;
    let file = directory.path().join("qemu.img");
    qemu_writes(&mut guest, &format!("file:{}", file.display()))?;
    wait_until("migrated", || guest.status().is_ok_and(|status| status == "postmigrate"))?;
    save(&guest, &[])?.said.assert(3, &["postmigrate", "`cont` makes it run again"]);
    assert_eq!(guest.status()?, "postmigrate");
    drop(guest);

    vmfile(words!["info", file]).assert(0, &["mapped-ram", "pc.ram"]);
    vmfile(words!["check", file]).assert(0, &["structure only"]);
    vmfile(words!["restore", file]).assert(2, &["no command line", "after `--`"]);
    let (prepared, _end) = prepare(&config, &qemu)?;
    let said = restore(&words![file, "--mode", "map"], &prepared.command_line());
    said.assert(6, &["QEMU wrote the file", "hint: --mode load"]);
    let said = restore(&words![file, "--mode", "auto"], &prepared.command_line());
    said.assert(0, &["mode      load (QEMU wrote the file"]);
    let guest = prepared.attach()?;
    guest.counts_on(2)
}
