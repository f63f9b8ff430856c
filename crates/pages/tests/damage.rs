//! Findings and errors for files in which a byte changed, or that another program wrote.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vmfile_format::manifest::ExtentMeta;
use vmfile_pages::check::{CheckOptions, CheckReport, FindingKind, check, verify_pages};
use vmfile_pages::format::mapped_ram::{MARK, PlacedBlock};
use vmfile_pages::memory_file::{Contents, FileOptions, load, save};
use vmfile_pages::{
    Control, FileFormat, Jobs, OwnMemory, OwnMemoryMut, PageSize, PagesError, RamBlock, RamLayout,
    Snapshot, SnapshotError,
};

/// One unit of 16 MiB, whose hashes are read at once, and a part of a second unit.
const RAM_LEN: usize = (17 << 20) + 3 * 4096;

/// A page in the second unit.
const LATE_PAGE: u64 = 4099;

struct Saved {
    _directory: TempDir,
    path: PathBuf,
    memory: Vec<Vec<u8>>,
}

/// Saves blocks of these lengths; `places` are a block and an offset each, where a byte is not
/// zero.
fn saved_with(page_size: u64, lens: &[usize], places: &[(usize, usize)]) -> Saved {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let mut memory: Vec<Vec<u8>> = lens.iter().map(|&len| vec![0; len]).collect();
    for &(block, offset) in places {
        memory[block][offset] = 0xd1;
    }
    let size = PageSize::new(page_size).unwrap();
    let block = |(number, bytes): (usize, &Vec<u8>)| {
        RamBlock::new(format!("block{number}"), bytes.len() as u64, size).unwrap()
    };
    let ram = RamLayout::new(memory.iter().enumerate().map(block).collect()).unwrap();
    let state: [(&str, &[u8]); 1] = [("cpu", &[1, 2, 3])];
    let source = OwnMemory::new(memory.iter().map(Vec::as_slice).collect());
    let (contents, options) = (Contents::new("test-1.0", ram, &state), FileOptions::default());
    save(&path, contents, &source, &options, &Control::none()).unwrap();
    Saved { _directory: directory, path, memory }
}

/// Saves two blocks with data in five pages.
fn saved() -> Saved {
    let late = usize::try_from(LATE_PAGE).unwrap() * 4096;
    saved_with(
        4096,
        &[RAM_LEN, 3 * 4096],
        &[(0, 0), (0, 5 * 4096), (0, late), (1, 4096), (1, 8192)],
    )
}

impl Saved {
    fn open(&self) -> Snapshot {
        Snapshot::open(&self.path, 0).unwrap()
    }

    fn file(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.path).unwrap()
    }

    fn block(&self, number: usize) -> PlacedBlock {
        self.open().structure().blocks[number].clone()
    }

    fn hashes_offset(&self, block: usize) -> u64 {
        self.open().manifest().unwrap().meta.blocks[block].hashes_offset
    }

    /// Changes a byte of the file; a second call changes it back.
    fn flip(&self, offset: u64) {
        let mut byte = [0];
        let file = self.file();
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
    }

    fn check(&self) -> CheckReport {
        check_by(&self.open(), &CheckOptions::default())
    }

    fn verify_pages(&self) -> Result<(), PagesError> {
        verify_pages(&self.open(), &CheckOptions::default(), &Control::none())
    }

    /// Loads the file into memory that is filled with other bytes.
    fn loaded(&self) -> Result<Vec<Vec<u8>>, PagesError> {
        let mut memory: Vec<Vec<u8>> =
            self.memory.iter().map(|bytes| vec![0xa5; bytes.len()]).collect();
        let sink = OwnMemoryMut::new(memory.iter_mut().map(Vec::as_mut_slice).collect());
        let read = load(&self.open(), &sink, &FileOptions::default(), &Control::none())?;
        drop(sink);
        assert_eq!(read, 5 * 4096);
        Ok(memory)
    }

    fn loads(&self) {
        assert!(self.loaded().unwrap() == self.memory);
    }

    /// Turns the file into one such as QEMU writes: without the mark and the manifest. Returns the
    /// end of its stream.
    fn make_foreign(&self) -> u64 {
        let end = self.open().structure().device_state.stream_end;
        let mark = self.block(0).mark_offset().unwrap();
        self.file().write_all_at(&[0; MARK.len()], mark).unwrap();
        self.file().set_len(end).unwrap();
        end
    }
}

fn check_by(snapshot: &Snapshot, options: &CheckOptions) -> CheckReport {
    check(snapshot, options, &Control::none()).unwrap()
}

fn one_job() -> CheckOptions {
    CheckOptions::default().jobs(Jobs::new(1).unwrap())
}

/// The findings about pages: kind, block, page index and file offset.
fn pages_of(report: &CheckReport) -> Vec<(FindingKind, &str, u64, u64)> {
    assert_eq!(report.findings_total, report.findings.len() as u64);
    let pages = report.findings.iter().map(|finding| {
        let block = finding.block.as_deref().expect("a page's block");
        assert_eq!(finding.section, None);
        (finding.kind, block, finding.page.unwrap(), finding.offset)
    });
    pages.collect()
}

fn sections_of(report: &CheckReport) -> Vec<(FindingKind, &str, u64)> {
    assert_eq!(report.findings_total, report.findings.len() as u64);
    let sections = report.findings.iter().map(|finding| {
        assert!(finding.block.is_none() && finding.page.is_none());
        (finding.kind, finding.section.as_deref().expect("a part"), finding.offset)
    });
    sections.collect()
}

fn damaged_page(error: PagesError) -> (String, u64, u64) {
    let PagesError::Snapshot(SnapshotError::DamagedPage { block, page, offset, .. }) = error else {
        panic!("{error}")
    };
    (block, page, offset)
}

#[test]
fn a_whole_file_has_no_findings_and_every_page_is_counted() {
    let saved = saved();
    let report = saved.check();
    assert_eq!(pages_of(&report), []);
    assert_eq!(report.pages_checked, 5);
    assert_eq!(report.format, FileFormat::Vmfile);
    assert!(report.io.is_some());
    saved.verify_pages().unwrap();
    saved.loads();
}

#[test]
fn a_page_that_changed_is_named_by_its_block_its_number_and_its_place() {
    let saved = saved();
    for (number, page, byte) in [(0, 0, 4095), (0, 5, 7), (0, LATE_PAGE, 1), (1, 2, 0)] {
        let (name, offset) =
            (format!("block{number}"), saved.block(number).pages_offset + page * 4096);
        saved.flip(offset + byte);
        let report = saved.check();
        assert_eq!(pages_of(&report), [(FindingKind::PageHash, &*name, page, offset)]);
        assert_eq!(report.pages_checked, 5);
        let expected = (name, page, offset);
        assert_eq!(damaged_page(saved.verify_pages().unwrap_err()), expected);
        assert_eq!(damaged_page(saved.loaded().unwrap_err()), expected);
        saved.flip(offset + byte);
        println!("cases: 3 flips");
    }
    saved.loads();
}

#[test]
fn a_hash_that_changed_is_found_at_its_page() {
    let saved = saved();
    for (number, page) in [(0, 0), (0, LATE_PAGE), (1, 1)] {
        let (name, offset) =
            (format!("block{number}"), saved.block(number).pages_offset + page * 4096);
        let hash = saved.hashes_offset(number) + page * 16;
        saved.flip(hash + 15);
        let expected = [(FindingKind::PageHash, &*name, page, offset)];
        assert_eq!(pages_of(&saved.check()), expected);
        let error = damaged_page(saved.verify_pages().unwrap_err());
        assert_eq!((&*error.0, error.1, error.2), (&*name, page, offset));
        saved.flip(hash + 15);
        println!("cases: 2 flips");
    }
}

#[test]
fn bytes_in_the_place_of_a_zero_page_are_found() {
    let saved = saved();
    for (number, page, byte) in [(0, 1, 0), (0, 1500, 4095), (0, 4354, 9), (1, 0, 1)] {
        let (name, offset) =
            (format!("block{number}"), saved.block(number).pages_offset + page * 4096);
        saved.flip(offset + byte);
        assert_eq!(pages_of(&saved.check()), [(FindingKind::StalePage, &*name, page, offset)]);
        assert_eq!(damaged_page(saved.verify_pages().unwrap_err()), (name, page, offset));
        // A load still puts zeros there.
        saved.loads();
        saved.file().write_all_at(&[0], offset + byte).unwrap();
        println!("cases: 3 flips");
    }
}

#[test]
fn a_hash_of_a_zero_page_is_found() {
    let saved = saved();
    for (number, page, byte) in [(0, 1, 0), (0, 700, 15), (0, 3000, 3), (0, 4354, 8), (1, 0, 15)] {
        let (name, offset) =
            (format!("block{number}"), saved.block(number).pages_offset + page * 4096);
        let hash = saved.hashes_offset(number) + page * 16 + byte;
        saved.flip(hash);
        assert_eq!(pages_of(&saved.check()), [(FindingKind::StrayHash, &*name, page, offset)]);
        assert_eq!(damaged_page(saved.verify_pages().unwrap_err()), (name, page, offset));
        saved.flip(hash);
        println!("cases: 2 flips");
    }
}

/// The kernel reports data in units of 4096 bytes, and a page of 64 KiB has 16 of them.
#[test]
fn bytes_in_the_middle_of_a_large_zero_page_are_found() {
    let saved = saved_with(65536, &[8 << 20], &[(0, 0), (0, (8 << 20) - 1)]);
    let pages_offset = saved.block(0).pages_offset;
    for (page, byte) in [(1, 65535), (40, 20481), (126, 40000)] {
        let offset = pages_offset + page * 65536;
        saved.flip(offset + byte);
        let expected = [(FindingKind::StalePage, "block0", page, offset)];
        assert_eq!(pages_of(&saved.check()), expected);
        saved.file().write_all_at(&[0; 65536], offset).unwrap();
        assert_eq!(pages_of(&saved.check()), []);
        let hash = saved.hashes_offset(0) + page * 16;
        saved.flip(hash);
        let expected = [(FindingKind::StrayHash, "block0", page, offset)];
        assert_eq!(pages_of(&saved.check()), expected);
        saved.flip(hash);
        println!("cases: 2 flips");
    }
}

#[test]
fn bytes_in_a_block_without_data_are_found() {
    let saved = saved_with(65536, &[1 << 20, 8 << 20], &[(0, 0)]);
    let pages_offset = saved.block(1).pages_offset;
    for (page, byte) in [(0, 4097), (40, 20481), (127, 65535)] {
        let offset = pages_offset + page * 65536;
        saved.flip(offset + byte);
        let expected = [(FindingKind::StalePage, "block1", page, offset)];
        assert_eq!(pages_of(&saved.check()), expected);
        // A zero byte that is allocated is no damage.
        saved.flip(offset + byte);
        assert_eq!(pages_of(&saved.check()), []);
        println!("cases: 1 flips");
    }
    // All of these places have allocated data now; a stale byte after them is still found.
    let offset = pages_offset + 100 * 65536;
    saved.flip(offset + 30000);
    assert_eq!(pages_of(&saved.check()), [(FindingKind::StalePage, "block1", 100, offset)]);
}

#[test]
fn bytes_that_belong_to_nothing_are_found_where_they_lie() {
    let saved = saved();
    let snapshot = saved.open();
    let manifest = snapshot.manifest().unwrap();
    let (ram, rom) = (&snapshot.structure().blocks[0], &snapshot.structure().blocks[1]);
    let metas = &manifest.meta.blocks;
    let stream_end = snapshot.structure().device_state.stream_end;
    for offset in [
        ram.bitmap_offset + ram.bitmap_len(),
        ram.mark_offset().unwrap() - 1,
        rom.pages_offset - 1,
        stream_end,
        metas[0].hashes_offset - 1,
        metas[0].hashes_offset + (RAM_LEN as u64 / 4096) * 16,
        metas[1].hashes_offset + 3 * 16,
        manifest.footer.metadata_offset - 1,
    ] {
        saved.flip(offset);
        let report = saved.check();
        assert_eq!(
            sections_of(&report),
            [(FindingKind::Padding, "padding", offset)],
            "{offset:#x}"
        );
        saved.verify_pages().unwrap();
        saved.flip(offset);
        println!("cases: 1 flips");
    }
}

#[test]
fn parts_with_a_checksum_are_found_by_their_names() {
    let saved = saved();
    let (state, mark) =
        (saved.open().structure().device_state.start, saved.block(0).mark_offset().unwrap());
    saved.flip(mark);
    assert_eq!(sections_of(&saved.check()), [(FindingKind::Checksum, "mark", mark)]);
    saved.flip(mark);
    // A page whose bitmap bit is cleared counts as a zero page that has bytes and a hash.
    let rom = saved.block(1);
    let mut bits = [0; 8];
    saved.file().read_exact_at(&mut bits, rom.bitmap_offset).unwrap();
    let without = (u64::from_le_bytes(bits) & !0b10).to_le_bytes();
    saved.file().write_all_at(&without, rom.bitmap_offset).unwrap();
    let report = saved.check();
    let kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind).collect();
    let (page, total) = (FindingKind::StalePage, report.findings_total);
    let expected = [FindingKind::Checksum, FindingKind::PageCount, page, FindingKind::StrayHash];
    assert_eq!((&kinds[..], total, report.pages_checked), (&expected[..], 4, 4));
    assert_eq!(report.findings[1].section.as_deref(), Some("block1"));
    saved.file().write_all_at(&bits, rom.bitmap_offset).unwrap();
    assert!(saved.check().findings.is_empty() && state > mark);
}

#[test]
fn all_findings_are_counted_and_the_first_are_listed() {
    let places: Vec<_> = (0..1200).map(|page| (0, page * 4096)).collect();
    let saved = saved_with(4096, &[8 << 20], &places);
    let first = saved.block(0).pages_offset;
    for page in 0..1003 {
        saved.file().write_all_at(&[7], first + page * 4096).unwrap();
    }
    for options in [one_job(), CheckOptions::default().jobs(Jobs::new(4).unwrap())] {
        let report = check_by(&saved.open(), &options);
        assert_eq!((report.findings.len(), report.findings_total), (1000, 1003));
        assert_eq!(report.pages_checked, 1200);
        assert!(report.findings.is_sorted_by_key(|finding| finding.offset));
    }
}

#[test]
fn parts_that_changed_are_counted_and_the_first_are_listed() {
    let saved = saved();
    let snapshot = saved.open();
    let manifest = snapshot.manifest().unwrap();
    let (mut meta, footer) = (manifest.meta.clone(), manifest.footer);
    // Extents of one byte each, whose checksums do not match.
    meta.extents.extend((0..1002).map(|_| ExtentMeta::of("part", 0, b"x")));
    let file = saved.file();
    file.set_len(footer.metadata_offset).unwrap();
    let metadata = meta.encode(footer.stream_end, footer.metadata_offset);
    file.write_all_at(&metadata, footer.metadata_offset).unwrap();
    saved.flip(saved.block(0).pages_offset);
    let report = saved.check();
    assert_eq!((report.findings.len(), report.findings_total), (1000, 1003));
    assert!(report.findings.iter().all(|finding| finding.kind == FindingKind::Checksum));
}

#[test]
fn a_file_without_a_manifest_ends_with_its_stream() {
    let saved = saved();
    let end = saved.make_foreign();
    let report = saved.check();
    assert_eq!(sections_of(&report), []);
    assert_eq!((report.format, report.pages_checked), (FileFormat::MappedRam, 0));
    assert!(report.io.is_none());
    for extra in [1, 3] {
        saved.file().set_len(end + extra).unwrap();
        assert_eq!(sections_of(&saved.check()), [], "zeros are those of a copy");
        saved.file().write_all_at(&[1], end + extra - 1).unwrap();
        let report = saved.check();
        let expected = [(FindingKind::TrailingBytes, "after the stream", end)];
        assert_eq!(sections_of(&report), expected);
        saved.file().set_len(end).unwrap();
    }
    // The pages have no hashes, so nothing is compared.
    saved.flip(saved.block(0).pages_offset + 9);
    saved.verify_pages().unwrap();
    assert!(saved.loaded().unwrap() != saved.memory);
}

fn open_error(path: &Path) -> SnapshotError {
    Snapshot::open(path, 0).unwrap_err()
}

#[test]
fn a_file_of_ours_that_was_cut_has_lost_its_end() {
    let saved = saved();
    let len = saved.open().file_len();
    saved.file().set_len(len - 1).unwrap();
    let SnapshotError::LostEnd { offset, .. } = open_error(&saved.path) else { panic!("not cut") };
    assert_eq!(offset, len - 1 - 64);
}

/// `qemu-img convert` and a copy to a block device add zeros. QEMU loads such a file, and vmfile said that it
/// had lost its end.
#[test]
fn zeros_behind_the_end_do_not_matter_and_other_bytes_do() {
    let saved = saved();
    let len = saved.open().file_len();
    let findings = || {
        let report = check(&saved.open(), &CheckOptions::default(), &Control::none()).unwrap();
        report.findings.iter().map(|one| (one.kind, one.offset)).collect::<Vec<_>>()
    };
    let padded_len = len + (64 << 20);
    for padded in [len + 1, len.next_multiple_of(512), padded_len] {
        saved.file().set_len(padded).unwrap();
        assert_eq!(saved.open().file_len(), len);
        assert_eq!(findings(), []);
    }
    saved.file().write_all_at(&[1], len + 70_000).unwrap();
    assert_eq!(findings(), [(FindingKind::Padding, len + 70_000)]);
    saved.file().write_all_at(&[1], padded_len - 1).unwrap();
    let error = Snapshot::open(&saved.path, 0).unwrap_err();
    assert!(matches!(error, SnapshotError::LostEnd { .. }), "{error}");
    saved.file().set_len(padded_len - 1).unwrap();
    for cut in 1..64 {
        saved.file().set_len(len - cut).unwrap();
        let error = Snapshot::open(&saved.path, 0).unwrap_err();
        assert!(matches!(error, SnapshotError::LostEnd { .. }), "{cut}: {error}");
        println!("cases: 1 truncations");
    }
    saved.file().set_len(padded_len - 1).unwrap();
    // The end that is behind the zeros is not that of this file.
    saved.file().write_all_at(&[0; 64], len - 64).unwrap();
    let error = Snapshot::open(&saved.path, 0).unwrap_err();
    assert!(matches!(error, SnapshotError::LostEnd { .. }), "{error}");
}
