//! Which files are used with direct I/O, and what that leaves in the page cache.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use vmfile_engine::{
    Backend, BufferPool, DataFile, DirectIo, DirectIoInUse, Direction, Memory, Transfer,
    open_storage, resident_bytes,
};

use crate::host;

fn create(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap()
}

/// Opens `file` for direct I/O, or prints why the test is skipped.
fn direct(file: File) -> Option<DataFile> {
    let file = DataFile::new(file, DirectIo::Preferred).unwrap();
    if let DirectIoInUse::No { reason } = file.direct() {
        println!("skipped: the target directory has no direct I/O: {reason}");
        return None;
    }
    Some(file)
}

#[test]
fn alignments_are_powers_of_two_that_buffers_can_have() {
    let directory = host::directory();
    let Some(file) = direct(create(&directory.path().join("file"))) else { return };
    let &DirectIoInUse::Yes { offset_align, memory_align } = file.direct() else { unreachable!() };
    for align in [offset_align, memory_align] {
        assert!(align.is_power_of_two() && align <= 1 << 16, "{align}");
    }
    println!("{}", file.direct());
}

#[test]
fn a_direct_write_leaves_only_its_tail_in_the_page_cache() {
    let directory = host::directory();
    let Some(file) = direct(create(&directory.path().join("file"))) else { return };
    let len = (1 << 20) + 100;
    let pool = BufferPool::new(1, 2 << 20, 4096).unwrap();
    let mut storage = open_storage(&file, Backend::Auto, 4).unwrap().storage;
    let mut buffer = pool.take();
    buffer.fill(7);
    let memory = Memory::Owned(buffer, 0..len);
    storage
        .submit(Transfer { direction: Direction::Write, file_offset: 0, memory, tag: 0 })
        .unwrap();
    storage.reap().unwrap().unwrap().result.unwrap();

    let resident = resident_bytes(file.as_fd(), 0..2 << 20).unwrap();

    assert!(resident <= 4096, "{resident} bytes in the page cache");
    assert_eq!(fs::read(directory.path().join("file")).unwrap(), vec![7; len]);
}

/// Asserts that `file`, which has no name, gets the same direct I/O as a named file in `directory`.
fn assert_is_as_direct_as_a_named_one(file: File, directory: &Path) {
    let Some(named) = direct(create(&directory.join("named"))) else { return };
    let file = DataFile::new(file, DirectIo::Preferred).unwrap();
    assert_eq!(file.direct(), named.direct());
}

#[test]
fn a_file_without_a_name_can_be_used_directly() {
    let directory = host::directory();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file: OwnedFd = match rustix::fs::open(directory.path(), flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => file,
        Err(errno) => return println!("skipped: O_TMPFILE: {errno}"),
    };
    assert_is_as_direct_as_a_named_one(file.into(), directory.path());
}

#[test]
fn a_deleted_file_can_be_used_directly() {
    let directory = host::directory();
    let path = directory.path().join("file");
    let file = create(&path);
    fs::remove_file(&path).unwrap();
    assert_is_as_direct_as_a_named_one(file, directory.path());
}

#[test]
fn what_lives_in_memory_is_refused_when_direct_io_is_required() {
    let file = || {
        let flags = MemfdFlags::CLOEXEC;
        File::from(rustix::fs::memfd_create("file", flags).unwrap())
    };
    let error = DataFile::new(file(), DirectIo::Required).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    assert_eq!(
        error.to_string(),
        "direct I/O is not possible: tmpfs is page cache and nothing else"
    );
    let preferred = DataFile::new(file(), DirectIo::Preferred).unwrap();
    assert!(matches!(preferred.direct(), DirectIoInUse::No { .. }));
}

#[test]
fn direct_io_that_is_off_is_off() {
    let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
    assert_eq!(file.direct().to_string(), "no: not asked for");
}

#[test]
fn a_pipe_has_no_direct_io() {
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let file = DataFile::new(reader.into(), DirectIo::Preferred).unwrap();
    assert_eq!(file.direct().to_string(), "no: neither a regular file nor a block device");
}
