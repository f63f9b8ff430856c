//! A save finds and names each difference between a VM and what its command line would make.

mod activities;
mod defaults;
mod devices;
mod drives;
mod image_properties;
mod io_limits;
mod replaced;
mod start;
mod unchanged;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::error::SaveError;
use vmfile::restore::{RestoreOptions, Restored};
use vmfile::save::{After, Change, SaveOptions};
use vmfile_testing::verbs::save_with;
use vmfile_testing::{Guest, TestResult};

/// The changes that a save reports for a VM that goes on.
fn changes(guest: &Guest) -> TestResult<Vec<Change>> {
    let directory = tempfile::tempdir()?;
    let options = SaveOptions::default().after(After::Resume);
    Ok(save_with(guest, &directory.path().join("vm.vmf"), &options)?.changes)
}

fn names(changes: &[Change]) -> Vec<&str> {
    changes.iter().map(|change| change.what.as_str()).collect()
}

/// Expects that a save which would end the VM is refused and names `expected`; then saves with
/// `changed_ok` and restores with the saved command line.
fn save_and_restore(guest: &mut Guest, expected: &[&str]) -> TestResult<Restored> {
    let error = guest.save_fails(&SaveOptions::default())?;
    let SaveError::Changed { changes } = &error else { return Err(error.into()) };
    assert_eq!(names(changes), expected, "{error}");
    assert_eq!(guest.status()?, "running");
    let saved = guest.save_and_end(&SaveOptions::default().changed_ok(true))?;
    Ok(saved.restore_saved(&RestoreOptions::default())?)
}

/// Expects that the restored VM counts on; it writes to the log of `guest`, which has ended.
fn goes_on(guest: &Guest, restored: &mut Restored) -> TestResult {
    guest.counts_on_in(restored.qemu.as_mut().ok_or("a QEMU was started")?, 2)
}

fn ask(restored: &mut Restored, command: &str, arguments: Value) -> TestResult<Value> {
    let qemu = restored.qemu.as_mut().ok_or("a QEMU was started")?;
    Ok(qemu.vm().execute(command, arguments)?)
}

/// Waits until a device is gone: the guest, or QEMU in its place, must release it first.
fn wait_until_gone(guest: &mut Guest, path: &str, name: &str) -> TestResult {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let children = guest.qmp("qom-list", json!({"path": path}))?;
        let is_there = children.as_array().into_iter().flatten().any(|child| child["name"] == name);
        if !is_there {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{name} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn image(directory: &Path) -> TestResult<PathBuf> {
    let image = directory.join("a,b.raw");
    std::fs::File::create_new(&image)?.set_len(1 << 20)?;
    Ok(image)
}

/// Makes `count` raw images, `0.raw` and so on, and a symbolic link `link` to the first.
fn images(directory: &Path, count: u32) -> TestResult {
    for number in 0..count {
        let path = directory.join(format!("{number}.raw"));
        std::fs::File::create_new(path)?.set_len(4 << 20)?;
    }
    Ok(std::os::unix::fs::symlink("0.raw", directory.join("link"))?)
}
