//! Guests that were saved by the program.

use std::path::PathBuf;

use tempfile::TempDir;
use vmfile_testing::{Guest, GuestConfig, Qemu, TestResult};

use crate::run::{Said, vmfile};
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
    let mut guest = config.boot(qemu)?;
    guest.wait_for_count(1)?;
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
