//! The tables of page hashes: XXH3-128 of every page that holds data.

use alloc::vec::Vec;

use crate::limits::FILE_LEN_MAX;
use crate::page::PageCount;

/// Length of one hash in the file, in bytes: XXH3-128, big-endian. Zeros stand for a zero page.
pub const HASH_LEN: u64 = 16;

/// Each table begins at a multiple of this, so that it can be written by direct I/O.
pub const TABLE_ALIGNMENT: u64 = 4096;

/// Returns the length of the table of `pages` pages, in bytes: whole units of [`TABLE_ALIGNMENT`],
/// zeros at the end.
#[must_use]
pub fn table_len(pages: PageCount) -> u64 {
    pages.0.saturating_mul(HASH_LEN).div_ceil(TABLE_ALIGNMENT).saturating_mul(TABLE_ALIGNMENT)
}

/// Places the tables of blocks with these numbers of pages, after QEMU's last byte; returns the
/// offset of each, and the offset one past the last.
///
/// `None` if the file would be longer than [`FILE_LEN_MAX`].
#[must_use]
pub fn place_tables(stream_end: u64, blocks: &[PageCount]) -> Option<(Vec<u64>, u64)> {
    let mut offset = stream_end.checked_next_multiple_of(TABLE_ALIGNMENT)?;
    let mut offsets = Vec::with_capacity(blocks.len());
    for &pages in blocks {
        offsets.push(offset);
        offset = offset.checked_add(table_len(pages)).filter(|&end| end <= FILE_LEN_MAX)?;
    }
    Some((offsets, offset))
}

/// Encodes one hash.
#[must_use]
pub fn encode_hash(hash: u128) -> [u8; 16] {
    hash.to_be_bytes()
}

/// Decodes one hash.
#[must_use]
pub fn decode_hash(bytes: [u8; 16]) -> u128 {
    u128::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_follow_one_another() {
        let (offsets, end) = place_tables(0x1234, &[PageCount(1), PageCount(257)]).unwrap();
        assert_eq!(offsets, [0x2000, 0x3000]);
        assert_eq!(end, 0x5000);
        assert_eq!(place_tables(u64::MAX - 5, &[]), None);
        assert_eq!(place_tables(FILE_LEN_MAX - 4096, &[PageCount(1)]), None);
    }
}
