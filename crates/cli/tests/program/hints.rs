//! Hints that depend on the state of the VM.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;

use serde_json::json;
use vmfile_testing::{Guest, GuestConfig, Ram, TestResult, requires};

use crate::guests::{directory, save};
use crate::run::vmfile;
use crate::words;

fn small(seed: u32) -> GuestConfig {
    Guest::boot_sector(Ram::private(32)).seed(seed)
}

/// This error had no hint.
#[test]
fn what_forbids_a_save_comes_with_a_remedy() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let image = directory.path().join("a.raw");
    fs::File::create_new(&image)?.set_len(1 << 20)?;
    let drive = format!("file={},format=raw,if=none,id=d,snapshot=on", image.display());
    let device = "virtio-blk-pci,drive=d";
    let mut guest = small(71).arguments(["-drive", &drive, "-device", device]).boot_to(&qemu, 1)?;
    save(&guest, &[])?.said.assert(3, &["cannot be saved", "hint: start the VM without -snapshot"]);
    guest.runs_on(1)
}

/// The hint spoke of -S and migrations.
#[test]
fn a_guest_that_has_shut_down_is_said_to_have() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = small(72).arguments(["-no-shutdown"]).boot_to(&qemu, 1)?;
    // Writes to the ACPI register that turns a `pc` off.
    for command in ["o/2 0x604 0x2000", "info status"] {
        guest.qmp("human-monitor-command", json!({"command-line": command}))?;
    }
    assert_eq!(guest.status()?, "shutdown");
    let said = save(&guest, &[])?.said;
    said.assert(3, &["shutdown", "hint: the guest has shut down"]);
    assert!(!said.stderr.contains("-S") && !said.stderr.contains("migrat"), "{said:?}");
    Ok(())
}

/// `--channels` was ignored without a warning.
#[test]
fn channels_that_are_not_used_are_told() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let guest = small(73).boot_to(&qemu, 1)?;
    let options = ["--channels", "2", "--after", "resume"];
    save(&guest, &options)?.said.assert(0, &["no channels were used, 2 were chosen"]);
    Ok(())
}

/// The hint spoke of a command line after `--` although none was given.
#[test]
fn a_saved_command_line_that_does_not_start_is_told_from_one_that_was_given() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = directory()?;
    let data = directory.path().join("data");
    fs::write(&data, "data")?;
    let option = format!("name=opt/b,file={}", data.display());
    let mut guest = small(74).arguments(["-fw_cfg", &option]).boot_to(&qemu, 1)?;
    let saved = save(&guest, &[])?;
    saved.said.assert(0, &[]);
    guest.wait_for_exit()?;
    fs::remove_file(&data)?;
    let said = vmfile(words!["restore", saved.file]);
    said.assert(3, &["QEMU ended", "hint: QEMU was started as for the VM that was saved"]);
    let said = vmfile(words!["restore", saved.file, "--", qemu.program(), "-no-such", "x"]);
    said.assert(3, &["QEMU ended", "hint: QEMU refused the command line after `--`"]);
    Ok(())
}

/// The error did not name the option.
#[test]
fn a_word_of_the_command_line_that_is_not_text_is_named() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let serial = OsStr::from_bytes(b"type=1,serial=x\xffy");
    let mut guest = small(75).arguments([OsStr::new("-smbios"), serial]).boot_to(&qemu, 1)?;
    let said = save(&guest, &[])?.said;
    assert!(!said.stderr.contains("serial=x"), "it may be a secret: {}", said.stderr);
    said.assert(3, &["is not UTF-8", "the value of \"-smbios\"", "hint: the file holds"]);
    guest.runs_on(1)
}
