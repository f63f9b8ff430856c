//! The named pieces of guest RAM, in the order in which they are saved.

use alloc::string::String;
use alloc::vec::Vec;

use crate::error::{FormatError, FormatErrorKind};
use crate::limits::{BLOCK_LEN_MAX, BLOCK_NAME_LEN_MAX, BLOCK_PAGES_MAX, BLOCKS_MAX};
use crate::page::{PageCount, PageIndex, PageSize};

/// A named, contiguous piece of guest RAM, as QEMU saves it.
///
/// A value of this type has a name of 1 to [`BLOCK_NAME_LEN_MAX`] bytes and a length that is a
/// whole number of pages, not zero, and at most [`BLOCK_LEN_MAX`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    name: String,
    used_length: u64,
    page_size: PageSize,
}

impl RamBlock {
    /// Returns the block `name` of `used_length` bytes in pages of `page_size`.
    ///
    /// # Errors
    ///
    /// Returns [`FormatErrorKind`] if the name or the length is out of its limits.
    pub fn new(
        name: String,
        used_length: u64,
        page_size: PageSize,
    ) -> Result<RamBlock, FormatErrorKind> {
        if name.is_empty() || name.len() > BLOCK_NAME_LEN_MAX {
            return Err(FormatErrorKind::TooLarge {
                field: "length of a RAM block's name",
                found: name.len() as u64,
                max: BLOCK_NAME_LEN_MAX as u64,
            });
        }
        if used_length == 0 || used_length > BLOCK_LEN_MAX {
            return Err(FormatErrorKind::TooLarge {
                field: "length of a RAM block",
                found: used_length,
                max: BLOCK_LEN_MAX,
            });
        }
        let pages = page_size.pages_in(used_length).map_or(0, |pages| pages.0);
        if pages > BLOCK_PAGES_MAX {
            return Err(FormatErrorKind::TooLarge {
                field: "number of pages of a RAM block",
                found: pages,
                max: BLOCK_PAGES_MAX,
            });
        }
        if pages == 0 {
            return Err(FormatErrorKind::Misaligned {
                field: "length of a RAM block",
                found: used_length,
                alignment: page_size.bytes(),
            });
        }
        Ok(RamBlock { name, used_length, page_size })
    }

    /// Returns the block's name: QEMU's `idstr`, such as `pc.ram`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the bytes in use; QEMU may have reserved more.
    #[must_use]
    pub fn used_length(&self) -> u64 {
        self.used_length
    }

    /// Returns the size of the block's pages.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Returns how many pages the block has.
    #[must_use]
    pub fn page_count(&self) -> PageCount {
        self.page_size.pages_in(self.used_length).expect("checked when the block was made")
    }

    /// Returns the page whose first byte lies `block_offset` bytes into the block.
    ///
    /// # Errors
    ///
    /// Returns [`FormatErrorKind`] if no page begins there, or if that is past the end of the
    /// block.
    pub fn page_at(&self, block_offset: u64) -> Result<PageIndex, FormatErrorKind> {
        let Some(page) = self.page_size.pages_in(block_offset) else {
            return Err(FormatErrorKind::Misaligned {
                field: "offset of a page",
                found: block_offset,
                alignment: self.page_size.bytes(),
            });
        };
        if block_offset >= self.used_length {
            return Err(FormatErrorKind::Outside {
                field: "page",
                end: block_offset.saturating_add(self.page_size.bytes()),
                limit: self.used_length,
            });
        }
        Ok(PageIndex(page.0))
    }
}

/// The RAM blocks of one VM, in the order of the stream; their names are unique.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    blocks: Vec<RamBlock>,
}

impl RamLayout {
    /// Returns the layout of `blocks`.
    ///
    /// # Errors
    ///
    /// Returns [`FormatErrorKind`] if a name occurs twice or if there are too many blocks.
    pub fn new(blocks: Vec<RamBlock>) -> Result<RamLayout, FormatErrorKind> {
        if blocks.len() > BLOCKS_MAX {
            return Err(FormatErrorKind::TooLarge {
                field: "number of RAM blocks",
                found: blocks.len() as u64,
                max: BLOCKS_MAX as u64,
            });
        }
        let mut names: Vec<&str> = blocks.iter().map(RamBlock::name).collect();
        names.sort_unstable();
        let repeated = names.iter().zip(names.iter().skip(1)).find(|(a, b)| a == b);
        if let Some((name, _)) = repeated {
            return Err(FormatErrorKind::RepeatedBlock { name: String::from(*name) });
        }
        Ok(RamLayout { blocks })
    }

    /// Returns the blocks, in the order of the stream.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Returns the place of the block `name` in the list.
    #[must_use]
    pub fn position(&self, name: &str) -> Option<usize> {
        self.blocks.iter().position(|block| block.name == name)
    }

    /// Returns the sum of the blocks' lengths, in bytes.
    #[must_use]
    pub fn total_length(&self) -> u64 {
        // BLOCKS_MAX times BLOCK_LEN_MAX is 2^58.
        self.blocks.iter().map(RamBlock::used_length).fold(0, u64::saturating_add)
    }
}

/// Adds the file offset to the error of a value.
pub(crate) fn at<T>(offset: u64, result: Result<T, FormatErrorKind>) -> Result<T, FormatError> {
    result.map_err(|kind| FormatError::new(offset, kind))
}

#[cfg(test)]
mod tests {
    use std::string::ToString;
    use std::vec;

    use super::*;

    fn block(name: &str, len: u64) -> Result<RamBlock, FormatErrorKind> {
        RamBlock::new(name.to_string(), len, PageSize::KIB_4)
    }

    #[test]
    fn a_block_needs_a_name_and_whole_pages() {
        assert!(block("pc.ram", 4096).is_ok());
        assert!(block("", 4096).is_err());
        assert!(block("pc.ram", 0).is_err());
        assert!(block("pc.ram", 4097).is_err());
        assert!(block("pc.ram", BLOCK_LEN_MAX + 4096).is_err());
        assert!(block(&"n".repeat(256), 4096).is_err());
    }

    #[test]
    fn a_page_begins_at_a_multiple_of_its_size_inside_its_block() {
        let block = block("pc.ram", 3 * 4096).unwrap();
        assert_eq!(block.page_at(2 * 4096), Ok(PageIndex(2)));
        let error = block.page_at(3 * 4096).unwrap_err();
        assert_eq!(error.to_string(), "page ends at 0x4000, past 0x3000");
        let error = block.page_at(4097).unwrap_err();
        assert_eq!(error.to_string(), "offset of a page is 0x1001, not a multiple of 4096");
        assert!(block.page_at(u64::MAX - 4095).is_err());
    }

    #[test]
    fn two_blocks_of_one_name_are_refused() {
        let blocks = vec![block("a", 4096).unwrap(), block("b", 4096).unwrap()];
        assert_eq!(RamLayout::new(blocks.clone()).unwrap().total_length(), 8192);
        let blocks = vec![blocks[0].clone(), blocks[1].clone(), blocks[0].clone()];
        let error = RamLayout::new(blocks).unwrap_err();
        assert_eq!(error.to_string(), "RAM block \"a\" occurs twice");
    }
}
