//! A running guest, and the operations of a test on it.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::config::GuestConfig;
use super::count::Count;
use super::prepared::Prepared;
use crate::qmp::Monitor;
use crate::{TestError, TestResult};

/// How long a guest may take for anything. A Linux guest under UEFI boots in a quarter of it on two
/// cores; a machine of CI may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long QEMU may take to reach a run state.
const STATUS_PATIENCE: Duration = Duration::from_secs(60);

const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running VM. Dropping it ends its QEMU and removes its files.
#[derive(Debug)]
pub struct Guest {
    prepared: Prepared,
    child: Option<Child>,
    monitor: Monitor,
}

impl Guest {
    pub(crate) fn connect(prepared: Prepared, mut child: Option<Child>) -> TestResult<Guest> {
        let socket = prepared.directory.path().join("oracle");
        match Monitor::connect(&socket, START_TIMEOUT) {
            Ok(monitor) => Ok(Guest { prepared, child, monitor }),
            Err(error) => {
                if let Some(child) = &mut child {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                let said = fs::read_to_string(prepared.stderr_path()).unwrap_or_default();
                Err(format!("{error}\nQEMU said: {said}").into())
            }
        }
    }

    /// Returns the description that this VM was started from.
    #[must_use]
    pub fn config(&self) -> &GuestConfig {
        &self.prepared.config
    }

    /// Returns the QMP socket for the program under test; the test itself uses another one.
    #[must_use]
    pub fn qmp_path(&self) -> PathBuf {
        self.prepared.qmp_path()
    }

    /// Returns QEMU's process id.
    ///
    /// # Errors
    ///
    /// When another program started QEMU and there is no pid file.
    pub fn pid(&self) -> TestResult<u32> {
        match &self.child {
            Some(child) => Ok(child.id()),
            None => {
                let text = fs::read_to_string(self.prepared.directory.path().join("pid"))?;
                Ok(text.trim().parse()?)
            }
        }
    }

    /// Returns a directory for files of this VM; it is removed with the VM.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.prepared.directory.path()
    }

    /// Returns the file that holds the RAM `id`, such as `pc.ram`; `None` if RAM is not in files.
    #[must_use]
    pub fn ram_file(&self, id: &str) -> Option<PathBuf> {
        Some(self.prepared.ram_files.as_ref()?.directory.path().join(id))
    }

    /// Executes a QMP command on the test's own monitor.
    ///
    /// # Errors
    ///
    /// With QEMU's message when it refuses; with its exit status when it has ended.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> TestResult<Value> {
        let answer = self.monitor.execute(command, arguments);
        answer.map_err(|error| match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(Some(status))) => self.explain(&format!("{error}: QEMU ended: {status}")),
            _ => error,
        })
    }

    /// Gives QEMU a descriptor, which it keeps under `name`.
    ///
    /// # Errors
    ///
    /// With QEMU's message when it refuses.
    pub fn give_descriptor(&mut self, name: &str, fd: BorrowedFd<'_>) -> TestResult {
        self.monitor.give_descriptor(name, fd)
    }

    /// Pauses the guest.
    ///
    /// # Errors
    ///
    /// With QEMU's message when it refuses.
    pub fn stop(&mut self) -> TestResult {
        self.qmp("stop", json!({})).map(drop)
    }

    /// Lets the guest run on.
    ///
    /// # Errors
    ///
    /// With QEMU's message when it refuses.
    pub fn resume(&mut self) -> TestResult {
        self.qmp("cont", json!({})).map(drop)
    }

    /// Returns QEMU's run state: `running`, `paused`, `postmigrate`, `inmigrate` and so on.
    ///
    /// # Errors
    ///
    /// When QEMU does not answer.
    pub fn status(&mut self) -> TestResult<String> {
        let status = self.qmp("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until QEMU reports this run state.
    ///
    /// # Errors
    ///
    /// When QEMU does not answer, or reports another state for a minute.
    pub fn wait_for_status(&mut self, state: &str) -> TestResult {
        let deadline = Instant::now() + STATUS_PATIENCE;
        loop {
            let found = self.status()?;
            if found == state {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.explain(&format!("the VM is {found}, expected {state}")));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Has QEMU write `len` bytes of guest physical memory at `address` to a file in this VM's
    /// directory, and returns its path. Tests compare other views of guest memory with these bytes.
    ///
    /// # Errors
    ///
    /// With QEMU's message when it refuses.
    pub fn pmemsave(&mut self, address: u64, len: u64) -> TestResult<PathBuf> {
        let path = self.directory().join(format!("pmem-{address:x}-{len:x}"));
        self.qmp("pmemsave", json!({ "val": address, "size": len, "filename": path }))?;
        Ok(path)
    }

    /// Returns all whole lines that the guest has printed.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let bytes = fs::read(self.prepared.serial_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| line.trim_end_matches('\r').to_owned()).collect()
    }

    /// Returns all passes that the guest has reported in this VM.
    #[must_use]
    pub fn counts(&self) -> Vec<Count> {
        self.lines().iter().filter_map(|line| Count::parse(line)).collect()
    }

    /// Forgets all that the guest has printed, before it is restored from an earlier moment: a restored VM goes
    /// on with the log.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn forget_lines(&self) -> TestResult {
        Ok(fs::File::options().write(true).open(self.prepared.serial_path())?.set_len(0)?)
    }

    /// Waits for a line that `is_wanted` accepts, among all that this VM has printed.
    ///
    /// # Errors
    ///
    /// When QEMU ends, or when the line has not come within `timeout`; both with the last lines.
    pub fn wait_for_line(
        &self,
        is_wanted: impl Fn(&str) -> bool,
        timeout: Duration,
    ) -> TestResult<String> {
        self.wait_for(timeout, || self.lines().into_iter().find(|line| is_wanted(line)))
    }

    /// Waits until the guest reports pass `number` or a later one, and judges its sum.
    ///
    /// # Errors
    ///
    /// When the guest's memory is wrong, and as [`Guest::wait_for_line`].
    pub fn wait_for_count(&self, number: u32) -> TestResult<Count> {
        let is_wanted = |count: &Count| count.number >= number || count.sum.is_none();
        let count = self.wait_for(PATIENCE, || self.counts().into_iter().find(is_wanted))?;
        self.judge(&count)?;
        Ok(count)
    }

    /// Waits until the guest has reported `passes` more passes than now, and judges the last.
    ///
    /// # Errors
    ///
    /// As [`Guest::wait_for_count`].
    pub fn wait_for_passes(&self, passes: usize) -> TestResult<Count> {
        let seen = self.counts().len();
        let newest = || self.counts().into_iter().nth(seen + passes - 1);
        let count = self.wait_for(PATIENCE, newest)?;
        self.judge(&count)?;
        Ok(count)
    }

    /// Judges all passes that the guest has reported in this VM: their sums, and that none is
    /// missing or reported twice.
    ///
    /// # Errors
    ///
    /// Names the first pass that is wrong.
    pub fn judge_counts(&self) -> TestResult {
        let counts = self.counts();
        for pair in counts.windows(2) {
            let [earlier, later] = pair else { continue };
            if later.number != earlier.number + 1 {
                return Err(format!("{:?} follows {:?}", later.line, earlier.line).into());
            }
        }
        counts.iter().try_for_each(|count| self.judge(count))
    }

    /// Waits until QEMU ends, without ending it.
    ///
    /// # Errors
    ///
    /// When it still runs after two minutes.
    pub fn wait_for_exit(&mut self) -> TestResult {
        let pid = self.pid()?;
        Guest::wait_for_exit_of(pid)
    }

    /// As [`Guest::wait_for_exit`], for a QEMU whose process is known: when it ends by itself, it removes
    /// the file that says so.
    pub(crate) fn wait_for_exit_of(pid: u32) -> TestResult {
        let deadline = Instant::now() + PATIENCE;
        while !has_ended(pid) {
            if Instant::now() > deadline {
                return Err(TestError::from("QEMU still runs"));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn judge(&self, count: &Count) -> TestResult {
        let Some(sum) = count.sum else {
            return Err(format!("the guest says: {}", count.line).into());
        };
        match self.config().expected_sum(count.number) {
            Some(expected) if expected != sum => {
                Err(format!("the guest says: {}; the sum must be {expected:08x}", count.line)
                    .into())
            }
            _ => Ok(()),
        }
    }

    fn wait_for<T>(&self, timeout: Duration, look: impl Fn() -> Option<T>) -> TestResult<T> {
        let deadline = Instant::now() + timeout;
        loop {
            let ended = self.pid().map_or(true, has_ended);
            if let Some(found) = look() {
                return Ok(found);
            }
            if ended {
                return Err(self.explain("QEMU ended"));
            }
            if Instant::now() > deadline {
                return Err(self.explain(&format!("nothing came in {} s", timeout.as_secs())));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn explain(&self, what: &str) -> TestError {
        let lines = self.lines();
        let last = lines[lines.len().saturating_sub(5)..].join("\n");
        let said = fs::read_to_string(self.prepared.stderr_path()).unwrap_or_default();
        format!("{what}; the guest's last lines:\n{last}\nQEMU said: {said}").into()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        match &mut self.child {
            Some(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            None => {
                let _ = self.monitor.execute("quit", json!({}));
            }
        }
    }
}

/// Whether a process has ended. A child of this process that has ended stays a zombie until it is waited
/// for; the child of another process may be gone.
fn has_ended(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    let state = stat.rsplit_once(") ").and_then(|(_name, rest)| rest.chars().next());
    matches!(state, Some('Z' | 'X') | None)
}
