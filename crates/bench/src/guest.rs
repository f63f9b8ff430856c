//! The paused VM that every way saves.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmfile_qemu::{RunState, Vm};

use crate::contents::fill;
use crate::error::BenchError;
use crate::options::{Backing, Contents};

/// How long QEMU may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How a guest is started, and started again to be restored into.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) qemu: PathBuf,
    pub(crate) ram_bytes: u64,
    pub(crate) backing: Backing,
    /// Whether the host must have this much memory free.
    pub(crate) is_reserved: bool,
}

impl Machine {
    /// Returns a machine with private RAM, which the host must have.
    pub(crate) fn new(qemu: &Path, ram_bytes: u64) -> Machine {
        let qemu = qemu.to_path_buf();
        Machine { qemu, ram_bytes, backing: Backing::Private, is_reserved: true }
    }

    /// Returns the command line of a QEMU of this kind, the program first, with its sockets in
    /// `directory`.
    ///
    /// Uses emulation on every host: the guest stands still, and its firmware has little to do.
    pub(crate) fn command_line(&self, directory: &Path) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![self.qemu.clone().into()];
        let mebibytes = self.ram_bytes >> 20;
        words.extend(["-nodefaults", "-no-user-config", "-display", "none"].map(OsString::from));
        words.extend(["-m".into(), format!("{mebibytes}M").into()]);
        let kind = match (self.backing, self.is_reserved) {
            (Backing::Private, true) => None,
            (Backing::Private, false) => Some("memory-backend-ram,reserve=off"),
            (Backing::Shared, true) => Some("memory-backend-memfd,share=on"),
            (Backing::Shared, false) => Some("memory-backend-memfd,share=on,reserve=off"),
        };
        let mut machine = "pc,accel=tcg".to_owned();
        if let Some(kind) = kind {
            let object = format!("{kind},id=ram0,size={mebibytes}M");
            words.extend(["-object".into(), object.into()]);
            machine += ",memory-backend=ram0";
        }
        words.extend(["-machine".into(), machine.into()]);
        let socket = socket_in(directory);
        let mut qmp = OsString::from("unix:");
        qmp.push(&socket);
        qmp.push(",server=on,wait=off");
        words.extend(["-qmp".into(), qmp]);
        words
    }
}

pub(crate) fn socket_in(directory: &Path) -> PathBuf {
    directory.join("qmp")
}

/// Makes a directory for sockets, whose paths must be short.
pub(crate) fn sockets() -> Result<TempDir, BenchError> {
    let made = tempfile::Builder::new().prefix("vmfile-bench-").tempdir();
    made.map_err(BenchError::system("make a directory for sockets"))
}

/// A QEMU that was started here; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Qemu {
    child: Child,
    directory: TempDir,
}

impl Qemu {
    /// Starts a QEMU with these options besides the machine's own.
    pub(crate) fn start(machine: &Machine, more: &[&str]) -> Result<Qemu, BenchError> {
        let directory = sockets()?;
        let words = machine.command_line(directory.path());
        let log = directory.path().join("stderr");
        let stderr = File::create_new(&log).map_err(BenchError::system("make QEMU's log"))?;
        let child = Command::new(&machine.qemu)
            .args(&words[1..])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|error| no_qemu(machine, error.to_string()))?;
        let mut qemu = Qemu { child, directory };
        let deadline = Instant::now() + START_TIMEOUT;
        // The socket exists before QEMU listens on it.
        while Vm::connect(&qemu.socket()).is_err() {
            let ended = qemu.child.try_wait().ok().flatten().is_some();
            if ended || Instant::now() > deadline {
                let said = fs::read_to_string(&log).unwrap_or_default();
                return Err(no_qemu(machine, said.trim().to_owned()));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(qemu)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        socket_in(self.directory.path())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if the child has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn no_qemu(machine: &Machine, said: String) -> BenchError {
    BenchError::NoQemu { program: machine.qemu.clone(), said }
}

/// The VM that is saved: started here, or the user's.
#[derive(Debug)]
pub(crate) struct Subject {
    socket: PathBuf,
    pid: u32,
    /// How it can be started again; `None` for the user's VM.
    machine: Option<Machine>,
    /// Whether it must be resumed in the end.
    ran: bool,
    /// Dropping it ends QEMU.
    _qemu: Option<Qemu>,
}

impl Subject {
    /// Starts a guest, fills its RAM, and leaves it paused.
    pub(crate) fn start(
        machine: &Machine,
        contents: Contents,
        stop: &AtomicBool,
    ) -> Result<Subject, BenchError> {
        Subject::start_filled(machine, contents, u64::MAX, stop)
    }

    /// Does the same, and fills no more than the first `len_max` bytes of RAM.
    pub(crate) fn start_filled(
        machine: &Machine,
        contents: Contents,
        len_max: u64,
        stop: &AtomicBool,
    ) -> Result<Subject, BenchError> {
        let qemu = Qemu::start(machine, &["-S"])?;
        let mut vm = Vm::connect(&qemu.socket())?;
        // vmfile does not save a VM that has never run. The firmware finds nothing to boot and
        // becomes idle.
        vm.cont()?;
        thread::sleep(Duration::from_millis(500));
        vm.stop()?;
        fill((qemu.pid(), &vm.ram_blocks()?), contents, len_max, stop)?;
        Ok(Subject {
            socket: qemu.socket(),
            pid: qemu.pid(),
            machine: Some(machine.clone()),
            ran: false,
            _qemu: Some(qemu),
        })
    }

    /// Takes a VM that runs already, and pauses it.
    pub(crate) fn take(socket: &Path) -> Result<Subject, BenchError> {
        let mut vm = Vm::connect(socket)?;
        let ran = vm.run_state()? == RunState::Running;
        let pid = vm.pid()?;
        if ran {
            vm.stop()?;
        }
        Ok(Subject { socket: socket.to_path_buf(), pid, machine: None, ran, _qemu: None })
    }

    pub(crate) fn connect(&self) -> Result<Vm, BenchError> {
        Ok(Vm::connect(&self.socket)?)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn machine(&self) -> Option<&Machine> {
        self.machine.as_ref()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        if self.ran {
            let _ = self.connect().map(|mut vm| vm.cont());
        }
    }
}
