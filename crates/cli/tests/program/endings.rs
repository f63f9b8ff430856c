//! The verb has done its work, and then the report or the release of the VM fails.

use std::fs;
use std::path::Path;
use std::process::Command;

use vmfile_testing::{Guest, Qemu, Ram, TestResult, requires};

use crate::guests::{directory, prepare};
use crate::run::{Said, command, names_in, program, strace, wait_until};
use crate::words;

fn boot(qemu: &Qemu, seed: u32) -> TestResult<Guest> {
    let guest = Guest::boot_sector(Ram::private(16)).seed(seed).boot_to(qemu, 1)?;
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

    let (prepared, _end) = prepare(guest.config(), &qemu)?;
    let mut restore = command();
    restore.args(words!["--json", "restore", file, "--"]).args(prepared.command_line());
    let said = Said::from(restore.stdout(full()?).output()?);
    said.assert(0, &["\"type\":\"warning\"", "the report is lost"]);
    let guest = prepared.attach()?;
    guest.counts_on(1)
}

/// Runs a save with `--after resume` under `strace` with these faults. Returns its output, and the
/// number of the command `cont` among its commands to QEMU, counted from 1.
fn save_with_faults(guest: &Guest, file: &Path, faults: &[String]) -> TestResult<(Said, usize)> {
    let trace = guest.directory().join("trace");
    let mut save = Command::new("strace");
    save.args(words!["-f", "-qq", "-s", "200", "-o", trace, "-e", "trace=sendmsg,fsync"]);
    for fault in faults {
        save.args(["-e", &format!("inject={fault}")]);
    }
    save.arg(program()).args(words!["--json", "save", "--after", "resume"]);
    let said = Said::from(save.args(words![guest.qmp_path(), file]).output()?);
    let trace = fs::read_to_string(&trace)?;
    let mut spoken = trace.lines().filter(|line| line.contains("sendmsg("));
    let cont = spoken.position(|line| line.contains("cont\\\"")).ok_or("it says `cont`")?;
    Ok((said, cont + 1))
}

/// vmfile cannot send `cont`: it reports that, and its guardian sends it.
#[test]
fn a_vm_that_cannot_be_released_is_let_run_by_the_guardian() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let mut guest = boot(&qemu, 62)?;
    let directory = directory()?;
    let (said, cont) = save_with_faults(&guest, &directory.path().join("first.vmf"), &[])?;
    said.assert(0, &[]);

    let fault = format!("sendmsg:error=EIO:when={cont}");
    let file = directory.path().join("second.vmf");
    let (said, _) = save_with_faults(&guest, &file, &[fault])?;
    said.assert(7, &["second.vmf is whole, but the VM is left paused", "vm-guardian"]);
    assert_eq!(said.json_error()?["kind"], "left_paused");
    wait_until("the guardian lets it run", || guest.status().is_ok_and(|s| s == "running"))?;
    vmfile_testing::verbs::check_is_clean(&file)?;
    guest.counts_on(1)
}

#[test]
fn a_failed_save_that_cannot_resume_the_vm_says_both() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(strace());
    let mut guest = boot(&qemu, 63)?;
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let failing = "fsync:error=EIO".to_owned();
    let (said, cont) = save_with_faults(&guest, &file, std::slice::from_ref(&failing))?;
    said.assert(5, &["sync"]);

    let (said, _) =
        save_with_faults(&guest, &file, &[failing, format!("sendmsg:error=EIO:when={cont}")])?;
    said.assert(7, &["sync", "and the VM is left paused", "vm-guardian"]);
    assert_eq!(said.json_error()?["kind"], "left_paused");
    wait_until("the guardian lets it run", || guest.status().is_ok_and(|s| s == "running"))?;
    assert_eq!(names_in(directory.path()), [""; 0]);
    guest.counts_on(1)
}
