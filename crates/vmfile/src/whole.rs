//! Writes a thin file as one that needs no other.

use std::sync::Arc;

use vmfile_engine::Backend;
use vmfile_format::RamBlock;
use vmfile_format::manifest::VmMeta;
use vmfile_pages::PagesError;
use vmfile_pages::base::{Base, KeptPages};
use vmfile_pages::control::Control;
use vmfile_pages::draft::{Draft, FileLayout, SaveFacts, StreamTail};
use vmfile_pages::jobs::Jobs;
use vmfile_pages::lane::Workers;
use vmfile_pages::layers::Layers;
use vmfile_pages::ram_writer::write_ram;
use vmfile_pages::snapshot::{Snapshot, SnapshotError};

use crate::trust::why_not;

/// What was written.
pub(crate) struct Whole {
    pub(crate) pages_total: u64,
    pub(crate) pages_data: u64,
    /// Why the new file holds no command line, if it was left out.
    pub(crate) left_out: Option<String>,
}

/// Writes everything of `snapshot`, a vmfile, to `draft`. Every page is compared with its hash. Where the
/// file system shares extents, those of the lowest file are shared. The command line is left out if another
/// user may have written it.
pub(crate) fn write_whole(
    draft: &Draft,
    snapshot: &Snapshot,
    io: Backend,
    control: &Control<'_>,
) -> Result<Whole, PagesError> {
    snapshot.verify_parts()?;
    let layers = Layers::new(snapshot)?;
    let base = lowest(&layers, draft)?.map(Arc::new);
    let structure = snapshot.structure();
    let state = &structure.device_state;
    let sections = snapshot.device_state()?;
    let description = match state.vm_description {
        Some(_) => snapshot.read(state.end, state.stream_end - state.end)?,
        None => Vec::new(),
    };
    let tail_len = (sections.len() + description.len()) as u64;
    let ram = structure.ram();
    let total_bytes = ram.blocks().iter().map(RamBlock::used_length).sum();
    let end = (state.unused_id(), tail_len);
    let places = FileLayout::on_base(&structure.configuration, ram, end, base)?;
    draft.reserve(places.tables())?;
    draft.take_base(&places)?;
    let workers = Workers::start(draft.file(), (io, Jobs::default().count()));
    let workers = workers.map_err(PagesError::writing("the file, by threads of its own"))?;
    let written = write_ram(workers, &places, &layers, total_bytes, control)?;
    let left_out = why_not(snapshot).map_err(PagesError::reading("the owner of a file"))?;
    let facts = facts(snapshot, left_out.is_none())?;
    let tail = StreamTail { sections: &sections, description: &description, state: Some(state) };
    draft.finish(&places, (&written.bitmaps, &written.of_base), tail, facts)?;
    let pages_data = written.bitmaps.iter().map(|bitmap| bitmap.data_count().0).sum();
    Ok(Whole { pages_total: places.pages_total(), pages_data, left_out })
}

/// Takes the lowest file as the base, if its pages can be shared.
fn lowest(layers: &Layers<'_>, draft: &Draft) -> Result<Option<Base>, PagesError> {
    let lowest = layers.lowest();
    let open = |source| SnapshotError::Open { path: lowest.path().to_path_buf(), source };
    let file = lowest.file().try_clone().map_err(open)?;
    let lowest = Snapshot::from_file(lowest.path(), file, 0)?;
    // A file that cannot be a base, of an older version, is copied.
    let base = Base::new(lowest, draft.file(), false).ok();
    let base = base.filter(|base| *base.kept() == KeptPages::Shared);
    // Of a page that a newer file has, only the bytes there are verified.
    Ok(base.map(|base| base.with_only(&layers.of_lowest())))
}

/// Returns what the manifest of the file says of its save; without how the VM was started, if that is not
/// `trusted`.
fn facts(snapshot: &Snapshot, trusted: bool) -> Result<SaveFacts, PagesError> {
    let meta = &snapshot.manifest().ok_or(PagesError::NoManifest)?.meta;
    let vm = meta.vm.clone();
    let vm = if trusted {
        vm
    } else {
        VmMeta { executable: None, command_line: Vec::new(), changes: Vec::new(), ..vm }
    };
    Ok(SaveFacts {
        route: meta.route.clone(),
        live: meta.live,
        pause_seconds: meta.pause_seconds,
        saved_at_unix_seconds: Some(meta.saved_at_unix_seconds),
        vm,
    })
}
