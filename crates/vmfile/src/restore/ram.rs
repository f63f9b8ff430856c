//! RAM and device state into the QEMU that waits.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use vmfile_engine::{Access, DataFile};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::encoder::{self, RamSection};
use vmfile_format::{PageIndex, RamLayout};
use vmfile_qemu::{RamBlockInfo, Vm};

use super::RestoreOptions;
use crate::check::describe;
use crate::control::Control;
use crate::ram_loader::{LoadTarget, load_ram};
use crate::restore_error::RestoreError;
use crate::snapshot::Snapshot;
use crate::source::process::{BlockAt, ProcessRam, Writable};

/// Blocks below this length go through the stream, as do blocks whose length QEMU may change.
const LOAD_LEN_MIN: u64 = 4 << 20;

/// How long QEMU may take for the device state: it is milliseconds of work.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// What was loaded.
pub(super) struct Loaded {
    pub(super) bytes_read: u64,
    pub(super) direct_io: String,
}

/// Brings RAM and device state into the QEMU that waits.
pub(super) fn load(
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
