//! `vmfile restore`: a file into a running VM.
//!
//! ```text
//! prepare - start QEMU - compare - RAM (map or load) - device state - run
//! ```
//!
//! `map`: the file's pages *are* the RAM, copy-on-write; QEMU is started with them and nothing is
//! read. `load`: the file is read straight into the memory of a QEMU that waits. Either way QEMU
//! then gets a short stream of its own kind: the block list, the pages of the small blocks, and
//! the device state.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use vmfile_engine::{Access, Backend, DataFile, DirectIo};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::encoder::{self, RamSection};
use vmfile_format::{PageIndex, RamLayout};
use vmfile_qemu::{
    CommandLine, Feature, Launch, LaunchedQemu, MappedBlock, QemuVersion, RamBlockInfo, RunState,
    Vm, program_version,
};

use crate::check::describe;
use crate::control::Control;
use crate::jobs::Jobs;
use crate::ram_loader::{LoadError, LoadTarget, load_ram};
use crate::restore_error::{Mismatch, RestoreError};
use crate::snapshot::Snapshot;
use crate::source::process::{BlockAt, ProcessRam, Writable};

/// Blocks below this length go through the stream, as do blocks whose length QEMU may change.
const LOAD_LEN_MIN: u64 = 4 << 20;

/// How long QEMU may take for the device state: it is milliseconds of work.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// How long QEMU may take to answer: it opens disks and makes RAM meanwhile.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How RAM comes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// `map` where it can be, else `load`; the report says which and why.
    #[default]
    Auto,
    /// Mapped from the file, copy-on-write: nothing is read.
    Map,
    /// Read from the file into the new process.
    Load,
}

/// Into which QEMU a VM is restored.
#[derive(Debug)]
pub enum Destination {
    /// One that is started with the command line that was saved.
    Saved,
    /// One that is started with this command line, the program's name first.
    Command(Vec<String>),
    /// One that somebody else started with `-incoming defer`.
    Waiting(Vm),
}

/// How a VM is restored.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// How RAM comes back.
    pub mode: Mode,
    /// Whether `load` reads past the page cache.
    pub direct_io: DirectIo,
    /// Who moves the bytes of `load`.
    pub io: Backend,
    /// How many threads `load` has.
    pub jobs: Jobs,
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
            paused: false,
            foreground: false,
        }
    }
}

/// What a restore did.
#[derive(Clone, Debug, Serialize)]
pub struct RestoreReport {
    /// QEMU's process.
    pub pid: u32,
    /// The first QMP socket that its command line names.
    pub qmp: Option<PathBuf>,
    /// How RAM came back: `map` or `load`.
    pub mode: &'static str,
    /// Why it was that mode.
    pub mode_reason: String,
    /// Whether the guest runs now.
    pub running: bool,
    /// Whether `load` used direct I/O; if not, why.
    pub direct_io: Option<String>,
    /// Bytes that were read from the file into RAM.
    pub bytes_read: u64,
    /// From the start of QEMU to its first answer, in seconds; 0 for a QEMU that waited.
    pub qemu_start_seconds: f64,
    /// From QEMU's first answer to the guest running, in seconds.
    pub resume_seconds: f64,
    /// How long it all took, in seconds.
    pub total_seconds: f64,
}

/// A restored VM.
#[derive(Debug)]
pub struct Restored {
    /// What was done.
    pub report: RestoreReport,
    /// The QEMU that was started, or `None` for one that somebody else did.
    pub qemu: Option<LaunchedQemu>,
}

/// Restores the VM in `snapshot`.
///
/// The QEMU that is started ends when [`Restored::qemu`] is dropped, unless it is kept.
///
/// # Errors
///
/// Returns [`RestoreError`]; a QEMU that was started for it is gone then. A QEMU that waited is
/// still waiting, unless its state was being loaded.
pub fn restore(
    snapshot: &Snapshot,
    destination: Destination,
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Restored, RestoreError> {
    let started = Instant::now();
    let mut prepared = prepare(snapshot, destination, options)?;
    let answered = Instant::now();
    let qmp = prepared.qmp.take();
    let (mode, mode_reason) = (prepared.mode, prepared.reason.clone());
    let vm = prepared.vm();
    let found = vm.ram_blocks()?;
    compare(snapshot, &vm.machine_type()?, &found)?;
    let mapped: &[String] = &prepared.mapped.clone();
    let loaded = load(snapshot, prepared.vm(), &found, mapped, options, control);
    let loaded = loaded.map_err(|error| prepared.explain(error))?;
    let running = run(snapshot, prepared.vm(), options)?;
    let report = RestoreReport {
        pid: prepared.vm().pid()?,
        qmp,
        mode,
        mode_reason,
        running,
        direct_io: (loaded.bytes_read > 0).then_some(loaded.direct_io),
        bytes_read: loaded.bytes_read,
        qemu_start_seconds: prepared.start_seconds,
        resume_seconds: answered.elapsed().as_secs_f64(),
        total_seconds: started.elapsed().as_secs_f64(),
    };
    Ok(Restored { report, qemu: prepared.qemu.into_launched() })
}

/// A QEMU that waits for the VM.
struct Prepared {
    qemu: Qemu,
    mode: &'static str,
    reason: String,
    /// Names of the blocks that are mapped from the file.
    mapped: Vec<String>,
    qmp: Option<PathBuf>,
    start_seconds: f64,
}

enum Qemu {
    Launched(LaunchedQemu),
    Waiting(Vm),
}

impl Qemu {
    fn into_launched(self) -> Option<LaunchedQemu> {
        match self {
            Qemu::Launched(qemu) => Some(qemu),
            Qemu::Waiting(_) => None,
        }
    }
}

impl Prepared {
    /// Adds what QEMU wrote to its standard error, which says more than its answer.
    fn explain(&self, error: RestoreError) -> RestoreError {
        match (error, &self.qemu) {
            (RestoreError::DeviceState { source, .. }, Qemu::Launched(qemu)) => {
                RestoreError::DeviceState { source, stderr: qemu.stderr().trim().to_owned() }
            }
            (error, _) => error,
        }
    }

    fn vm(&mut self) -> &mut Vm {
        match &mut self.qemu {
            Qemu::Launched(qemu) => qemu.vm(),
            Qemu::Waiting(vm) => vm,
        }
    }
}

fn prepare(
    snapshot: &Snapshot,
    destination: Destination,
    options: &RestoreOptions,
) -> Result<Prepared, RestoreError> {
    let (executable, command_line, directory) = match destination {
        Destination::Waiting(vm) => return prepare_waiting(vm, options),
        Destination::Command(mut words) => {
            if words.is_empty() {
                return Err(RestoreError::NoCommand);
            }
            let executable = PathBuf::from(words.remove(0));
            (executable, CommandLine::new(words)?, None)
        }
        Destination::Saved => {
            let meta = snapshot.manifest().map(|manifest| &manifest.meta.vm);
            let meta = meta.ok_or(RestoreError::NoSavedCommand)?;
            let executable = meta.executable.as_ref().ok_or(RestoreError::NoSavedCommand)?;
            let words = meta.command_line.get(1..).unwrap_or_default().to_vec();
            let command_line = CommandLine::new(words)?;
            let lost = command_line.what_cannot_be_recreated();
            if !lost.is_empty() {
                return Err(RestoreError::CannotRecreate { what: lost });
            }
            let directory = meta.working_directory.as_ref().map(PathBuf::from);
            (PathBuf::from(executable), command_line, directory)
        }
    };
    let here = directory.as_deref().unwrap_or(Path::new("."));
    if let Some(socket) = command_line.sockets_in_use(here)?.into_iter().next() {
        return Err(RestoreError::SocketInUse { socket });
    }
    let version = program_version(&executable)?;
    compare_memory_size(snapshot, &command_line)?;
    let (mapped, mode, reason) = choose(snapshot, &command_line, version, options.mode)?;
    let file = snapshot.file().try_clone().map_err(RestoreError::File)?;
    let inherited = OwnedFd::from(file);
    // The descriptor of the file that was checked: what lies under the name later does not matter.
    let path = PathBuf::from(format!("/proc/self/fd/{}", inherited.as_raw_fd()));
    let blocks: Vec<MappedBlock> = mapped
        .iter()
        .map(|placed| MappedBlock {
            block_name: placed.block.name().to_owned(),
            size: placed.block.used_length(),
            path: path.clone(),
            offset: placed.pages_offset,
        })
        .collect();
    let names = blocks.iter().map(|block| block.block_name.clone()).collect();
    let qmp = command_line.qmp_sockets().into_iter().next();
    let start = Instant::now();
    let mut launch = Launch::new(executable, command_line.for_incoming(&blocks)?)
        .foreground(options.foreground)
        .inherit(inherited);
    if let Some(directory) = directory {
        launch = launch.working_directory(directory);
    }
    let qemu = launch.spawn(START_TIMEOUT)?;
    let start_seconds = start.elapsed().as_secs_f64();
    Ok(Prepared { qemu: Qemu::Launched(qemu), mode, reason, mapped: names, qmp, start_seconds })
}

fn prepare_waiting(mut vm: Vm, options: &RestoreOptions) -> Result<Prepared, RestoreError> {
    if options.mode == Mode::Map {
        let reason = "a QEMU that runs already has its RAM".to_owned();
        return Err(RestoreError::CannotMap { reason });
    }
    let found = vm.run_state()?;
    if found != RunState::InMigrate {
        return Err(RestoreError::NotWaiting { found: found.to_string() });
    }
    let reason = "QEMU was running already".to_owned();
    let qemu = Qemu::Waiting(vm);
    let (mapped, qmp) = (Vec::new(), None);
    Ok(Prepared { qemu, mode: "load", reason, mapped, qmp, start_seconds: 0.0 })
}

/// Compares `-m` with the machine's RAM in the file: QEMU would refuse to start with a mapped file
/// of another size, and not say which two sizes differ.
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

/// Decides which blocks are mapped, and says the mode and why.
fn choose<'a>(
    snapshot: &'a Snapshot,
    command_line: &CommandLine,
    version: QemuVersion,
    mode: Mode,
) -> Result<(Vec<&'a PlacedBlock>, &'static str, String), RestoreError> {
    if mode == Mode::Load {
        return Ok((Vec::new(), "load", "asked for".to_owned()));
    }
    let blocks = &snapshot.structure().blocks;
    let mappable: Vec<&PlacedBlock> = blocks
        .iter()
        .filter(|placed| command_line.check_mappable(placed.block.name()).is_ok())
        .collect();
    let obstacle = if snapshot.manifest().is_none() {
        Some("QEMU wrote the file: there may be stale bytes at the places of zero pages".to_owned())
    } else if !version.has(Feature::BackendRom) {
        let first = Feature::BackendRom.since();
        Some(format!("QEMU {version} cannot map a read-only file as RAM, {first} can"))
    } else if command_line.needs_shared_ram() {
        Some("another process shares the guest's RAM, as vhost-user does".to_owned())
    } else if mappable.is_empty() {
        Some("the command line defines no RAM that the file has".to_owned())
    } else {
        None
    };
    match (obstacle, mode) {
        (None, Mode::Map) => Ok((mappable, "map", "asked for".to_owned())),
        (None, _) => Ok((mappable, "map", "the file and this QEMU allow it".to_owned())),
        (Some(reason), Mode::Map) => Err(RestoreError::CannotMap { reason }),
        (Some(reason), _) => Ok((Vec::new(), "load", reason)),
    }
}

/// Compares the file with the QEMU that waits, before QEMU sees a byte of it: QEMU itself does not
/// compare the lengths of RAM blocks in a mapped-ram file (9.0 to 11.0).
fn compare(snapshot: &Snapshot, machine: &str, found: &[RamBlockInfo]) -> Result<(), RestoreError> {
    let structure = snapshot.structure();
    let mut differ = Vec::new();
    if structure.configuration.machine != machine {
        differ.push(Mismatch {
            what: "machine type".to_owned(),
            file: structure.configuration.machine.clone(),
            vm: machine.to_owned(),
        });
    }
    for placed in &structure.blocks {
        let (name, length) = (placed.block.name(), placed.block.used_length());
        let what = format!("RAM block {name:?}");
        match found.iter().find(|info| info.name == name) {
            None => differ.push(Mismatch {
                what,
                file: format!("{length} bytes"),
                vm: "none of that name".to_owned(),
            }),
            // Blocks that can be resized take the length that the stream says.
            Some(info)
                if length == info.used_length
                    || length <= info.total_length && info.total_length > info.used_length => {}
            Some(info) => differ.push(Mismatch {
                what,
                file: format!("{length} bytes"),
                vm: format!("{} bytes", info.used_length),
            }),
        }
    }
    for info in found {
        if structure.block(&info.name).is_none() {
            differ.push(Mismatch {
                what: format!("RAM block {:?}", info.name),
                file: "none of that name".to_owned(),
                vm: format!("{} bytes", info.used_length),
            });
        }
    }
    if differ.is_empty() { Ok(()) } else { Err(RestoreError::Incompatible { differ }) }
}

/// What was loaded.
struct Loaded {
    bytes_read: u64,
    direct_io: String,
}

/// Brings RAM and device state into the QEMU that waits.
fn load(
    snapshot: &Snapshot,
    vm: &mut Vm,
    found: &[RamBlockInfo],
    mapped: &[String],
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Loaded, RestoreError> {
    let mut direct = Vec::new();
    if mapped.is_empty() {
        for placed in &snapshot.structure().blocks {
            let length = placed.block.used_length();
            let info = found.iter().find(|info| info.name == placed.block.name());
            let info = info.filter(|info| length >= LOAD_LEN_MIN && info.used_length == length);
            if let Some(address) = info.and_then(|info| info.host_address) {
                direct.push((placed, address));
            }
        }
    }
    let loaded = load_direct(snapshot, vm.pid()?, &direct, options, control)?;
    let skip = |name: &str| {
        mapped.iter().any(|mapped| mapped == name)
            || direct.iter().any(|(placed, _)| placed.block.name() == name)
    };
    let stream = short_stream(snapshot, skip)?;
    send(vm, stream, control)?;
    Ok(loaded)
}

/// Reads the pages of some blocks straight into the process.
fn load_direct(
    snapshot: &Snapshot,
    pid: u32,
    blocks: &[(&PlacedBlock, u64)],
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Loaded, RestoreError> {
    if blocks.is_empty() {
        return Ok(Loaded { bytes_read: 0, direct_io: String::new() });
    }
    let at = |(placed, address): &(&PlacedBlock, u64)| BlockAt {
        name: placed.block.name().to_owned(),
        address: *address,
        len: placed.block.used_length(),
    };
    let places: Vec<BlockAt> = blocks.iter().map(at).collect();
    let process = ProcessRam::open(pid, &places, Access::ReadWrite)?;
    let mut targets = Vec::new();
    for ((placed, _), Writable { touched, writer }) in
        blocks.iter().zip(process.scan_for_writing()?)
    {
        let bitmap = snapshot.bitmap(placed)?;
        targets.push(LoadTarget { placed: (*placed).clone(), bitmap, writer, touched });
    }
    let file = snapshot.file().try_clone().map_err(RestoreError::File)?;
    let file = DataFile::new(file, options.direct_io).map_err(RestoreError::File)?;
    let direct_io = describe(file.direct());
    let width = (options.io, options.jobs.count());
    let (bytes_read, _) = load_ram(&file, &targets, width, control)?;
    Ok(Loaded { bytes_read, direct_io })
}

/// Makes the stream for a destination that has the RAM of the blocks that are skipped.
fn short_stream(snapshot: &Snapshot, skip: impl Fn(&str) -> bool) -> Result<Vec<u8>, RestoreError> {
    let structure = snapshot.structure();
    let ram: RamLayout = structure.ram();
    let state = &structure.device_state;
    // No capability: the destination is to read a plain stream.
    let configuration =
        Configuration { capabilities: Vec::new(), ..structure.configuration.clone() };
    let mut bytes = configuration.encode();
    let mut section = RamSection::begin(&mut bytes, state.unused_id(), &ram);
    for (index, placed) in structure.blocks.iter().enumerate() {
        if skip(placed.block.name()) {
            continue;
        }
        let bitmap = snapshot.bitmap(placed)?;
        let page_size = placed.block.page_size();
        for page in (0..placed.block.page_count().0).map(PageIndex) {
            // Zero pages are sent as well: the destination filled its ROMs by itself.
            if bitmap.contains(page) {
                let offset = placed.page_offset(page).expect("inside the file");
                let data = snapshot.read(offset, page_size.bytes())?;
                section.page(&mut bytes, (index, &placed.block), page, &data);
            } else {
                section.zero_page(&mut bytes, (index, &placed.block), page);
            }
        }
    }
    section.finish(&mut bytes);
    // Whatever the guest did, it waits for `cont`, even in a QEMU that was started without -S.
    let mut devices = snapshot.device_state()?;
    if !state.set_run_state(&mut devices, "paused") {
        return Err(RestoreError::NoRunState);
    }
    bytes.extend_from_slice(&devices);
    encoder::vm_description(&mut bytes);
    Ok(bytes)
}

/// Sends the stream to QEMU and waits until QEMU has loaded it.
fn send(vm: &mut Vm, stream: Vec<u8>, control: &Control<'_>) -> Result<(), RestoreError> {
    let (mut ours, theirs) = UnixStream::pair().map_err(RestoreError::Stream)?;
    vm.load_stream(theirs.into())
        .map_err(|source| RestoreError::DeviceState { source, stderr: String::new() })?;
    let writer = thread::spawn(move || ours.write_all(&stream));
    let loaded = vm.wait_loaded(Instant::now() + LOAD_TIMEOUT, &|| control.is_stopped());
    // QEMU has what it wanted, or has closed its end: the writer does not wait for long.
    let written = writer.join().expect("the writer does not panic");
    loaded.map_err(|error| match error {
        vmfile_qemu::LoadError::Cancelled => RestoreError::Stopped,
        source => RestoreError::DeviceState { source, stderr: String::new() },
    })?;
    written.map_err(RestoreError::Stream)
}

/// Lets the guest run if it is to; returns whether it does.
fn run(snapshot: &Snapshot, vm: &mut Vm, options: &RestoreOptions) -> Result<bool, RestoreError> {
    let state = &snapshot.structure().device_state;
    let was_running = state.run_state(&snapshot.device_state()?) == Some("running");
    if options.paused || !was_running {
        return Ok(false);
    }
    vm.cont()?;
    Ok(true)
}

impl From<LoadError> for RestoreError {
    fn from(error: LoadError) -> RestoreError {
        match error {
            LoadError::Stopped => RestoreError::Stopped,
            error => RestoreError::Load(error),
        }
    }
}
