//! A file whose reads and writes fail while a test says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use crate::require::{Missing, root};
use crate::{TestError, TestResult};

/// How long the server may take to begin, or to end.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A file of FUSE that shows another file. nbdkit serves that one, and its filter `error` lets
/// requests fail (1.32). Dropping it ends the server.
#[derive(Debug)]
pub struct FailingFile {
    server: Child,
    directory: TempDir,
}

impl FailingFile {
    /// Shows `file`. Of its reads and writes, `share` ("100%") fail with `error` ("EIO") after
    /// [`FailingFile::fail`].
    ///
    /// # Errors
    ///
    /// Says what is missing: root, nbdkit or nbdfuse.
    pub fn of(file: &Path, error: &str, share: &str) -> Result<FailingFile, Missing> {
        root()?;
        let missing = |error: TestError| Missing::new(format!("no file that fails: {error}"));
        let attempt = || -> TestResult<FailingFile> {
            let directory = tempfile::Builder::new().prefix("vmf-fail-").tempdir()?;
            let path = directory.path().join("file");
            fs::write(&path, "")?;
            let mut command = Command::new("nbdfuse");
            command.arg(path).args(["[", "nbdkit", "--foreground", "--filter=error", "file"]);
            command.arg(file).arg(format!("error={error}"));
            command
                .args(["error-pread-rate", "error-pwrite-rate"].map(|of| format!("{of}={share}")));
            command.arg(format!("error-file={}", directory.path().join("fail").display())).arg("]");
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            Ok(FailingFile { server: command.spawn()?, directory })
        };
        let mut failing = attempt().map_err(missing)?;
        let len = fs::metadata(file).map_err(|error| missing(error.into()))?.len();
        let deadline = Instant::now() + TIMEOUT;
        while fs::metadata(failing.path()).is_ok_and(|found| found.len() != len) {
            let ended = failing.server.try_wait().ok().flatten().is_some();
            if ended || Instant::now() > deadline {
                return Err(missing("nbdfuse shows nothing".into()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(failing)
    }

    /// Returns the path of the file that fails.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("file")
    }

    fn trigger(&self) -> PathBuf {
        self.directory.path().join("fail")
    }

    /// Lets reads and writes fail from now on.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn fail(&self) -> TestResult {
        Ok(fs::write(self.trigger(), "")?)
    }

    /// Lets them succeed again.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn heal(&self) -> TestResult {
        Ok(fs::remove_file(self.trigger())?)
    }
}

impl Drop for FailingFile {
    fn drop(&mut self) {
        // The server ends with its mount. All of this fails only if it has ended by itself.
        let _ = unmount(self.path(), UnmountFlags::DETACH);
        let deadline = Instant::now() + TIMEOUT;
        while self.server.try_wait().is_ok_and(|ended| ended.is_none()) {
            if Instant::now() > deadline {
                let _ = self.server.kill();
                let _ = self.server.wait();
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}
