//! `Footer::decode`, `Meta::decode`, `Meta::check`, and the encoders.
//!
//! The first byte of the input says how long the file is before the metadata; the rest is the
//! metadata and the footer, which end the file. A fuzzer seldom makes a checksum that matches, so
//! the same metadata is decoded a second time, with a footer that matches it.
//!
//! Contract: no panic; what is decoded lies inside the file and within the limits, and stays the
//! same when it is encoded and decoded again; if metadata passes its check against a file, its
//! tables and extents lie in the parts of the file that are meant for them.

#![no_main]

use std::convert::Infallible;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vmfile_format::checksum;
use vmfile_format::limits::MANIFEST_LEN_MAX;
use vmfile_format::manifest::{FOOTER_LEN, Footer, Meta, table_len};
use vmfile_format::mapped_ram::MappedRamFile;

/// The file that metadata is checked against. Its first two bytes are input of the target
/// `mapped_ram_file` and do not belong to the file.
const FILE: &[u8] = include_bytes!("../seeds/mapped_ram_file/pages_of_512_bytes");

static STRUCTURE: LazyLock<MappedRamFile> = LazyLock::new(|| {
    let file = &FILE[2..];
    let read =
        |offset, len| Ok::<_, Infallible>(file[offset as usize..offset as usize + len].to_vec());
    MappedRamFile::read(0, file.len() as u64, read).expect("a seed that is a whole file")
});

fuzz_target!(|input: &[u8]| {
    let Some((&before, bytes)) = input.split_first() else { return };
    let before = u64::from(before) << 12;
    let file_len = before + bytes.len() as u64;
    let (json, footer) = bytes.split_at(bytes.len().saturating_sub(FOOTER_LEN as usize));
    if let Ok(Some(footer)) = Footer::decode(footer, file_len) {
        assert!(footer.metadata_len <= MANIFEST_LEN_MAX);
        assert_eq!(footer.metadata_offset + footer.metadata_len, file_len - FOOTER_LEN);
        assert!(footer.stream_end <= footer.metadata_offset);
        let decoded = Footer::decode(&footer.encode(), file_len);
        assert_eq!(decoded, Ok(Some(footer)));
        let _ = Meta::decode(json, &footer);
    }

    if bytes.len() as u64 <= FOOTER_LEN {
        return;
    }

    let footer = Footer {
        version: 2,
        stream_end: before,
        metadata_offset: before,
        metadata_len: json.len() as u64,
        metadata_hash: checksum(json),
    };
    assert_eq!(Footer::decode(&footer.encode(), file_len), Ok(Some(footer)));
    let meta = match Meta::decode(json, &footer) {
        Ok(meta) => meta,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    for extent in &meta.extents {
        let _ = extent.matches(json);
    }
    check(&meta);
    let encoded = meta.encode(before, before);
    let (json, footer) = encoded.split_at(encoded.len() - FOOTER_LEN as usize);
    let footer = Footer::decode(footer, before + encoded.len() as u64);
    let footer = footer.expect("our own footer").expect("one");
    let mut again = Meta::decode(json, &footer).expect("our own metadata");
    if let (Some(read), Some(written)) = (again.pause_seconds, meta.pause_seconds) {
        // The JSON parser rounds some numbers to a neighbor of the nearest one.
        assert!((read - written).abs() <= written.abs() * 1e-15 + f64::MIN_POSITIVE);
        again.pause_seconds = meta.pause_seconds;
    }
    assert_eq!(again, meta);
});

fn check(meta: &Meta) {
    let stream_end = STRUCTURE.device_state.stream_end;
    let (metadata_offset, metadata_len) = (1 << 20, 0);
    let footer = Footer { version: 2, stream_end, metadata_offset, metadata_len, metadata_hash: 0 };
    if meta.check(&STRUCTURE, &footer).is_err() {
        return;
    }
    let mut free = stream_end;
    for (block, placed) in meta.blocks.iter().zip(&STRUCTURE.blocks) {
        assert_eq!(block.name, placed.block.name());
        assert!(block.hashes_offset >= free);
        free = block.hashes_offset + table_len(placed.block.page_count());
    }
    for table in &meta.tables {
        assert!(table.offset >= free);
        free = table.offset + table.bytes;
    }
    assert!(free <= footer.metadata_offset);
    for section in &meta.cpu_sections {
        assert!(section.offset + section.bytes <= STRUCTURE.device_state.end);
    }
    assert!(meta.extents.iter().all(|extent| extent.offset + extent.bytes <= stream_end));
}
