//! Reports of saves, opens and loads, and what they leave in the page cache.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use vmfile_pages::check::{CheckOptions, check, verify_pages};
use vmfile_pages::draft::{Draft, FileLayout};
use vmfile_pages::engine::{Unpublished, data_ranges, drop_cached, resident_bytes};
use vmfile_pages::format::stream::configuration::Configuration;
use vmfile_pages::memory_file::{Contents, FileOptions, SavedMemory, load, save, state};
use vmfile_pages::reading::open_for_reading;
use vmfile_pages::{
    Control, DirectIo, DirectIoInUse, Existing, FileFormat, Jobs, OwnMemory, OwnMemoryMut,
    PageBitmap, PageIndex, PageSize, PageSource as _, PagesError, Progress, RamBlock, RamLayout,
    Snapshot, Verified,
};

fn layout(lens: &[usize], size: PageSize) -> RamLayout {
    let block = |(number, &len): (usize, &usize)| {
        RamBlock::new(format!("block{number}"), len as u64, size).unwrap()
    };
    RamLayout::new(lens.iter().enumerate().map(block).collect()).unwrap()
}

/// Returns memory in which every third page has data.
fn memory(len: usize) -> Vec<u8> {
    let mut memory = vec![0; len];
    memory.chunks_mut(4096).step_by(3).for_each(|page| page[9] = 1);
    memory
}

fn save_in(
    path: &Path,
    memory: &[u8],
    state: &[(&str, &[u8])],
    options: &FileOptions,
    control: &Control<'_>,
) -> Result<SavedMemory, PagesError> {
    let contents = Contents::new("test-1.0", layout(&[memory.len()], PageSize::KIB_4), state);
    save(path, contents, &OwnMemory::new(vec![memory]), options, control)
}

fn saved(memory: &[u8], direct_io: DirectIo) -> (TempDir, PathBuf, SavedMemory) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let options = FileOptions::default().direct_io(direct_io);
    let saved = save_in(&path, memory, &[("cpu", &[1])], &options, &Control::none()).unwrap();
    (directory, path, saved)
}

fn resident(file: &File) -> u64 {
    resident_bytes(file.as_fd(), 0..file.metadata().unwrap().len()).unwrap()
}

fn text(in_use: &DirectIoInUse) -> String {
    match in_use {
        DirectIoInUse::Yes { .. } => "yes".to_owned(),
        DirectIoInUse::No { reason } => reason.clone(),
    }
}

#[test]
fn a_save_counts_all_pages_and_those_with_data() {
    let (_directory, path, saved) = saved(&memory(300 * 4096), DirectIo::Preferred);
    assert_eq!((saved.pages_total, saved.pages_data), (300, 100));
    let snapshot = Snapshot::open(&path, 0).unwrap();
    assert_eq!(snapshot.structure().configuration.machine, "test-1.0");
    assert_eq!((snapshot.path(), snapshot.format()), (&*path, FileFormat::Vmfile));
    assert_eq!(Verified::of(&snapshot), Verified::Yes);
    assert_eq!(snapshot.file_len(), path.metadata().unwrap().len());
}

#[test]
fn formats_and_answers_are_shown_as_words() {
    assert_eq!(FileFormat::Vmfile.to_string(), "vmfile");
    assert_eq!(FileFormat::MappedRam.to_string(), "mapped-ram");
    assert_eq!(Verified::Yes.to_string(), "yes");
    assert!(Verified::NoHashes.to_string().starts_with("no: "));
}

#[test]
fn a_directory_is_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let error = Snapshot::open(directory.path(), 0).unwrap_err();
    assert!(error.to_string().ends_with("is not a regular file"), "{error}");
}

/// Reading a file back to prove it leaves nothing in the page cache.
#[test]
fn a_file_that_was_saved_past_the_page_cache_is_not_in_it() {
    let (_directory, path, saved) = saved(&memory(1 << 20), DirectIo::Preferred);
    let file = File::open(&path).unwrap();
    let left = resident(&file);
    drop_cached(file.as_fd(), 0..u64::MAX).unwrap();
    // On a file system in memory, the whole file stays in it.
    if matches!(saved.direct_io, DirectIoInUse::Yes { .. }) {
        assert_eq!(left, resident(&file));
    }
}

#[test]
fn a_file_that_is_in_the_page_cache_is_read_from_there() {
    let (_directory, path, _) = saved(&vec![7; 1 << 20], DirectIo::Off);
    let snapshot = Snapshot::open(&path, 0).unwrap();
    let in_cache = "most of the file is in the page cache";
    let open = |direct_io| open_for_reading(&snapshot, direct_io).map(|(_, in_use)| text(&in_use));
    assert_eq!(open(DirectIo::Preferred).unwrap(), in_cache);
    assert_ne!(open(DirectIo::Off).unwrap(), in_cache);
    // A file system without direct I/O refuses this, others use it.
    assert_eq!(open(DirectIo::Required).unwrap_or("yes".to_owned()), "yes");
}

#[test]
fn a_file_of_which_little_is_in_the_page_cache_is_read_past_it() {
    let (_directory, path, saved) = saved(&vec![7; 16 << 20], DirectIo::Preferred);
    let snapshot = Snapshot::open(&path, 0).unwrap();
    snapshot.verify_parts().unwrap();
    let (_, in_use) = open_for_reading(&snapshot, DirectIo::Preferred).unwrap();
    if resident(snapshot.file()) < 4 << 20 {
        assert_eq!(text(&in_use), text(&saved.direct_io));
    }
}

/// The stream may end anywhere in a page, and the tables must not begin in that page.
#[test]
fn tables_begin_at_the_next_page_after_the_stream() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let options = FileOptions::default().existing(Existing::Replace);
    let mut len = 3000;
    for wanted in [None, Some(1), Some(4095), Some(0)] {
        let bytes = vec![3; len];
        let parts: [(&str, &[u8]); 2] = [("cpu", &bytes), ("bus", &[1, 2])];
        save_in(&path, &memory(4096), &parts, &options, &Control::none()).unwrap();
        let snapshot = Snapshot::open(&path, 0).unwrap();
        let end = snapshot.structure().device_state.stream_end;
        let manifest = snapshot.manifest().unwrap();
        assert!(wanted.is_none_or(|wanted| end % 4096 == wanted));
        assert_eq!(manifest.meta.blocks[0].hashes_offset, end.next_multiple_of(4096));
        assert_eq!(state(&snapshot, "cpu").unwrap(), Some(bytes));
        assert_eq!(state(&snapshot, "bus").unwrap(), Some(vec![1, 2]));
        let next = match wanted {
            None => 1,
            Some(1) => 4095,
            _ => 0,
        };
        let more = (next + 4096 - end % 4096) % 4096;
        len += usize::try_from(more).unwrap();
    }
}

/// Runs a verb and returns its progress reports.
fn progress(verb: impl FnOnce(&Control<'_>)) -> Vec<Progress> {
    let (seen, never) = (Mutex::new(Vec::new()), Arc::new(AtomicBool::new(false)));
    let note = |progress| seen.lock().unwrap().push(progress);
    verb(&Control::new(&never, &note));
    seen.into_inner().unwrap()
}

#[test]
fn progress_ends_when_all_is_done() {
    let memory = memory(40 << 20);
    let data_bytes = (40_u64 << 20).div_ceil(3 * 4096) * 4096;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let of_save = progress(|control| {
        save_in(&path, &memory, &[("cpu", &[1])], &FileOptions::default(), control).unwrap();
    });
    let snapshot = Snapshot::open(&path, 0).unwrap();
    let of_load = progress(|control| {
        let mut found = vec![0xff; memory.len()];
        let sink = OwnMemoryMut::new(vec![&mut found]);
        let read = load(&snapshot, &sink, &FileOptions::default(), control).unwrap();
        assert_eq!(read, data_bytes);
    });
    let of_check = progress(|control| {
        check(&snapshot, &CheckOptions::default(), control).unwrap();
    });
    for (seen, total_bytes) in [(of_save, 40 << 20), (of_load, data_bytes), (of_check, data_bytes)]
    {
        assert!(seen.iter().all(|progress| progress.total_bytes == total_bytes));
        let most = seen.iter().map(|progress| progress.done_bytes).max();
        assert_eq!(most, Some(total_bytes));
        // More than one report.
        assert!(seen.iter().any(|progress| progress.done_bytes < total_bytes));
        assert!(seen.iter().all(|progress| progress.done_bytes > 0));
    }
}

#[test]
fn progress_of_a_save_adds_up_the_data_of_its_units() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory(20 << 20);
    let options = FileOptions::default().jobs(Jobs::new(1).unwrap());
    let seen = progress(|control| {
        let path = directory.path().join("memory.vmf");
        save_in(&path, &memory, &[("cpu", &[1])], &options, control).unwrap();
    });
    let done: Vec<u64> = seen.iter().map(|progress| progress.done_bytes).collect();
    // Every third of 4096 pages, every third of 5120, and at the end the zero pages too.
    assert_eq!(done, [1366 * 4096, 1707 * 4096, 20 << 20]);
}

#[test]
fn a_unit_without_data_takes_no_place_in_the_file() {
    let mut memory = vec![0; 36 << 20];
    memory[35 << 20] = 1;
    let (_directory, path, saved) = saved(&memory, DirectIo::Off);
    assert_eq!(saved.pages_data, 1);
    let snapshot = Snapshot::open(&path, 0).unwrap();
    let hashes = snapshot.manifest().unwrap().meta.blocks[0].hashes_offset;
    let file = File::open(&path).unwrap();
    // The hashes of two units of 16 MiB, and those of the third.
    assert_eq!(data_ranges(file.as_fd(), hashes..hashes + 2 * 65536).unwrap(), []);
    let third = data_ranges(file.as_fd(), hashes + 2 * 65536..hashes + 3 * 65536).unwrap();
    assert!(!third.is_empty());
}

#[test]
fn what_the_caller_stops_ends() {
    let memory = memory(8 << 20);
    let (_directory, path, _) = saved(&memory, DirectIo::Preferred);
    let snapshot = Snapshot::open(&path, 0).unwrap();
    let stop = Arc::new(AtomicBool::new(true));
    let control = Control::new(&stop, &|_| {});
    let mut found = vec![0xff; memory.len()];
    let sink = OwnMemoryMut::new(vec![&mut found]);
    let error = load(&snapshot, &sink, &FileOptions::default(), &control).unwrap_err();
    assert!(error.is_stopped(), "{error}");
    let error = check(&snapshot, &CheckOptions::default(), &control).unwrap_err();
    assert!(error.is_stopped(), "{error}");
    let error = verify_pages(&snapshot, &CheckOptions::default(), &control).unwrap_err();
    assert!(error.is_stopped(), "{error}");
    stop.store(false, Ordering::Relaxed);
    verify_pages(&snapshot, &CheckOptions::default(), &control).unwrap();
}

#[test]
fn memory_that_was_loaded_can_be_saved_again() {
    let memory = memory(5 << 20);
    let (directory, path, _) = saved(&memory, DirectIo::Preferred);
    let snapshot = Snapshot::open(&path, 0).unwrap();
    let mut first = vec![0xff; memory.len()];
    let sink = OwnMemoryMut::new(vec![&mut first]);
    load(&snapshot, &sink, &FileOptions::default(), &Control::none()).unwrap();
    let mut bytes = vec![0; 5000];
    assert!(sink.read(0, &(8192..13192), &mut bytes).unwrap());
    assert_eq!(bytes, memory[8192..13192]);
    let second = directory.path().join("again.vmf");
    let state: [(&str, &[u8]); 1] = [("cpu", &[1])];
    let contents = Contents::new("test-1.0", layout(&[memory.len()], PageSize::KIB_4), &state);
    save(&second, contents, &sink, &FileOptions::default(), &Control::none()).unwrap();
    let (snapshot, mut found) = (Snapshot::open(&second, 0).unwrap(), vec![0xff; memory.len()]);
    let sink = OwnMemoryMut::new(vec![&mut found]);
    load(&snapshot, &sink, &FileOptions::default(), &Control::none()).unwrap();
    drop(sink);
    assert!(found == memory);
}

#[test]
fn a_layout_counts_the_pages_and_the_bytes_of_all_blocks() {
    let size = PageSize::new(16384).unwrap();
    let ram = layout(&[5 * 16384, 3 * 16384], size);
    let bitmaps: Vec<PageBitmap> = ram
        .blocks()
        .iter()
        .map(|block| {
            let mut bitmap = PageBitmap::new(block.page_count());
            bitmap.set(PageIndex(0), true);
            bitmap.set(PageIndex(2), true);
            bitmap
        })
        .collect();
    let places = FileLayout::new(&Configuration::default(), ram, 1, 100).unwrap();
    assert_eq!(places.pages_total(), 8);
    assert_eq!(places.tables().pages_total(), 8);
    assert_eq!(places.data_bytes(&bitmaps), 4 * 16384);
}

#[test]
fn a_draft_is_as_long_as_its_tables_before_they_are_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let unpublished = Unpublished::create_beside(&path, Existing::Refuse).unwrap();
    let draft = Draft::new(unpublished, DirectIo::Preferred).unwrap();
    let ram = layout(&[1 << 20], PageSize::KIB_4);
    let places = FileLayout::new(&Configuration::default(), ram, 1, 64).unwrap();
    draft.reserve(places.tables()).unwrap();
    let len = draft.file().buffered().metadata().unwrap().len();
    assert_eq!(len, places.hashes()[0] + 256 * 16);
}
