//! The caller's own memory, saved to a file and loaded again.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Mutex;

use proptest::prelude::*;
use vmfile_pages::check::{CheckOptions, FindingKind, check};
use vmfile_pages::draft::{Draft, FileLayout};
use vmfile_pages::engine::Unpublished;
use vmfile_pages::format::stream::configuration::Configuration;
use vmfile_pages::memory_file::{Contents, FileOptions, load, save, state};
use vmfile_pages::process_ram::BlockAt;
use vmfile_pages::{
    Access, Backend, Control, DirectIo, Existing, OwnMemory, OwnMemoryMut, PageSink, PageSize,
    PageSource, PagesError, ProcessRam, PublishError, RamBlock, RamLayout, Snapshot, SnapshotError,
};

fn layout(blocks: &[Vec<u8>], page_size: u64) -> RamLayout {
    let size = PageSize::new(page_size).unwrap();
    let block = |(number, bytes): (usize, &Vec<u8>)| {
        RamBlock::new(format!("block{number}"), bytes.len() as u64, size).unwrap()
    };
    RamLayout::new(blocks.iter().enumerate().map(block).collect()).unwrap()
}

fn options(io: Backend) -> FileOptions {
    FileOptions::default().existing(Existing::Replace).io(io)
}

fn save_blocks(path: &Path, blocks: &[Vec<u8>], page_size: u64, source: &dyn PageSource) {
    let ram = layout(blocks, page_size);
    let state: [(&str, &[u8]); 2] = [("cpu", &[0x7e, 0, 0, 0, 0, 4]), ("bus", &[])];
    let options = options(Backend::Auto);
    let contents = Contents::new("test-1.0", ram, &state);
    save(path, contents, source, &options, &Control::none()).unwrap();
}

fn own(blocks: &[Vec<u8>]) -> OwnMemory<'_> {
    OwnMemory::new(blocks.iter().map(Vec::as_slice).collect())
}

fn this_process(blocks: &[Vec<u8>]) -> ProcessRam {
    let at = |bytes: &Vec<u8>| BlockAt {
        name: "block".to_owned(),
        address: bytes.as_ptr().addr() as u64,
        len: bytes.len() as u64,
    };
    let at: Vec<BlockAt> = blocks.iter().map(at).collect();
    ProcessRam::open(std::process::id(), &at, Access::Read).unwrap()
}

/// Loads the file into memory that is filled with other bytes.
fn loaded(path: &Path, blocks: &[Vec<u8>], io: Backend) -> Result<Vec<Vec<u8>>, PagesError> {
    let mut memory: Vec<Vec<u8>> = blocks.iter().map(|bytes| vec![0xa5; bytes.len()]).collect();
    let sink = OwnMemoryMut::new(memory.iter_mut().map(Vec::as_mut_slice).collect());
    load(&Snapshot::open(path, 0)?, &sink, &options(io), &Control::none())?;
    drop(sink);
    Ok(memory)
}

/// Blocks of up to 3 MiB, so that there are whole windows and a rest; random pages have data.
fn blocks() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let block = (1_usize..48, proptest::collection::vec((0_usize..768, any::<u8>()), 0..80));
    let bytes = |(len, pages): (usize, Vec<(usize, u8)>)| {
        let mut bytes = vec![0; len * 65536];
        for (page, byte) in pages {
            if let Some(page) = bytes.chunks_mut(4096).nth(page) {
                page[usize::from(byte)] = byte;
            }
        }
        bytes
    };
    proptest::collection::vec(block.prop_map(bytes), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn memory_comes_back_as_it_was(
        blocks in blocks(),
        page_size in prop_oneof![Just(4096_u64), Just(16384), Just(65536)],
        by_process in any::<bool>(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory.vmf");
        if by_process {
            save_blocks(&path, &blocks, page_size, &this_process(&blocks));
        } else {
            save_blocks(&path, &blocks, page_size, &own(&blocks));
        }
        let snapshot = Snapshot::open(&path, 0).unwrap();
        let report = check(&snapshot, &CheckOptions::default(), &Control::none()).unwrap();
        prop_assert_eq!(report.findings, vec![]);
        prop_assert_eq!(state(&snapshot, "cpu").unwrap(), Some(vec![0x7e, 0, 0, 0, 0, 4]));
        prop_assert_eq!(state(&snapshot, "bus").unwrap(), Some(vec![]));
        prop_assert_eq!(state(&snapshot, "disk").unwrap(), None);
        for io in [Backend::Auto, Backend::Threads] {
            prop_assert!(loaded(&path, &blocks, io).unwrap() == blocks);
        }
        println!("cases: 1 mutations");
    }
}

#[test]
fn a_page_that_changed_in_the_file_is_not_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let mut blocks = vec![vec![0; 4 << 20]];
    blocks[0][(3 << 20) + 7] = 9;
    save_blocks(&path, &blocks, 4096, &own(&blocks));
    let snapshot = Snapshot::open(&path, 0).unwrap();
    let offset = snapshot.structure().blocks[0].pages_offset + (3 << 20) + 8;
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[1], offset).unwrap();
    let error = loaded(&path, &blocks, Backend::Auto).unwrap_err();
    let PagesError::Snapshot(SnapshotError::DamagedPage { page, .. }) = error else {
        panic!("{error}")
    };
    assert_eq!(page, 768);
    let report = check(&snapshot, &CheckOptions::default(), &Control::none()).unwrap();
    let kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::PageHash]);
}

#[test]
fn a_name_that_is_taken_is_refused_and_a_save_that_is_stopped_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let blocks = vec![vec![1; 2 << 20]];
    let try_save = |control: &Control<'_>| {
        let ram = layout(&blocks, 4096);
        let state: [(&str, &[u8]); 1] = [("cpu", &[1])];
        let options = FileOptions::default();
        save(&path, Contents::new("test-1.0", ram, &state), &own(&blocks), &options, control)
    };
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let error = try_save(&Control::new(&stop, &|_| {})).unwrap_err();
    assert!(error.is_stopped(), "{error}");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    try_save(&Control::none()).unwrap();
    let error = try_save(&Control::none()).unwrap_err();
    assert!(matches!(error, PagesError::Publish(PublishError::Exists { .. })), "{error}");
}

/// Memory that implements only what a source and a sink must: it does not report where it has data.
struct Bytes(Mutex<Vec<u8>>);

fn at(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

impl PageSource for Bytes {
    fn read(&self, _: usize, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool> {
        into.copy_from_slice(&self.0.lock().unwrap()[at(range)]);
        Ok(true)
    }
}

impl PageSink for Bytes {
    fn write(&self, _: usize, start: u64, parts: &[Range<usize>], bytes: &[u8]) -> io::Result<()> {
        let mut memory = self.0.lock().unwrap();
        for part in parts {
            let start = usize::try_from(start).unwrap();
            memory[start..][part.clone()].copy_from_slice(&bytes[part.clone()]);
        }
        Ok(())
    }
}

#[test]
fn memory_that_only_reads_and_writes_is_enough() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let mut blocks = vec![vec![0; 3 << 20]];
    for page in blocks[0].chunks_mut(4096).step_by(5) {
        page[7] = 9;
    }
    save_blocks(&path, &blocks, 4096, &Bytes(Mutex::new(blocks[0].clone())));
    let sink = Bytes(Mutex::new(vec![0xa5; 3 << 20]));
    let snapshot = Snapshot::open(&path, 0).unwrap();
    load(&snapshot, &sink, &options(Backend::Auto), &Control::none()).unwrap();
    assert_eq!(*sink.0.lock().unwrap(), blocks[0]);
}

/// What a source and a sink say of their data without more than the trait asks for: all of it is.
#[test]
fn memory_that_does_not_report_its_data_may_have_it_everywhere() {
    let bytes = Bytes(Mutex::new(vec![0; 8192]));
    assert_eq!(bytes.first_data(0, &(5..8192)).unwrap(), Some(5));
    assert_eq!(bytes.first_data(0, &(5..5)).unwrap(), None);
    assert_eq!(bytes.data(0, &(5..8192)).unwrap(), vec![5..8192]);
}

#[test]
fn memory_that_is_loaded_into_tells_where_it_holds_data() {
    const WINDOW: u64 = 2 << 20;
    let mut blocks = [vec![0; 4096], vec![0; (5 << 20) + 4096 * 3]];
    let len = blocks[1].len() as u64;
    for offset in [3 * 4096 + 4095, (2 << 20) - 1, (5 << 20) + 2 * 4096] {
        blocks[1][offset] = 1;
    }
    let sink = OwnMemoryMut::new(blocks.iter_mut().map(Vec::as_mut_slice).collect());
    let first = |start: u64| sink.first_data(1, &(start..len)).unwrap();
    assert_eq!(first(0), Some(3 * 4096));
    assert_eq!(first(3 * 4096), Some(3 * 4096));
    assert_eq!(first(4 * 4096), Some(WINDOW - 4096));
    assert_eq!(first(WINDOW), Some((5 << 20) + 2 * 4096));
    assert_eq!(sink.first_data(1, &(WINDOW..2 * WINDOW)).unwrap(), None);
    assert_eq!(sink.first_data(0, &(0..4096)).unwrap(), None);
    assert_eq!(sink.data(1, &(0..WINDOW)).unwrap(), vec![3 * 4096..WINDOW]);
    assert_eq!(sink.data(1, &(WINDOW..2 * WINDOW)).unwrap(), vec![]);
}

/// A draft is complete only after `finish` and all pages: `prove` finds what is missing, before the
/// file has a name.
#[test]
fn a_draft_that_is_not_finished_gets_no_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let unpublished = Unpublished::create_beside(&path, Existing::Refuse).unwrap();
    let draft = Draft::new(unpublished, DirectIo::Preferred).unwrap();
    let ram = layout(&[vec![0; 1 << 20]], 4096);
    let configuration = Configuration { machine: "test-1.0".to_owned(), ..Default::default() };
    let places = FileLayout::new(&configuration, ram, 1, 64).unwrap();
    draft.reserve(places.tables()).unwrap();
    let error = draft.prove().unwrap_err();
    assert!(matches!(error, PagesError::NotAsWritten(_)), "{error}");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}
