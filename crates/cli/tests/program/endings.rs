//! The work is done and something after it is not: the report, or the VM's release.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use vmfile_testing::{Guest, Qemu, Ram, TestResult, requires};

use crate::guests::directory;
use crate::run::{EndAllIn, Said, command, names_in, program, strace};
use crate::words;

fn boot(qemu: &Qemu, seed: u32) -> TestResult<Guest> {
    let guest = Guest::boot_sector(Ram::private(16)).seed(seed).boot(qemu)?;
    guest.wait_for_count(1)?;
    Ok(guest)
}

#[test]
fn a_report_that_cannot_be_printed_is_no_failure() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = boot(&qemu, 61)?;
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let full = || fs::File::options().write(true).open("/dev/full");
    let words = words!["save", guest.qmp_path(), file];
    let said = Said::from(command().args(words).stdout(full()?).output()?);
    said.assert(0, &["warning: done, but the report is lost: stdout: No space left"]);
    guest.wait_for_exit()?;

    let prepared = guest.config().prepare(&qemu)?;
    let _end = EndAllIn(prepared.qmp_path().parent().ok_or("a directory")?.to_path_buf());
    let mut restore = command();
    restore.args(words!["--json", "restore", file, "--"]).args(prepared.command_line());
    let said = Said::from(restore.stdout(full()?).output()?);
    said.assert(0, &["\"type\":\"warning\"", "the report is lost"]);
    let guest = prepared.attach()?;
    guest.wait_for_passes(1)?;
    guest.judge_counts()
}

/// Runs a save and tells the VM to go on, under `strace` with these faults; returns what it said and
/// how often it spoke to QEMU.
fn save_with_faults(guest: &Guest, file: &Path, faults: &[String]) -> TestResult<(Said, usize)> {
    let trace = guest.directory().join("trace");
    let mut save = Command::new("strace");
    save.args(words!["-f", "-qq", "-o", trace, "-e", "trace=sendmsg,fsync"]);
    for fault in faults {
        save.args(["-e", &format!("inject={fault}")]);
    }
    save.arg(program()).args(words!["--json", "save", "--after", "resume"]);
    let said = Said::from(save.args(words![guest.qmp_path(), file]).output()?);
    let spoken = fs::read_to_string(&trace)?.lines().filter(|l| l.contains("sendmsg(")).count();
    Ok((said, spoken))
}

#[test]
fn a_vm_that_cannot_be_released_is_left_paused_beside_a_whole_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let mut guest = boot(&qemu, 62)?;
    let directory = directory()?;
    let (said, spoken) = save_with_faults(&guest, &directory.path().join("first.vmf"), &[])?;
    said.assert(0, &[]);

    // The last word to QEMU is `cont`.
    let fault = format!("sendmsg:error=EIO:when={spoken}");
    let file = directory.path().join("second.vmf");
    let (said, _) = save_with_faults(&guest, &file, &[fault])?;
    said.assert(7, &["second.vmf is whole, but the VM is left paused", "`cont` on the VM's"]);
    assert_eq!(said.json_error()?["kind"], "left_paused");
    assert_eq!(guest.status()?, "paused");
    vmfile_testing::verbs::check_is_clean(&file)?;

    guest.qmp("cont", json!({}))?;
    guest.wait_for_passes(1)?;
    guest.judge_counts()
}

#[test]
fn a_failed_save_that_cannot_resume_the_vm_says_both() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let mut guest = boot(&qemu, 63)?;
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let (said, spoken) = save_with_faults(&guest, &file, &[])?;
    said.assert(0, &[]);
    fs::remove_file(&file)?;

    let faults = ["fsync:error=EIO".to_owned(), format!("sendmsg:error=EIO:when={spoken}")];
    let (said, _) = save_with_faults(&guest, &file, &faults)?;
    said.assert(5, &["sync", "and the VM is left paused", "`cont` on the VM's monitor"]);
    assert_eq!(said.json_error()?["kind"], "left_paused");
    assert_eq!(guest.status()?, "paused");
    assert_eq!(names_in(directory.path()), [""; 0]);

    guest.qmp("cont", json!({}))?;
    guest.wait_for_passes(1)?;
    guest.judge_counts()
}
