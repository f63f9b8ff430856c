//! A process that has mapped a file, as a clone of a VM has: it is saved with the file as the base, and
//! only what it has written is read.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

#[path = "../../engine/tests/memory/mapped.rs"]
mod mapped;

use std::path::Path;

use vmfile_pages::copied_ram::{CopiedRam, Room, own_len};
use vmfile_pages::engine::ProcessMemory;
use vmfile_pages::memory_file::{Contents, FileOptions, SavedMemory, load, save};
use vmfile_pages::process_ram::BlockAt;
use vmfile_pages::{
    Access, Control, OwnMemory, OwnMemoryMut, PageSize, PageSource, ProcessRam, RamBlock,
    RamLayout, Snapshot,
};

use crate::mapped::Mapped;

const PAGE: usize = 4096;
/// Two units and three pages.
const LEN: usize = (32 << 20) + 3 * PAGE;

fn layout() -> RamLayout {
    let block = RamBlock::new("ram".to_owned(), LEN as u64, PageSize::KIB_4).unwrap();
    RamLayout::new(vec![block]).unwrap()
}

fn save_on(path: &Path, base: Option<&Path>, source: &dyn PageSource) -> SavedMemory {
    let state: [(&str, &[u8]); 1] = [("cpu", &[1])];
    let options = FileOptions::default().base(base.map(Path::to_path_buf)).thin(base.is_some());
    let contents = Contents::new("test-1.0", layout(), &state);
    save(path, contents, source, &options, &Control::none()).unwrap()
}

fn loaded(path: &Path) -> Vec<u8> {
    let mut memory = vec![0xa5; LEN];
    let sink = OwnMemoryMut::new(vec![&mut memory]);
    let snapshot = Snapshot::open(path, 0).unwrap();
    load(&snapshot, &sink, &FileOptions::default(), &Control::none()).unwrap();
    drop(sink);
    memory
}

/// Maps the RAM of a file as a clone does.
fn clone_of(path: &Path) -> Mapped {
    let snapshot = Snapshot::open(path, 0).unwrap();
    let offset = snapshot.structure().blocks[0].pages_offset;
    Mapped::private(LEN as u64, Some((snapshot.file(), offset)))
}

/// Writes to a page as the process does.
fn put(mapped: &Mapped, page: usize, byte: u8) {
    let memory = ProcessMemory::open(std::process::id()).unwrap();
    memory.write(mapped.address() + (page * PAGE) as u64, &[byte]).unwrap();
}

fn ram(mapped: &Mapped) -> ProcessRam {
    let block = BlockAt { name: "ram".to_owned(), address: mapped.address(), len: mapped.len() };
    ProcessRam::open(std::process::id(), &[block], Access::Read).unwrap()
}

/// Memory of which every third page has data.
fn memory() -> Vec<u8> {
    let mut memory = vec![0; LEN];
    memory.chunks_mut(PAGE).step_by(3).for_each(|page| page[9] = 7);
    memory
}

#[test]
fn only_what_a_clone_wrote_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut expected = memory();
    save_on(&path("base"), None, &OwnMemory::new(vec![&expected]));
    let clone = clone_of(&path("base"));
    // A zero page, one with data, one that becomes zero, and one that stays as it was.
    for (page, byte) in [(1, 5), (3, 6), (4095, 8), (8194, 9)] {
        put(&clone, page, byte);
        expected[page * PAGE] = byte;
    }
    let memory = ProcessMemory::open(std::process::id()).unwrap();
    memory.write(clone.address() + (6 * PAGE) as u64, &[0; PAGE]).unwrap();
    expected[6 * PAGE..7 * PAGE].fill(0);
    put(&clone, 9, 0);

    let saved = save_on(&path("one"), Some(&path("base")), &ram(&clone));
    assert_eq!(saved.bytes_read, 6 * PAGE as u64);
    // The first, which was zero, and those of the changed ones that had data.
    let data = expected.chunks(PAGE).filter(|page| page.iter().any(|&byte| byte != 0)).count();
    assert_eq!((saved.pages_data, saved.pages_of_base), (data as u64, data as u64 - 4));
    assert!(loaded(&path("one")) == expected);
    println!("cases: 1 restores");

    // On top of the thin file, of which the process has mapped the base.
    put(&clone, 300, 4);
    expected[300 * PAGE] = 4;
    let ram = ram(&clone);
    let room = Room::new(own_len(&ram).unwrap(), 2).unwrap();
    let copied = CopiedRam::copy(&ram, room, || false).unwrap().unwrap();
    put(&clone, 301, 4);
    let saved = save_on(&path("two"), Some(&path("one")), &copied);
    assert_eq!(saved.pages_of_base, saved.pages_data - 1);
    assert!(loaded(&path("two")) == expected);
    println!("cases: 1 restores");
}

/// A file that is mapped and is not the base says nothing of the base's pages.
#[test]
fn a_clone_of_another_file_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let expected = memory();
    save_on(&path("mapped"), None, &OwnMemory::new(vec![&expected]));
    let mut other = memory();
    other[0] = 1;
    save_on(&path("base"), None, &OwnMemory::new(vec![&other]));
    let clone = clone_of(&path("mapped"));
    let saved = save_on(&path("one"), Some(&path("base")), &ram(&clone));
    assert_eq!(saved.pages_of_base, saved.pages_data - 1);
    assert!(saved.bytes_read > LEN as u64 / 2, "{saved:?}");
    assert!(loaded(&path("one")) == expected);
    println!("cases: 1 restores");
}
