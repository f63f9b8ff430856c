//! `PageBitmap::decode`, `encode`, and the runs.
//!
//! The first byte of the input says by how many pages the bitmap is shorter than its bytes; the
//! next two are the range of pages whose runs are compared.
//!
//! Contract: no panic; a bitmap of another length is refused; a decoded bitmap has the bits of its
//! bytes, also after it is encoded and decoded again; the runs are those that a naive loop finds.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmfile_format::page_bitmap::encoded_len;
use vmfile_format::{PageBitmap, PageCount, PageIndex, PageRange};

fuzz_target!(|input: &[u8]| {
    let Some((&[lacking, from, to], bytes)) = input.split_first_chunk::<3>() else { return };
    let pages = (bytes.len() as u64 * 8).saturating_sub(u64::from(lacking));
    let pages = PageCount(pages);
    let Some(bitmap) = PageBitmap::decode(bytes, pages) else {
        assert_ne!(bytes.len() as u64, encoded_len(pages));
        return;
    };
    assert_eq!(bytes.len() as u64, encoded_len(pages));
    let bit = |page: u64| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1;
    let encoded = bitmap.encode();
    assert_eq!(PageBitmap::decode(&encoded, pages).as_ref(), Some(&bitmap));
    assert_eq!(encoded.len(), bytes.len());

    let range = PageRange::new(u64::from(from) * 4, u64::from(to) * 4);
    let runs: Vec<PageRange> = bitmap.runs_within(range).collect();
    for pair in runs.windows(2) {
        assert!(pair[0].end < pair[1].start, "runs are in order and do not touch");
    }
    let from_runs: Vec<u64> = runs.iter().flat_map(|run| run.start.0..run.end.0).collect();
    let end = range.end.0.min(pages.0);
    let naive: Vec<u64> = (range.start.0..end).filter(|&page| bit(page)).collect();
    assert_eq!(from_runs, naive);

    let count = (0..pages.0).filter(|&page| bit(page)).count();
    assert_eq!(bitmap.data_count(), PageCount(count as u64));
    let sum: u64 = bitmap.data_runs().map(|run| run.count().0).sum();
    assert_eq!(sum, count as u64);
    assert!(!bitmap.contains(PageIndex(pages.0)) && !bitmap.contains(PageIndex(u64::MAX)));

    let mut rebuilt = PageBitmap::new(pages);
    for page in (0..pages.0).map(PageIndex) {
        rebuilt.set(page, bit(page.0));
    }
    assert_eq!(rebuilt, bitmap);
});
