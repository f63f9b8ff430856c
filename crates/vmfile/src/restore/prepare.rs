//! Prepares the QEMU for the VM, and chooses how its RAM is restored.

use super::ModeUsed;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_pages::PagesError;
use vmfile_pages::control::Control;
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::{
    CommandLine, EmptiedFile, Feature, Launch, LaunchError, LaunchedQemu, MappedBlock, MonitorPair,
    PUT_BACK_TIMEOUT, QemuVersion, RunState, Vm, VmError, high_descriptor, program_version,
};

use super::changed_images;
use super::disks::{Images, NewOverlays, Start, place_given, place_saved, refuse_own};
use super::parts::remake;
use super::{Destination, Mode, RestoreOptions};
use crate::guard::Guard;
use crate::restore_error::{Mismatch, RestoreError};
use crate::surroundings;
use crate::trust;

/// How long QEMU may take to start and answer: it opens disks and makes RAM meanwhile.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The kinds of memory backend whose memory is anonymous, so that it starts as zeros.
const ANONYMOUS: [&str; 2] = ["memory-backend-ram", "memory-backend-memfd"];

/// A QEMU that waits for the VM.
pub(super) struct Prepared {
    pub(super) qemu: Qemu,
    /// Whether its command line is the one that was saved.
    pub(super) is_saved: bool,
    pub(super) mode: ModeUsed,
    pub(super) reason: String,
    /// Whether `stream` may take the place of `load`.
    pub(super) may_stream: bool,
    /// Names of the blocks that are mapped from the file.
    pub(super) mapped: Vec<String>,
    /// The overlays that were made for it.
    pub(super) overlays: NewOverlays,
    /// Warnings for the user.
    pub(super) warnings: Vec<String>,
    pub(super) qmp: Option<PathBuf>,
    pub(super) start_seconds: f64,
    /// Ends the QEMU that was started if this process ends. This field is dropped last.
    pub(super) guard: Option<Guard>,
}

pub(super) enum Qemu {
    Launched(LaunchedQemu),
    Waiting(Vm),
}

impl Qemu {
    pub(super) fn into_launched(self) -> Option<LaunchedQemu> {
        match self {
            Qemu::Launched(qemu) => Some(qemu),
            Qemu::Waiting(_) => None,
        }
    }
}

impl Prepared {
    /// Adds to an error what QEMU wrote to its standard error, and whether QEMU has ended: then the
    /// error is only a consequence.
    pub(super) fn explain(&mut self, error: RestoreError) -> RestoreError {
        match error {
            RestoreError::Pages(PagesError::Stopped) => error,
            RestoreError::DeviceState { source, .. } => {
                RestoreError::DeviceState { source, stderr: self.stderr() }
            }
            // A process that is ending may take long to free its memory: a query waits until its
            // monitor closes.
            cause => match self.vm().unstoppable(PUT_BACK_TIMEOUT, Vm::run_state) {
                Err(VmError::Qmp(source)) if source.is_closed() => {
                    RestoreError::QemuGone { cause: Box::new(cause), stderr: self.stderr(), source }
                }
                _ => cause,
            },
        }
    }

    /// Returns the end of QEMU's standard error; nothing if this process did not start QEMU.
    fn stderr(&self) -> String {
        match &self.qemu {
            Qemu::Launched(qemu) => qemu.stderr().trim().to_owned(),
            Qemu::Waiting(_) => String::new(),
        }
    }

    /// Returns the names of the RAM blocks that are still all zero: those that a QEMU, just
    /// started, made of anonymous memory. RAM in a file may hold old bytes.
    pub(super) fn fresh_blocks(&mut self) -> Result<Vec<String>, RestoreError> {
        let Qemu::Launched(qemu) = &mut self.qemu else { return Ok(Vec::new()) };
        let mut backends = qemu.vm().memory_backends()?;
        backends.retain(|backend| backend.path.is_none() && ANONYMOUS.contains(&&*backend.kind));
        // Machine types before 4.0 name a block by its backend's whole path.
        let names = |id: String| [format!("/objects/{id}"), id];
        Ok(backends.into_iter().flat_map(|backend| names(backend.id)).collect())
    }

    pub(super) fn vm(&mut self) -> &mut Vm {
        match &mut self.qemu {
            Qemu::Launched(qemu) => qemu.vm(),
            Qemu::Waiting(vm) => vm,
        }
    }
}

pub(super) fn prepare(
    snapshot: &Snapshot,
    destination: Destination,
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Prepared, RestoreError> {
    let again = match &destination {
        Destination::Saved => Some(Destination::Saved),
        Destination::Command(words) => Some(Destination::Command(words.clone())),
        Destination::Waiting(_) => None,
    };
    let started = start(snapshot, destination, options, control);
    let Some(again) = again.filter(|_| options.mode == Mode::Auto) else { return started };
    match started {
        Err(RestoreError::Launch(LaunchError::Ended { stderr, .. })) if has_own_ram(&stderr) => {
            let by_load = options.clone().mode(Mode::Load);
            let started = start(snapshot, again, &by_load, control)?;
            let reason =
                "the machine makes its RAM by itself, and takes none from a file".to_owned();
            Ok(Prepared { reason, may_stream: true, ..started })
        }
        started => started,
    }
}

/// Tells whether QEMU ended because its machine takes no memory backend for its RAM, as `sun4u` (7.2 to
/// 11.1).
fn has_own_ram(stderr: &str) -> bool {
    stderr.contains("RAMBlock") && stderr.contains("already registered")
}

/// Starts a QEMU for the VM, or takes the one that waits.
fn start(
    snapshot: &Snapshot,
    destination: Destination,
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Prepared, RestoreError> {
    let is_saved = matches!(destination, Destination::Saved);
    let (executable, mut command_line, directory) = match destination {
        Destination::Waiting(mut vm) => {
            vm.set_stop(control.stop_flag());
            return prepare_waiting(snapshot, vm, options);
        }
        Destination::Command(mut words) => {
            if words.is_empty() {
                return Err(RestoreError::NoCommand);
            }
            let executable = PathBuf::from(words.remove(0));
            (executable, CommandLine::new(words)?, None)
        }
        Destination::Saved => saved_command(snapshot, options)?,
    };
    let here = directory.as_deref().unwrap_or(Path::new("."));
    // A QEMU built without user networking refuses `-net user`, in words that say so.
    command_line.expand_config(true, |path| fs::read_to_string(here.join(path)))?;
    if let Some(socket) = command_line.sockets_in_use(here)?.into_iter().next() {
        return Err(RestoreError::SocketInUse { socket });
    }
    let version = program_version(&executable)?;
    compare_memory_size(snapshot, &command_line)?;
    let lowest = lowest(snapshot);
    let (mapped, mode, reason) = choose(snapshot, lowest, (&command_line, version), options.mode)?;
    let beginning = Start { snapshot, executable: &executable, directory: here, options };
    let Images { overlays, mut warnings } = if is_saved {
        place_saved(beginning, &mut command_line)?
    } else {
        place_given(beginning, &mut command_line)?
    };
    let inherited = high_descriptor(lowest.file()).map_err(RestoreError::File)?;
    // Uses the descriptor of the file that was checked: its path may lead to another file by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", inherited.as_raw_fd()));
    let blocks: Vec<MappedBlock> = mapped.iter().map(|placed| in_file(placed, &path)).collect();
    let names = blocks.iter().map(|block| block.block_name.clone()).collect();
    warnings.extend(of_mapping(lowest, &blocks, &command_line, options)?);
    warnings.extend(outside(beginning, is_saved, &mut command_line));
    let qmp = command_line.qmp_sockets().into_iter().next();
    let monitor = MonitorPair::new()?;
    let mut guard = Guard::of_monitor(monitor.as_fd())?;
    guard.add_files(overlays.files())?;
    guard.watch_start()?;
    let started = Instant::now();
    let mut launch = Launch::new(executable, command_line.for_incoming(&blocks)?)
        .monitor(monitor)
        .version(version)
        .foreground(options.foreground)
        .until(control.stop_flag())
        .inherit(inherited);
    if let Some(directory) = directory {
        launch = launch.working_directory(directory);
    }
    let qemu = launch.spawn(START_TIMEOUT)?;
    let start_seconds = started.elapsed().as_secs_f64();
    Ok(Prepared {
        qemu: Qemu::Launched(qemu),
        is_saved,
        mode,
        reason,
        may_stream: options.mode == Mode::Auto,
        mapped: names,
        overlays,
        warnings,
        qmp,
        start_seconds,
        guard: Some(guard),
    })
}

/// Returns warnings about RAM that is mapped from the file `lowest`: what it lacks, and who can change it.
fn of_mapping(
    lowest: &Snapshot,
    blocks: &[MappedBlock],
    line: &CommandLine,
    options: &RestoreOptions,
) -> Result<Vec<String>, RestoreError> {
    let is_asked = !blocks.is_empty() && !options.trust_command;
    let reason = is_asked.then(|| trust::why_not_alone(lowest)).transpose();
    let reason = reason.map_err(RestoreError::File)?.flatten();
    let now = "who can write it can change the guest's RAM while it runs";
    let owner = reason.map(|reason| format!("RAM is mapped from a file: {reason}; {now}"));
    let lost = said(&line.lost_by_mapping(blocks), "is not kept: RAM is mapped from the file");
    Ok(lost.into_iter().chain(owner).collect())
}

/// Returns warnings about what the new QEMU has or uses in another way than the old one: files, sockets, a
/// terminal, and, if its command line is the saved one, what the old one had from those who started it.
fn outside(beginning: Start<'_>, is_saved: bool, line: &mut CommandLine) -> Vec<String> {
    let Start { snapshot, directory: here, options, .. } = beginning;
    let has_bytes = |path: &Path| here.join(path).metadata().is_ok_and(|file| file.len() > 0);
    let emptied = line.keep_logs().into_iter().filter(|file| has_bytes(&file.path));
    let words = |EmptiedFile { option, path }: EmptiedFile| {
        format!("{option}: QEMU has emptied {}", path.display())
    };
    let terminal = if options.foreground { Vec::new() } else { line.on_terminal() };
    let lost = "has no terminal: QEMU runs in the background, --foreground gives it this one";
    let saved = snapshot.manifest().filter(|_| is_saved);
    let surroundings = saved.and_then(|manifest| manifest.meta.vm.surroundings.as_ref());
    let had = surroundings.map(surroundings::lost).unwrap_or_default();
    let waits = "waits for no client: QEMU would not start until one connects";
    let waiting = said(&line.stop_waiting(), waits);
    emptied.map(words).chain(said(&terminal, lost)).chain(waiting).chain(had).collect()
}

/// Returns one warning for options of the command line; none if there are none.
fn said(options: &[String], what: &str) -> Option<String> {
    (!options.is_empty()).then(|| format!("{} {what}", options.join(", ")))
}

/// Returns the program, command line and directory of the saved VM. The command line makes what the
/// VM had when it was saved.
fn saved_command(
    snapshot: &Snapshot,
    options: &RestoreOptions,
) -> Result<(PathBuf, CommandLine, Option<PathBuf>), RestoreError> {
    let meta = snapshot.manifest().map(|manifest| &manifest.meta.vm);
    let meta = meta.ok_or(RestoreError::NoSavedCommand)?;
    let executable = meta.executable.as_ref().ok_or(RestoreError::NoSavedCommand)?;
    let words = meta.command_line.get(1..).unwrap_or_default().to_vec();
    let mut command_line = CommandLine::new(words)?;
    if !options.trust_command {
        trust::check(snapshot, meta, Path::new(executable))?;
    }
    give_secrets(&mut command_line, options)?;
    let lost = command_line.what_cannot_be_recreated();
    if !lost.is_empty() {
        return Err(RestoreError::CannotRecreate { what: lost });
    }
    remake(meta, &mut command_line)?;
    // `-machine q35` is another machine in another version of QEMU. Only an explicit `type=` replaces
    // the machine of an earlier option (QEMU 7.2 to 11.1).
    let machine = &snapshot.structure().configuration.machine;
    command_line.push("-machine", Some(&format!("type={machine}")));
    let directory = meta.working_directory.as_ref().map(PathBuf::from);
    Ok((PathBuf::from(executable), command_line, directory))
}

/// Has secret objects read their values from the files that were given for them.
fn give_secrets(line: &mut CommandLine, options: &RestoreOptions) -> Result<(), RestoreError> {
    for (id, file) in &options.secrets {
        // QEMU starts in another directory.
        let file = std::path::absolute(file).map_err(RestoreError::File)?;
        if !line.give_secret(id, &file) {
            return Err(RestoreError::NoSuchSecret { id: id.clone() });
        }
    }
    let missing = line.redacted();
    if missing.is_empty() { Ok(()) } else { Err(RestoreError::SecretsLeftOut { missing }) }
}

fn prepare_waiting(
    snapshot: &Snapshot,
    mut vm: Vm,
    options: &RestoreOptions,
) -> Result<Prepared, RestoreError> {
    if options.mode == Mode::Map {
        let reason = "a QEMU that runs already has its RAM".to_owned();
        return Err(RestoreError::CannotMap { reason });
    }
    let found = vm.run_state()?;
    if found != RunState::InMigrate {
        return Err(RestoreError::NotWaiting { found: found.to_string() });
    }
    let warnings = check_waiting(snapshot, &mut vm, options)?;
    let (mode, reason) = match options.mode {
        Mode::Stream => (ModeUsed::Stream, "asked for"),
        Mode::Load => (ModeUsed::Load, "asked for"),
        Mode::Map | Mode::Auto => (ModeUsed::Load, "QEMU was running already"),
    };
    Ok(Prepared {
        qemu: Qemu::Waiting(vm),
        is_saved: false,
        mode,
        reason: reason.to_owned(),
        may_stream: options.mode == Mode::Auto,
        mapped: Vec::new(),
        overlays: NewOverlays::default(),
        warnings,
        qmp: None,
        start_seconds: 0.0,
        guard: None,
    })
}

/// Compares the images of a QEMU that waits with what the file says of them, and refuses an image
/// that belongs to the file if the guest would write to it.
fn check_waiting(
    snapshot: &Snapshot,
    vm: &mut Vm,
    options: &RestoreOptions,
) -> Result<Vec<String>, RestoreError> {
    let Some(manifest) = snapshot.manifest() else { return Ok(Vec::new()) };
    let saved = &manifest.meta.vm;
    let directory = saved.working_directory.as_deref().map_or(Path::new("."), Path::new);
    let here = vm.process().map(|process| process.working_directory).unwrap_or_default();
    let drives = vm.drives()?;
    refuse_own(saved, directory, &here, &drives)?;
    let tops = drives.iter().filter_map(|drive| drive.image());
    let named: Vec<PathBuf> = tops.map(|image| here.join(&image.path)).collect();
    changed_images::check_named(saved, directory, &named, options)
}

/// Compares `-m` with the machine's RAM in the file: QEMU would refuse to start with a mapped file
/// of another size, without saying which sizes differ.
fn compare_memory_size(
    snapshot: &Snapshot,
    command_line: &CommandLine,
) -> Result<(), RestoreError> {
    let ram = snapshot.structure().block("pc.ram").map(|placed| placed.block.used_length());
    match (ram, command_line.memory_size()) {
        (Some(file), Some(vm)) if file != vm => Err(RestoreError::Incompatible {
            differ: vec![Mismatch {
                what: "memory (-m)".to_owned(),
                file: format!("{file} bytes"),
                vm: format!("{vm} bytes"),
            }],
        }),
        _ => Ok(()),
    }
}

/// Returns the block as it lies in the file.
fn in_file(placed: &PlacedBlock, path: &Path) -> MappedBlock {
    MappedBlock {
        block_name: placed.block.name().to_owned(),
        size: placed.block.used_length(),
        path: path.to_owned(),
        offset: placed.pages_offset,
    }
}

/// Returns the file whose pages are mapped: of a chain, the lowest one.
fn lowest(snapshot: &Snapshot) -> &Snapshot {
    snapshot.chain().last().expect("the file itself")
}

/// Chooses the blocks to map, by their places in the file `lowest`, and the mode; returns also why.
fn choose<'a>(
    snapshot: &Snapshot,
    lowest: &'a Snapshot,
    (command_line, version): (&CommandLine, QemuVersion),
    mode: Mode,
) -> Result<(Vec<&'a PlacedBlock>, ModeUsed, String), RestoreError> {
    match mode {
        Mode::Load => return Ok((Vec::new(), ModeUsed::Load, "asked for".to_owned())),
        Mode::Stream => return Ok((Vec::new(), ModeUsed::Stream, "asked for".to_owned())),
        Mode::Auto | Mode::Map => {}
    }
    let is_saved = |placed: &PlacedBlock| {
        snapshot.structure().blocks.iter().any(|saved| saved.block == placed.block)
    };
    let blocks = &lowest.structure().blocks;
    let mappable: Vec<&PlacedBlock> = blocks
        .iter()
        .filter(|placed| is_saved(placed))
        .filter(|placed| command_line.check_mappable(placed.block.name()).is_ok())
        .collect();
    let obstacle = if snapshot.manifest().is_none() {
        Some("QEMU wrote the file: there may be stale bytes at the places of zero pages".to_owned())
    } else if !version.has(Feature::BackendRom) {
        let first = Feature::BackendRom.since();
        Some(format!("QEMU {version} cannot map a read-only file as RAM, {first} can"))
    } else if snapshot.base().is_some() && !version.has(Feature::RamBlockAddresses) {
        let first = Feature::RamBlockAddresses.since();
        Some(format!(
            "the file is thin, and QEMU {version} does not say where RAM lies, {first} does"
        ))
    } else if command_line.needs_shared_ram() {
        Some("another process shares the guest's RAM, as vhost-user does".to_owned())
    } else if mappable.is_empty() {
        Some("the command line defines no RAM that the file has".to_owned())
    } else {
        None
    };
    match (obstacle, mode) {
        (None, Mode::Map) => Ok((mappable, ModeUsed::Map, "asked for".to_owned())),
        (None, _) => Ok((mappable, ModeUsed::Map, "the file and this QEMU allow it".to_owned())),
        (Some(reason), Mode::Map) => Err(RestoreError::CannotMap { reason }),
        (Some(reason), _) => Ok((Vec::new(), ModeUsed::Load, reason)),
    }
}
