//! Memory that is copied aside: what the process writes after the copy is not in it.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

#[path = "../../engine/tests/memory/mapped.rs"]
mod mapped;

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use rustix::fs::MemfdFlags;
use rustix::mm::MapFlags;
use vmfile_pages::copied_ram::{CopiedRam, Room, own_len};
use vmfile_pages::engine::ProcessMemory;
use vmfile_pages::plan::{UNIT_LEN, WINDOW_LEN, pieces};
use vmfile_pages::process_ram::BlockAt;
use vmfile_pages::{Access, PageSource, ProcessRam};

use crate::mapped::Mapped;

const PAGE: u64 = 4096;
/// The length of a block: two units and three pages.
const LEN: u64 = 2 * UNIT_LEN + 3 * PAGE;

fn ram(mapped: &Mapped) -> ProcessRam {
    let block = BlockAt { name: "ram".to_owned(), address: mapped.address(), len: mapped.len() };
    ProcessRam::open(std::process::id(), &[block], Access::Read).unwrap()
}

/// Writes to a page as the process does.
fn put(mapped: &Mapped, page: u64, byte: u8) {
    let memory = ProcessMemory::open(std::process::id()).unwrap();
    memory.write(mapped.address() + page * PAGE + 7, &[byte]).unwrap();
}

/// Returns byte 7 of each page, as a source of pages has it.
fn bytes(source: &dyn PageSource) -> Vec<u8> {
    let mut all = Vec::new();
    for range in pieces(0..LEN, WINDOW_LEN) {
        let mut window = vec![0xee; usize::try_from(range.end - range.start).unwrap()];
        if !source.read(0, &range, &mut window).unwrap() {
            window.fill(0);
        }
        assert!(source.first_data(0, &range).unwrap().is_some() || window.iter().all(|&b| b == 0));
        all.extend(window.chunks(4096).map(|page| page[7]));
    }
    all
}

fn memfd(pages: &[u64]) -> File {
    let file = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(LEN).unwrap();
    for page in pages {
        file.write_all_at(&[9], page * PAGE + 7).unwrap();
    }
    file
}

/// Of a VM that was restored by `map`, only what the guest has written is copied.
#[test]
fn only_what_was_written_over_a_file_is_copied() {
    let file = memfd(&[0, 1, 600, 5000, 8193]);
    let mapped = Mapped::private(LEN, Some((&file, 0)));
    // Reading a page of the file makes it present, and not the process's own.
    assert_eq!(bytes(&ram(&mapped))[600], 9);
    for page in [1, 700, 5001, 8194] {
        put(&mapped, page, 5);
    }
    let ram = ram(&mapped);
    let before = bytes(&ram);
    assert_eq!(own_len(&ram).unwrap(), 4 * PAGE);
    let room = Room::new(4 * PAGE, 3).unwrap();
    let copied = CopiedRam::copy(&ram, room, || false).unwrap().unwrap();
    assert_eq!(copied.bytes(), 4 * PAGE);
    for page in [0, 1, 2, 5000, 5001] {
        put(&mapped, page, 6);
    }
    assert_eq!(bytes(&copied), before);
    println!("cases: 1 saves");
    assert_eq!([before[0], before[1], before[2], before[700], before[8194]], [9, 5, 0, 5, 5]);
}

/// The kernel's list of many places came with its tail twice, and the copy was not what the process had.
#[test]
fn what_was_written_to_many_places_is_copied() {
    let file = memfd(&[]);
    let mapped = Mapped::private(LEN, Some((&file, 0)));
    for page in (0..LEN / PAGE).step_by(2) {
        put(&mapped, page, u8::try_from(page % 251 + 1).unwrap());
    }
    let ram = ram(&mapped);
    let before = bytes(&ram);
    assert_eq!(own_len(&ram).unwrap(), LEN / PAGE / 2 * PAGE + PAGE);
    let copied = CopiedRam::copy(&ram, Room::new(LEN, 2).unwrap(), || false).unwrap().unwrap();
    (0..LEN / PAGE).for_each(|page| put(&mapped, page, 252));
    assert!(bytes(&copied) == before);
    println!("cases: 1 saves");
}

#[test]
fn all_data_of_other_memory_is_copied() {
    let file = memfd(&[3, 8194]);
    let shared = Mapped::new(LEN, MapFlags::SHARED, Some((&file, 0)));
    let private = Mapped::private(LEN, None);
    for mapped in [&shared, &private] {
        for page in 4000..4500 {
            put(mapped, page, 5);
        }
        let ram = ram(mapped);
        let before = bytes(&ram);
        let room = Room::new(own_len(&ram).unwrap(), 2).unwrap();
        let copied = CopiedRam::copy(&ram, room, || false).unwrap().unwrap();
        (0..LEN / PAGE).step_by(3).for_each(|page| put(mapped, page, 6));
        assert_eq!(bytes(&copied), before);
        assert_eq!(before[4400], 5);
        println!("cases: 1 saves");
    }
}

#[test]
fn a_copy_that_takes_too_long_or_too_much_is_given_up() {
    let mapped = Mapped::private(LEN, None);
    (0..LEN / PAGE).for_each(|page| put(&mapped, page, 5));
    let ram = ram(&mapped);
    // There is room for whole units.
    let small = Room::new(UNIT_LEN, 1).unwrap();
    assert!(CopiedRam::copy(&ram, small, || false).unwrap().is_none());
    let room = Room::new(LEN, 2).unwrap();
    assert!(CopiedRam::copy(&ram, room, || true).unwrap().is_none());
    let room = Room::new(LEN, 2).unwrap();
    let copied = CopiedRam::copy(&ram, room, || false).unwrap().unwrap();
    assert_eq!((copied.bytes(), bytes(&copied)), (LEN, bytes(&ram)));
}
