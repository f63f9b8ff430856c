//! The header of a qcow2 image: what tells whether the image has changed.

use alloc::string::String;
#[cfg(test)]
use alloc::vec::Vec;

use crate::checksum;
use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind};

/// How much of an image [`Qcow2Header::decode`] needs, in bytes: the header, its extensions and the
/// name of the image below, which lie in the first cluster. Extensions of QEMU's (7.2 to 11.1) and
/// the longest name take less than 3 KiB.
pub const QCOW2_HEADER_LEN_MAX: usize = 16 << 10;

const MAGIC: u32 = 0x5146_49fb;
/// The shortest header of version 3, in bytes.
const HEADER_LEN_3: u32 = 104;
const HEADER_LEN_2: u32 = 72;
/// Longest name of the image below that QEMU allows, in bytes.
const NAME_LEN_MAX: u32 = 1023;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const LAZY_REFCOUNTS: u64 = 1;
const END_OF_EXTENSIONS: u32 = 0;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// What the header of a qcow2 image says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// Whether it was not closed: QEMU repairs it when it opens it.
    pub is_dirty: bool,
    /// Whether QEMU has found damage in it.
    pub is_corrupt: bool,
    /// Whether QEMU writes to its header when it closes it: it is dirty, keeps dirty bitmaps, or
    /// counts references lazily.
    pub changes_when_closed: bool,
    /// The image below, as the header names it.
    pub backing_file: Option<String>,
    /// XXH3-128 of the header, its extensions and the name of the image below. The dirty bit and
    /// the autoclear features count as 0.
    pub hash: u128,
}

impl Qcow2Header {
    /// Decodes the beginning of an image.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if it is not a qcow2 image of version 2 or 3, or if `bytes` end
    /// early.
    pub fn decode(bytes: &[u8]) -> Result<Qcow2Header, FormatError> {
        let mut cursor = Cursor::new(bytes, 0);
        let magic = cursor.be32("magic number of qcow2")?;
        if magic != MAGIC {
            return Err(differs("magic number of qcow2", magic, MAGIC));
        }
        let version = cursor.be32("version of qcow2")?;
        if !matches!(version, 2 | 3) {
            return Err(differs("version of qcow2", version, 3));
        }
        let name_offset = cursor.be64("offset of the backing file's name")?;
        let name_len = cursor.be32("length of the backing file's name")?;
        // The fields between are only hashed.
        cursor.bytes("header of qcow2", 52)?;
        let mut is_dirty = false;
        let mut is_corrupt = false;
        let mut is_lazy = false;
        let mut header_len = HEADER_LEN_2;
        if version == 3 {
            let incompatible = cursor.be64("incompatible features")?;
            let compatible = cursor.be64("compatible features")?;
            cursor.be64("autoclear features")?;
            cursor.be32("width of reference counts")?;
            header_len = cursor.be32("length of the header")?;
            is_dirty = incompatible & DIRTY != 0;
            is_corrupt = incompatible & CORRUPT != 0;
            is_lazy = compatible & LAZY_REFCOUNTS != 0;
        }
        let least = if version == 3 { HEADER_LEN_3 } else { HEADER_LEN_2 };
        if header_len < least {
            return Err(differs("length of the header", header_len, least));
        }
        let extensions = Cursor::new(part(bytes, u64::from(header_len), None)?, 0);
        let (extensions_len, has_bitmaps) = walk(extensions)?;
        let name = match name_len {
            0 => None,
            len if len > NAME_LEN_MAX => {
                return Err(differs("length of the backing file's name", len, NAME_LEN_MAX));
            }
            len => Some(part(bytes, name_offset, Some(len))?),
        };
        let head_len = u64::from(header_len).saturating_add(extensions_len);
        let mut hashed =
            part(bytes, 0, Some(u32::try_from(head_len).unwrap_or(u32::MAX)))?.to_vec();
        hide_what_changes(&mut hashed, version);
        hashed.extend_from_slice(name.unwrap_or_default());
        Ok(Qcow2Header {
            is_dirty,
            is_corrupt,
            changes_when_closed: is_dirty || is_lazy || has_bitmaps,
            backing_file: name.map(|name| String::from_utf8_lossy(name).into_owned()),
            hash: checksum(&hashed),
        })
    }
}

/// Clears the dirty bit and the autoclear features in a header: a program clears those that it does
/// not know.
fn hide_what_changes(header: &mut [u8], version: u32) {
    const INCOMPATIBLE_END: usize = 79;
    const AUTOCLEAR: core::ops::Range<usize> = 88..96;
    if version < 3 {
        return;
    }
    if let Some(byte) = header.get_mut(INCOMPATIBLE_END) {
        *byte &= 0xfe;
    }
    if let Some(bits) = header.get_mut(AUTOCLEAR) {
        bits.fill(0);
    }
}

/// Walks the header's extensions; returns their length, with the end's, and whether there are dirty
/// bitmaps.
fn walk(mut cursor: Cursor<'_>) -> Result<(u64, bool), FormatError> {
    let mut has_bitmaps = false;
    loop {
        let kind = cursor.be32("kind of a header extension")?;
        let len = cursor.be32("length of a header extension")?;
        if kind == END_OF_EXTENSIONS {
            return Ok((cursor.offset(), has_bitmaps));
        }
        has_bitmaps |= kind == EXTENSION_BITMAPS;
        let padded = len.checked_next_multiple_of(8).unwrap_or(u32::MAX);
        cursor.bytes("header extension", usize::try_from(padded).unwrap_or(usize::MAX))?;
    }
}

/// Returns a part of the image's beginning.
fn part(bytes: &[u8], offset: u64, len: Option<u32>) -> Result<&[u8], FormatError> {
    let mut cursor = Cursor::new(bytes, 0);
    cursor.bytes("header of qcow2", usize::try_from(offset).unwrap_or(usize::MAX))?;
    let rest = bytes.len().saturating_sub(usize::try_from(offset).unwrap_or(usize::MAX));
    let len = len.map_or(rest, |len| usize::try_from(len).unwrap_or(usize::MAX));
    cursor.bytes("header of qcow2", len)
}

fn differs(field: &'static str, found: u32, expected: u32) -> FormatError {
    let (found, expected) = (found.into(), expected.into());
    FormatError::new(0, FormatErrorKind::Differs { field, found, expected })
}

/// Makes the beginning of an image, for tests.
#[cfg(test)]
fn image(version: u32, incompatible: u64, extensions: &[(u32, &[u8])], name: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&MAGIC.to_be_bytes());
    bytes.extend_from_slice(&version.to_be_bytes());
    bytes.resize(72, 7);
    if version == 3 {
        bytes.extend_from_slice(&incompatible.to_be_bytes());
        bytes.extend_from_slice(&[0; 16]);
        bytes.extend_from_slice(&4_u32.to_be_bytes());
        bytes.extend_from_slice(&104_u32.to_be_bytes());
    }
    for (kind, data) in extensions {
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(data.len()).expect("short").to_be_bytes());
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend_from_slice(&[0; 8]);
    let offset = bytes.len() as u64;
    bytes.extend_from_slice(name);
    bytes[8..16].copy_from_slice(&offset.to_be_bytes());
    bytes[16..20].copy_from_slice(&u32::try_from(name.len()).expect("short").to_be_bytes());
    bytes.resize(QCOW2_HEADER_LEN_MAX, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_name_below_and_the_state_are_read() {
        let bytes = image(3, 3, &[(0xe279_2aca, b"qcow2")], b"/srv/base.qcow2");
        let header = Qcow2Header::decode(&bytes).unwrap();
        assert_eq!(header.backing_file.as_deref(), Some("/srv/base.qcow2"));
        assert!(header.is_dirty && header.is_corrupt && header.changes_when_closed);
        let header = Qcow2Header::decode(&image(2, 0, &[], b"")).unwrap();
        assert_eq!(header.backing_file, None);
        assert!(!header.is_dirty && !header.is_corrupt && !header.changes_when_closed);
    }

    #[test]
    fn an_image_with_bitmaps_changes_when_it_is_closed() {
        let bytes = image(3, 0, &[(EXTENSION_BITMAPS, &[0; 24])], b"");
        assert!(Qcow2Header::decode(&bytes).unwrap().changes_when_closed);
    }

    #[test]
    fn the_hash_is_of_all_but_of_whether_the_image_is_dirty() {
        let hash = |bytes: &[u8]| Qcow2Header::decode(bytes).unwrap().hash;
        let clean = image(3, 0, &[], b"a");
        assert_eq!(hash(&clean), hash(&image(3, 1, &[], b"a")));
        assert_ne!(hash(&clean), hash(&image(3, 2, &[], b"a")), "corrupt");
        assert_ne!(hash(&clean), hash(&image(3, 0, &[], b"b")), "the image below");
        assert_ne!(hash(&clean), hash(&image(3, 0, &[(1, b"x")], b"a")), "an extension");
        let mut grown = clean.clone();
        grown[31] ^= 1;
        assert_ne!(hash(&clean), hash(&grown), "the disk's size");
        let mut written = clean;
        *written.last_mut().unwrap() = 1;
        assert_eq!(hash(&written), hash(&image(3, 0, &[], b"a")), "behind the header");
    }

    #[test]
    fn what_is_no_qcow2_is_refused() {
        assert!(Qcow2Header::decode(b"").is_err());
        assert!(Qcow2Header::decode(&[0; 512]).is_err());
        assert!(Qcow2Header::decode(&image(4, 0, &[], b"")).is_err());
        let whole = image(3, 0, &[], b"name");
        for len in 0..116 {
            assert!(Qcow2Header::decode(&whole[..len]).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(tail in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut bytes = image(3, 0, &[], b"");
            bytes.truncate(8);
            bytes.extend_from_slice(&tail);
            let _ = Qcow2Header::decode(&bytes);
            std::println!("cases: 1 mutations");
        }
    }
}
