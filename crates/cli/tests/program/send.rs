//! Sends a file as a stream, in all the ways in which QEMU takes one.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::thread;

use rustix::process::{Signal, kill_process};
use vmfile_testing::{Guest, GuestConfig, Machine, Qemu, Ram, Release, TestResult, requires};

use crate::guests::{Saved, saved};
use crate::run::{Said, command, pid, program, start, vmfile, wait_until, wait_until_it_catches};
use crate::verbs::assert_documented;
use crate::words;

fn small(seed: u32) -> GuestConfig {
    Guest::boot_sector(Ram::private(64)).seed(seed)
}

/// The address for `-incoming` that makes QEMU run `vmfile send`.
fn exec(file: &Path, options: &str) -> String {
    format!("exec:{} send {} {options}", program().display(), file.display())
}

/// Saves a machine type that all versions have, and has a QEMU load the file by `exec:`.
fn taken_by(release: Release, config: &GuestConfig, options: &str) -> TestResult {
    let (source, qemu) = (requires!(Qemu::of(Release::Distribution)), requires!(Qemu::of(release)));
    let config = config.clone().machine_version("7.2");
    let saved = saved(&source, &config)?;
    config.incoming(&qemu, &exec(&saved.file, options))?.counts_on(2)
}

#[test]
fn the_oldest_qemu_takes_a_file_by_exec() -> TestResult {
    taken_by(Release::Oldest, &small(71), "")
}

#[test]
fn the_installed_qemu_takes_a_file_by_exec() -> TestResult {
    taken_by(Release::Distribution, &small(72).machine(Machine::Q35), "--assume-zeroed")
}

#[test]
fn the_newest_qemu_takes_a_file_by_exec() -> TestResult {
    taken_by(Release::Newest, &small(73), "--io threads --direct-io required")
}

#[test]
fn a_qemu_that_listens_takes_a_file_and_the_report_is_on_stdout() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = small(74);
    let Saved { file, directory, .. } = &saved(&qemu, &config)?;
    let socket = directory.path().join("incoming");
    let address = format!("unix:{}", socket.display());
    let guest = config.incoming(&qemu, &address)?;
    let said = vmfile(words!["send", file, "--connect", address, "--json"]);
    said.assert(0, &[]);
    let report = said.json()?;
    assert_documented("send", &report);
    let pages = |name: &str| report[name].as_u64().unwrap_or(0);
    assert!(pages("pages_data") > 0, "{report}");
    assert_eq!(pages("pages_total"), pages("pages_data") + pages("pages_zero"));
    guest.counts_on(2)?;
    // QEMU no longer listens.
    let said = vmfile(words!["send", file, "--connect", address]);
    said.assert(3, &["connect to", "hint: start a QEMU with -incoming unix:PATH first"]);
    Ok(())
}

#[test]
fn a_stream_is_the_same_by_stdout_and_by_a_descriptor() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &small(75))?;
    let piped = command().arg("send").arg(&saved.file).output()?;
    let said = String::from_utf8_lossy(&piped.stderr);
    assert_eq!(piped.status.code(), Some(0), "{said}");
    assert!(said.starts_with("sent      ") && said.contains("pages with data"), "{said}");
    assert!(piped.stdout.starts_with(b"QEVM"));

    let path = saved.file.with_extension("stream");
    let file = File::options().create_new(true).read(true).write(true).open(&path)?;
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
    let number = file.as_raw_fd().to_string();
    let said = vmfile(words!["send", saved.file, "--fd", number, "--json"]);
    said.assert(0, &[]);
    assert_eq!(said.stdout, "");
    assert_documented("send", &said.json_error()?);
    assert!(std::fs::read(&path)? == piped.stdout, "the same bytes");
    let said = vmfile(words!["send", saved.file, "--fd", "999"]);
    said.assert(5, &["descriptor 999: Bad file descriptor"]);
    Ok(())
}

#[test]
fn a_reader_that_goes_away_is_an_error_with_the_offset() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &small(76))?;
    let mut child = start(words!["send", saved.file])?;
    let mut stdout = child.stdout.take().ok_or("piped")?;
    stdout.read_exact(&mut [0; 5000])?;
    drop(stdout);
    let said = Said::from(child.wait_with_output()?);
    said.assert(3, &["the reader closed its end at offset 0x", "hint: QEMU says on its stderr"]);
    Ok(())
}

#[test]
fn a_signal_stops_a_send_whose_reader_sleeps() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &small(77))?;
    let mut child = start(words!["send", saved.file, "--progress", "json"])?;
    let _stdout = child.stdout.take().ok_or("piped")?;
    // It begins to write right after it catches signals.
    wait_until_it_catches(child.id(), Signal::TERM)?;
    kill_process(pid(child.id()), Signal::TERM)?;
    let waiter = thread::spawn(move || child.wait_with_output());
    wait_until("it has ended", || waiter.is_finished())?;
    let said = Said::from(waiter.join().map_err(|_| "no panic")??);
    said.assert(143, &["\"kind\":\"stopped\""]);
    Ok(())
}
