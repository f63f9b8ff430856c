//! A VM whose files exist, and whose QEMU is not yet started.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::config::GuestConfig;
use crate::TestResult;
use crate::ordinary_user::OrdinaryUser;
use crate::qemu::Qemu;

/// A VM whose files and command line are ready.
#[derive(Debug)]
pub struct Prepared {
    pub(crate) config: GuestConfig,
    pub(crate) qemu: Qemu,
    pub(crate) directory: TempDir,
    pub(crate) ram_files: Option<RamFiles>,
    pub(super) arguments: Vec<OsString>,
}

/// The directory of the files that hold a VM's RAM; it is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct RamFiles {
    pub(crate) directory: TempDir,
}

impl Prepared {
    /// Returns the command line, the program first.
    #[must_use]
    pub fn command_line(&self) -> Vec<OsString> {
        let program = self.qemu.program().as_os_str().to_owned();
        [program].into_iter().chain(self.arguments.iter().cloned()).collect()
    }

    /// Returns the directory of this VM's sockets and logs, which its command line names.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the QMP socket of this VM for the program under test.
    #[must_use]
    pub fn qmp_path(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// Makes all files of this VM the user's, so that its QEMU can run as that user.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn belongs_to(&self, user: &OrdinaryUser) -> TestResult {
        user.take(self.directory())?;
        user.take(self.config.files.path())?;
        self.ram_files.as_ref().map_or(Ok(()), |files| user.take(files.directory.path()))
    }

    /// Starts QEMU by `command`, which runs its program; `more` are arguments.
    pub(super) fn spawn(&self, mut command: Command, more: &[&str]) -> TestResult<Child> {
        let errors = File::options().create_new(true).append(true).open(self.stderr_path())?;
        command
            .args(&self.arguments)
            .args(more)
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors)
            .spawn()
            .map_err(|error| format!("{}: {error}", self.qemu.program().display()).into())
    }

    pub(crate) fn stderr_path(&self) -> PathBuf {
        self.directory.path().join("stderr")
    }

    pub(crate) fn serial_path(&self) -> PathBuf {
        self.directory.path().join("serial")
    }
}
