//! `vmfile restore`: a file into a running VM.
//!
//! ```text
//! verify all but pages - prepare - start QEMU - compare - RAM (map, load or stream)
//!     - device state - run
//! ```
//!
//! `map`: the file's pages *are* the RAM, copy-on-write; QEMU starts with them and nothing is read.
//! `load`: vmfile reads the file straight into the memory of a QEMU that waits. Either way QEMU
//! then gets a short migration stream: the block list, the pages of the small blocks, and the
//! device state. `stream`: QEMU gets everything as a migration stream, which every QEMU accepts.
//! Pages that vmfile reads are compared with their hashes before the guest runs.

mod changed_images;
mod compare;
mod disks;
mod drives;
mod parts;
mod prepare;
mod ram;
mod stream;

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use derive_setters::Setters;
use serde::{Serialize, Serializer};
use vmfile_engine::{Backend, DirectIo, DirectIoInUse};
use vmfile_pages::control::Control;
use vmfile_pages::jobs::Jobs;
use vmfile_pages::reading::Verified;
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::{Feature, LaunchedQemu, PUT_BACK_TIMEOUT, RunState, Vm, VmError};

use self::compare::compare;
pub use self::disks::RestoredDisk;
use self::drives::{compare_drives, limit_drives};
use self::parts::compare_parts;
use self::prepare::{Prepared, prepare};
use self::ram::{Brought, bring};
use crate::guard::Guard;
use crate::restore_error::RestoreError;

/// How RAM gets from the file into QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// `map` if possible, else `load`, else `stream`; the report says which and why.
    #[default]
    Auto,
    /// Mapped from the file, copy-on-write: nothing is read.
    Map,
    /// Read from the file into the new process.
    Load,
    /// Sent as QEMU's own stream.
    Stream,
}

/// How RAM got from the file into QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ModeUsed {
    /// Mapped from the file.
    Map,
    /// Read from the file into the new process.
    Load,
    /// Sent as QEMU's own stream.
    Stream,
}

impl fmt::Display for ModeUsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ModeUsed::Map => "map",
            ModeUsed::Load => "load",
            ModeUsed::Stream => "stream",
        })
    }
}

/// The QEMU into which a VM is restored.
#[derive(Debug)]
pub enum Destination {
    /// A new one, started with the saved command line.
    Saved,
    /// A new one, started with this command line; its first word is the program.
    Command(Vec<String>),
    /// The one that the caller has started with `-incoming defer`.
    Waiting(Vm),
}

/// How a VM is restored.
#[derive(Clone, Debug, Setters)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// How RAM gets from the file into QEMU.
    pub mode: Mode,
    /// Whether `load` and `stream` read past the page cache.
    pub direct_io: DirectIo,
    /// Which back end does the I/O.
    pub io: Backend,
    /// How many threads read and hash for `load`.
    pub jobs: Jobs,
    /// Restore even if disk images have changed since the VM was saved.
    pub disks_changed_ok: bool,
    /// With `map`, read all pages and compare them with their hashes before the guest runs. `load`
    /// and `stream` always compare the pages.
    pub verify: bool,
    /// Run the command line in the file even if another user may have written it: one who owns a file or the
    /// program, or as whom the VM ran.
    pub trust_command: bool,
    /// Files with the values of secret objects, by the ids of these: the file has none, unless it was saved
    /// with them. A path is relative to this process's directory.
    pub secrets: Vec<(String, PathBuf)>,
    /// Leave the guest paused, even if it ran when it was saved.
    pub paused: bool,
    /// Let QEMU share this process's standard streams and end with it.
    pub foreground: bool,
}

impl Default for RestoreOptions {
    fn default() -> RestoreOptions {
        RestoreOptions {
            mode: Mode::Auto,
            direct_io: DirectIo::Preferred,
            io: Backend::Auto,
            jobs: Jobs::default(),
            disks_changed_ok: false,
            verify: false,
            trust_command: false,
            secrets: Vec::new(),
            paused: false,
            foreground: false,
        }
    }
}

/// What a restore did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct RestoreReport {
    /// QEMU's process; `None` if it cannot be seen from here, as that of a QEMU that waited in another
    /// PID namespace.
    pub pid: Option<u32>,
    /// The first QMP socket that its command line names.
    pub qmp: Option<PathBuf>,
    /// How RAM got from the file into QEMU: `map`, `load` or `stream`.
    pub mode: ModeUsed,
    /// Why it was that mode.
    pub mode_reason: String,
    /// Whether the guest runs now.
    pub running: bool,
    /// QEMU's name of its state: `running`, `paused`, or `io-error`, `guest-panicked` or `watchdog` if it
    /// stood still for that reason when it was saved.
    pub run_state: String,
    /// The disks whose images belong to the file, and the overlays to which the guest writes.
    pub disks: Vec<RestoredDisk>,
    /// Warnings for the user, such as images that have changed.
    pub warnings: Vec<String>,
    /// Whether `load` or `stream` used direct I/O; if not, why.
    #[serde(serialize_with = "as_text_if_any")]
    pub direct_io: Option<DirectIoInUse>,
    /// Bytes of pages that `load` or `stream` read from the file.
    pub bytes_read: u64,
    /// Whether the file was compared with its checksums and each page with its hash; if not, why.
    pub verified: Verified,
    /// From the start of QEMU to its first answer, in seconds; 0 for a QEMU that was waiting.
    pub qemu_start_seconds: f64,
    /// From QEMU's first answer to the guest running, in seconds.
    pub resume_seconds: f64,
    /// How long the restore took, in seconds.
    pub total_seconds: f64,
}

fn as_text_if_any<S: Serializer>(
    direct_io: &Option<DirectIoInUse>,
    to: S,
) -> Result<S::Ok, S::Error> {
    direct_io.as_ref().map(ToString::to_string).serialize(to)
}

/// A restored VM.
#[derive(Debug)]
#[non_exhaustive]
pub struct Restored {
    /// What was done.
    pub report: RestoreReport,
    /// The QEMU that was started, or `None` for one that was waiting.
    pub qemu: Option<LaunchedQemu>,
}

/// Restores the VM in `snapshot`.
///
/// The QEMU that is started ends when [`Restored::qemu`] is dropped, unless it is detached
/// ([`LaunchedQemu::detach`]).
///
/// # Errors
///
/// Returns [`RestoreError`]; a QEMU that was started has then been ended, except with
/// [`RestoreError::Unanswered`]. A QEMU that was waiting still waits, unless its state was being
/// loaded.
pub fn restore(
    snapshot: &Snapshot,
    destination: Destination,
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Restored, RestoreError> {
    let started = Instant::now();
    if options.verify && snapshot.manifest().is_none() {
        return Err(RestoreError::NoHashes { path: snapshot.path().to_path_buf() });
    }
    snapshot.verify_parts()?;
    let mut prepared = prepare(snapshot, destination, options, control)?;
    let answered = Instant::now();
    let qmp = prepared.qmp.take();
    let brought = fill(snapshot, &mut prepared, options, control);
    let brought = brought.map_err(|error| prepared.explain(error))?;
    let is_to_run = is_to_run(snapshot, options)?;
    if let Some(guard) = prepared.guard.as_ref().filter(|_| is_to_run) {
        // The VM is restored: if this process ends now, the guardian lets the guest run.
        guard.watch_run()?;
    }
    match run(prepared.vm(), is_to_run) {
        Err(error @ RestoreError::Unanswered { .. }) => {
            // The guest may run, and ending its QEMU would lose what it does.
            prepared.guard.map(Guard::leave).unwrap_or_default();
            drop(prepared.overlays.keep());
            drop(prepared.qemu.into_launched().map(LaunchedQemu::detach));
            return Err(error);
        }
        told => told.map_err(|error| prepared.explain(error))?,
    }
    prepared.guard.take().map(Guard::dismiss).unwrap_or_default();
    let resume_seconds = answered.elapsed().as_secs_f64();
    if let Some(id) = snapshot.id() {
        let path = snapshot.path();
        let noted = prepared.vm().note_last_file(&id.to_string(), path);
        let warning = |error| format!("`save --base auto` will not find this file: {error}");
        prepared.warnings.extend(noted.err().map(warning));
    }
    let run_state = prepared.vm().run_state()?.to_string();
    let report = RestoreReport {
        pid: prepared.vm().pid().ok(),
        qmp,
        mode: brought.mode,
        mode_reason: brought.reason,
        running: is_to_run,
        run_state,
        disks: prepared.overlays.keep(),
        warnings: prepared.warnings,
        direct_io: brought.direct_io.filter(|_| brought.bytes_read > 0),
        bytes_read: brought.bytes_read,
        verified: brought.verified,
        qemu_start_seconds: prepared.start_seconds,
        resume_seconds,
        total_seconds: started.elapsed().as_secs_f64(),
    };
    Ok(Restored { report, qemu: prepared.qemu.into_launched() })
}

/// Compares the QEMU that waits with the file, and loads RAM and device state into it.
fn fill(
    snapshot: &Snapshot,
    prepared: &mut Prepared,
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Brought, RestoreError> {
    if let Some(manifest) = snapshot.manifest().filter(|_| prepared.is_saved) {
        let drives = prepared.vm().drives()?;
        let limits = compare_drives(&manifest.meta.vm, prepared.overlays.list(), &drives)?;
        let warnings = limit_drives(prepared.vm(), &limits)?;
        prepared.warnings.extend(warnings);
    }
    let vm = prepared.vm();
    let found = vm.ram_blocks()?;
    compare(snapshot, &vm.machine_type()?, &found)?;
    compare_parts(snapshot, vm)?;
    refuse_sleep(snapshot, vm)?;
    bring(snapshot, prepared, &found, options, control)
}

/// Whether the guest is to run: it ran or slept when it was saved, and the caller does not want it paused.
fn is_to_run(snapshot: &Snapshot, options: &RestoreOptions) -> Result<bool, RestoreError> {
    let state = &snapshot.structure().device_state;
    let devices = snapshot.device_state()?;
    let found = state.run_state(&devices).map(RunState::from_name);
    Ok(matches!(found, Some(RunState::Running | RunState::Suspended)) && !options.paused)
}

/// Refuses a guest that sleeps if this QEMU does not know a sleep in which the guest was stopped.
fn refuse_sleep(snapshot: &Snapshot, vm: &mut Vm) -> Result<(), RestoreError> {
    let sleeps = snapshot.structure().device_state.sleeps(&snapshot.device_state()?);
    let found = vm.version()?;
    if sleeps && !found.has(Feature::StoppedSleep) {
        return Err(RestoreError::Sleeps { found });
    }
    Ok(())
}

/// Lets the guest run if it is to.
fn run(vm: &mut Vm, is_to_run: bool) -> Result<(), RestoreError> {
    if !is_to_run {
        return Ok(());
    }
    match vm.cont() {
        Err(VmError::Qmp(source)) if source.may_run_later() => {
            let state = vm.unstoppable(PUT_BACK_TIMEOUT, Vm::run_state);
            match state {
                Ok(RunState::Running | RunState::Suspended) => Ok(()),
                Ok(_) => Err(VmError::from(source).into()),
                Err(_) => Err(RestoreError::Unanswered { pid: vm.pid().ok(), source }),
            }
        }
        told => told.map_err(RestoreError::from),
    }
}
