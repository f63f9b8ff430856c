//! Loads RAM and device state into the QEMU that waits, in the mode that was chosen.

use vmfile_engine::Access;
use vmfile_engine::DirectIoInUse;
use vmfile_format::RamBlock;
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_pages::check::{CheckOptions, verify_pages};
use vmfile_pages::control::Control;
use vmfile_pages::lane::Workers;
use vmfile_pages::layers::Layers;
use vmfile_pages::plan::WINDOW_LEN;
use vmfile_pages::process_ram::{BlockAt, ProcessRam};
use vmfile_pages::ram_loader::{CHANGES_LEN, load_changes, load_ram};
use vmfile_pages::reading::{Verified, open_for_reading};
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::{Feature, RamBlockInfo, RunState, Vm, VmError};
use vmfile_stream::contents::{LARGE_BLOCK_LEN, Pages, StreamContents};
use vmfile_stream::stream_writer::Source;

use super::ModeUsed;
use super::RestoreOptions;
use super::prepare::Prepared;
use super::stream::send_to;
use crate::error::with_sources;
use crate::restore_error::RestoreError;
use crate::send::SendError;

/// How RAM got into QEMU, and how much of it.
pub(super) struct Brought {
    pub(super) mode: ModeUsed,
    pub(super) reason: String,
    /// Bytes of pages read from the file, without the small blocks of the short stream.
    pub(super) bytes_read: u64,
    /// `None` if nothing was read.
    pub(super) direct_io: Option<DirectIoInUse>,
    /// Whether all that the guest will see was verified; if not, why.
    pub(super) verified: Verified,
}

/// Loads RAM and device state into the QEMU that waits.
pub(super) fn bring(
    snapshot: &Snapshot,
    prepared: &mut Prepared,
    found: &[RamBlockInfo],
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Brought, RestoreError> {
    let reason = prepared.reason.clone();
    match prepared.mode {
        ModeUsed::Map => {
            let mapped = prepared.mapped.clone();
            let is_there = |name: &str| mapped.iter().any(|mapped| mapped == name);
            let verified = verify_mapped(snapshot, options, control)?;
            let (bytes_read, direct_io) = match snapshot.base() {
                None => (0, None),
                Some(_) => {
                    let loadable = Loadable::find(snapshot, prepared.vm(), found, &is_there)??;
                    loadable.load(snapshot, (options, true), control)?
                }
            };
            short_stream(snapshot, prepared.vm(), is_there, control)?;
            Ok(Brought { mode: ModeUsed::Map, reason, bytes_read, direct_io, verified })
        }
        ModeUsed::Load => match Loadable::find(snapshot, prepared.vm(), found, &|_| true)? {
            Ok(loadable) => {
                let (bytes_read, direct_io) = loadable.load(snapshot, (options, false), control)?;
                let is_there = |name: &str| loadable.has(name);
                short_stream(snapshot, prepared.vm(), is_there, control)?;
                let (mode, verified) = (ModeUsed::Load, Verified::of(snapshot));
                Ok(Brought { mode, reason, bytes_read, direct_io, verified })
            }
            Err(obstacle) if prepared.may_stream => {
                let reason = format!("{reason}; {}", obstacle.words());
                whole_stream(snapshot, prepared, reason, options, control)
            }
            Err(obstacle) => Err(obstacle.into()),
        },
        ModeUsed::Stream => whole_stream(snapshot, prepared, reason, options, control),
    }
}

/// Compares the mapped pages with their hashes if the caller wants that; returns whether.
fn verify_mapped(
    snapshot: &Snapshot,
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Verified, RestoreError> {
    if !options.verify {
        return Ok(Verified::NotPages);
    }
    let RestoreOptions { direct_io, io, jobs, .. } = *options;
    verify_pages(
        snapshot,
        &CheckOptions::default().direct_io(direct_io).io(io).jobs(jobs),
        control,
    )?;
    Ok(Verified::of(snapshot))
}

/// The large blocks, and the process in whose memory they lie.
struct Loadable<'a> {
    /// Each block with its index in the file.
    blocks: Vec<(usize, &'a PlacedBlock)>,
    process: Option<ProcessRam>,
}

/// Why the pages cannot be read into QEMU's memory.
enum Obstacle {
    NoAddresses(String),
    Vm(VmError),
    Process(vmfile_pages::process_ram::ProcessRamError),
}

impl Obstacle {
    fn words(&self) -> String {
        match self {
            Obstacle::NoAddresses(words) => words.clone(),
            Obstacle::Vm(error) => with_sources(error),
            Obstacle::Process(error) => with_sources(error),
        }
    }
}

impl From<Obstacle> for RestoreError {
    fn from(obstacle: Obstacle) -> RestoreError {
        match obstacle {
            Obstacle::NoAddresses(reason) => RestoreError::CannotLoad { reason },
            Obstacle::Vm(error) => RestoreError::Vm(error),
            Obstacle::Process(error) => RestoreError::Process(error),
        }
    }
}

impl<'a> Loadable<'a> {
    /// Finds where the large blocks that are `wanted` lie in QEMU's process; an [`Obstacle`] says why
    /// that is not possible. It changes nothing.
    fn find(
        snapshot: &'a Snapshot,
        vm: &mut Vm,
        found: &[RamBlockInfo],
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Result<Loadable<'a>, Obstacle>, RestoreError> {
        let (mut blocks, mut places) = (Vec::new(), Vec::new());
        for (number, placed) in snapshot.structure().blocks.iter().enumerate() {
            let (name, len) = (placed.block.name(), placed.block.used_length());
            let info = found.iter().find(|info| info.name == name);
            // A block that is small, or that QEMU must resize, goes through the stream.
            let is_large = len >= LARGE_BLOCK_LEN && wanted(name);
            let Some(info) = info.filter(|info| is_large && info.used_length == len) else {
                continue;
            };
            let Some(address) = info.host_address else {
                let (version, first) = (vm.version()?, Feature::RamBlockAddresses.since());
                let words = format!("QEMU {version} does not say where RAM lies, {first} does");
                return Ok(Err(Obstacle::NoAddresses(words)));
            };
            places.push(BlockAt { name: name.to_owned(), address, len });
            blocks.push((number, placed));
        }
        if blocks.is_empty() {
            return Ok(Ok(Loadable { blocks, process: None }));
        }
        let pid = match vm.pid() {
            Err(error) if error.is_out_of_reach() => return Ok(Err(Obstacle::Vm(error))),
            found => found?,
        };
        Ok(match ProcessRam::open(pid, &places, Access::ReadWrite) {
            Ok(process) => Ok(Loadable { blocks, process: Some(process) }),
            Err(error) => Err(Obstacle::Process(error)),
        })
    }

    fn has(&self, name: &str) -> bool {
        self.blocks.iter().any(|(_, placed)| placed.block.name() == name)
    }

    /// Reads the pages of the blocks and copies them into the process: if it has mapped the lowest file
    /// of the chain, those that have changed since. Returns how many bytes it read, and whether by
    /// direct I/O.
    fn load(
        &self,
        snapshot: &Snapshot,
        (options, is_mapped): (&RestoreOptions, bool),
        control: &Control<'_>,
    ) -> Result<(u64, Option<DirectIoInUse>), RestoreError> {
        let Some(process) = &self.process else { return Ok((0, None)) };
        let blocks: Vec<usize> = self.blocks.iter().map(|&(block, _)| block).collect();
        let layers = Layers::new(snapshot)?;
        let changes = if is_mapped { layers.changes()? } else { None };
        let file = changes.as_ref().map_or(layers.main(), |(newer, _)| newer.main());
        let opened = open_for_reading(file, options.direct_io);
        let (file, direct_io) = opened.map_err(RestoreError::File)?;
        let width = (options.io, options.jobs.count());
        let len = if changes.is_some() { CHANGES_LEN } else { WINDOW_LEN };
        let workers = Workers::start_reading(&file, width, len).map_err(RestoreError::File)?;
        let bytes_read = match &changes {
            Some(changes) => load_changes((changes, workers), &blocks, process, control)?,
            None => load_ram((&layers, workers), &blocks, process, control)?.0,
        };
        Ok((bytes_read, Some(direct_io)))
    }
}

/// Sends the device state, and the pages of the blocks that QEMU does not have yet.
fn short_stream(
    snapshot: &Snapshot,
    vm: &mut Vm,
    is_there: impl Fn(&str) -> bool,
    control: &Control<'_>,
) -> Result<(), RestoreError> {
    // Zero pages are sent too: QEMU has filled its ROM blocks by itself.
    let pages = |block: &RamBlock| if is_there(block.name()) { Pages::None } else { Pages::All };
    let contents = paused(snapshot, StreamContents::new(snapshot, pages)?)?;
    // Progress is at its end, and this does not take long.
    send_to(vm, &contents, None, control, &|_| {})
}

/// Sends everything.
fn whole_stream(
    snapshot: &Snapshot,
    prepared: &mut Prepared,
    reason: String,
    options: &RestoreOptions,
    control: &Control<'_>,
) -> Result<Brought, RestoreError> {
    let fresh = prepared.fresh_blocks()?;
    let is_fresh = |block: &RamBlock| fresh.iter().any(|fresh| fresh == block.name());
    let pages = |block: &RamBlock| {
        let is_large = block.used_length() >= LARGE_BLOCK_LEN;
        if is_large && is_fresh(block) { Pages::Data } else { Pages::All }
    };
    let contents = paused(snapshot, StreamContents::new(snapshot, pages)?)?;
    let opened = open_for_reading(contents.layers.main(), options.direct_io);
    let (file, direct_io) = opened.map_err(RestoreError::File)?;
    let source = Source { file, io: options.io };
    let report = |progress| control.report(progress);
    send_to(prepared.vm(), &contents, Some(&source), control, &report)?;
    let (_, bytes_read) = contents.data();
    let (mode, verified) = (ModeUsed::Stream, Verified::of(snapshot));
    Ok(Brought { mode, reason, bytes_read, direct_io: Some(direct_io), verified })
}

/// Sets the run state to "paused" if the guest ran, so that it waits for `cont` even in a QEMU that was
/// started without -S. A guest that stood still for another reason stands still again.
fn paused<'a>(
    snapshot: &Snapshot,
    mut contents: StreamContents<'a>,
) -> Result<StreamContents<'a>, RestoreError> {
    let state = &snapshot.structure().device_state;
    let found = state.run_state(&contents.devices).map(RunState::from_name);
    if found.is_some_and(|found| found.is_kept())
        || state.set_run_state(&mut contents.devices, "paused")
    {
        Ok(contents)
    } else {
        Err(RestoreError::NoRunState)
    }
}

impl From<SendError> for RestoreError {
    fn from(error: SendError) -> RestoreError {
        match error {
            SendError::Pages(error) => RestoreError::Pages(error),
            error => RestoreError::Send(error),
        }
    }
}
