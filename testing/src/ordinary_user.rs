//! A user without rights of its own, as whom tests run QEMU and the program.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{chown, lchown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::TestResult;
use crate::require::{Missing, root};

/// A number that has no name on any machine, for the user and the group.
const ID: u32 = 54_322;

/// A user who is not root, has no capability, and is in no other group; with a directory of its own, which
/// is removed when this is dropped.
#[derive(Debug)]
pub struct OrdinaryUser {
    directory: TempDir,
}

impl OrdinaryUser {
    /// Makes the directory, where every user may go.
    ///
    /// # Errors
    ///
    /// Says what is missing: only root runs programs as another user.
    pub fn new() -> Result<OrdinaryUser, Missing> {
        root()?;
        let made = || -> TestResult<OrdinaryUser> {
            let directory = tempfile::Builder::new().prefix("vmf-user-").tempdir()?;
            chown(directory.path(), Some(ID), Some(ID))?;
            Ok(OrdinaryUser { directory })
        };
        made().map_err(|error| Missing::new(format!("no directory for another user: {error}")))
    }

    /// Returns the number of the user, which is that of its group as well.
    #[must_use]
    pub fn id(&self) -> u32 {
        ID
    }

    /// Returns the directory of the user.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Copies a program to where the user may run it: the directory of the build may be closed to it.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn copy(&self, program: &Path) -> TestResult<PathBuf> {
        let copy = self.directory().join(program.file_name().ok_or("a program")?);
        fs::copy(program, &copy)?;
        Ok(copy)
    }

    /// Makes a command that runs `program` as this user; the caller adds the arguments. To change the user
    /// takes all capabilities away, and `std` clears the list of groups with it.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.uid(ID).gid(ID).current_dir(self.directory());
        command
    }

    /// Makes everything in and below `path` the user's.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn take(&self, path: &Path) -> TestResult {
        lchown(path, Some(ID), Some(ID))?;
        if path.is_dir() && !path.is_symlink() {
            for entry in fs::read_dir(path)? {
                self.take(&entry?.path())?;
            }
        }
        Ok(())
    }
}
