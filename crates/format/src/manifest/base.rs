//! Files that keep some pages in another file, their base.
//!
//! The page bitmap of such a file, a thin one, says which pages are zero, as in every file. A further
//! table, [`BASE_PAGES`], says which of the others are those of the base: the file has a hole at their
//! places. The head names the feature as well, so that QEMU refuses the file and does not take the
//! holes for zero pages.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::page::PageCount;
use crate::page_bitmap::{PageBitmap, encoded_len};

/// The name of the table that says which pages the base has: the bitmaps of all blocks, one after
/// another.
pub const BASE_PAGES: &str = "base-pages";

/// The identity of a file: the hash of its metadata.
///
/// The metadata have the checksums of everything but pages, a time, and a random seed. A copy
/// with another name has the same identity; no two saves have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotId([u8; 16]);

impl SnapshotId {
    /// Takes the hash of the metadata.
    pub(super) fn new(metadata_hash: u128) -> SnapshotId {
        SnapshotId(metadata_hash.to_be_bytes())
    }

    /// Reads the form that [`fmt::Display`] writes: 32 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<SnapshotId> {
        let is_hex = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_hex { u128::from_str_radix(text, 16).ok().map(SnapshotId::new) } else { None }
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl Serialize for SnapshotId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SnapshotId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SnapshotId, D::Error> {
        let text = String::deserialize(deserializer)?;
        let error = || serde::de::Error::custom("an id is 32 hexadecimal digits");
        SnapshotId::parse(&text).ok_or_else(error)
    }
}

/// The file that has the pages that a thin file lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseMeta {
    /// Its identity.
    pub id: SnapshotId,
    /// Where it was: an absolute path.
    pub path: String,
}

/// Encodes the table of the pages that the base has: a bitmap for each block.
#[must_use]
pub fn encode_base_pages(bitmaps: &[PageBitmap]) -> Vec<u8> {
    bitmaps.iter().flat_map(PageBitmap::encode).collect()
}

/// Decodes the table for blocks with these numbers of pages; `None` if it has another length.
#[must_use]
pub fn decode_base_pages(bytes: &[u8], blocks: &[PageCount]) -> Option<Vec<PageBitmap>> {
    let mut rest = bytes;
    let mut bitmaps = Vec::with_capacity(blocks.len());
    for &pages in blocks {
        let len = usize::try_from(encoded_len(pages)).ok()?;
        let (bitmap, after) = rest.split_at_checked(len)?;
        bitmaps.push(PageBitmap::decode(bitmap, pages)?);
        rest = after;
    }
    rest.is_empty().then_some(bitmaps)
}

/// A seed in JSON: 16 hexadecimal digits, because many readers keep numbers as floating point.
pub(super) mod hex_seed {
    use alloc::format;

    use super::{Deserialize, Deserializer, Serializer, String};

    pub(crate) fn serialize<S: Serializer>(seed: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{seed:016x}"))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        let is_hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let seed = if is_hex { u64::from_str_radix(&text, 16).ok() } else { None };
        seed.ok_or_else(|| serde::de::Error::custom("a seed is 16 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;
    use crate::page::PageIndex;

    #[test]
    fn an_id_is_read_as_it_is_written() {
        let id = SnapshotId::new(0x12);
        assert_eq!(id.to_string(), "00000000000000000000000000000012");
        assert_eq!(SnapshotId::parse(&id.to_string()), Some(id));
        for wrong in ["12", "+0000000000000000000000000000012", "0000000000000000000000000000001g"]
        {
            assert_eq!(SnapshotId::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_table_has_a_bitmap_for_each_block() {
        let mut bitmaps = [PageBitmap::new(PageCount(3)), PageBitmap::new(PageCount(70))];
        bitmaps[1].set(PageIndex(69), true);
        let bytes = encode_base_pages(&bitmaps);
        assert_eq!(bytes.len(), 8 + 16);
        let blocks = [PageCount(3), PageCount(70)];
        assert_eq!(decode_base_pages(&bytes, &blocks).unwrap(), bitmaps);
        assert_eq!(decode_base_pages(&bytes, &blocks[..1]), None);
        assert_eq!(decode_base_pages(&bytes[1..], &blocks), None);
    }
}
