//! One word of the "ram" section: an offset, and below the page size the flags.

use alloc::format;
use alloc::string::String;

use super::ram_flag;
use crate::error::FormatErrorKind;
use crate::page::PageSize;

/// What a word announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RamWord {
    /// A page, in one form or another.
    Page {
        form: PageForm,
        /// The page belongs to the block that was named last; otherwise a name follows.
        continues: bool,
        /// Offset of the page in its block, in bytes; a multiple of the page size.
        block_offset: u64,
    },
    MultifdFlush,
    /// The payload ends.
    End,
}

/// What follows the word of a page and the name of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageForm {
    Raw,
    Zero,
    Xbzrle,
    Compressed,
}

impl RamWord {
    /// Decodes a word that comes after the block list.
    pub(super) fn decode(word: u64, page_size: PageSize) -> Result<RamWord, FormatErrorKind> {
        let (flags, block_offset) = split(word, page_size);
        let form = match flags & !ram_flag::CONTINUE {
            ram_flag::PAGE => PageForm::Raw,
            ram_flag::ZERO => PageForm::Zero,
            ram_flag::XBZRLE => PageForm::Xbzrle,
            ram_flag::COMPRESS_PAGE => PageForm::Compressed,
            ram_flag::EOS if word == ram_flag::EOS => return Ok(RamWord::End),
            ram_flag::MULTIFD_FLUSH if word == ram_flag::MULTIFD_FLUSH => {
                return Ok(RamWord::MultifdFlush);
            }
            _ => return Err(refuse(word, flags)),
        };
        let continues = flags & ram_flag::CONTINUE != 0;
        Ok(RamWord::Page { form, continues, block_offset })
    }
}

/// Splits a word into its flags and the offset or length above them.
pub(super) fn split(word: u64, page_size: PageSize) -> (u64, u64) {
    // A page size is a power of two, and not zero.
    let mask = page_size.bytes().saturating_sub(1);
    (word & mask, word & !mask)
}

fn refuse(word: u64, flags: u64) -> FormatErrorKind {
    let (what, name) = match flags {
        ram_flag::FULL => ("RAM flag", "FULL"),
        ram_flag::HOOK => ("RAM flag of RDMA", "HOOK"),
        ram_flag::MEM_SIZE => ("second block list", "MEM_SIZE"),
        _ => return FormatErrorKind::Unsupported { what: "RAM word", name: format!("{word:#x}") },
    };
    FormatErrorKind::Unsupported { what, name: String::from(name) }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    fn decode(word: u64) -> Result<RamWord, FormatErrorKind> {
        RamWord::decode(word, PageSize::KIB_4)
    }

    #[test]
    fn flags_lie_below_the_page_size_and_the_offset_above() {
        let page =
            |form, continues, block_offset| Ok(RamWord::Page { form, continues, block_offset });
        assert_eq!(decode(0x1_2008), page(PageForm::Raw, false, 0x1_2000));
        assert_eq!(decode(0x28), page(PageForm::Raw, true, 0));
        assert_eq!(decode(0x1022), page(PageForm::Zero, true, 0x1000));
        assert_eq!(decode(0x1040), page(PageForm::Xbzrle, false, 0x1000));
        assert_eq!(decode(0x1120), page(PageForm::Compressed, true, 0x1000));
        assert_eq!(decode(0x10), Ok(RamWord::End));
        assert_eq!(decode(0x200), Ok(RamWord::MultifdFlush));
        let word = RamWord::decode(0x608, PageSize::new(1024).unwrap());
        assert_eq!(word.unwrap_err().to_string(), "RAM word \"0x608\" is not supported");
        let word = RamWord::decode(0x408, PageSize::new(1024).unwrap());
        assert_eq!(word, page(PageForm::Raw, false, 0x400));
    }

    #[test]
    fn other_words_are_refused_by_name() {
        let refusals = [
            (0x1001, "RAM flag \"FULL\" is not supported"),
            (0x80, "RAM flag of RDMA \"HOOK\" is not supported"),
            (0x4004, "second block list \"MEM_SIZE\" is not supported"),
            (0x1000, "RAM word \"0x1000\" is not supported"),
            (0x100a, "RAM word \"0x100a\" is not supported"),
            (0x1010, "RAM word \"0x1010\" is not supported"),
            (0x30, "RAM word \"0x30\" is not supported"),
            (0x220, "RAM word \"0x220\" is not supported"),
            (0x408, "RAM word \"0x408\" is not supported"),
        ];
        for (word, text) in refusals {
            assert_eq!(decode(word).unwrap_err().to_string(), text);
        }
    }
}
