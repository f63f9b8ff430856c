//! `vmfile save`: a running VM into a file.
//!
//! ```text
//! begin - pause - device_state - ram - metadata - publish - release
//! ```
//!
//! Everything that can be refused is refused in `begin`, while the VM runs. From `pause` on, every
//! exit but the last resumes the VM as it ran and leaves no file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmfile_engine::{Access, Backend, DataFile, DirectIo, Existing, Unpublished, available_space};
use vmfile_format::error::FormatErrorKind;
use vmfile_format::manifest::{DiskMeta, VmMeta};
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::device_state::DeviceState;
use vmfile_format::stream::encoder;
use vmfile_format::{FormatError, PageSize, RamBlock, RamLayout};
use vmfile_qemu::{RamBlockInfo, RunState, Vm};

use crate::check::describe;
use crate::control::Control;
use crate::draft::{Draft, Facts, Places, Tail};
use crate::error::SaveError;
use crate::jobs::Jobs;
use crate::plan::{total_len, units};
use crate::ram_writer::{PAGE_LEN, Reader, Target, Written, write_ram};
use crate::source::process::{BlockAt, ProcessRam};

/// How long QEMU may take to flush its disks and end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(60);

/// What becomes of the VM once the file is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// QEMU ends, as after `virsh save`.
    #[default]
    Quit,
    /// The guest runs on, if it ran before.
    Resume,
    /// The guest stays paused.
    Pause,
}

/// How a VM is saved.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// What becomes of the VM.
    pub after: After,
    /// Whether pages are written past the page cache.
    pub direct_io: DirectIo,
    /// Who moves the bytes.
    pub io: Backend,
    /// How many threads read, hash and write.
    pub jobs: Jobs,
    /// Whether a file of that name may be replaced.
    pub existing: Existing,
}

impl Default for SaveOptions {
    fn default() -> SaveOptions {
        SaveOptions {
            after: After::default(),
            direct_io: DirectIo::Preferred,
            io: Backend::Auto,
            jobs: Jobs::default(),
            existing: Existing::Refuse,
        }
    }
}

/// What a save did.
#[derive(Clone, Debug, Serialize)]
pub struct SaveReport {
    /// The file.
    pub file: PathBuf,
    /// How RAM was taken: `direct`.
    pub route: &'static str,
    /// Whether the guest ran meanwhile.
    pub live: bool,
    /// Whether direct I/O was used; if not, why.
    pub direct_io: String,
    /// The back end that was used.
    pub io: String,
    /// Pages of all RAM blocks.
    pub pages_total: u64,
    /// Pages that are zero and take no room.
    pub pages_zero: u64,
    /// Bytes of pages that were written.
    pub bytes_written: u64,
    /// How long the guest stood still, in seconds: to the end of the save, where it did not run on.
    pub pause_seconds: f64,
    /// How long it all took, in seconds.
    pub total_seconds: f64,
}

/// Saves `vm` to a new file at `destination`.
///
/// The guest is paused, its RAM written from where it lies, the file made durable and given its
/// name; then comes what [`SaveOptions::after`] says.
///
/// # Errors
///
/// Returns [`SaveError`]. Whatever it is, the VM runs on as it did and no file is left under the
/// name, but for [`SaveError::LeftPaused`] and [`SaveError::Release`], which say so.
pub fn save(
    vm: &mut Vm,
    destination: &Path,
    options: &SaveOptions,
    control: &Control<'_>,
) -> Result<SaveReport, SaveError> {
    let mut save = Save::begin(vm, destination, options, control)?;
    match save.write() {
        Ok(()) => {}
        Err(error) => return Err(save.give_up(error)),
    }
    save.release()?;
    Ok(save.report())
}

/// A save at work.
struct Save<'a> {
    vm: &'a mut Vm,
    options: &'a SaveOptions,
    control: &'a Control<'a>,
    path: PathBuf,
    started: Instant,
    was_running: bool,
    paused_at: Option<Instant>,
    pause_seconds: f64,
    /// `None` once it was published or given up.
    draft: Option<Draft>,
    direct_io: String,
    meta: VmMeta,
    ram: RamLayout,
    process: ProcessRam,
    pages_data: u64,
    io: String,
}

impl Drop for Save<'_> {
    /// Nobody returns early with the VM paused: `give_up` resumes it and says so. This is for a
    /// panic.
    fn drop(&mut self) {
        if self.paused_at.is_some() && self.was_running {
            let _ = self.vm.cont();
        }
    }
}

impl<'a> Save<'a> {
    /// Refuses what can be refused while the VM runs.
    fn begin(
        vm: &'a mut Vm,
        destination: &Path,
        options: &'a SaveOptions,
        control: &'a Control<'a>,
    ) -> Result<Save<'a>, SaveError> {
        let started = Instant::now();
        let unpublished = Unpublished::create_beside(destination, options.existing)?;
        let state = vm.run_state()?;
        let was_running = match state {
            RunState::Running => true,
            RunState::Paused => false,
            other => return Err(SaveError::RunState { found: other.to_string() }),
        };
        let blockers = vm.why_not_saved()?;
        if !blockers.is_empty() {
            let reasons = blockers.iter().map(ToString::to_string).collect();
            return Err(SaveError::Blocked { reasons });
        }
        let (ram, blocks) = ram_layout(&vm.ram_blocks()?)?;
        let meta = describe_vm(vm, was_running)?;
        let process = ProcessRam::open(vm.pid()?, &blocks, Access::Read)?;
        let draft = Draft::new(unpublished, options.direct_io)?;
        check_space(&process, draft.file())?;
        Ok(Save {
            vm,
            options,
            control,
            path: destination.to_path_buf(),
            started,
            was_running,
            paused_at: None,
            pause_seconds: 0.0,
            direct_io: describe(draft.file().direct()),
            draft: Some(draft),
            meta,
            ram,
            process,
            pages_data: 0,
            io: String::new(),
        })
    }

    /// From the pause to the durable file.
    fn write(&mut self) -> Result<(), SaveError> {
        self.pause()?;
        let (state, sections) = self.device_state()?;
        self.file_contents(&state, &sections)?;
        if self.control.is_stopped() {
            return Err(SaveError::Stopped);
        }
        self.publish()
    }

    fn pause(&mut self) -> Result<(), SaveError> {
        self.paused_at = Some(Instant::now());
        if self.was_running {
            self.vm.stop()?;
        }
        Ok(())
    }

    /// Takes everything that is not RAM: the sections from the first to EOF, and where each is.
    fn device_state(&mut self) -> Result<(DeviceState, Vec<u8>), SaveError> {
        // QEMU writes magic and version, then the sections.
        const HEADER_LEN: usize = 8;
        let bytes = self.vm.save_device_state()?;
        let mut sections = bytes.get(HEADER_LEN..).unwrap_or_default().to_vec();
        let state = DeviceState::locate(&sections, 0, 0).map_err(SaveError::DeviceState)?;
        // QEMU's last byte is EOF, and the last section says whether the VM runs: with both the
        // sections were followed to their end.
        if state.end != sections.len() as u64 {
            let offset = state.end;
            let kind = FormatErrorKind::BrokenSections;
            return Err(SaveError::DeviceState(FormatError { offset, kind }));
        }
        // QEMU writes "running" whatever the VM does: a paused VM is to come back paused.
        let run_state = if self.was_running { "running" } else { "paused" };
        if !state.set_run_state(&mut sections, run_state) {
            return Err(SaveError::NoRunState);
        }
        Ok((state, sections))
    }

    /// Places everything, writes RAM, and then what belongs around it.
    fn file_contents(&mut self, state: &DeviceState, sections: &[u8]) -> Result<(), SaveError> {
        let machine = self.meta.machine.clone();
        let source = Configuration { machine, ..Configuration::default() };
        let mut description = Vec::new();
        encoder::vm_description(&mut description);
        let tail = Tail { sections, description: &description };
        let tail_len = (sections.len() + description.len()) as u64;
        let places = Places::new(&source, self.ram.clone(), state.unused_id(), tail_len)?;
        self.draft().reserve(&places)?;

        let written = self.ram(&places)?;
        self.pages_data = written.bitmaps.iter().map(|bitmap| bitmap.data_count().0).sum();
        self.io = written.backend.to_string();

        let facts = Facts {
            route: "direct",
            live: Some(false),
            pause_seconds: self.paused_at.map(|at| at.elapsed().as_secs_f64()),
            vm: self.meta.clone(),
        };
        Ok(self.draft().finish(&places, &written.bitmaps, tail, facts)?)
    }

    fn ram(&mut self, places: &Places) -> Result<Written, SaveError> {
        let scanned = self.process.scan()?;
        let (found, readers): (Vec<_>, Vec<Reader>) =
            scanned.into_iter().map(|block| (block.ranges, block.reader)).unzip();
        let target = |((placed, &hashes_offset), reader): ((&_, _), _)| Target {
            placed: Clone::clone(placed),
            hashes_offset,
            reader,
        };
        let targets: Vec<Target> =
            places.blocks().iter().zip(places.hashes()).zip(readers).map(target).collect();
        let width = (self.options.io, self.options.jobs.count());
        let file = self.draft().file();
        Ok(write_ram(file, &targets, &units(&found), width, self.control)?)
    }

    fn draft(&self) -> &Draft {
        self.draft.as_ref().expect("published once")
    }

    fn publish(&mut self) -> Result<(), SaveError> {
        Ok(self.draft.take().expect("published once").publish()?)
    }

    /// The file is whole: does with the VM what was asked for.
    fn release(&mut self) -> Result<(), SaveError> {
        let released = match self.options.after {
            After::Quit => self.vm.quit(QUIT_TIMEOUT),
            After::Resume if self.was_running => self.vm.cont(),
            After::Resume | After::Pause => Ok(()),
        };
        if let Some(at) = self.paused_at.take() {
            self.pause_seconds = at.elapsed().as_secs_f64();
        }
        released.map_err(|source| SaveError::Release { file: self.path.clone(), source })
    }

    /// Resumes the VM if it ran, drops the file, and returns the error to report.
    fn give_up(&mut self, error: SaveError) -> SaveError {
        self.draft = None;
        if self.paused_at.take().is_none() || !self.was_running {
            return error;
        }
        match self.vm.cont() {
            Ok(()) => error,
            Err(source) => SaveError::LeftPaused { cause: Box::new(error), source },
        }
    }

    fn report(&self) -> SaveReport {
        let pages_total: u64 = self.ram.blocks().iter().map(|block| block.page_count().0).sum();
        SaveReport {
            file: self.path.clone(),
            route: "direct",
            live: false,
            direct_io: self.direct_io.clone(),
            io: self.io.clone(),
            pages_total,
            pages_zero: pages_total - self.pages_data,
            bytes_written: self.pages_data * PAGE_LEN,
            pause_seconds: self.pause_seconds,
            total_seconds: self.started.elapsed().as_secs_f64(),
        }
    }
}

fn describe_vm(vm: &mut Vm, was_running: bool) -> Result<VmMeta, SaveError> {
    let process = vm.process()?;
    let disks = vm.disks()?.into_iter().map(|disk| DiskMeta {
        device: disk.device,
        path: disk.file,
        format: disk.format,
        read_only: disk.read_only,
    });
    Ok(VmMeta {
        disks: disks.collect(),
        name: vm.name()?,
        uuid: vm.uuid()?,
        machine: vm.machine_type()?,
        qemu_version: Some(vm.version()?.to_string()),
        run_state: if was_running { "running" } else { "paused" }.to_owned(),
        executable: Some(process.executable.to_string_lossy().into_owned()),
        command_line: texts(&process.arguments)?,
        working_directory: Some(process.working_directory.to_string_lossy().into_owned()),
    })
}

/// Returns the command line as the manifest holds it.
fn texts(arguments: &[OsString]) -> Result<Vec<String>, SaveError> {
    let text = |argument: &OsString| argument.to_str().map(str::to_owned);
    arguments.iter().map(text).collect::<Option<_>>().ok_or(SaveError::CommandLine)
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

/// Refuses while the VM runs what would end in a full disk. Pages that the guest touched and that
/// are zero again count here and not in the end: the check errs towards refusing only where a
/// guest has filled much of its RAM with zeros and the disk is nearly full.
fn check_space(process: &ProcessRam, file: &DataFile) -> Result<(), SaveError> {
    // Bitmaps, hashes, device state and the file system's own needs.
    const OVERHEAD_PERCENT: u64 = 1;
    const OVERHEAD: u64 = 16 << 20;
    let found: Vec<_> = process.scan()?.into_iter().map(|block| block.ranges).collect();
    let data = total_len(&found);
    let needed_bytes = data + data / 100 * OVERHEAD_PERCENT + OVERHEAD;
    let available_bytes = available_space(file.buffered())
        .map_err(|source| SaveError::Write { what: "the file system's free space", source })?;
    if needed_bytes > available_bytes {
        return Err(SaveError::NoSpace { needed_bytes, available_bytes });
    }
    Ok(())
}
