//! Files of the format's first version, and of future versions.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vmfile_format::manifest::{ExtentMeta, Meta};
use vmfile_pages::check::{CheckOptions, FindingKind, check};
use vmfile_pages::memory_file::{Contents, FileOptions, load, save};
use vmfile_pages::{
    Control, OwnMemory, OwnMemoryMut, PageSize, RamBlock, RamLayout, Snapshot, SnapshotError,
};

const PAGES: usize = 3;

fn memory() -> Vec<u8> {
    let mut memory = vec![0; PAGES * 4096];
    memory[4096..8192].fill(0xa1);
    memory
}

/// Saves three pages.
fn saved() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory.vmf");
    let block = RamBlock::new("ram".to_owned(), PAGES as u64 * 4096, PageSize::KIB_4).unwrap();
    let ram = RamLayout::new(vec![block]).unwrap();
    let memory = memory();
    let source = OwnMemory::new(vec![&memory]);
    let state: [(&str, &[u8]); 1] = [("cpu", &[1])];
    let options = FileOptions::default();
    save(&path, Contents::new("test-1.0", ram, &state), &source, &options, &Control::none())
        .unwrap();
    (directory, path)
}

/// Rewrites the manifest as another version would write it: with the table `table` after the
/// hashes, and with metadata that `change` has changed.
fn rewrite(path: &Path, table: &[u8], change: impl FnOnce(&mut Meta)) {
    let snapshot = Snapshot::open(path, 0).unwrap();
    let manifest = snapshot.manifest().unwrap();
    let (mut meta, footer) = (manifest.meta.clone(), manifest.footer);
    let offset = footer.metadata_offset;
    let metadata_offset = offset + (table.len() as u64).next_multiple_of(4096);
    if !table.is_empty() {
        meta.tables.push(ExtentMeta::of("later", offset, table));
    }
    change(&mut meta);
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(offset).unwrap();
    file.write_all_at(table, offset).unwrap();
    file.write_all_at(&meta.encode(footer.stream_end, metadata_offset), metadata_offset).unwrap();
}

fn loads(path: &Path) {
    let mut found = vec![0xff; PAGES * 4096];
    let sink = OwnMemoryMut::new(vec![&mut found]);
    let snapshot = Snapshot::open(path, 0).unwrap();
    load(&snapshot, &sink, &FileOptions::default(), &Control::none()).unwrap();
    drop(sink);
    assert!(found == memory());
}

fn findings(path: &Path) -> Vec<(FindingKind, Option<String>)> {
    let snapshot = Snapshot::open(path, 0).unwrap();
    let report = check(&snapshot, &CheckOptions::default(), &Control::none()).unwrap();
    report.findings.into_iter().map(|finding| (finding.kind, finding.section)).collect()
}

#[test]
fn a_file_with_a_feature_that_is_not_known_is_refused_by_its_name() {
    let (_directory, path) = saved();
    rewrite(&path, &[], |meta| meta.features.incompatible.push("striped".to_owned()));
    let error = Snapshot::open(&path, 0).unwrap_err();
    let SnapshotError::Newer { source, .. } = &error else { panic!("{error}") };
    assert!(source.to_string().contains("\"striped\""), "{source}");
    assert!(error.to_string().ends_with("needs a newer version of vmfile"), "{error}");
}

#[test]
fn a_compatible_feature_is_passed_over() {
    let (_directory, path) = saved();
    rewrite(&path, &[], |meta| meta.features.compatible.push("hints".to_owned()));
    assert_eq!(findings(&path), []);
    loads(&path);
}

#[test]
fn a_table_that_is_not_known_is_passed_over_and_checked() {
    let (_directory, path) = saved();
    rewrite(&path, &[7; 5000], |_| {});
    let snapshot = Snapshot::open(&path, 0).unwrap();
    let manifest = snapshot.manifest().unwrap();
    assert_eq!(manifest.footer.version, 2);
    let table = manifest.meta.tables[0].clone();
    assert_eq!(findings(&path), []);
    loads(&path);

    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[8], table.offset + 4999).unwrap();
    assert_eq!(findings(&path), [(FindingKind::Checksum, Some("later".to_owned()))]);
    file.write_all_at(&[7], table.offset + 4999).unwrap();
    file.write_all_at(&[1], table.offset + 5000).unwrap();
    assert_eq!(findings(&path), [(FindingKind::Padding, Some("padding".to_owned()))]);
}

#[test]
fn a_table_over_the_hashes_is_refused() {
    let (_directory, path) = saved();
    rewrite(&path, &[7; 10], |meta| meta.tables[0].offset -= 4096);
    let error = Snapshot::open(&path, 0).unwrap_err();
    assert!(matches!(error, SnapshotError::Format { .. }), "{error}");
}

/// The worked example of docs/format.md, as it was at version 1. The file has pieces: offset,
/// length, bytes.
#[test]
fn a_whole_file_of_the_first_version_is_checked_and_loaded() {
    let golden = "../format/tests/golden/vmfile-v1-example.pieces";
    let pieces = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(golden)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v1.vmf");
    let file = File::create_new(&path).unwrap();
    let mut rest = pieces.as_slice();
    while let Some((head, after)) = rest.split_first_chunk::<16>() {
        let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
        let (offset, len) = (number(&head[..8]), number(&head[8..]));
        let (piece, after) = after.split_at(usize::try_from(len).unwrap());
        // The first piece describes the file.
        if offset != u64::MAX {
            file.write_all_at(piece, offset).unwrap();
        }
        rest = after;
    }
    assert_eq!(findings(&path), []);
    let (mut ram, mut bios) = (vec![0xff; 3 * 4096], vec![0xff; 4096]);
    let sink = OwnMemoryMut::new(vec![&mut ram, &mut bios]);
    let snapshot = Snapshot::open(&path, 0).unwrap();
    load(&snapshot, &sink, &FileOptions::default(), &Control::none()).unwrap();
    drop(sink);
    let expected = [[0xa0; 4096], [0; 4096], [0xa2; 4096]].concat();
    assert!(ram == expected && bios == [0xf4; 4096]);
}
