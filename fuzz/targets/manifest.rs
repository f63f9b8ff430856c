//! `Footer::decode`, `Meta::decode`, and their encoders.
//!
//! The input is the metadata and the footer, as they end a file; its first byte says how much file
//! lies before them. Checksums would stop a fuzzer at the door, so the metadata goes in a second
//! time, under a footer that fits it.
//!
//! Contract: no panic; what was decoded lies inside the file and below the limits, and survives its
//! encoding.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmfile_format::checksum;
use vmfile_format::limits::MANIFEST_LEN_MAX;
use vmfile_format::manifest::{FOOTER_LEN, Footer, Meta};

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
    let encoded = meta.encode(before, before);
    let (json, footer) = encoded.split_at(encoded.len() - FOOTER_LEN as usize);
    let footer = Footer::decode(footer, before + encoded.len() as u64);
    let footer = footer.expect("our own footer").expect("one");
    let again = Meta::decode(json, &footer).expect("our own metadata");
    assert_eq!(again, meta);
});
