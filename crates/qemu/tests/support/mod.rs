//! A real QEMU for one test, which ends with the test.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmfile_qemu::{CommandLine, Launch, LaunchError, LaunchedQemu, Vm};

/// How long a QEMU may take to start on a loaded machine.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The options of every test VM: without QEMU's default devices.
pub(crate) const PLAIN: [&str; 7] =
    ["-accel", "tcg", "-nodefaults", "-display", "none", "-m", "64M"];

/// Returns the QEMU under test: `$VMFILE_QEMU`, or the one on the search path.
pub(crate) fn program() -> PathBuf {
    if let Some(program) = std::env::var_os("VMFILE_QEMU") {
        return PathBuf::from(program);
    }
    let search: Option<OsString> = std::env::var_os("PATH");
    let found = vmfile_qemu::find_program(Path::new("/qemu-system-x86_64"), search.as_ref());
    found.expect("qemu-system-x86_64 is not installed; `cargo xtask setup` installs it")
}

/// A QEMU with a QMP socket, in its own directory.
pub(crate) struct TestQemu {
    child: Child,
    pub(crate) directory: TempDir,
    pub(crate) socket: PathBuf,
}

impl TestQemu {
    /// Starts a QEMU with [`PLAIN`] and `options` and waits for its socket.
    pub(crate) fn start(options: &[&str]) -> TestQemu {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp.sock");
        let child = Command::new(program())
            .args(PLAIN)
            .args(options)
            .arg("-qmp")
            .arg("unix:qmp.sock,server=on,wait=off")
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut qemu = TestQemu { child, directory, socket };
        let deadline = Instant::now() + START_TIMEOUT;
        while std::os::unix::net::UnixStream::connect(&qemu.socket).is_err() {
            assert!(qemu.child.try_wait().unwrap().is_none(), "QEMU ended while it started");
            assert!(Instant::now() < deadline, "QEMU does not start");
            thread::sleep(Duration::from_millis(5));
        }
        qemu
    }

    pub(crate) fn vm(&self) -> Vm {
        Vm::connect(&self.socket).unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for TestQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the command line of a test VM.
pub(crate) fn line(options: &[&str]) -> CommandLine {
    CommandLine::new(PLAIN.iter().chain(options).copied()).unwrap()
}

/// Launches a test VM through the library.
pub(crate) fn launch(line: CommandLine) -> Result<LaunchedQemu, LaunchError> {
    Launch::new(program(), line).spawn(START_TIMEOUT)
}

/// Makes a file of zeros.
pub(crate) fn sparse_file(path: &Path, len: u64) {
    let file = OpenOptions::new().write(true).create_new(true).open(path).unwrap();
    file.set_len(len).unwrap();
}
