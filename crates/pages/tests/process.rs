//! The memory of a process, by what backs it: nothing, a private file, a shared file, huge pages.
//!
//! The process is that of the test. A test that this machine does not allow prints `skipped: ` and
//! the reason.

#![expect(clippy::single_range_in_vec_init, reason = "the answers are lists of ranges")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

#[path = "../../engine/tests/memory/mapped.rs"]
mod mapped;

#[path = "../../engine/tests/kernel/host.rs"]
#[expect(dead_code, reason = "the tests of the engine need more of it")]
mod host;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use rustix::fs::MemfdFlags;
use rustix::mm::MapFlags;
use vmfile_pages::engine::ProcessMemory;
use vmfile_pages::memory_file::{Contents, FileOptions, save};
use vmfile_pages::plan::WINDOW_LEN;
use vmfile_pages::process_ram::BlockAt;
use vmfile_pages::{
    Access, Control, PageSink as _, PageSize, PageSource as _, PagesError, ProcessRam,
    ProcessRamError, RamBlock, RamLayout,
};

use crate::host::HugePages;
use crate::mapped::Mapped;

const PAGE: u64 = 4096;
/// The length of each block: two windows and three pages.
const LEN: u64 = 2 * WINDOW_LEN + 3 * PAGE;
/// Where in its file a block begins.
const OFFSET: u64 = 64 << 10;

/// What these tests do with a mapping.
trait InRam {
    fn at(&self, name: &str) -> BlockAt;
    fn ram(&self) -> ProcessRam;
    /// Writes bytes as the process does.
    fn put(&self, offset: u64, bytes: &[u8]);
    /// Returns the byte at each of `offsets`, as the process sees it.
    fn bytes<const N: usize>(&self, offsets: [u64; N]) -> [u8; N];
}

impl InRam for Mapped {
    fn at(&self, name: &str) -> BlockAt {
        BlockAt { name: name.to_owned(), address: self.address(), len: self.len() }
    }

    fn ram(&self) -> ProcessRam {
        ProcessRam::open(std::process::id(), &[self.at("ram")], Access::ReadWrite).unwrap()
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        let memory = ProcessMemory::open(std::process::id()).unwrap();
        memory.write(self.address() + offset, bytes).unwrap();
    }

    fn bytes<const N: usize>(&self, offsets: [u64; N]) -> [u8; N] {
        let memory = ProcessMemory::open(std::process::id()).unwrap();
        offsets.map(|offset| {
            let mut byte = [0xff];
            memory.read(self.address() + offset, &mut byte).unwrap();
            byte[0]
        })
    }
}

fn memfd(flags: MemfdFlags, len: u64) -> File {
    let file: OwnedFd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC | flags).unwrap();
    let file = File::from(file);
    file.set_len(len).unwrap();
    file
}

/// Makes a file that has `LEN` bytes from `OFFSET` on, with one byte in each of these pages of them.
/// The tests name page 0 as well: [`ProcessRam::open`] reads it, and the kernel then makes it.
fn file_with(pages: &[u64]) -> File {
    let file = memfd(MemfdFlags::empty(), OFFSET + LEN);
    // What lies before the block is none of it.
    file.write_all_at(&[0xbb], OFFSET - PAGE).unwrap();
    for &page in pages {
        file.write_all_at(&[number(page)], OFFSET + page * PAGE + 9).unwrap();
    }
    file
}

/// The byte that the tests write into a page.
fn number(page: u64) -> u8 {
    page.to_le_bytes()[0] | 1
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// Reads a window of a block; checks that just these pages of it have their bytes, and returns
/// whether any of it was read.
fn reads(ram: &ProcessRam, window: u64, pages: &[u64]) -> bool {
    let range = window * WINDOW_LEN..((window + 1) * WINDOW_LEN).min(LEN);
    let mut bytes = vec![0xee; index(range.end - range.start)];
    let was_read = ram.read(0, &range, &mut bytes).unwrap();
    if was_read {
        let mut expected = vec![0; bytes.len()];
        for page in pages {
            expected[index(page * PAGE - range.start) + 9] = number(*page);
        }
        assert!(bytes == expected, "window {window}");
    }
    was_read
}

#[test]
fn untouched_private_memory_is_not_read_and_gaps_count_up_to_their_limit() {
    let mapped = Mapped::private(LEN, None);
    let pages = [3, 4, 10, 510, 1026];
    for page in pages {
        mapped.put(page * PAGE + 9, &[number(page)]);
    }
    let ram = mapped.ram();
    let first = |page: u64| ram.first_data(0, &(page * PAGE..LEN)).unwrap();
    assert_eq!([0, 4, 5, 511].map(first), [3, 4, 10, 1026].map(|page| Some(page * PAGE)));
    assert_eq!(ram.first_data(0, &(511 * PAGE..1026 * PAGE)).unwrap(), None);
    let data = ram.data(0, &(0..WINDOW_LEN)).unwrap();
    let expected = [3 * PAGE..5 * PAGE, 10 * PAGE..11 * PAGE, 510 * PAGE..511 * PAGE];
    assert_eq!(data, expected);
    assert_eq!(ram.data(0, &(1026 * PAGE..LEN)).unwrap(), [1026 * PAGE..LEN]);
    assert!(reads(&ram, 0, &[3, 4, 10, 510]));
    assert!(!reads(&ram, 1, &[]));
    assert!(reads(&ram, 2, &[1026]));
    // Between pages 4 and 10 there are 5 others.
    assert_eq!(ram.data_len(5 * PAGE - 1).unwrap(), 5 * PAGE);
    assert_eq!(ram.data_len(5 * PAGE).unwrap(), 10 * PAGE);
}

#[test]
fn private_memory_over_a_file_is_the_file_where_the_process_has_not_written() {
    let file = file_with(&[0, 1, 5, 600]);
    let mapped = Mapped::private(LEN, Some((&file, OFFSET)));
    for page in [3, 600, 700] {
        mapped.put(page * PAGE + 9, &[number(page)]);
    }
    let ram = mapped.ram();
    let first = |page: u64| ram.first_data(0, &(page * PAGE..LEN)).unwrap();
    assert_eq!([1, 2, 4, 601].map(first), [1, 3, 5, 700].map(|page| Some(page * PAGE)));
    assert_eq!(first(701), None);
    let data = ram.data(0, &(0..WINDOW_LEN)).unwrap();
    assert_eq!(data, [0..2 * PAGE, 3 * PAGE..4 * PAGE, 5 * PAGE..6 * PAGE]);
    assert!(reads(&ram, 0, &[0, 1, 3, 5]));
    assert!(reads(&ram, 1, &[600, 700]));
    assert!(!reads(&ram, 2, &[]));
    assert_eq!(ram.data_len(0).unwrap(), 6 * PAGE);
    // What is loaded belongs to the process, and not to the file.
    ram.write(0, WINDOW_LEN, &[4..6, 8..9], &[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
    let found = mapped.bytes([3, 4, 5, 6, 8].map(|offset| WINDOW_LEN + offset));
    assert_eq!(found, [0, 5, 6, 0, 9]);
    let mut bytes = [0xff; 9];
    file.read_exact_at(&mut bytes, OFFSET + WINDOW_LEN).unwrap();
    assert_eq!(bytes, [0; 9]);
}

#[test]
fn a_shared_file_is_read_and_written_from_the_offset_of_the_block() {
    let file = file_with(&[0, 3, 4, 500, 1026]);
    let mapped = Mapped::new(LEN, MapFlags::SHARED, Some((&file, OFFSET)));
    let ram = mapped.ram();
    let first = |page: u64| ram.first_data(0, &(page * PAGE..LEN)).unwrap();
    assert_eq!([1, 4, 5, 501].map(first), [3, 4, 500, 1026].map(|page| Some(page * PAGE)));
    assert_eq!(ram.first_data(0, &(501 * PAGE..1026 * PAGE)).unwrap(), None);
    let data = ram.data(0, &(0..WINDOW_LEN)).unwrap();
    assert_eq!(data, [0..PAGE, 3 * PAGE..5 * PAGE, 500 * PAGE..501 * PAGE]);
    assert_eq!(ram.data(0, &(WINDOW_LEN..2 * WINDOW_LEN)).unwrap(), []);
    // A range that begins inside a page.
    assert_eq!(ram.data(0, &(5 * PAGE - 1..8 * PAGE)).unwrap(), [4 * PAGE..5 * PAGE]);
    assert!(reads(&ram, 0, &[0, 3, 4, 500]));
    assert!(!reads(&ram, 1, &[]));
    assert!(reads(&ram, 2, &[1026]));
    // The first three are of one cell of 64 KiB; the last cell ends with the block.
    assert_eq!(ram.data_len(16 * PAGE).unwrap(), 2 * 16 * PAGE + 3 * PAGE);
    ram.write(0, WINDOW_LEN, &[4..6, 8..9], &[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
    let found = mapped.bytes([3, 4, 5, 6, 8].map(|offset| WINDOW_LEN + offset));
    assert_eq!(found, [0, 5, 6, 0, 9]);
    let mut bytes = [0xff; 2];
    file.read_exact_at(&mut bytes, OFFSET + WINDOW_LEN + 4).unwrap();
    assert_eq!(bytes, [5, 6]);
}

#[test]
fn a_file_that_was_cut_since_is_an_error_and_no_zeros() {
    let file = file_with(&[0, 3]);
    let mapped = Mapped::new(LEN, MapFlags::SHARED, Some((&file, OFFSET)));
    let ram = mapped.ram();
    let text = |found: u64| {
        let expected = OFFSET + LEN;
        format!("the file that backs it has been cut: it has {found} bytes, expected {expected}")
    };
    file.set_len(OFFSET + LEN - 1).unwrap();
    let error = ram.first_data(0, &(4 * PAGE..LEN)).unwrap_err();
    assert_eq!(error.to_string(), text(OFFSET + LEN - 1));
    // The window has data, and then it ends too early.
    file.set_len(OFFSET + 4 * PAGE).unwrap();
    let error = ram.read(0, &(0..WINDOW_LEN), &mut vec![0; index(WINDOW_LEN)]).unwrap_err();
    assert_eq!(error.to_string(), text(OFFSET + 4 * PAGE));
    let ProcessRamError::File { block, source, .. } = ram.data_len(PAGE).unwrap_err() else {
        panic!("no error of the file")
    };
    assert_eq!((&*block, source.to_string()), ("ram", text(OFFSET + 4 * PAGE)));
}

#[test]
fn a_save_names_the_bytes_that_could_not_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let file = file_with(&[0, 3, 600]);
    let mapped = Mapped::new(LEN, MapFlags::SHARED, Some((&file, OFFSET)));
    let ram = mapped.ram();
    // The first two windows are whole.
    file.set_len(OFFSET + 2 * WINDOW_LEN + PAGE).unwrap();
    let block = RamBlock::new("pc.ram".to_owned(), LEN, PageSize::KIB_4).unwrap();
    let state: [(&str, &[u8]); 1] = [("cpu", &[1])];
    let contents = Contents::new("test-1.0", RamLayout::new(vec![block]).unwrap(), &state);
    let path = directory.path().join("memory.vmf");
    let saved = save(&path, contents, &ram, &FileOptions::default(), &Control::none());
    let PagesError::ReadRam { block, block_offset, len, .. } = saved.unwrap_err() else {
        panic!("another error")
    };
    assert_eq!((&*block, block_offset, len), ("pc.ram", 2 * WINDOW_LEN, 3 * PAGE));
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn memory_that_cannot_be_read_and_a_block_that_is_not_mapped_are_told_apart() {
    let mapped = Mapped::private(LEN, None);
    // No process has memory in its first page.
    let missing = |len| BlockAt { name: "missing".to_owned(), address: 0, len };
    let open = |blocks: &[BlockAt]| ProcessRam::open(std::process::id(), blocks, Access::Read);
    let error = open(&[missing(PAGE)]).unwrap_err();
    assert!(matches!(error, ProcessRamError::Process { .. }), "{error}");
    let error = open(&[mapped.at("ram"), missing(PAGE)]).unwrap_err();
    let ProcessRamError::Backing { block, .. } = error else { panic!("{error}") };
    assert_eq!(block, "missing");
    // A block that is longer than what is mapped.
    let beyond = BlockAt { len: 1 << 46, ..mapped.at("ram") };
    let error = open(&[beyond]).unwrap_err();
    assert!(matches!(error, ProcessRamError::Backing { .. }), "{error}");
}

/// The process's page tables do not show the pages that another mapping has put into the file.
#[test]
fn huge_pages_that_the_process_has_not_touched_are_read_as_well() {
    const SIZE: u64 = HugePages::SIZE;
    let _pages = match HugePages::reserve(6) {
        Ok(pages) => pages,
        Err(reason) => {
            println!("skipped: huge pages: {reason}");
            return;
        }
    };
    let file = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 6 * SIZE);
    let mapped = Mapped::new(5 * SIZE, MapFlags::SHARED, Some((&file, SIZE)));
    for (page, byte) in [(0, 1), (2, 2), (4, 3)] {
        mapped.put(page * SIZE + 7, &[byte]);
    }
    let mut ram = mapped.ram();
    let first = |ram: &ProcessRam, page: u64| ram.first_data(0, &(page * SIZE..5 * SIZE)).unwrap();
    assert_eq!([1, 3].map(|page| first(&ram, page)), [Some(2 * SIZE), Some(4 * SIZE)]);
    assert_eq!(ram.first_data(0, &(SIZE..2 * SIZE)).unwrap(), None);
    assert_eq!(ram.data(0, &(SIZE..3 * SIZE)).unwrap(), [2 * SIZE..3 * SIZE]);
    assert_eq!(ram.data_len(0).unwrap(), 3 * SIZE);
    let mut bytes = vec![0xee; index(SIZE)];
    assert!(ram.read(0, &(2 * SIZE..3 * SIZE), &mut bytes).unwrap());
    assert_eq!(bytes[..9], [0, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert!(!ram.read(0, &(SIZE..2 * SIZE), &mut bytes).unwrap());

    let elsewhere = Mapped::new(SIZE, MapFlags::SHARED, Some((&file, 2 * SIZE)));
    elsewhere.put(5, &[4]);
    assert_eq!(first(&ram, 1), Some(2 * SIZE));
    ram.look_again().unwrap();
    assert_eq!([1, 3].map(|page| first(&ram, page)), [Some(SIZE), Some(3 * SIZE)]);
    assert_eq!(ram.first_data(0, &(SIZE..SIZE)).unwrap(), None);
    assert_eq!(ram.data(0, &(SIZE..3 * SIZE)).unwrap(), [SIZE..3 * SIZE]);
    assert!(ram.read(0, &(SIZE..2 * SIZE), &mut bytes).unwrap());
    assert_eq!(bytes[..7], [0, 0, 0, 0, 0, 4, 0]);

    ram.write(0, 2 * SIZE, &[6..7], &[9; 8]).unwrap();
    assert_eq!(mapped.bytes([5, 6, 7].map(|offset| 2 * SIZE + offset)), [0, 9, 2]);
    file.set_len(5 * SIZE).unwrap();
    let error = ram.first_data(0, &(0..SIZE)).unwrap_err();
    assert!(error.to_string().contains("has been cut"), "{error}");
}
