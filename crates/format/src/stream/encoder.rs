//! Writes the parts of a stream that vmfile makes itself.

use alloc::vec::Vec;

use super::{RAM_SECTION_VERSION, command, ram_flag, section};
use crate::page::PageIndex;
use crate::ram_block::{RamBlock, RamLayout};

/// Appends a text after one byte with its length.
///
/// # Panics
///
/// Panics if the text is longer than 255 bytes.
pub fn counted_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.push(u8::try_from(text.len()).expect("names in a stream have at most 255 bytes"));
    bytes.extend_from_slice(text.as_bytes());
}

/// Appends the header of the "ram" section and the word that announces the block list.
pub fn start_ram(bytes: &mut Vec<u8>, section_id: u32, layout: &RamLayout) {
    bytes.push(section::START);
    bytes.extend_from_slice(&section_id.to_be_bytes());
    counted_text(bytes, "ram");
    bytes.extend_from_slice(&0_u32.to_be_bytes());
    bytes.extend_from_slice(&RAM_SECTION_VERSION.to_be_bytes());
    word(bytes, layout.total_length() | ram_flag::MEM_SIZE);
}

/// Appends one block's name and length.
pub fn block_record(bytes: &mut Vec<u8>, block: &RamBlock) {
    counted_text(bytes, block.name());
    bytes.extend_from_slice(&block.used_length().to_be_bytes());
}

/// Appends a word of the "ram" section.
pub fn word(bytes: &mut Vec<u8>, word: u64) {
    bytes.extend_from_slice(&word.to_be_bytes());
}

/// Appends the end of a part of the "ram" section: the word EOS and the footer.
pub fn end_part(bytes: &mut Vec<u8>, section_id: u32) {
    word(bytes, ram_flag::EOS);
    bytes.push(section::FOOTER);
    bytes.extend_from_slice(&section_id.to_be_bytes());
}

/// Appends the command that says that the source has stopped: machine types of QEMU 10.0 and later
/// expect it, older versions of QEMU refuse it.
pub fn switchover_start(bytes: &mut Vec<u8>) {
    bytes.push(section::COMMAND);
    bytes.extend_from_slice(&command::SWITCHOVER_START.to_be_bytes());
    bytes.extend_from_slice(&0_u16.to_be_bytes());
}

/// Writes the "ram" section of a stream, in pieces: what it appends can be sent after each call.
///
/// The block list names every block; only the pages that are given are sent. QEMU does not require
/// every page (tried on 8.2 and 10.0), so that the destination may have most of its RAM already.
#[derive(Debug)]
pub struct RamSection {
    section_id: u32,
    named: Option<usize>,
    flushes: bool,
}

impl RamSection {
    /// Begins the section: START with the block list, then a PART that takes pages.
    pub fn begin(bytes: &mut Vec<u8>, section_id: u32, layout: &RamLayout) -> RamSection {
        RamSection { section_id, named: None, flushes: false }.start(bytes, layout)
    }

    /// Begins the section as [`RamSection::begin`] does, and ends each of its parts with the word
    /// MULTIFD_FLUSH: machine types of QEMU 8.1 and later wait there for the multifd channels.
    pub fn begin_flushing(bytes: &mut Vec<u8>, section_id: u32, layout: &RamLayout) -> RamSection {
        RamSection { section_id, named: None, flushes: true }.start(bytes, layout)
    }

    fn start(self, bytes: &mut Vec<u8>, layout: &RamLayout) -> RamSection {
        start_ram(bytes, self.section_id, layout);
        for block in layout.blocks() {
            block_record(bytes, block);
        }
        self.next_part(bytes);
        self
    }

    /// Ends the current part and begins the next: QEMU's loader does other work between parts. The
    /// block that was named last stays named.
    pub fn next_part(&self, bytes: &mut Vec<u8>) {
        self.end_part(bytes);
        bytes.push(section::PART);
        bytes.extend_from_slice(&self.section_id.to_be_bytes());
    }

    /// Appends what stands before the data of a page.
    pub fn page_header(&mut self, bytes: &mut Vec<u8>, block: (usize, &RamBlock), page: PageIndex) {
        self.page_word(bytes, block, page, ram_flag::PAGE);
    }

    /// Appends a page with its data, which has the length of one page.
    pub fn page(
        &mut self,
        bytes: &mut Vec<u8>,
        block: (usize, &RamBlock),
        page: PageIndex,
        data: &[u8],
    ) {
        self.page_header(bytes, block, page);
        bytes.extend_from_slice(data);
    }

    /// Appends a page of zeros.
    pub fn zero_page(&mut self, bytes: &mut Vec<u8>, block: (usize, &RamBlock), page: PageIndex) {
        self.page_word(bytes, block, page, ram_flag::ZERO);
        bytes.push(0);
    }

    /// Ends the section.
    pub fn finish(self, bytes: &mut Vec<u8>) {
        self.end_part(bytes);
        bytes.push(section::END);
        bytes.extend_from_slice(&self.section_id.to_be_bytes());
        self.end_part(bytes);
    }

    fn end_part(&self, bytes: &mut Vec<u8>) {
        if self.flushes {
            word(bytes, ram_flag::MULTIFD_FLUSH);
        }
        end_part(bytes, self.section_id);
    }

    /// `block` is the block and its place in the layout; the name is sent when it changes.
    fn page_word(
        &mut self,
        bytes: &mut Vec<u8>,
        (index, block): (usize, &RamBlock),
        page: PageIndex,
        flag: u64,
    ) {
        let offset = page.block_offset(block.page_size()).expect("a page of the block");
        if self.named == Some(index) {
            word(bytes, offset | flag | ram_flag::CONTINUE);
        } else {
            word(bytes, offset | flag);
            counted_text(bytes, block.name());
            self.named = Some(index);
        }
    }
}

/// Appends what stands before the JSON of a VM description of `len` bytes.
///
/// # Panics
///
/// Panics if `len` does not fit into 32 bits: it is that of vmfile's own description, or comes from
/// a file that was checked.
pub fn begin_vm_description(bytes: &mut Vec<u8>, len: u64) {
    bytes.push(section::VM_DESCRIPTION);
    let len = u32::try_from(len).expect("a description has less than 4 GiB");
    bytes.extend_from_slice(&len.to_be_bytes());
}

/// Appends a VM description without devices. QEMU warns if there is none.
///
/// The member `vmfile` says that vmfile wrote it.
pub fn vm_description(bytes: &mut Vec<u8>) {
    let json = br#"{"configuration":{},"page_size":4096,"devices":[],"vmfile":1}"#;
    begin_vm_description(bytes, json.len() as u64);
    bytes.extend_from_slice(json);
}
