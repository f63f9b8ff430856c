//! Where everything goes in a mapped-ram file that vmfile writes.

use alloc::vec::Vec;

use super::header::{HEADER_LEN, MappedRamHeader};
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::FILE_LEN_MAX;
use crate::page::PageIndex;
use crate::page_bitmap;
use crate::ram_block::{RamBlock, RamLayout};
use crate::stream::configuration::{Configuration, FEATURE_PREFIX, MAPPED_RAM};
use crate::stream::encoder;

/// vmfile begins each block's pages at a multiple of 2 MiB, so that huge mappings of the file stay
/// possible. QEMU aligns them to 1 MiB, and accepts any multiple of the page size.
pub const PAGES_ALIGNMENT: u64 = 2 << 20;

/// The mark of a file that vmfile wrote: the last bytes before the first block's pages, where QEMU
/// reads nothing. A file that has the mark and no footer has lost its end.
pub const MARK: &[u8; 8] = b"vmfile\r\n";

/// A RAM block and where its parts lie in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedBlock {
    /// The block.
    pub block: RamBlock,
    /// File offset of the block's record: name, length, header.
    pub record_offset: u64,
    /// File offset of the page bitmap.
    pub bitmap_offset: u64,
    /// File offset of page 0.
    pub pages_offset: u64,
}

impl PlacedBlock {
    /// Returns the file offset of `page`, or `None` past the end of `u64`.
    #[must_use]
    pub fn page_offset(&self, page: PageIndex) -> Option<u64> {
        page.block_offset(self.block.page_size())?.checked_add(self.pages_offset)
    }

    /// Returns the file offset one past the last page.
    #[must_use]
    pub fn pages_end(&self) -> u64 {
        // Checked against FILE_LEN_MAX when the block was placed.
        self.pages_offset.saturating_add(self.block.used_length())
    }

    /// Returns the file offset of [`MARK`], if this is the first block of a file that has one;
    /// `None` if the record or the bitmap leaves no room for it.
    #[must_use]
    pub fn mark_offset(&self) -> Option<u64> {
        let offset = self.pages_offset.checked_sub(MARK.len() as u64)?;
        let record_end = self.record_offset.saturating_add(self.encode_record().len() as u64);
        let bitmap = self.bitmap_offset..self.bitmap_offset.saturating_add(self.bitmap_len());
        let free =
            record_end <= offset && (bitmap.end <= offset || bitmap.start >= self.pages_offset);
        free.then_some(offset)
    }

    /// Returns the length of the page bitmap, in bytes.
    #[must_use]
    pub fn bitmap_len(&self) -> u64 {
        page_bitmap::encoded_len(self.block.page_count())
    }

    /// Encodes the block's record.
    #[must_use]
    pub fn encode_record(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        encoder::block_record(&mut bytes, &self.block);
        let header = MappedRamHeader {
            page_size: self.block.page_size(),
            bitmap_offset: self.bitmap_offset,
            pages_offset: self.pages_offset,
        };
        header.encode(&mut bytes);
        bytes
    }
}

/// The places of everything up to the device state, in a file that begins at offset 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedRamLayout {
    configuration: Configuration,
    ram: RamLayout,
    section_id: u32,
    blocks: Vec<PlacedBlock>,
    device_state_offset: u64,
}

impl MappedRamLayout {
    /// Places the blocks of `ram` in a new file of the VM that `source` configures.
    ///
    /// The file's only capability is `mapped-ram`, whatever capabilities `source` has. `section_id`
    /// is the id of the "ram" section; no device section has it.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if the file would be longer than [`FILE_LEN_MAX`].
    pub fn new(
        source: &Configuration,
        ram: RamLayout,
        section_id: u32,
    ) -> Result<MappedRamLayout, FormatError> {
        MappedRamLayout::with_features(source, ram, section_id, &[])
    }

    /// Does the same for a file with `features` for which QEMU must refuse it.
    ///
    /// # Errors
    ///
    /// As [`MappedRamLayout::new`].
    pub fn with_features(
        source: &Configuration,
        ram: RamLayout,
        section_id: u32,
        features: &[&str],
    ) -> Result<MappedRamLayout, FormatError> {
        let features = features.iter().map(|name| alloc::format!("{FEATURE_PREFIX}{name}"));
        let capabilities = core::iter::once(MAPPED_RAM.into()).chain(features).collect();
        let configuration = Configuration { capabilities, ..source.clone() };
        let mut head = configuration.encode();
        encoder::start_ram(&mut head, section_id, &ram);
        let mut offset = head.len() as u64;
        let mut blocks = Vec::new();
        for block in ram.blocks() {
            let placed = place(block, offset).ok_or_else(|| {
                let (field, end, limit) = ("RAM block", u64::MAX, FILE_LEN_MAX);
                FormatError::new(offset, FormatErrorKind::Outside { field, end, limit })
            })?;
            offset = placed.pages_end();
            blocks.push(placed);
        }
        let mut end = Vec::new();
        encoder::end_part(&mut end, section_id);
        let device_state_offset = offset.saturating_add(end.len() as u64);
        Ok(MappedRamLayout { configuration, ram, section_id, blocks, device_state_offset })
    }

    /// Returns the blocks and their places, in the order of the file.
    #[must_use]
    pub fn blocks(&self) -> &[PlacedBlock] {
        &self.blocks
    }

    /// Returns the file offset of the first device section.
    #[must_use]
    pub fn device_state_offset(&self) -> u64 {
        self.device_state_offset
    }

    /// Encodes what stands before the first block's record; it goes to offset 0.
    #[must_use]
    pub fn encode_head(&self) -> Vec<u8> {
        let mut bytes = self.configuration.encode();
        encoder::start_ram(&mut bytes, self.section_id, &self.ram);
        bytes
    }

    /// Encodes the end of the "ram" section, which goes right before the device state; returns it
    /// with its file offset.
    #[must_use]
    pub fn encode_end(&self) -> (u64, Vec<u8>) {
        let mut bytes = Vec::new();
        encoder::end_part(&mut bytes, self.section_id);
        (self.device_state_offset.saturating_sub(bytes.len() as u64), bytes)
    }
}

fn place(block: &RamBlock, record_offset: u64) -> Option<PlacedBlock> {
    let record_len = block.name().len().checked_add(1 + 8 + HEADER_LEN)?;
    let bitmap_offset = record_offset.checked_add(record_len as u64)?;
    let bitmap_end = bitmap_offset.checked_add(page_bitmap::encoded_len(block.page_count()))?;
    let mark_end = bitmap_end.checked_add(MARK.len() as u64)?;
    let pages_offset = mark_end.checked_next_multiple_of(PAGES_ALIGNMENT)?;
    pages_offset.checked_add(block.used_length()).filter(|&end| end <= FILE_LEN_MAX)?;
    Some(PlacedBlock { block: block.clone(), record_offset, bitmap_offset, pages_offset })
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use proptest::prelude::*;

    use super::*;
    use crate::page::PageSize;

    fn ram(lengths: &[u64]) -> RamLayout {
        let block = |(index, &pages): (usize, &u64)| {
            RamBlock::new(std::format!("block{index}"), pages * 4096, PageSize::KIB_4).unwrap()
        };
        RamLayout::new(lengths.iter().enumerate().map(block).collect()).unwrap()
    }

    fn machine(name: &str) -> Configuration {
        Configuration { machine: name.to_string(), ..Configuration::default() }
    }

    #[test]
    fn what_the_source_says_of_the_vm_is_kept_and_its_capabilities_are_not() {
        let source = Configuration {
            capabilities: Vec::from(["x-ignore-shared".to_string()]),
            page_bits: Some(12),
            uuid: Some([7; 16]),
            ..machine("virt-10.0")
        };
        let layout = MappedRamLayout::new(&source, ram(&[3]), 1).unwrap();
        let capabilities = Vec::from([MAPPED_RAM.to_string()]);
        let expected = Configuration { capabilities, ..source };
        assert!(layout.encode_head().starts_with(&expected.encode()));
        assert_eq!(layout.blocks()[0].record_offset, layout.encode_head().len() as u64);
    }

    #[test]
    fn a_file_longer_than_the_kernel_allows_is_refused() {
        let huge: Vec<u64> = core::iter::repeat_n(1 << 34, 4096).collect();
        assert!(MappedRamLayout::new(&machine("pc"), ram(&huge), 1).is_ok());
        let error = place(ram(&[1 << 34]).blocks().first().unwrap(), FILE_LEN_MAX - 4096);
        assert_eq!(error, None);
    }

    #[test]
    fn the_head_is_what_qemu_writes() {
        let block = RamBlock::new("pc.ram".to_string(), 0x1109_2000, PageSize::KIB_4).unwrap();
        let layout = MappedRamLayout::new(
            &machine("pc-i440fx-10.0"),
            RamLayout::new([block].into()).unwrap(),
            1,
        );
        let head = layout.unwrap().encode_head();
        // From a file that QEMU 10.0.2 wrote: START at 0x4a, the block list's first record at 0x63.
        assert_eq!(head.len(), 0x63);
        assert_eq!(&head[0x5b..], [0, 0, 0, 0, 0x11, 0x09, 0x20, 0x04]);
    }

    proptest! {
        #[test]
        fn parts_do_not_overlap_and_pages_are_aligned(
            lengths in proptest::collection::vec(1_u64..100_000, 0..8),
        ) {
            let layout = MappedRamLayout::new(&machine("q35"), ram(&lengths), 1).unwrap();
            let mut end = layout.encode_head().len() as u64;
            for placed in layout.blocks() {
                prop_assert_eq!(placed.record_offset, end);
                let record_end = end + placed.encode_record().len() as u64;
                prop_assert!(placed.bitmap_offset >= record_end);
                prop_assert!(placed.pages_offset >= placed.bitmap_offset + placed.bitmap_len());
                prop_assert_eq!(placed.mark_offset(), Some(placed.pages_offset - 8));
                prop_assert_eq!(placed.pages_offset % PAGES_ALIGNMENT, 0);
                end = placed.pages_end();
            }
            let (offset, bytes) = layout.encode_end();
            prop_assert_eq!(offset, end);
            prop_assert_eq!(offset + bytes.len() as u64, layout.device_state_offset());
            std::println!("cases: 1 mutations");
        }
    }
}
