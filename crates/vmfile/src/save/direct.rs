//! The route `direct`: RAM from the memory of QEMU's process, device state from its monitor.

use vmfile_engine::Access;
use vmfile_format::error::FormatErrorKind;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::device_state::DeviceState;
use vmfile_format::stream::encoder;
use vmfile_format::{FormatError, PageBitmap, PageSize, RamBlock, RamLayout};
use vmfile_pages::draft::{Draft, FileLayout, StreamTail};
use vmfile_pages::lane::Workers;
use vmfile_pages::plan::BRIDGE_LEN;
use vmfile_pages::process_ram::{BlockAt, ProcessRam};
use vmfile_pages::ram_writer::{self, write_ram};
use vmfile_qemu::{RamBlockInfo, Vm};

use super::base::ChosenBase;
use super::space::refuse_without_space;
use super::{LiveDone, RouteUsed, SaveOptions, Work, Written, describe};
use crate::error::SaveError;

/// The RAM of a VM, found in the memory of its process.
#[derive(Debug)]
pub(super) struct DirectRoute {
    /// The blocks as QEMU reported them.
    pub(super) found: Vec<RamBlockInfo>,
    pub(super) ram: RamLayout,
    pub(super) process: ProcessRam,
    /// How many bytes are written at most, including the short gaps between runs of data; with a base, how
    /// many there are.
    pub(super) data_bytes: u64,
    /// Threads, rings and buffers, set up while the VM runs; `None` once they were used.
    pub(super) workers: Option<Workers>,
}

impl DirectRoute {
    /// Finds the RAM, and refuses what can be refused while the VM runs.
    pub(super) fn prepare(
        vm: &mut Vm,
        (draft, base): (&Draft, &ChosenBase),
        options: &SaveOptions,
    ) -> Result<DirectRoute, SaveError> {
        let found = vm.ram_blocks()?;
        let (ram, process) = find(vm, &found)?;
        let data_bytes = if base.file().is_some() {
            // It is not known how much is written, and looking at all pages would take longer than
            // writing those that changed. A full disk ends the save later.
            ram.blocks().iter().map(RamBlock::used_length).sum()
        } else {
            // This also counts pages that are zero again and that the save will not write. So the check
            // refuses too much only if the guest has filled much of its RAM with zeros and the disk is
            // nearly full.
            let data_bytes = process.data_len(BRIDGE_LEN)?;
            refuse_without_space(data_bytes, draft.file())?;
            data_bytes
        };
        let width = (options.io, options.jobs.count());
        let workers = Some(Workers::start(draft.file(), width).map_err(SaveError::Workers)?);
        Ok(DirectRoute { found, ram, process, data_bytes, workers })
    }

    /// Lays out the file, writes RAM, and then everything else.
    pub(super) fn write(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        // Memory may have been plugged in or have grown since it was found.
        if self.found != work.blocks {
            self.found = work.blocks.to_vec();
            (self.ram, self.process) = find(work.vm, &self.found)?;
        }
        self.write_found(work)
    }

    fn write_found(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let devices = Devices::save(work)?;
        let places = devices.places(work, &self.ram)?;
        let written = self.ram(work, &places)?;
        devices.finish(work, &places, written, None)
    }

    fn ram(
        &mut self,
        work: &Work<'_>,
        places: &FileLayout,
    ) -> Result<ram_writer::Written, SaveError> {
        self.process.look_again()?;
        let workers = self.workers.take().expect("a route writes once");
        Ok(write_ram(workers, places, &self.process, self.data_bytes, work.control)?)
    }
}

/// The state of the devices, for the end of the file's stream.
pub(super) struct Devices {
    state: DeviceState,
    /// From the first section to EOF.
    sections: Vec<u8>,
    description: Vec<u8>,
}

impl Devices {
    /// Has QEMU write the state of the devices of a stopped VM.
    pub(super) fn save(work: &mut Work<'_>) -> Result<Devices, SaveError> {
        let bytes = work.vm.save_device_state(work.is_last())?;
        Devices::read(work, &bytes)
    }

    /// Reads what QEMU wrote.
    pub(super) fn read(work: &mut Work<'_>, bytes: &[u8]) -> Result<Devices, SaveError> {
        let (state, mut sections) = device_state(bytes)?;
        // QEMU writes "running" even for a VM that was paused, which must come back paused.
        describe::write_run_state(work, &state, &mut sections)?;
        let mut description = Vec::new();
        encoder::vm_description(&mut description);
        Ok(Devices { state, sections, description })
    }

    /// Lays out the file.
    pub(super) fn places(&self, work: &Work<'_>, ram: &RamLayout) -> Result<FileLayout, SaveError> {
        let machine = work.meta.machine.clone();
        let source = Configuration { machine, ..Configuration::default() };
        let tail_len = (self.sections.len() + self.description.len()) as u64;
        let (section_id, base) = (self.state.unused_id(), work.base.file().cloned());
        let places = FileLayout::on_base(&source, ram.clone(), (section_id, tail_len), base)?;
        work.draft.reserve(places.tables())?;
        work.draft.take_base(&places)?;
        Ok(places)
    }

    /// Completes the file, once its RAM is written; `live` says how long a guest stood still that
    /// ran meanwhile.
    pub(super) fn finish(
        self,
        work: &mut Work<'_>,
        places: &FileLayout,
        written: ram_writer::Written,
        live: Option<LiveDone>,
    ) -> Result<Written, SaveError> {
        let pause = live.as_ref().map_or(work.seconds_paused(), |live| live.pause_seconds);
        describe::record(work)?;
        let facts = work.facts(RouteUsed::Direct, pause, live.is_some());
        let tail = StreamTail {
            sections: &self.sections,
            description: &self.description,
            state: Some(&self.state),
        };
        work.draft.finish(places, (&written.bitmaps, &written.of_base), tail, facts)?;
        let pages = |bitmaps: &[PageBitmap]| bitmaps.iter().map(|one| one.data_count().0).sum();
        Ok(Written {
            pages_total: places.pages_total(),
            pages_data: pages(&written.bitmaps),
            pages_of_base: pages(&written.of_base),
            bytes_read: written.read_bytes,
            bytes_written: written.data_bytes,
            bytes_rewritten: 0,
            io: written.backend,
            live,
        })
    }
}

/// Finds where the blocks lie in the memory of QEMU's process.
fn find(vm: &mut Vm, found: &[RamBlockInfo]) -> Result<(RamLayout, ProcessRam), SaveError> {
    let (ram, blocks) = ram_layout(found)?;
    Ok((ram, ProcessRam::open(vm.pid()?, &blocks, Access::Read)?))
}

/// Returns where each section of a device state is, and the bytes from the first section to EOF.
pub(super) fn device_state(bytes: &[u8]) -> Result<(DeviceState, Vec<u8>), SaveError> {
    // QEMU writes magic and version, then the sections.
    const HEADER_LEN: usize = 8;
    let sections = bytes.get(HEADER_LEN..).unwrap_or_default().to_vec();
    let state = DeviceState::locate(&sections, 0, 0).map_err(SaveError::DeviceState)?;
    // EOF must be QEMU's last byte, and the last section, which holds the run state, must be there:
    // then every section was found.
    if state.end != sections.len() as u64 {
        let offset = state.end;
        let kind = FormatErrorKind::BrokenSections;
        return Err(SaveError::DeviceState(FormatError { offset, kind }));
    }
    Ok((state, sections))
}

/// Returns the migratable blocks as the file names them, and where they lie in the process.
fn ram_layout(found: &[RamBlockInfo]) -> Result<(RamLayout, Vec<BlockAt>), SaveError> {
    let mut blocks = Vec::new();
    let mut places = Vec::new();
    for info in found {
        let block = RamBlock::new(info.name.clone(), info.used_length, PageSize::KIB_4).map_err(
            |kind| SaveError::Block { block: info.name.clone(), reason: kind.to_string() },
        )?;
        let Some(address) = info.host_address else {
            return Err(SaveError::NoAddress { block: info.name.clone() });
        };
        places.push(BlockAt { name: info.name.clone(), address, len: info.used_length });
        blocks.push(block);
    }
    let ram = RamLayout::new(blocks)
        .map_err(|kind| SaveError::Block { block: String::new(), reason: kind.to_string() })?;
    Ok((ram, places))
}
