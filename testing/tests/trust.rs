//! Whose command line a restore runs.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};

use vmfile::RestoreError;
use vmfile::restore::RestoreOptions;
use vmfile::save::SaveOptions;
use vmfile_testing::verbs::rewrite_manifest;
use vmfile_testing::{Guest, Qemu, Ram, Release, Saved, TestResult, requires, root};

/// Somebody who is neither root nor the user of the tests.
const STRANGER: u32 = 54_321;

/// Expects that the command line in the file is not run, for a reason with this word, and that it is run
/// if the user says so.
fn is_refused(saved: &Saved, word: &str) -> TestResult {
    let error = saved.restore_saved(&RestoreOptions::default()).expect_err("it is not trusted");
    let RestoreError::Untrusted { reason } = &error else { return Err(error.into()) };
    assert!(reason.contains(word), "{reason}");
    let trusted = saved.restore_saved(&RestoreOptions::default().trust_command(true))?;
    assert!(trusted.report.running && trusted.qemu.is_some());
    Ok(())
}

/// `restore FILE` ran whatever program the file named, as whoever restored it.
#[test]
fn a_command_line_that_another_user_may_have_written_is_not_run() -> TestResult {
    requires!(root());
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(411).boot_to(&qemu, 1)?;
    let saved = guest.save_and_end(&SaveOptions::default())?;

    chown(&saved.file, Some(STRANGER), None)?;
    is_refused(&saved, "belongs to user 54321")?;
    chown(&saved.file, Some(0), None)?;
    for mode in [0o620, 0o602] {
        fs::set_permissions(&saved.file, Permissions::from_mode(mode))?;
        is_refused(&saved, "may be written by others")?;
    }
    fs::set_permissions(&saved.file, Permissions::from_mode(0o644))?;
    drop(saved.restore_saved(&RestoreOptions::default())?);

    let program = saved.directory.path().join("qemu-system-x86_64");
    fs::copy(qemu.executable()?, &program)?;
    chown(&program, Some(STRANGER), None)?;
    let name = program.to_str().ok_or("UTF-8")?.to_owned();
    rewrite_manifest(&saved.file, |vm| vm.executable = Some(name.clone()))?;
    is_refused(&saved, "the program")?;
    chown(&program, Some(0), None)?;
    drop(saved.restore_saved(&RestoreOptions::default())?);

    // The file says as whom the VM ran.
    rewrite_manifest(&saved.file, |vm| {
        assert_eq!(vm.user, Some(0));
        vm.user = Some(STRANGER);
    })?;
    is_refused(&saved, "would run as root now")
}
