//! Data, holes and huge pages.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;
use rustix::mm::MapFlags;
use vmfile_engine::{
    FileSystem, ProcessMemory, data_ranges, drop_cached, file_system, hugetlb_allocated_bytes,
    punch_hole, resident_bytes,
};

use crate::child::map;
use crate::host::{self, HugePages};

fn memfd(flags: MemfdFlags, len: u64) -> File {
    let file: OwnedFd = rustix::fs::memfd_create("extents", MemfdFlags::CLOEXEC | flags).unwrap();
    let file = File::from(file);
    file.set_len(len).unwrap();
    file
}

#[test]
fn an_empty_memfd_has_no_data_whatever_its_length() {
    let file = memfd(MemfdFlags::empty(), 1 << 40);
    assert_eq!(data_ranges(file.as_fd(), 0..1 << 40).unwrap(), []);
}

#[test]
fn data_is_found_merged_and_clipped() {
    let file = memfd(MemfdFlags::empty(), 1 << 30);
    for page in [0, 1, 7, 1000] {
        file.write_all_at(&[1; 4096], page * 4096).unwrap();
    }
    let all = data_ranges(file.as_fd(), 0..1 << 30).unwrap();
    assert_eq!(all, [0..8192, 7 * 4096..8 * 4096, 1000 * 4096..1001 * 4096]);
    let some = data_ranges(file.as_fd(), 100..7 * 4096 + 1).unwrap();
    assert_eq!(some, [100..8192, 7 * 4096..7 * 4096 + 1]);
}

#[test]
fn looking_for_data_leaves_the_file_position_alone() {
    let mut file = memfd(MemfdFlags::empty(), 1 << 20);
    file.write_all_at(&[1; 4096], 1 << 19).unwrap();
    file.seek(SeekFrom::Start(77)).unwrap();
    data_ranges(file.as_fd(), 0..1 << 20).unwrap();
    assert_eq!(file.stream_position().unwrap(), 77);
}

#[test]
fn a_punched_hole_is_no_data_and_reads_as_zeros() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.write_all_at(&[1; 3 << 16], 0).unwrap();
    file.sync_all().unwrap();
    if let Err(error) = punch_hole(file.as_fd(), 1 << 16..2 << 16) {
        println!("skipped: holes on this file system: {error}");
        return;
    }
    assert_eq!(data_ranges(file.as_fd(), 0..1 << 30).unwrap(), [0..1 << 16, 2 << 16..3 << 16]);
    let mut bytes = [9; 100];
    file.read_exact_at(&mut bytes, 1 << 16).unwrap();
    assert_eq!(bytes, [0; 100]);
    assert_eq!(file.metadata().unwrap().len(), 3 << 16);
}

#[test]
fn cached_pages_are_counted_and_dropped() {
    let directory = host::directory();
    let path = directory.path().join("file");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let file = File::open(&path).unwrap();
    if file_system(file.as_fd()).unwrap() != FileSystem::Other {
        println!("skipped: the target directory is in memory");
        return;
    }
    assert_eq!(resident_bytes(file.as_fd(), 0..1 << 20).unwrap(), 1 << 20);
    assert_eq!(resident_bytes(file.as_fd(), 4096..12_288).unwrap(), 8192);

    file.sync_all().unwrap();
    drop_cached(file.as_fd(), 0..1 << 20).unwrap();

    assert_eq!(resident_bytes(file.as_fd(), 0..1 << 20).unwrap(), 0);
    assert_eq!(resident_bytes(file.as_fd(), 5..5).unwrap(), 0);
    std::fs::read(&path).unwrap();
    drop_cached(file.as_fd(), 0..u64::MAX).unwrap();
    assert_eq!(resident_bytes(file.as_fd(), 0..1 << 20).unwrap(), 0);
}

#[test]
fn the_kind_of_file_system_is_told() {
    let file = memfd(MemfdFlags::empty(), 0);
    assert_eq!(file_system(file.as_fd()).unwrap(), FileSystem::Tmpfs);
    let proc = File::open("/proc/self/maps").unwrap();
    assert_eq!(file_system(proc.as_fd()).unwrap(), FileSystem::Other);
}

#[test]
fn huge_pages_hide_their_holes_but_are_counted_and_found_by_page_tables() {
    const SIZE: u64 = HugePages::SIZE;
    let _pages = match HugePages::reserve(8) {
        Ok(pages) => pages,
        Err(reason) => {
            println!("skipped: huge pages: {reason}");
            return;
        }
    };
    let file = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 6 * SIZE);
    assert_eq!(file_system(file.as_fd()).unwrap(), FileSystem::Hugetlbfs { page_size: SIZE });
    assert_eq!(hugetlb_allocated_bytes(file.as_fd()).unwrap(), 0);

    let memory = ProcessMemory::open(std::process::id()).unwrap();
    let start = map(6 * SIZE, MapFlags::SHARED, Some((file.as_fd(), 0))).addr() as u64;
    // hugetlbfs has no `write`: its pages are allocated when a process that maps them touches them.
    memory.write(start + SIZE + 5, &[1]).unwrap();
    memory.write(start + 4 * SIZE, &[2]).unwrap();

    assert_eq!(hugetlb_allocated_bytes(file.as_fd()).unwrap(), 2 * SIZE);
    // On hugetlbfs, SEEK_DATA reports everything as data.
    assert_eq!(data_ranges(file.as_fd(), 0..6 * SIZE).unwrap(), [0..6 * SIZE]);

    let touched = memory.touched(start..start + 6 * SIZE).unwrap();
    assert_eq!(touched, [start + SIZE..start + 2 * SIZE, start + 4 * SIZE..start + 5 * SIZE]);

    // pread fills in zeros for a hole and allocates nothing.
    let mut bytes = [9; 4096];
    file.read_exact_at(&mut bytes, 2 * SIZE).unwrap();
    assert_eq!(bytes, [0; 4096]);
    file.read_exact_at(&mut bytes, SIZE).unwrap();
    assert_eq!(bytes[..6], [0, 0, 0, 0, 0, 1]);
    assert_eq!(hugetlb_allocated_bytes(file.as_fd()).unwrap(), 2 * SIZE);
}
