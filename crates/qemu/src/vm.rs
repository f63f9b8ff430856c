//! A running QEMU and its guest, seen through its monitor.

mod activities;
mod blockers;
mod device_state;
mod drives;
mod error;
mod files;
mod flush;
mod io_limits;
mod last_file;
mod memory_backends;
mod memory_map;
mod other_writers;
mod overlays;
mod own_monitor;
mod paused;
mod process;
mod put_back;
mod ram;
mod reconnect;
mod record;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

pub use blockers::{Blocker, BlockerKind};
pub use device_state::{DEVICE_STATE_LEN_MAX, DeviceStateFile};
pub use drives::{DeviceName, Drive, Image};
pub(crate) use drives::{FILTERS, collect_files};
pub use error::VmError;
pub use files::FileId;
pub use io_limits::IoLimits;
pub use memory_backends::MemoryBackend;
pub use memory_map::MemoryRange;
pub(crate) use overlays::OVERLAY_PREFIX;
pub use overlays::Overlay;
pub use paused::Paused;
pub use process::{ProcessInfo, sender};
pub use put_back::{Footprint, UndoStep, steps_to_end, steps_to_run, undo_steps};
pub use ram::RamBlockInfo;
pub use record::{Holder, SaveRecord};

use crate::qmp::{COMMAND_TIMEOUT, Qmp, QmpError, is_missing_command, unexpected};
use crate::version::{Feature, QemuVersion};

/// How long a monitor may take to greet us.
///
/// A free monitor greets at once. A monitor that is serving another client stays silent, and the
/// user should learn that within seconds.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// The total time for the commands that put a VM back as it was, if none of them waits for a disk.
pub const PUT_BACK_TIMEOUT: Duration = Duration::from_secs(10);

/// The run state that QEMU reports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Stopped by a command.
    Paused,
    /// Started with `-S`, has not run yet.
    Prelaunch,
    /// Waits for, or is reading, an incoming migration.
    InMigrate,
    /// Stopped because its migration is complete; QEMU has released its disks.
    PostMigrate,
    /// Stopped for the last part of a migration.
    FinishMigrate,
    /// The guest sleeps (ACPI S3).
    Suspended,
    /// The guest has shut down and QEMU stays (`-no-shutdown`).
    Shutdown,
    /// Stopped because a disk failed.
    IoError,
    /// Stopped because QEMU itself failed.
    InternalError,
    /// The guest reported a panic.
    GuestPanicked,
    /// Stopped by the watchdog device.
    Watchdog,
    /// Stopped by a debugger.
    Debug,
    /// Stopped while a snapshot is written into a disk image.
    SaveVm,
    /// Stopped while a snapshot is read from a disk image.
    RestoreVm,
    /// A state that this program does not know.
    Other(String),
}

/// The states that we know, with QEMU's names.
const RUN_STATES: [(RunState, &str); 15] = [
    (RunState::Running, "running"),
    (RunState::Paused, "paused"),
    (RunState::Prelaunch, "prelaunch"),
    (RunState::InMigrate, "inmigrate"),
    (RunState::PostMigrate, "postmigrate"),
    (RunState::FinishMigrate, "finish-migrate"),
    (RunState::Suspended, "suspended"),
    (RunState::Shutdown, "shutdown"),
    (RunState::IoError, "io-error"),
    (RunState::InternalError, "internal-error"),
    (RunState::GuestPanicked, "guest-panicked"),
    (RunState::Watchdog, "watchdog"),
    (RunState::Debug, "debug"),
    (RunState::SaveVm, "save-vm"),
    (RunState::RestoreVm, "restore-vm"),
];

impl RunState {
    /// Tells whether the guest stands still and goes on from there with `cont`: it was stopped by a
    /// command, a disk that failed, its own panic, its watchdog or a debugger.
    #[must_use]
    pub fn stands_still(&self) -> bool {
        matches!(self, RunState::Paused | RunState::Debug) || self.is_kept()
    }

    /// Tells whether a restored VM has this state again, and not just that it is paused. QEMU aborts if
    /// it restores a VM that a debugger had stopped (7.2 to 11.1).
    #[must_use]
    pub fn is_kept(&self) -> bool {
        matches!(self, RunState::IoError | RunState::GuestPanicked | RunState::Watchdog)
    }

    /// Reads QEMU's name of a state.
    #[must_use]
    pub fn from_name(name: &str) -> RunState {
        let known = RUN_STATES.iter().find(|(_, known)| *known == name);
        known.map_or_else(|| RunState::Other(name.to_owned()), |(state, _)| state.clone())
    }

    /// Returns QEMU's name of this state.
    #[must_use]
    pub fn name(&self) -> &str {
        if let RunState::Other(name) = self {
            return name;
        }
        let row = RUN_STATES.iter().find(|(state, _)| state == self);
        row.expect("the table has a row for every known state").1
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A running QEMU, connected through its monitor.
///
/// It caches nothing that the guest or another client of QEMU can change. Dropping it leaves QEMU
/// as it is.
#[derive(Debug)]
pub struct Vm {
    pub(crate) qmp: Qmp,
    socket: Option<Box<Path>>,
    /// Known when we started this QEMU, or found by [`Vm::pid`].
    pid: Option<u32>,
    /// Whether [`Vm::release_disks`] was called and [`Vm::take_back_disks`] has not succeeded
    /// since.
    has_released_disks: bool,
    /// How many more times QEMU had said `RESUME` than `STOP` when it began to send, or when this client
    /// last let the guest run since.
    surplus: Option<i32>,
}

impl Vm {
    /// Connects to the VM whose QMP socket is at `socket`.
    ///
    /// # Errors
    ///
    /// See [`Qmp::connect`].
    pub fn connect(socket: &Path) -> Result<Vm, VmError> {
        Vm::connect_with(socket, None)
    }

    /// Connects as [`Vm::connect`] does; `stop` ends this wait, and every later one as
    /// [`Vm::set_stop`] says.
    ///
    /// # Errors
    ///
    /// See [`Qmp::connect_until`].
    pub fn connect_until(socket: &Path, stop: &Arc<AtomicBool>) -> Result<Vm, VmError> {
        Vm::connect_with(socket, Some(Arc::clone(stop)))
    }

    /// Connects as [`Vm::connect`] does, within `timeout`.
    ///
    /// # Errors
    ///
    /// See [`Qmp::connect`].
    pub fn connect_within(socket: &Path, timeout: Duration) -> Result<Vm, VmError> {
        let mut qmp = Qmp::connect(socket, timeout)?;
        qmp.set_timeout(COMMAND_TIMEOUT);
        Ok(Vm::connected(qmp, Some(socket.to_owned()), None))
    }

    fn connect_with(socket: &Path, stop: Option<Arc<AtomicBool>>) -> Result<Vm, VmError> {
        // The short timeout applies to the greeting only, not to later commands.
        let mut qmp = Qmp::connect_until(socket, GREETING_TIMEOUT, stop)?;
        qmp.set_timeout(COMMAND_TIMEOUT);
        Ok(Vm::connected(qmp, Some(socket.to_owned()), None))
    }

    /// Makes every wait for QEMU end soon after `stop` is set, as [`Qmp::set_stop`] does.
    pub fn set_stop(&mut self, stop: &Arc<AtomicBool>) {
        self.qmp.set_stop(Arc::clone(stop));
    }

    /// Runs `work`, whose commands ignore the stop flag and may take `limit` in all, as
    /// [`Qmp::unstoppable`] does. It is for putting the VM back.
    pub fn unstoppable<T>(&mut self, limit: Duration, work: impl FnOnce(&mut Vm) -> T) -> T {
        let before = self.qmp.ignore_stop(limit);
        let result = work(self);
        self.qmp.heed_stop(before);
        result
    }

    /// Takes over a connected monitor; `pid` is QEMU's process, if the caller knows it.
    ///
    /// # Errors
    ///
    /// See [`Qmp::from_stream`].
    pub fn from_stream(stream: UnixStream, pid: Option<u32>) -> Result<Vm, VmError> {
        let mut qmp = Qmp::from_stream(stream, GREETING_TIMEOUT, None, pid)?;
        qmp.set_timeout(COMMAND_TIMEOUT);
        Ok(Vm::from_qmp(qmp, pid))
    }

    /// Makes a VM of a monitor that has greeted already.
    #[must_use]
    pub fn from_qmp(mut qmp: Qmp, pid: Option<u32>) -> Vm {
        if let Some(pid) = pid {
            qmp.set_process(pid);
        }
        Vm::connected(qmp, None, pid)
    }

    fn connected(qmp: Qmp, socket: Option<PathBuf>, pid: Option<u32>) -> Vm {
        let socket = socket.map(PathBuf::into_boxed_path);
        Vm { qmp, socket, pid, has_released_disks: false, surplus: None }
    }

    /// Tells whether [`Vm::stop`] stops a guest in this run state, and [`Vm::cont`] lets it go on: it
    /// runs, or it sleeps. QEMU before 9.0 answers `stop`, and a guest that sleeps stays as it is.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn runs_or_sleeps(&mut self, state: &RunState) -> Result<bool, VmError> {
        Ok(match state {
            RunState::Running => true,
            RunState::Suspended => self.version()?.has(Feature::StoppedSleep),
            _ => false,
        })
    }

    /// Stops the guest; it can be continued. Disks are drained and flushed when this returns.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn stop(&mut self) -> Result<(), VmError> {
        Ok(self.execute("stop", Value::Null).map(drop)?)
    }

    /// Stops the guest, and tells whether it ran: QEMU sends the event `STOP` before it answers (7.2 to
    /// 11.1), and sends none if something else had stopped the guest.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn stop_if_running(&mut self) -> Result<bool, VmError> {
        let stops = self.qmp.stops();
        self.stop()?;
        Ok(self.qmp.stops() > stops)
    }

    /// Returns how many times QEMU has said by an event that the guest stands still, as far as its
    /// messages were read.
    #[must_use]
    pub fn stops(&self) -> u64 {
        self.qmp.stops().into()
    }

    /// Returns how many times QEMU has said by an event that the guest runs again, as far as its
    /// messages were read.
    #[must_use]
    pub fn resumes(&self) -> u64 {
        self.qmp.resumes().into()
    }

    /// Tells whether the guest has fallen asleep (ACPI S3) since this connection began, and was not woken,
    /// as far as QEMU's messages were read. QEMU does not say it otherwise of one that it has stopped.
    #[must_use]
    pub fn has_fallen_asleep(&self) -> bool {
        self.qmp.has_fallen_asleep()
    }

    /// Resumes the guest. First waits until QEMU has finished cleaning up after an ended migration.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn cont(&mut self) -> Result<(), VmError> {
        self.settle(Instant::now() + PUT_BACK_TIMEOUT)?;
        self.execute("cont", Value::Null)?;
        if self.surplus.is_some() {
            self.note_that_it_sends();
        }
        Ok(())
    }

    /// Reads the events that QEMU has sent, for at most `limit`: QEMU may not answer for a while.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn hear(&mut self, limit: Duration) -> Result<(), VmError> {
        match self.qmp.execute_within("query-status", Value::Null, limit) {
            Err(QmpError::Timeout { .. }) => Ok(()),
            asked => Ok(asked.map(drop)?),
        }
    }

    /// Notes that QEMU begins to send the VM.
    pub(crate) fn note_that_it_sends(&mut self) {
        self.surplus = Some(self.surplus_of_resumes());
    }

    /// Tells whether another client has let the guest run while QEMU stopped it to send it. QEMU says
    /// `RESUME` without a `STOP` then, and its migration waits for the CPUs until the guest is stopped once
    /// more (7.2 to 11.1).
    #[must_use]
    pub fn is_overtaken(&self) -> bool {
        self.surplus.is_some_and(|before| self.surplus_of_resumes() > before)
    }

    fn surplus_of_resumes(&self) -> i32 {
        let surplus = i64::from(self.qmp.resumes()) - i64::from(self.qmp.stops());
        i32::try_from(surplus).unwrap_or_default()
    }

    /// Resumes the guest, takes back its disks if they were released, and checks that it runs.
    ///
    /// A guest that stops again at once, by itself because of a disk error or by another client, counts
    /// as resumed.
    ///
    /// # Errors
    ///
    /// As for [`Vm::take_back_disks`] and [`Vm::cont`]; [`VmError::WrongState`] if the guest is
    /// still stopped as before.
    pub fn resume_and_check(&mut self) -> Result<(), VmError> {
        if self.has_released_disks {
            self.take_back_disks()?;
        }
        let resumes = self.resumes();
        self.cont()?;
        let found = self.run_state()?;
        match found {
            RunState::Paused
            | RunState::Prelaunch
            | RunState::PostMigrate
            | RunState::FinishMigrate
                if self.resumes() == resumes =>
            {
                Err(VmError::WrongState { found, expected: "running, after `cont`" })
            }
            _ => Ok(()),
        }
    }

    /// Ends QEMU and waits at most `timeout` for its process to be gone.
    ///
    /// Its disks are flushed and unlocked once this returns.
    ///
    /// # Errors
    ///
    /// [`VmError::StillRunning`] if QEMU does not end in time.
    pub fn quit(&mut self, timeout: Duration) -> Result<(), VmError> {
        let deadline = Instant::now() + timeout;
        let process = self.pid().ok().and_then(|pid| open_process(pid).ok());
        match self.execute("quit", Value::Null) {
            Ok(_) => {}
            // QEMU may exit before it has sent its answer.
            Err(error) if error.is_closed() => {}
            Err(error) => return Err(error.into()),
        }
        match process {
            Some(process) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let gone = readable_within(&process, left)
                    .map_err(|source| VmError::system("wait for QEMU's process", source))?;
                if gone { Ok(()) } else { Err(VmError::StillRunning { after: timeout }) }
            }
            None => self.wait_for_end_of_monitor(deadline, timeout),
        }
    }

    /// Runs a command that has no method of its own.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.qmp.execute(command, arguments)
    }

    /// Returns the monitor, for events and for commands with descriptors.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Returns the state that QEMU reports.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn run_state(&mut self) -> Result<RunState, VmError> {
        let answer = self.execute("query-status", Value::Null)?;
        let name = answer.get("status").and_then(Value::as_str);
        Ok(RunState::from_name(name.ok_or_else(|| unexpected("query-status", "status"))?))
    }

    /// Tells whether the guest's CPUs run.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn is_running(&mut self) -> Result<bool, VmError> {
        let answer = self.execute("query-status", Value::Null)?;
        let running = answer.get("running").and_then(Value::as_bool);
        Ok(running.ok_or_else(|| unexpected("query-status", "running"))?)
    }

    /// Returns the version from QEMU's greeting.
    ///
    /// # Errors
    ///
    /// [`QmpError::Unexpected`] when the greeting holds none.
    pub fn version(&self) -> Result<QemuVersion, VmError> {
        let version = self.qmp.greeting().get("version").and_then(|version| version.get("qemu"));
        let version = version.and_then(QemuVersion::from_json);
        Ok(version.ok_or_else(|| unexpected("qmp_capabilities", "version"))?)
    }

    /// Returns the distributor's name of this QEMU build, empty when it has none.
    #[must_use]
    pub fn package(&self) -> &str {
        let version = self.qmp.greeting().get("version");
        version.and_then(|version| version.get("package")).and_then(Value::as_str).unwrap_or("")
    }

    /// Returns the versioned machine type, e.g. `pc-i440fx-10.0`, as a migration stream names it.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn machine_type(&mut self) -> Result<String, VmError> {
        let class = self.machine_property("type")?.unwrap_or_default();
        // The QOM type of every machine is its name with this suffix.
        let name = class.strip_suffix("-machine");
        Ok(name.map(str::to_owned).ok_or_else(|| unexpected("qom-get", "machine type"))?)
    }

    /// Returns QEMU's name of the architecture that it emulates: `x86_64`, `aarch64` and so on.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn target(&mut self) -> Result<String, VmError> {
        let answer = self.execute("query-target", Value::Null)?;
        let arch = answer.get("arch").and_then(Value::as_str).map(str::to_owned);
        Ok(arch.ok_or_else(|| unexpected("query-target", "arch"))?)
    }

    /// Returns the name given with `-name`.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn name(&mut self) -> Result<Option<String>, VmError> {
        let answer = self.execute("query-name", Value::Null)?;
        Ok(answer.get("name").and_then(Value::as_str).map(str::to_owned))
    }

    /// Returns the UUID given with `-uuid` in its usual text form; `None` when none was given.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`].
    pub fn uuid(&mut self) -> Result<Option<String>, VmError> {
        let answer = self.execute("query-uuid", Value::Null)?;
        let uuid = answer.get("UUID").and_then(Value::as_str).unwrap_or_default();
        // QEMU answers zeros when it was given none.
        let given = uuid.bytes().any(|byte| byte != b'0' && byte != b'-');
        Ok(given.then(|| uuid.to_owned()))
    }

    /// Returns the path of the monitor's socket, if this VM was connected by path.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// Runs a query that not every QEMU has; `None` when this one does not.
    fn query_if_known(&mut self, command: &str) -> Result<Option<Value>, VmError> {
        match self.execute(command, Value::Null) {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if is_missing_command(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns a textual property of the machine; `None` when this machine has no such property.
    fn machine_property(&mut self, property: &str) -> Result<Option<String>, VmError> {
        Ok(self.qom_get("/machine", property)?.and_then(|value| text_of(&value)))
    }

    /// Returns a property of a QOM object; `None` when QEMU refuses it.
    fn qom_get(&mut self, path: &str, property: &str) -> Result<Option<Value>, VmError> {
        match self.execute("qom-get", json!({"path": path, "property": property})) {
            Ok(value) => Ok(Some(value)),
            Err(QmpError::Refused { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn wait_for_end_of_monitor(
        &mut self,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<(), VmError> {
        match self.qmp.wait_for_event(&[], deadline) {
            Ok(_) => Err(VmError::StillRunning { after: timeout }),
            Err(error) if error.is_closed() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn text_of(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

/// Opens a process so that we can wait for its end, even if the kernel reuses its number.
fn open_process(pid: u32) -> Result<OwnedFd, io::Error> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

/// Waits until `fd` is readable or at its end; `false` if that takes longer than `timeout`.
fn readable_within(fd: &impl std::os::fd::AsFd, timeout: Duration) -> Result<bool, io::Error> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_state_has_one_name() {
        for (state, name) in &RUN_STATES {
            assert_eq!(RunState::from_name(name), *state);
            assert_eq!(state.name(), *name);
        }
    }

    #[test]
    fn a_state_of_a_future_qemu_keeps_its_name() {
        let state = RunState::from_name("hibernating");
        assert_eq!(state, RunState::Other("hibernating".to_owned()));
        assert_eq!(state.to_string(), "hibernating");
    }
}
