//! The memory of another process.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use vmfile_engine::{
    Access, Backing, BackingError, Fault, FileSystem, KernelProbe, ProcessMemory, data_ranges,
};

use crate::child::{
    HUGE_LEN, HUGE_TOUCHED, NOBODY, PAGE, PRIVATE_LEN, PRIVATE_PAGES, Playing, SHARED_LEN,
    SHARED_OFFSET, number,
};

struct Other {
    child: Playing,
    memory: ProcessMemory,
    shared: u64,
    private: u64,
    huge: u64,
}

fn other() -> Other {
    let mut child = Playing::start("memory", "", None).unwrap();
    let words = child.words();
    let mut addresses = words.split(' ').map(|word| word.parse::<u64>().unwrap());
    let memory = ProcessMemory::open(child.pid()).unwrap();
    let mut next = || addresses.next().unwrap();
    Other { shared: next(), private: next(), huge: next(), child, memory }
}

#[test]
fn private_memory_is_read_as_it_was_written() {
    let other = other();
    let mut bytes = vec![0xff; usize::try_from(PRIVATE_LEN).unwrap()];
    other.memory.read(other.private, &mut bytes).unwrap();
    for (page, bytes) in (0..).zip(bytes.chunks(4096)) {
        let expected = if PRIVATE_PAGES.contains(&page) { number(page) } else { 0 };
        assert!(bytes.iter().all(|&byte| byte == expected), "page {page}");
    }
}

#[test]
fn what_is_written_into_a_process_is_read_back() {
    let other = other();
    let bytes: Vec<u8> = (0..50_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    other.memory.write(other.private + 12_345, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    other.memory.read(other.private + 12_345, &mut back).unwrap();
    assert_eq!(back, bytes);
}

#[test]
fn a_read_past_a_mapping_names_the_address() {
    let other = other();
    let mappings = other.memory.mappings().unwrap();
    let end = mappings.iter().find(|mapping| {
        mapping.permissions.read
            && !mappings.iter().any(|next| next.range.start == mapping.range.end)
    });
    let end = end.unwrap().range.end;
    let error = other.memory.read(end - 100, &mut [0; 8192]).unwrap_err();
    let fault = error.get_ref().and_then(|source| source.downcast_ref::<Fault>());
    assert_eq!(fault, Some(&Fault { address: end }));
    assert_eq!(error.to_string(), format!("no memory can be reached at {end:#x}"));
}

#[test]
fn a_shared_memfd_is_opened_and_has_the_same_bytes() {
    let other = other();
    let range = other.shared + PAGE..other.shared + SHARED_LEN;
    let backing = other.memory.backing(range, Access::ReadWrite).unwrap();
    let Backing::Shared { file } = backing else { panic!("{backing:?}") };
    assert_eq!(file.offset, SHARED_OFFSET + PAGE);
    assert_eq!(file.file_system, FileSystem::Tmpfs);

    let mut page = [0; 4096];
    file.file.read_exact_at(&mut page, file.offset + 4 * PAGE).unwrap();
    assert_eq!(page, [0x55; 4096]);

    file.file.write_all_at(b"from here", file.offset + 4 * PAGE).unwrap();
    let mut bytes = [0; 9];
    other.memory.read(other.shared + 5 * PAGE, &mut bytes).unwrap();
    assert_eq!(&bytes, b"from here");
    assert_eq!(
        data_ranges(file.file.as_fd(), 0..u64::MAX >> 1).unwrap(),
        [SHARED_OFFSET + 5 * PAGE..SHARED_OFFSET + 6 * PAGE]
    );
}

#[test]
fn private_anonymous_memory_has_no_file() {
    let other = other();
    let range = other.private..other.private + PRIVATE_LEN;
    let backing = other.memory.backing(range, Access::Read).unwrap();
    assert!(matches!(backing, Backing::Private { file: None }), "{backing:?}");
}

#[test]
fn a_privately_mapped_file_is_named_as_the_origin() {
    let other = other();
    let mappings = other.memory.mappings().unwrap();
    let text = mappings.iter().find(|mapping| mapping.permissions.execute && mapping.has_file());
    let range = text.unwrap().range.clone();
    let backing = other.memory.backing(range, Access::ReadWrite).unwrap();
    let Backing::Private { file: Some(file) } = backing else { panic!("{backing:?}") };
    assert_eq!(file.offset, text.unwrap().file_offset);
}

#[test]
fn unmapped_memory_has_no_backing() {
    let other = other();
    let error = other.memory.backing(0..PAGE, Access::Read).unwrap_err();
    assert!(matches!(error, BackingError::Unmapped { address: 0 }), "{error}");
}

#[test]
fn only_touched_pages_are_reported() {
    let other = other();
    let page = |page: u64| other.private + page * PAGE;
    let touched = other.memory.touched(other.private..other.private + PRIVATE_LEN).unwrap();
    assert_eq!(touched, [page(3)..page(5), page(9)..page(10), page(2047)..page(2048)]);
    let touched = other.memory.touched(page(3) + 100..page(4) + 1).unwrap();
    assert_eq!(touched, [page(3) + 100..page(4) + 1]);
}

#[test]
fn the_first_touched_page_is_found_from_any_place() {
    let other = other();
    let page = |page: u64| other.private + page * PAGE;
    for (from, first) in [(0, Some(3)), (3, Some(3)), (5, Some(9)), (10, Some(2047))] {
        let range = page(from)..other.private + PRIVATE_LEN;
        assert_eq!(other.memory.first_touched(&range).unwrap(), first.map(page));
    }
    assert_eq!(other.memory.first_touched(&(page(10)..page(2047))).unwrap(), None);
    assert_eq!(other.memory.first_touched(&(page(3) + 5..page(4))).unwrap(), Some(page(3) + 5));
}

/// More pieces than one system call takes; each is copied to its own place.
#[test]
fn scattered_pieces_are_copied_each_to_its_place() {
    let other = other();
    let pieces: Vec<_> = (0..1500).map(|piece| piece * 4096..piece * 4096 + 64).collect();
    let mut bytes = vec![0; 1500 * 4096];
    for (number, piece) in pieces.iter().enumerate() {
        bytes[piece.clone()].fill(u8::try_from(number % 255 + 1).unwrap());
    }
    let address = other.private + 100 * PAGE;
    other.memory.write_pieces(address, &pieces, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    other.memory.read(address, &mut back).unwrap();
    assert!(back == bytes, "what lies between the pieces is not touched");
    back.fill(7);
    other.memory.read_pieces(address, &pieces, &mut back).unwrap();
    for (number, bytes) in back.chunks(4096).enumerate() {
        assert_eq!(bytes[0], u8::try_from(number % 255 + 1).unwrap());
        assert_eq!(bytes[64], 7);
    }
}

#[test]
fn a_page_that_was_only_read_counts_as_untouched_where_the_kernel_can_tell() {
    let probe = KernelProbe::run();
    if !probe.pagemap_scan.is_yes() {
        println!("skipped: PAGEMAP_SCAN: {}", probe.pagemap_scan);
        return;
    }
    let other = other();
    // Reading puts the shared zero page into that process's page tables.
    other.memory.read(other.private + 100 * PAGE, &mut [0; 4096]).unwrap();
    let range = other.private + 100 * PAGE..other.private + 101 * PAGE;
    assert_eq!(other.memory.touched(range).unwrap(), []);
}

#[test]
fn a_quarter_of_a_tebibyte_of_untouched_memory_is_scanned_in_no_time() {
    let probe = KernelProbe::run();
    if !probe.pagemap_scan.is_yes() {
        println!("skipped: PAGEMAP_SCAN: {}", probe.pagemap_scan);
        return;
    }
    let other = other();
    let start = Instant::now();
    let touched = other.memory.touched(other.huge..other.huge + HUGE_LEN).unwrap();
    let time = start.elapsed();
    let page = |offset: u64| other.huge + offset..other.huge + offset + PAGE;
    assert_eq!(touched, HUGE_TOUCHED.map(page));
    assert!(time < Duration::from_millis(200), "{time:?}");
    println!("256 GiB scanned in {time:?}");
}

#[test]
fn a_process_that_has_ended_is_gone_and_not_mistaken() {
    let mut other = other();
    other.child.kill();
    for error in [
        other.memory.read(other.private, &mut [0; 10]).unwrap_err(),
        other.memory.write(other.private, &[0; 10]).unwrap_err(),
        other.memory.mappings().unwrap_err(),
        ProcessMemory::open(other.memory.pid()).unwrap_err(),
    ] {
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH), "{error}");
    }
}

#[test]
fn a_stranger_is_told_that_permission_is_missing() {
    match Playing::start("stranger", &std::process::id().to_string(), Some(NOBODY)) {
        Ok(mut child) => {
            assert_eq!(child.words(), format!("{:?}", io::ErrorKind::PermissionDenied));
        }
        Err(error) => println!("skipped: a child of another user: {error}"),
    }
}

#[test]
fn a_user_without_rights_still_finds_the_file_behind_their_own_memory() {
    match Playing::start("self", "", Some(NOBODY)) {
        Ok(mut child) => {
            let fell_back = child.words();
            assert_eq!(fell_back, "true", "map_files was expected to be forbidden");
        }
        Err(error) => println!("skipped: a child of another user: {error}"),
    }
}
