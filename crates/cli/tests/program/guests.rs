//! Guests that were saved by the program.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vmfile_testing::{Guest, GuestConfig, Prepared, Qemu, Ram, TestResult};

use crate::run::{Begun, EndAllIn, Said, vmfile};
use crate::words;

/// A file with a saved VM, in a directory of its own.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) file: PathBuf,
    /// Removes the file.
    pub(crate) directory: TempDir,
    pub(crate) said: Said,
}

/// Makes a directory on a file system that has direct I/O.
pub(crate) fn directory() -> TestResult<TempDir> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}

/// Boots a guest, lets it fill its memory, and saves it; its QEMU has ended then.
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

/// Makes a VM's files and its command line; whatever is started with it ends with the second.
pub(crate) fn prepare(config: &GuestConfig, qemu: &Qemu) -> TestResult<(Prepared, EndAllIn)> {
    let prepared = config.prepare(qemu)?;
    let end = EndAllIn(prepared.directory().to_path_buf());
    Ok((prepared, end))
}

/// A guest whose save takes long enough to be met in the middle.
pub(crate) fn large(qemu: &Qemu, arguments: &[&str]) -> TestResult<Guest> {
    let config = Guest::boot_sector(Ram::private(1200)).seed(51).data_share(200);
    config.arguments(arguments).boot_to(qemu, 1)
}

/// A save of a [`large`] guest that runs and has begun to write.
pub(crate) fn begin_to_save(guest: &Guest, file: &Path) -> TestResult<Begun> {
    let words = words!["save", guest.qmp_path(), file, "--after", "resume"];
    let slow = words!["--jobs", "1", "--io", "threads", "--direct-io", "required"];
    let begun = Begun::start(words.iter().chain(&slow).chain(&words!["--progress", "json"]))?;
    let progress = &begun.progress;
    assert!(progress["done_bytes"].as_u64() < progress["total_bytes"].as_u64(), "{progress}");
    Ok(begun)
}
