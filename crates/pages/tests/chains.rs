//! Files that keep pages of a base: the memory comes back through a chain of them as it was.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vmfile_pages::base::BaseError;
use vmfile_pages::check::{CheckOptions, FindingKind, check};
use vmfile_pages::format::limits::CHAIN_LEN_MAX;
use vmfile_pages::layers::Layers;
use vmfile_pages::memory_file::{Contents, FileOptions, SavedMemory, load, save};
use vmfile_pages::plan::{WINDOW_LEN, pieces};
use vmfile_pages::{
    Control, OwnMemory, OwnMemoryMut, PageSize, PageSource as _, PagesError, RamBlock, RamLayout,
    Snapshot, SnapshotError,
};

/// Blocks by name.
type Memory = Vec<(&'static str, Vec<u8>)>;

const NAMES: [&str; 3] = ["ram", "rom", "dimm"];

fn save_on(path: &Path, base: Option<&Path>, memory: &Memory) -> Result<SavedMemory, PagesError> {
    let block = |(name, bytes): &(&str, Vec<u8>)| {
        RamBlock::new((*name).to_owned(), bytes.len() as u64, PageSize::KIB_4).unwrap()
    };
    let ram = RamLayout::new(memory.iter().map(block).collect()).unwrap();
    let state: [(&str, &[u8]); 1] = [("cpu", &[1, 2])];
    let source = OwnMemory::new(memory.iter().map(|(_, bytes)| bytes.as_slice()).collect());
    let options = FileOptions::default().base(base.map(Path::to_path_buf)).thin(base.is_some());
    save(path, Contents::new("test-1.0", ram, &state), &source, &options, &Control::none())
}

fn loaded(path: &Path, memory: &Memory) -> Result<Memory, PagesError> {
    let snapshot = Snapshot::open(path, 0)?;
    let mut found: Memory =
        memory.iter().map(|(name, bytes)| (*name, vec![0xa5; bytes.len()])).collect();
    let sink = OwnMemoryMut::new(found.iter_mut().map(|(_, bytes)| bytes.as_mut_slice()).collect());
    load(&snapshot, &sink, &FileOptions::default(), &Control::none())?;
    drop(sink);
    Ok(found)
}

/// Reads the memory as a conversion does.
fn read(path: &Path, memory: &Memory) -> Memory {
    let snapshot = Snapshot::open(path, 0).unwrap();
    let layers = Layers::new(&snapshot).unwrap();
    let block = |(number, (name, bytes)): (usize, &(&'static str, Vec<u8>))| {
        let mut found = vec![0; bytes.len()];
        for range in pieces(0..bytes.len() as u64, WINDOW_LEN) {
            let at = |offset: u64| usize::try_from(offset).unwrap();
            let window = &mut found[at(range.start)..at(range.end)];
            window.fill(0xa5);
            if !layers.read(number, &range, window).unwrap() {
                window.fill(0);
            }
        }
        (*name, found)
    };
    memory.iter().enumerate().map(block).collect()
}

fn findings(path: &Path) -> Vec<FindingKind> {
    let snapshot = Snapshot::open(path, 0).unwrap();
    let report = check(&snapshot, &CheckOptions::default(), &Control::none()).unwrap();
    report.findings.iter().map(|finding| finding.kind).collect()
}

/// What happens to the memory between two saves.
#[derive(Clone, Debug)]
enum Change {
    /// A page of a block gets this byte at its start; 0 makes it zero.
    Page(usize, usize, u8),
    /// A block comes or goes.
    Block(usize),
    /// The order of the blocks changes.
    Turn,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        20 => (0..3_usize, 0..1200_usize, 0..3_u8).prop_map(|(block, page, byte)| Change::Page(block, page, byte)),
        1 => (1..3_usize).prop_map(Change::Block),
        1 => Just(Change::Turn),
    ]
}

fn apply(memory: &mut Memory, change: &Change) {
    match *change {
        Change::Page(block, page, byte) => {
            let Some((_, bytes)) = memory.iter_mut().find(|(name, _)| *name == NAMES[block]) else {
                return;
            };
            if let Some(page) = bytes.chunks_mut(4096).nth(page) {
                page.fill(0);
                page[0] = byte;
            }
        }
        Change::Block(block) => match memory.iter().position(|(name, _)| *name == NAMES[block]) {
            Some(place) => drop(memory.remove(place)),
            None => memory.push((NAMES[block], vec![0; 1 << 20])),
        },
        Change::Turn => memory.rotate_left(1),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn memory_comes_back_through_a_chain(
        rounds in proptest::collection::vec(proptest::collection::vec(change(), 0..60), 1..7),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = |number: usize| directory.path().join(format!("{number}.vmf"));
        let mut memory: Memory = vec![("ram", vec![0; 5 << 20]), ("rom", vec![7; 1 << 20])];
        save_on(&path(0), None, &memory).unwrap();
        let mut saved = vec![memory.clone()];
        for (number, changes) in (1..).zip(&rounds) {
            changes.iter().for_each(|change| apply(&mut memory, change));
            let report = save_on(&path(number), Some(&path(number - 1)), &memory).unwrap();
            prop_assert!(report.is_thin);
            saved.push(memory.clone());
        }
        for (number, memory) in saved.iter().enumerate() {
            prop_assert!(&loaded(&path(number), memory).unwrap() == memory, "file {}", number);
            prop_assert_eq!(findings(&path(number)), vec![]);
            prop_assert!(&read(&path(number), memory) == memory, "file {} by layers", number);
            println!("cases: 2 restores");
        }
        println!("cases: 1 mutations");
    }
}

fn two_files(directory: &Path) -> (PathBuf, PathBuf, Memory) {
    let (base, thin) = (directory.join("base.vmf"), directory.join("thin.vmf"));
    let mut memory: Memory = vec![("ram", vec![3; 4 << 20])];
    save_on(&base, None, &memory).unwrap();
    memory[0].1[5 * 4096] = 9;
    let report = save_on(&thin, Some(&base), &memory).unwrap();
    assert_eq!((report.pages_data, report.pages_of_base, report.is_thin), (1024, 1023, true));
    (base, thin, memory)
}

/// With every fifth page changed, each was a write of its own: the save took longer than one without
/// a base.
#[test]
fn a_short_gap_between_changed_pages_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let (base, thin) = (directory.path().join("base.vmf"), directory.path().join("thin.vmf"));
    let mut memory: Memory = vec![("ram", vec![3; 4 << 20])];
    save_on(&base, None, &memory).unwrap();
    // Gaps of 4 pages and of 5; one of a page of zeros and one of the base; one of a page of zeros.
    for page in [10, 15, 21, 100, 103, 200, 202] {
        memory[0].1[page * 4096] = 9;
    }
    for page in [101, 201] {
        memory[0].1[page * 4096..(page + 1) * 4096].fill(0);
    }
    let report = save_on(&thin, Some(&base), &memory).unwrap();
    let written = [10..=15, 21..=21, 100..=100, 102..=103, 200..=200, 202..=202];
    let written: usize = written.iter().map(|pages| pages.clone().count()).sum();
    assert_eq!(report.pages_data, 1024 - 2);
    assert_eq!(report.pages_of_base, report.pages_data - written as u64);
    assert!(loaded(&thin, &memory).unwrap() == memory && read(&thin, &memory) == memory);
    assert_eq!(findings(&thin), vec![]);
}

/// `info` held every bitmap of a file in memory; a file of a few KiB can say that it has terabytes of RAM.
#[test]
fn pages_are_counted_without_their_bitmaps() {
    let directory = tempfile::tempdir().unwrap();
    let (base, thin) = (directory.path().join("base.vmf"), directory.path().join("thin.vmf"));
    // Blocks whose last words are not full.
    let mut memory: Memory = vec![
        ("ram", vec![0; (40 << 20) + 4096]),
        ("rom", vec![0; 3 * 4096]),
        ("dimm", vec![7; 4096]),
    ];
    for page in [0, 1, 63, 64, 4096, 10_240] {
        memory[0].1[page * 4096] = 9;
    }
    save_on(&base, None, &memory).unwrap();
    memory[0].1[4096 * 4096] = 8;
    save_on(&thin, Some(&base), &memory).unwrap();
    for (path, in_base) in [(&base, None), (&thin, Some(6))] {
        let snapshot = Snapshot::open(path, 0).unwrap();
        for placed in &snapshot.structure().blocks {
            let expected = snapshot.bitmap(placed).unwrap().data_count().0;
            assert_eq!(snapshot.count_data(placed).unwrap(), expected, "{placed:?}");
        }
        assert_eq!(snapshot.count_in_base().unwrap(), in_base);
    }
}

#[test]
fn a_thin_file_takes_room_for_what_changed() {
    use std::os::unix::fs::MetadataExt as _;
    let directory = tempfile::tempdir().unwrap();
    let (base, thin, _) = two_files(directory.path());
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(blocks(&base) > 4 << 20);
    assert!(blocks(&thin) < 256 << 10, "{} bytes", blocks(&thin));
}

/// A renamed or moved base is still the base; another file under its name is not.
#[test]
fn a_base_is_found_by_its_id() {
    let directory = tempfile::tempdir().unwrap();
    let (base, thin, memory) = two_files(directory.path());
    // Beside the thin file, when both were moved.
    let moved = directory.path().join("moved");
    fs::create_dir(&moved).unwrap();
    let (new_base, new_thin) = (moved.join("base.vmf"), moved.join("thin.vmf"));
    fs::rename(&base, &new_base).unwrap();
    fs::rename(&thin, &new_thin).unwrap();
    assert_eq!(loaded(&new_thin, &memory).unwrap(), memory);
    // Another file under its name.
    let other = directory.path().join("other.vmf");
    save_on(&other, None, &memory).unwrap();
    fs::rename(&other, &base).unwrap();
    fs::rename(&new_base, directory.path().join("kept.vmf")).unwrap();
    let error = Snapshot::open(&new_thin, 0).unwrap_err();
    let SnapshotError::BaseMissing { id, found, .. } = &error else { panic!("{error}") };
    let there = Snapshot::open(&base, 0).unwrap().id().unwrap();
    assert_ne!(*id, there);
    assert!(found.contains(&there.to_string()) && found.contains("No such file"), "{found}");
    assert!(error.to_string().contains(&id.to_string()), "{error}");
    // What the file says of itself can be read all the same.
    assert!(Snapshot::open_alone(&new_thin, 0).is_ok());
}

#[test]
fn a_page_that_changed_in_the_base_is_found_and_the_base_named() {
    let directory = tempfile::tempdir().unwrap();
    let (base, thin, memory) = two_files(directory.path());
    let offset = Snapshot::open(&base, 0).unwrap().structure().blocks[0].pages_offset;
    let file = fs::OpenOptions::new().write(true).open(&base).unwrap();
    file.write_all_at(&[1], offset + 77 * 4096).unwrap();
    let error = loaded(&thin, &memory).unwrap_err();
    let PagesError::Snapshot(SnapshotError::DamagedPage { path, page, .. }) = error else {
        panic!("{error}")
    };
    assert_eq!((path, page), (base.clone(), 77));
    assert_eq!(findings(&thin), [FindingKind::PageHash]);
    println!("cases: 2 flips");
}

/// A page that the thin file has itself may change in the base.
#[test]
fn a_page_of_the_thin_file_is_not_read_from_the_base() {
    let directory = tempfile::tempdir().unwrap();
    let (base, thin, memory) = two_files(directory.path());
    let offset = Snapshot::open(&base, 0).unwrap().structure().blocks[0].pages_offset;
    let file = fs::OpenOptions::new().write(true).open(&base).unwrap();
    file.write_all_at(&[1], offset + 5 * 4096).unwrap();
    assert_eq!(loaded(&thin, &memory).unwrap(), memory);
}

#[test]
fn a_chain_has_a_limit() {
    let directory = tempfile::tempdir().unwrap();
    let path = |number: usize| directory.path().join(format!("{number}.vmf"));
    let mut memory: Memory = vec![("ram", vec![3; 1 << 20])];
    save_on(&path(0), None, &memory).unwrap();
    for number in 1..=CHAIN_LEN_MAX {
        memory[0].1[number * 4096] = 1;
        save_on(&path(number), Some(&path(number - 1)), &memory).unwrap();
    }
    assert_eq!(loaded(&path(CHAIN_LEN_MAX), &memory).unwrap(), memory);
    println!("cases: 1 restores");
    let error = save_on(&path(100), Some(&path(CHAIN_LEN_MAX)), &memory).unwrap_err();
    assert!(matches!(error, PagesError::Base(BaseError::ChainTooLong { .. })), "{error}");
    assert!(!path(100).exists());
}

#[test]
fn a_thin_file_without_its_end_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (_, thin, _) = two_files(directory.path());
    let file = fs::OpenOptions::new().write(true).open(&thin).unwrap();
    file.set_len(fs::metadata(&thin).unwrap().len() - 64).unwrap();
    let error = Snapshot::open(&thin, 0).unwrap_err();
    assert!(matches!(error, SnapshotError::LostEnd { .. }), "{error}");
}

/// A save on top of a damaged base would end the VM, and only the damaged pages would be left.
#[test]
fn a_base_that_is_damaged_is_named_before_the_file_has_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let (base, thin) = (directory.path().join("base.vmf"), directory.path().join("thin.vmf"));
    let memory: Memory = vec![("ram", vec![3; 4 << 20])];
    save_on(&base, None, &memory).unwrap();
    let offset = Snapshot::open(&base, 0).unwrap().structure().blocks[0].pages_offset;
    let file = fs::OpenOptions::new().write(true).open(&base).unwrap();
    (0..1024).for_each(|page| file.write_all_at(&[1], offset + page * 4096).unwrap());
    let error = save_on(&thin, Some(&base), &memory).unwrap_err();
    let PagesError::Base(BaseError::Snapshot(SnapshotError::DamagedPage { path, .. })) = error
    else {
        panic!("{error}")
    };
    assert_eq!(path, base);
    assert!(!thin.exists());
}
