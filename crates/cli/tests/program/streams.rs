//! Streams in and out, as QEMU and shells use them.

use std::fs;
use std::process::Stdio;

use serde_json::{Value, json};
use vmfile_testing::migration::migrate;
use vmfile_testing::{Guest, Ram, TestResult, requires};

use crate::guests::directory;
use crate::run::{EndAllIn, Said, command, names_in, program, vmfile, wait_until};
use crate::verbs::assert_documented;
use crate::words;

#[test]
fn receive_replaces_cat_in_exec_and_the_file_starts_the_vm_again() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(32)).seed(91).boot(&qemu)?;
    let before = guest.wait_for_count(2)?;
    let directory = directory()?;
    let (file, report) = (directory.path().join("vm.vmf"), directory.path().join("report"));
    let (vmfile_path, file_path, report_path) =
        (program().display(), file.display(), report.display());
    let uri = format!("exec:{vmfile_path} --json receive {file_path} > {report_path}");
    assert_eq!(migrate(&mut guest, &uri)?["status"], "completed");
    wait_until("the file has its name", || file.exists())?;
    wait_until("the report is there", || {
        fs::read_to_string(&report).is_ok_and(|text| text.ends_with("}\n"))
    })?;
    let report: Value = serde_json::from_str(&fs::read_to_string(&report)?)?;
    assert_documented("receive", &report);
    assert_eq!(report["pages_total"].as_u64().map(|pages| pages >> 13), Some(1), "{report}");
    vmfile(words!["check", file]).assert(0, &["0 findings"]);

    // QEMU was the parent of `vmfile receive`, so the file holds its command line.
    let vm_directory = guest.directory().to_path_buf();
    guest.qmp("quit", json!({}))?;
    guest.wait_for_exit()?;
    let _end = EndAllIn(vm_directory);
    vmfile(words!["restore", file]).assert(0, &["restored  running"]);
    let counts_on = || guest.counts().iter().any(|count| count.number > before.number + 1);
    wait_until("the guest counts on", counts_on)?;
    guest.judge_counts()
}

#[test]
fn a_receiver_that_cannot_begin_fails_the_migration_and_the_guest_runs_on() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(32)).seed(92).boot_to(&qemu, 1)?;
    let uri = format!("exec:{} receive /nowhere/vm.vmf 2> /dev/null", program().display());
    assert_eq!(migrate(&mut guest, &uri)?["status"], "failed");
    guest.runs_on(1)
}

#[test]
fn what_is_no_stream_is_refused() -> TestResult {
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let receive = |input: Stdio, options: &[&str]| -> TestResult<Said> {
        let mut command = command();
        command.arg("receive").arg(&file).args(options).stdin(input);
        Ok(command.output()?.into())
    };
    receive(Stdio::null(), &[])?.assert(4, &["the stream: at offset 0x0: stream magic needs"]);
    let elf = || fs::File::open(program());
    receive(elf()?.into(), &[])?.assert(4, &["begins with 0x7f454c46, not \"QEVM\""]);
    receive(elf()?.into(), &["--json"])?.assert(4, &["\"kind\":\"stream\""]);
    receive(Stdio::null(), &["--fd", "77"])?.assert(5, &["descriptor 77: Bad file descriptor"]);
    receive(Stdio::null(), &["--listen", "tcp:1:2"])?.assert(2, &["expected unix:PATH"]);
    let taken = program().display().to_string();
    let listen = format!("unix:{taken}");
    receive(Stdio::null(), &["--listen", &listen])?.assert(5, &["nothing may be there yet"]);
    assert_eq!(names_in(directory.path()), [""; 0]);
    Ok(())
}

#[test]
fn a_sender_that_does_not_come_is_not_waited_for_for_ever() -> TestResult {
    let directory = directory()?;
    let (file, socket) = (directory.path().join("vm.vmf"), directory.path().join("socket"));
    let said = vmfile(words!["receive", file, "--listen", socket, "--stall-timeout", "1"]);
    said.assert(3, &["no byte came for 1s", "--stall-timeout waits longer"]);
    assert_eq!(names_in(directory.path()), [""; 0]);
    Ok(())
}

#[test]
fn a_file_is_converted_there_and_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = crate::guests::saved(&qemu, &Guest::boot_sector(Ram::private(16)).seed(93))?;
    let directory = directory()?;
    let (stream, again) = (directory.path().join("stream"), directory.path().join("again.vmf"));
    let said = vmfile(words!["convert", "--json", saved.file, stream, "--to", "stream"]);
    said.assert(0, &[]);
    assert_documented("convert", &said.json()?);
    vmfile(words!["convert", stream, again, "--to", "mapped-ram"])
        .assert(0, &["converted", "stream to mapped-ram"]);
    vmfile(words!["check", again]).assert(0, &["0 findings"]);
    vmfile(words!["convert", stream, again, "--to", "stream"]).assert(2, &["is a stream already"]);
    vmfile(words!["convert", stream, again, "--to", "mapped-ram"]).assert(5, &["--force"]);
    vmfile(words!["convert", saved.file, stream, "--to", "elf"]).assert(2, &["possible values"]);
    Ok(())
}
