//! Guests that the tests boot and save with the program.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vmfile_testing::{Guest, GuestConfig, Prepared, Qemu, Ram, TestResult};

use crate::run::{Begun, EndAllIn, Said, vmfile};
use crate::words;

/// A file with a saved VM, in its own directory.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) file: PathBuf,
    /// Removes the file when it is dropped.
    pub(crate) directory: TempDir,
    pub(crate) said: Said,
}

/// Makes a directory on a file system that has direct I/O.
pub(crate) fn directory() -> TestResult<TempDir> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}

/// Boots a guest, lets it fill its memory, saves it, and waits until its QEMU has ended.
pub(crate) fn saved(qemu: &Qemu, config: &GuestConfig) -> TestResult<Saved> {
    let mut guest = config.boot_to(qemu, 1)?;
    let saved = save(&guest, &[])?;
    saved.said.assert(0, &[]);
    guest.wait_for_exit()?;
    Ok(saved)
}

/// Saves a guest.
pub(crate) fn save(guest: &Guest, options: &[&str]) -> TestResult<Saved> {
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let words = words!["save", guest.qmp_path(), file];
    let said = vmfile(words.into_iter().chain(options.iter().map(Into::into)));
    Ok(Saved { file, directory, said })
}

/// Makes a VM's files and its command line. Dropping the second value ends all processes that were
/// started with that command line.
pub(crate) fn prepare(config: &GuestConfig, qemu: &Qemu) -> TestResult<(Prepared, EndAllIn)> {
    let prepared = config.prepare(qemu)?;
    let end = EndAllIn(prepared.directory().to_path_buf());
    Ok((prepared, end))
}

/// Boots a guest whose save takes so long that a test can act in the middle of it.
pub(crate) fn large(qemu: &Qemu, arguments: &[&str]) -> TestResult<Guest> {
    let config = Guest::boot_sector(Ram::private(1200)).seed(51).data_share(200);
    config.arguments(arguments).boot_to(qemu, 1)
}

/// Starts a save of a [`large`] guest, and waits for its first progress.
pub(crate) fn begin_to_save(guest: &Guest, file: &Path) -> TestResult<Begun> {
    let words = words!["save", guest.qmp_path(), file, "--after", "resume"];
    let slow = words!["--jobs", "1", "--io", "threads", "--direct-io", "required"];
    let begun = Begun::start(words.iter().chain(&slow).chain(&words!["--progress", "json"]))?;
    let progress = &begun.progress;
    assert!(progress["done_bytes"].as_u64() < progress["total_bytes"].as_u64(), "{progress}");
    Ok(begun)
}
