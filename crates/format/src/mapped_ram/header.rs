//! The mapped-ram header: where one RAM block's pages live in the file.
//!
//! QEMU writes it after each RAM block's name and length when the capability `mapped-ram` is on.
//!
//! ```text
//! offset  size  field          meaning
//!      0     4  version        1
//!      4     8  page_size      guest page size, in bytes
//!     12     8  bitmap_offset  file offset of the page bitmap
//!     20     8  pages_offset   file offset of page 0
//! ```
//!
//! All fields are big-endian and there is no padding. A page whose bit is clear is a zero page.

use alloc::vec::Vec;

use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind};
use crate::page::PageSize;

/// The newest header version that this crate reads, and the one it writes. QEMU 9.0 to 11.0.
const VERSION: u32 = 1;

/// The header's length in the file, in bytes.
pub const HEADER_LEN: usize = 28;

/// Where one RAM block's pages live in a mapped-ram file.
///
/// A value of this type has passed every check that needs the header alone: the page size is valid,
/// and `pages_offset` is a multiple of it. The caller, who knows the file's length, checks that the
/// offsets lie inside the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRamHeader {
    /// The size of the block's pages.
    pub page_size: PageSize,
    /// File offset of the page bitmap, in bytes.
    pub bitmap_offset: u64,
    /// File offset of page 0, in bytes.
    pub pages_offset: u64,
}

impl MappedRamHeader {
    pub(crate) fn decode(cursor: &mut Cursor<'_>) -> Result<MappedRamHeader, FormatError> {
        let offset = cursor.offset();
        let version = cursor.be32("mapped-ram version")?;
        if version > VERSION {
            let (found, max) = (version.into(), VERSION.into());
            let kind = FormatErrorKind::TooLarge { field: "mapped-ram version", found, max };
            return Err(FormatError::new(offset, kind));
        }
        let offset = cursor.offset();
        let found = cursor.be64("page size")?;
        let page_size = PageSize::new(found)
            .ok_or_else(|| FormatError::new(offset, FormatErrorKind::BadPageSize { found }))?;
        let bitmap_offset = cursor.be64("bitmap offset")?;
        let offset = cursor.offset();
        let pages_offset = cursor.be64("pages offset")?;
        // QEMU aligns pages to 1 MiB, but says that the value may change. So only page alignment is
        // required, as by QEMU's own reader.
        if page_size.pages_in(pages_offset).is_none() {
            let kind = FormatErrorKind::Misaligned {
                field: "pages offset",
                found: pages_offset,
                alignment: page_size.bytes(),
            };
            return Err(FormatError::new(offset, kind));
        }
        Ok(MappedRamHeader { page_size, bitmap_offset, pages_offset })
    }

    pub(crate) fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&VERSION.to_be_bytes());
        bytes.extend_from_slice(&self.page_size.bytes().to_be_bytes());
        bytes.extend_from_slice(&self.bitmap_offset.to_be_bytes());
        bytes.extend_from_slice(&self.pages_offset.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    /// Bytes as QEMU 10.0.2 wrote them for pc.ram: bitmap at 0x8e, pages at 1 MiB.
    #[rustfmt::skip]
    const GOLDEN: [u8; HEADER_LEN] = [
        0x00, 0x00, 0x00, 0x01,                         // version
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00, // page_size
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x8e, // bitmap_offset
        0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, // pages_offset
    ];

    fn decode(bytes: &[u8]) -> Result<MappedRamHeader, FormatError> {
        MappedRamHeader::decode(&mut Cursor::new(bytes, 0x72))
    }

    #[test]
    fn decodes_and_encodes_the_header_qemu_writes() {
        let header = decode(&GOLDEN).unwrap();
        assert_eq!((header.bitmap_offset, header.pages_offset), (0x8e, 0x10_0000));
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        assert_eq!(bytes, GOLDEN);
    }

    #[test]
    fn refuses_a_newer_version_and_bad_pages() {
        let mut bytes = GOLDEN;
        bytes[3] = 2;
        let text = "at offset 0x72: mapped-ram version is 2, at most 1 is accepted";
        assert_eq!(decode(&bytes).unwrap_err().to_string(), text);

        let mut bytes = GOLDEN;
        bytes[10] = 0;
        let text = "at offset 0x76: page size 0 is not a power of two from 512 to 65536";
        assert_eq!(decode(&bytes).unwrap_err().to_string(), text);

        let mut bytes = GOLDEN;
        bytes[27] = 1;
        let text = "at offset 0x86: pages offset is 0x100001, not a multiple of 4096";
        assert_eq!(decode(&bytes).unwrap_err().to_string(), text);
    }
}
