//! The last 64 bytes of a vmfile: they say where the manifest is.
//!
//! ```text
//! offset  size  field            meaning
//!      0     8  magic            "vmfile\r\n"
//!      8     4  version          1, or 2 where the file has what version 1 did not know
//!     12     4  footer_len       64
//!     16     8  stream_end       file offset one past QEMU's last byte
//!     24     8  metadata_offset  file offset of the metadata
//!     32     8  metadata_len     its length; the footer follows it
//!     40    16  metadata_hash    XXH3-128 of the metadata
//!     56     8  footer_hash      upper half of the XXH3-128 of bytes 0 to 55
//! ```
//!
//! All fields are big-endian, as QEMU's are.

use alloc::vec::Vec;

use super::base::SnapshotId;
use crate::checksum;
use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::MANIFEST_LEN_MAX;

/// The first bytes of a footer. The carriage return and line feed show a file that was copied as text.
pub const FOOTER_MAGIC: &[u8; 8] = b"vmfile\r\n";

/// The newest version that this crate reads. It writes version 2 only if a reader of version 1
/// would misread the file, and version 1 otherwise.
const VERSION_MAX: u32 = 2;

/// The footer's length, in bytes.
pub const FOOTER_LEN: u64 = 64;

/// Where the manifest lies.
///
/// A value of this type has passed every check that needs the footer and the file's length alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// 1, or 2 for a file with incompatible features or further tables.
    pub version: u32,
    /// File offset one past QEMU's last byte.
    pub stream_end: u64,
    /// File offset of the metadata.
    pub metadata_offset: u64,
    /// Length of the metadata, in bytes.
    pub metadata_len: u64,
    /// XXH3-128 of the metadata.
    pub metadata_hash: u128,
}

impl Footer {
    /// Returns the identity of the file.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        SnapshotId::new(self.metadata_hash)
    }

    /// Decodes the last bytes of a file of `file_len` bytes, or `None` if they are no footer at
    /// all: the file is not a vmfile, or has lost its end.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if they are a footer that is damaged or of a newer version.
    pub fn decode(bytes: &[u8], file_len: u64) -> Result<Option<Footer>, FormatError> {
        let Some(start) = file_len.checked_sub(FOOTER_LEN) else { return Ok(None) };
        if bytes.len() as u64 != FOOTER_LEN || !bytes.starts_with(FOOTER_MAGIC) {
            return Ok(None);
        }
        let mut cursor = Cursor::new(bytes, start);
        cursor.bytes("footer magic", FOOTER_MAGIC.len())?;
        let version = cursor.be32("footer version")?;
        // This comes before the version, so that a damaged footer is not taken for a newer one. All
        // versions have the hash in this place.
        let covered = bytes.get(..56).unwrap_or_default();
        let recorded = bytes.get(56..).unwrap_or_default();
        if recorded != upper_half(checksum(covered)).to_be_bytes() {
            return Err(FormatError::new(start, FormatErrorKind::Checksum { field: "footer" }));
        }
        if version > VERSION_MAX {
            let kind = FormatErrorKind::NewerFooter { found: version, max: VERSION_MAX };
            return Err(FormatError::new(start.saturating_add(8), kind));
        }
        cursor.expect_be32("footer length", 64)?;
        let footer = Footer {
            version,
            stream_end: cursor.be64("stream end")?,
            metadata_offset: cursor.be64("metadata offset")?,
            metadata_len: cursor.be64("metadata length")?,
            metadata_hash: cursor.be128("metadata hash")?,
        };
        footer.check(start)?;
        Ok(Some(footer))
    }

    fn check(&self, footer_offset: u64) -> Result<(), FormatError> {
        if self.metadata_len > MANIFEST_LEN_MAX {
            let (field, found) = ("metadata length", self.metadata_len);
            let kind = FormatErrorKind::TooLarge { field, found, max: MANIFEST_LEN_MAX };
            return Err(FormatError::new(footer_offset, kind));
        }
        let end = self.metadata_offset.saturating_add(self.metadata_len);
        if end != footer_offset {
            let (field, limit) = ("metadata", footer_offset);
            let kind = FormatErrorKind::Outside { field, end, limit };
            return Err(FormatError::new(footer_offset, kind));
        }
        if self.stream_end > self.metadata_offset {
            let (field, end, limit) = ("stream", self.stream_end, self.metadata_offset);
            let kind = FormatErrorKind::Outside { field, end, limit };
            return Err(FormatError::new(footer_offset, kind));
        }
        Ok(())
    }

    /// Encodes the footer.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::from(*FOOTER_MAGIC);
        bytes.extend_from_slice(&self.version.to_be_bytes());
        bytes.extend_from_slice(&64_u32.to_be_bytes());
        bytes.extend_from_slice(&self.stream_end.to_be_bytes());
        bytes.extend_from_slice(&self.metadata_offset.to_be_bytes());
        bytes.extend_from_slice(&self.metadata_len.to_be_bytes());
        bytes.extend_from_slice(&self.metadata_hash.to_be_bytes());
        let hash = upper_half(checksum(&bytes));
        bytes.extend_from_slice(&hash.to_be_bytes());
        bytes
    }
}

fn upper_half(hash: u128) -> u64 {
    u64::try_from(hash >> 64).expect("64 bits are left")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOOTER: Footer = Footer {
        version: 1,
        stream_end: 0x1000,
        metadata_offset: 0x3000,
        metadata_len: 0x100,
        metadata_hash: 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
    };

    #[test]
    fn survives_its_encoding() {
        let bytes = FOOTER.encode();
        assert_eq!(bytes.len() as u64, FOOTER_LEN);
        assert_eq!(Footer::decode(&bytes, 0x3140), Ok(Some(FOOTER)));
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        for index in 0..64 {
            let mut bytes = FOOTER.encode();
            bytes[index] ^= 0x40;
            assert_ne!(Footer::decode(&bytes, 0x3140), Ok(Some(FOOTER)), "byte {index}");
        }
    }

    #[test]
    fn a_footer_of_a_longer_or_shorter_file_is_refused() {
        let bytes = FOOTER.encode();
        assert!(Footer::decode(&bytes, 0x3141).is_err());
        assert!(Footer::decode(&bytes, 0x313f).is_err());
        assert_eq!(Footer::decode(&bytes[..63], 63), Ok(None));
    }
}
