//! A file of any VMM's memory: [`save`], [`load`] and [`state`], without QEMU.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use derive_setters::Setters;
use vmfile_engine::{Backend, BackendInUse, DirectIo, DirectIoInUse, Existing, Unpublished};
use vmfile_format::manifest::VmMeta;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::own_state::OwnState;
use vmfile_format::{PageBitmap, RamLayout};

use crate::base::{Base, KeptPages};
use crate::control::Control;
use crate::draft::{Draft, FileLayout, SaveFacts, StreamTail};
use crate::error::PagesError;
use crate::jobs::Jobs;
use crate::lane::Workers;
use crate::layers::Layers;
use crate::memory::{PageSink, PageSource};
use crate::plan::WINDOW_LEN;
use crate::ram_loader::load_ram;
use crate::ram_writer::write_ram;
use crate::reading::open_for_reading;
use crate::snapshot::Snapshot;

/// How a file is written or read.
#[derive(Clone, Debug, Setters)]
#[non_exhaustive]
pub struct FileOptions {
    /// What to do if the file exists already.
    pub existing: Existing,
    /// When a file is written: keep the pages of this file that have not changed. The new file is whole
    /// where the file system shares extents (XFS, btrfs); elsewhere it is thin, and needs this one.
    pub base: Option<PathBuf>,
    /// Make the file thin even if the file system shares extents.
    pub thin: bool,
    /// Whether pages go past the page cache.
    pub direct_io: DirectIo,
    /// What moves the bytes: `io_uring`, or threads.
    pub io: Backend,
    /// How many threads work at once.
    pub jobs: Jobs,
}

impl Default for FileOptions {
    /// A new file, past the page cache where that is possible.
    fn default() -> FileOptions {
        FileOptions {
            existing: Existing::Refuse,
            base: None,
            thin: false,
            direct_io: DirectIo::Preferred,
            io: Backend::Auto,
            jobs: Jobs::default(),
        }
    }
}

/// What goes into a file.
#[derive(Clone, Debug)]
pub struct Contents<'a> {
    machine: &'a str,
    ram: RamLayout,
    state: &'a [(&'a str, &'a [u8])],
}

impl<'a> Contents<'a> {
    /// Takes the name of the VMM and its kind of machine, the blocks of RAM, and the device state:
    /// at least one part, each a name and bytes of the caller's choice.
    ///
    /// Choose a name that no machine type of QEMU has: then no QEMU loads the file as one of its
    /// own.
    #[must_use]
    pub fn new(machine: &'a str, ram: RamLayout, state: &'a [(&'a str, &'a [u8])]) -> Contents<'a> {
        Contents { machine, ram, state }
    }
}

/// What was saved.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SavedMemory {
    /// Pages of all blocks.
    pub pages_total: u64,
    /// Those that are not zero.
    pub pages_data: u64,
    /// Those of them that are the pages of the base.
    pub pages_of_base: u64,
    /// Whether the file needs its base.
    pub is_thin: bool,
    /// How many bytes of RAM were read: less than there are if the kernel says what was written since the
    /// base was mapped.
    pub bytes_read: u64,
    /// Whether the pages went past the page cache; if not, why.
    pub direct_io: DirectIoInUse,
    /// What moved the bytes.
    pub io: BackendInUse,
}

/// Saves `contents`, whose RAM `source` provides, to a new file at `path`.
///
/// When this returns, the file is on the disk, was read back, and has its name. If it fails, there
/// is no file.
///
/// # Errors
///
/// Returns [`PagesError`] if the file cannot be written or does not read back.
pub fn save(
    path: &Path,
    contents: Contents<'_>,
    source: &dyn PageSource,
    options: &FileOptions,
    control: &Control<'_>,
) -> Result<SavedMemory, PagesError> {
    let draft = Draft::new(Unpublished::create_beside(path, options.existing)?, options.direct_io)?;
    let Contents { machine, ram, state } = contents;
    let state = OwnState::new(state);
    let tail =
        StreamTail { sections: &state.sections, description: &state.description, state: None };
    let tail_len = (state.sections.len() + state.description.len()) as u64;
    let configuration = Configuration { machine: machine.to_owned(), ..Configuration::default() };
    let total_bytes = ram.blocks().iter().map(vmfile_format::RamBlock::used_length).sum();
    let base = options.base.as_ref().map(|path| base(path, &draft, options)).transpose()?;
    let end = (state.unused_id, tail_len);
    let places = FileLayout::on_base(&configuration, ram, end, base.map(Arc::new))?;
    draft.reserve(places.tables())?;
    draft.take_base(&places)?;
    let workers = Workers::start(draft.file(), (options.io, options.jobs.count()));
    let workers = workers.map_err(PagesError::writing("the file, by threads of its own"))?;
    let written = write_ram(workers, &places, source, total_bytes, control)?;
    draft.finish(&places, (&written.bitmaps, &written.of_base), tail, facts(machine))?;
    let direct_io = draft.file().direct().clone();
    draft.prove()?.publish()?;
    let pages = |bitmaps: &[PageBitmap]| bitmaps.iter().map(|one| one.data_count().0).sum();
    Ok(SavedMemory {
        pages_total: places.pages_total(),
        pages_data: pages(&written.bitmaps),
        pages_of_base: pages(&written.of_base),
        is_thin: places.base().is_some_and(|base| *base.kept() != KeptPages::Shared),
        bytes_read: written.read_bytes,
        direct_io,
        io: written.backend,
    })
}

/// Loads all blocks of `snapshot` into `sink`, whose blocks have the same order and lengths. Every
/// page is compared with its hash before it is copied. Returns how many bytes were read.
///
/// # Errors
///
/// Returns [`PagesError`] if a part of the file or a page is not what was written, or cannot be
/// read. The memory then holds some of the pages.
pub fn load(
    snapshot: &Snapshot,
    sink: &dyn PageSink,
    options: &FileOptions,
    control: &Control<'_>,
) -> Result<u64, PagesError> {
    snapshot.verify_parts()?;
    let layers = Layers::new(snapshot)?;
    let opened = open_for_reading(layers.main(), options.direct_io);
    let (file, _) = opened.map_err(PagesError::reading("the file once more"))?;
    let width = (options.io, options.jobs.count());
    let workers = Workers::start_reading(&file, width, WINDOW_LEN);
    let workers = workers.map_err(PagesError::reading("the file, by threads of its own"))?;
    let blocks: Vec<usize> = (0..snapshot.structure().blocks.len()).collect();
    Ok(load_ram((&layers, workers), &blocks, sink, control)?.0)
}

/// Returns the bytes of the part of the state that is called `name`; `None` if there is none.
///
/// # Errors
///
/// Returns [`PagesError`] if the file cannot be read.
pub fn state(snapshot: &Snapshot, name: &str) -> Result<Option<Vec<u8>>, PagesError> {
    let bytes = snapshot.device_state()?;
    Ok(snapshot.structure().device_state.payload(name, &bytes).map(<[u8]>::to_vec))
}

fn base(path: &Path, draft: &Draft, options: &FileOptions) -> Result<Base, PagesError> {
    let snapshot = Snapshot::open(path, 0)?;
    Ok(Base::new(snapshot, draft.file(), options.thin)?)
}

fn facts(machine: &str) -> SaveFacts {
    SaveFacts {
        route: "memory".to_owned(),
        live: Some(false),
        pause_seconds: None,
        saved_at_unix_seconds: None,
        vm: VmMeta::of_machine(machine),
    }
}
