//! Saves a counting guest and restores it, which most tests of a VM do.
//!
//! ```no_run
//! use vmfile::restore::Mode;
//! use vmfile::save::SaveOptions;
//! use vmfile_testing::{Guest, Ram, TestResult, requires};
//!
//! fn private_ram_comes_back() -> TestResult {
//!     let qemu = requires!(qemu >= "9.0");
//!     let mut guest = Guest::boot_sector(Ram::private(64)).boot_to(&qemu, 2)?;
//!     let saved = guest.save(&SaveOptions::default())?;
//!     drop(guest);
//!     saved.comes_back(&qemu, [Mode::Map, Mode::Load])
//! }
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use vmfile::error::SaveError;
use vmfile::restore::{Destination, Mode, RestoreOptions, Restored};
use vmfile::save::{After, SaveOptions, SaveReport};
use vmfile::{Control, LaunchedQemu, RestoreError, Snapshot};

use crate::build_directory::target_directory;
use crate::verbs::{check_is_clean, restore, restore_into, save_with};
use crate::{Case, Guest, GuestConfig, Qemu, TestResult, cases};

/// A file with a saved guest, in its own directory, which is removed when this is dropped.
#[derive(Debug)]
pub struct Saved<R = SaveReport> {
    /// The file.
    pub file: PathBuf,
    /// Where the file is; nothing else is there.
    pub directory: TempDir,
    /// The report of the save.
    pub report: R,
    config: GuestConfig,
    /// The last pass that the guest had reported when the save began, and when it ended.
    passes: (u32, u32),
}

impl GuestConfig {
    /// Starts the guest and waits until it has reported pass `number`.
    ///
    /// # Errors
    ///
    /// As [`GuestConfig::boot`] and [`Guest::wait_for_count`].
    pub fn boot_to(&self, qemu: &Qemu, number: u32) -> TestResult<Guest> {
        let guest = self.boot(qemu)?;
        guest.wait_for_count(number)?;
        Ok(guest)
    }
}

impl Guest {
    /// Waits for `passes` more passes, and judges all that the guest has reported in this VM.
    ///
    /// # Errors
    ///
    /// As [`Guest::wait_for_passes`] and [`Guest::judge_counts`].
    pub fn counts_on(&self, passes: usize) -> TestResult {
        self.wait_for_passes(passes)?;
        self.judge_counts()
    }

    /// As [`Guest::counts_on`], and expects that the guest runs: a save failed, or let it run
    /// again.
    ///
    /// # Errors
    ///
    /// As [`Guest::counts_on`].
    ///
    /// # Panics
    ///
    /// If QEMU says that the guest does not run.
    pub fn runs_on(&mut self, passes: usize) -> TestResult {
        assert_eq!(self.status()?, "running");
        self.counts_on(passes)
    }

    /// Expects that `restored`, a VM restored from this guest after it ended, counts on. It goes on with
    /// the log of this guest.
    ///
    /// # Errors
    ///
    /// Names the first pass that is wrong.
    ///
    /// # Panics
    ///
    /// If QEMU ends, or the guest reports too few passes within two minutes.
    pub fn counts_on_in(&self, restored: &mut LaunchedQemu, passes: usize) -> TestResult {
        let seen = self.counts().len();
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.counts().len() < seen + passes {
            assert!(restored.ended()?.is_none(), "it runs");
            assert!(Instant::now() < deadline, "the guest reports nothing: {:?}", self.lines());
            thread::sleep(Duration::from_millis(10));
        }
        self.judge_counts()
    }

    /// Saves the guest on a file system that has direct I/O.
    ///
    /// # Errors
    ///
    /// The library's error.
    pub fn save(&mut self, options: &SaveOptions) -> TestResult<Saved> {
        self.save_below(&scratch()?, options)
    }

    /// Saves the guest into a new directory in `parent`.
    ///
    /// # Errors
    ///
    /// The library's error.
    pub fn save_below(&mut self, parent: &Path, options: &SaveOptions) -> TestResult<Saved> {
        let directory = tempfile::tempdir_in(parent)?;
        Saved::written(directory, self, |guest, file| save_with(guest, file, options))
    }

    /// As [`Guest::save`], and ends QEMU if the save did not.
    ///
    /// # Errors
    ///
    /// The library's or QEMU's error.
    pub fn save_and_end(&mut self, options: &SaveOptions) -> TestResult<Saved> {
        let pid = self.pid()?;
        let saved = self.save(options)?;
        if options.after != After::Quit {
            self.qmp("quit", json!({}))?;
        }
        Guest::wait_for_exit_of(pid)?;
        Ok(saved)
    }

    /// Expects that a save fails and leaves no file.
    ///
    /// # Errors
    ///
    /// When the guest is saved, or when the error is not one of a save.
    ///
    /// # Panics
    ///
    /// If a file is left.
    pub fn save_fails(&self, options: &SaveOptions) -> TestResult<SaveError> {
        let directory = tempfile::tempdir_in(scratch()?)?;
        let result = save_with(self, &directory.path().join("vm.vmf"), options);
        let error = result.err().ok_or("the guest was saved")?;
        assert_eq!(fs::read_dir(directory.path())?.count(), 0, "{error}");
        Ok(*error.downcast::<SaveError>()?)
    }

    fn last_pass(&self) -> TestResult<u32> {
        Ok(self.counts().last().ok_or("the guest has not counted yet")?.number)
    }
}

impl<R> Saved<R> {
    /// Saves the guest with `write`, for ways that [`Guest::save`] does not offer.
    ///
    /// # Errors
    ///
    /// The error of `write`.
    pub fn by(
        guest: &mut Guest,
        write: impl FnOnce(&mut Guest, &Path) -> TestResult<R>,
    ) -> TestResult<Saved<R>> {
        Saved::written(tempfile::tempdir_in(scratch()?)?, guest, write)
    }

    /// Calls `write`, and notes the guest's last pass before and after it.
    fn written(
        directory: TempDir,
        guest: &mut Guest,
        write: impl FnOnce(&mut Guest, &Path) -> TestResult<R>,
    ) -> TestResult<Saved<R>> {
        let file = directory.path().join("vm.vmf");
        let begun = guest.last_pass()?;
        let report = write(guest, &file)?;
        let passes = (begun, guest.last_pass()?);
        Ok(Saved { file, directory, report, config: guest.config().clone(), passes })
    }

    /// Restores the guest as [`restore`] does, and does not wait for its passes.
    ///
    /// # Errors
    ///
    /// The library's error.
    pub fn restore(&self, qemu: &Qemu, mode: Mode) -> TestResult<Guest> {
        restore(qemu, &self.config, &self.file, mode)
    }

    /// Restores the guest with the command line that the file holds.
    ///
    /// # Errors
    ///
    /// The library's error.
    pub fn restore_saved(&self, options: &RestoreOptions) -> Result<Restored, RestoreError> {
        let snapshot = Snapshot::open(&self.file, 0)?;
        vmfile::restore::restore(&snapshot, Destination::Saved, options, &Control::none())
    }

    /// Restores the guest into a QEMU that waits for it.
    ///
    /// # Errors
    ///
    /// The library's error.
    pub fn restore_into(&self, waiting: &Guest, options: &RestoreOptions) -> TestResult<Restored> {
        restore_into(waiting, &Snapshot::open(&self.file, 0)?, options)
    }

    /// Restores the guest, which must count on from where it was saved.
    ///
    /// # Errors
    ///
    /// The library's error, and as [`Guest::counts_on`].
    ///
    /// # Panics
    ///
    /// If the guest counts on from elsewhere.
    pub fn comes_back_on(&self, qemu: &Qemu, mode: Mode) -> TestResult<Guest> {
        let guest = self.restore(qemu, mode)?;
        self.goes_on_in(&guest)?;
        Ok(guest)
    }

    /// As [`Saved::comes_back_on`], for a guest that was paused when it was saved.
    ///
    /// # Errors
    ///
    /// As [`Saved::comes_back_on`].
    ///
    /// # Panics
    ///
    /// If the guest is not paused, and as [`Saved::comes_back_on`].
    pub fn comes_back_paused_on(&self, qemu: &Qemu, mode: Mode) -> TestResult {
        let mut guest = self.restore(qemu, mode)?;
        assert_eq!(guest.status()?, "paused");
        guest.resume()?;
        self.goes_on_in(&guest)
    }

    /// Checks every byte of the file and restores the guest in each of `modes`, one after another.
    ///
    /// # Errors
    ///
    /// As [`Saved::comes_back_on`].
    ///
    /// # Panics
    ///
    /// If there is a finding, and as [`Saved::comes_back_on`].
    pub fn comes_back(&self, qemu: &Qemu, modes: impl IntoIterator<Item = Mode>) -> TestResult {
        check_is_clean(&self.file)?;
        modes.into_iter().try_for_each(|mode| self.comes_back_on(qemu, mode).map(drop))
    }

    /// Expects that `guest`, made from the file in any way, counts on from where it was saved.
    ///
    /// # Errors
    ///
    /// As [`Guest::counts_on`].
    ///
    /// # Panics
    ///
    /// If it counts on from elsewhere.
    pub fn goes_on_in(&self, guest: &Guest) -> TestResult {
        guest.counts_on(2)?;
        let first = guest.counts().first().ok_or("a count")?.number;
        // The line that the guest was printing when it was saved may be split between the two logs.
        let (begun, ended) = self.passes;
        let may_be_first = begun + 1..=ended + 2;
        assert!(may_be_first.contains(&first), "pass {first} comes first, of {may_be_first:?}");
        cases(1, Case::Restore);
        Ok(())
    }
}

/// Returns the directory that cargo gives to integration tests; it is on the disk of the build.
fn scratch() -> TestResult<PathBuf> {
    let path = target_directory().join("tmp");
    fs::create_dir_all(&path)?;
    Ok(path)
}
