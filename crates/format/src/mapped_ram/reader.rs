//! Reads a mapped-ram file's structure: everything but the pages.

use alloc::vec::Vec;

use super::header::{HEADER_LEN, MappedRamHeader};
use super::layout::PlacedBlock;
use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind, ReadError};
use crate::limits::{
    BLOCK_LEN_MAX, BLOCK_NAME_LEN_MAX, BLOCKS_MAX, DEVICE_STATE_LEN_MAX, FILE_LEN_MAX,
};
use crate::manifest::features;
use crate::ram_block::{RamBlock, RamLayout, at};
use crate::stream::configuration::{Configuration, FEATURE_PREFIX, MAPPED_RAM};
use crate::stream::device_state::DeviceState;
use crate::stream::{RAM_SECTION_VERSION, ram_flag, section};

/// Enough for everything before the first block's record: see the limits of its fields.
const HEAD_LEN_MAX: u64 = 32 << 10;

/// The longest record: name, length, header.
const RECORD_LEN_MAX: u64 = (1 + BLOCK_NAME_LEN_MAX + 8 + HEADER_LEN) as u64;

/// How many bytes after RAM are read at first: the whole device state of most VMs.
const TAIL_LEN_MIN: u64 = 1 << 20;

/// The structure of a mapped-ram file.
///
/// A value of this type has passed every check that needs no page: parts lie inside the file and
/// do not overlap, the blocks add up, and the device sections follow one another to their end.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MappedRamFile {
    /// File offset at which the stream begins: QEMU's `offset=`.
    pub start: u64,
    /// Header and configuration.
    pub configuration: Configuration,
    /// The blocks and their places, in the order of the file.
    pub blocks: Vec<PlacedBlock>,
    /// File offset one past the head, which ends where the first record begins.
    pub head_end: u64,
    /// File offset of the end of the "ram" section's START: EOS and footer.
    pub ram_end_offset: u64,
    /// The device sections and the end of the stream.
    pub device_state: DeviceState,
}

impl MappedRamFile {
    /// Reads the structure of a file of `file_len` bytes whose stream begins at `start`.
    ///
    /// `read` gets an offset and a length, never past `file_len`, and returns that many bytes.
    /// There is one read of at most 32 KiB for the head, one of less than 1 KiB for each block, and
    /// one of at most 1 MiB for the device state, with further ones if that is longer.
    ///
    /// # Errors
    ///
    /// Returns [`ReadError::Format`] with the offset of the field at fault, and
    /// [`ReadError::Source`] if `read` fails.
    pub fn read<E>(
        start: u64,
        file_len: u64,
        mut read: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
    ) -> Result<MappedRamFile, ReadError<E>> {
        let mut read = |offset: u64, len_max: u64| {
            let len = file_len.saturating_sub(offset).min(len_max);
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            if len == 0 {
                return Ok(Vec::new());
            }
            read(offset, len).map_err(ReadError::Source)
        };
        let head = read(start, HEAD_LEN_MAX)?;
        let mut cursor = Cursor::new(&head, start);
        let configuration = Configuration::decode(&mut cursor)?;
        require_mapped_ram(&configuration, start)?;
        let (section_id, total) = decode_ram_start(&mut cursor)?;
        let head_end = cursor.offset();

        let mut offset = head_end;
        let mut rest = total;
        let mut blocks = Vec::new();
        let mut ram_blocks = Vec::new();
        while rest > 0 {
            let bytes = read(offset, RECORD_LEN_MAX)?;
            let placed = decode_block(&bytes, offset, file_len)?;
            rest = rest.checked_sub(placed.block.used_length()).ok_or_else(|| {
                let found = total.saturating_sub(rest);
                let found = found.saturating_add(placed.block.used_length());
                let kind = FormatErrorKind::WrongTotal { found, expected: total };
                FormatError::new(offset, kind)
            })?;
            if blocks.len() >= BLOCKS_MAX {
                let (field, found, max) =
                    ("number of RAM blocks", blocks.len() as u64, BLOCKS_MAX as u64);
                let kind = FormatErrorKind::TooLarge { field, found, max };
                return Err(FormatError::new(offset, kind).into());
            }
            offset = placed.pages_end();
            ram_blocks.push(placed.block.clone());
            blocks.push(placed);
        }
        at(head_end, RamLayout::new(ram_blocks))?;

        let ram_end_offset = offset;
        // The file may go on long after QEMU's last byte, which is not needed: begin with a short
        // read.
        let mut len = TAIL_LEN_MIN;
        let device_state = loop {
            let tail = read(ram_end_offset, len)?;
            let tail_end = ram_end_offset.saturating_add(tail.len() as u64);
            let whole = (tail.len() as u64) < len || len >= DEVICE_STATE_LEN_MAX;
            match locate(&tail, ram_end_offset, section_id) {
                // The bytes that were read may end with a byte that only looks like EOF.
                Ok(state) if whole || state.stream_end < tail_end => break state,
                Err(error) if whole => return Err(error.into()),
                _ => len = len.saturating_mul(16).min(DEVICE_STATE_LEN_MAX),
            }
        };
        Ok(MappedRamFile { start, configuration, blocks, head_end, ram_end_offset, device_state })
    }

    /// Returns the blocks as QEMU lists them.
    #[must_use]
    pub fn ram(&self) -> RamLayout {
        let blocks = self.blocks.iter().map(|placed| placed.block.clone()).collect();
        RamLayout::new(blocks).expect("checked when the file was read")
    }

    /// Returns whether the head names the feature `name`, so that QEMU refuses the file.
    #[must_use]
    pub fn has_feature(&self, name: &str) -> bool {
        let mut names = self.configuration.capabilities.iter();
        names.any(|found| found.strip_prefix(FEATURE_PREFIX) == Some(name))
    }

    /// Returns the block `name` with its places.
    #[must_use]
    pub fn block(&self, name: &str) -> Option<&PlacedBlock> {
        self.blocks.iter().find(|placed| placed.block.name() == name)
    }
}

/// Locates the device state in what follows the last block's pages.
fn locate(tail: &[u8], offset: u64, section_id: u32) -> Result<DeviceState, FormatError> {
    let mut cursor = Cursor::new(tail, offset);
    expect_ram_end(&mut cursor, section_id)?;
    let skipped = usize::try_from(cursor.offset().saturating_sub(offset)).unwrap_or(usize::MAX);
    let rest = tail.get(skipped..).unwrap_or_default();
    DeviceState::locate(rest, cursor.offset(), section_id)
}

fn require_mapped_ram(configuration: &Configuration, start: u64) -> Result<(), FormatError> {
    let is_known = |name: &str| {
        name == MAPPED_RAM || name.strip_prefix(FEATURE_PREFIX).is_some_and(features::is_known)
    };
    let unknown = configuration.capabilities.iter().find(|name| !is_known(name));
    if let Some(name) = unknown {
        let kind = match name.strip_prefix(FEATURE_PREFIX) {
            Some(name) => FormatErrorKind::UnknownFeature { name: name.into() },
            None => FormatErrorKind::Unsupported { what: "capability", name: name.clone() },
        };
        return Err(FormatError::new(start, kind));
    }
    if !configuration.capabilities.iter().any(|name| name == MAPPED_RAM) {
        let what = "a stream without the capability";
        let kind = FormatErrorKind::Unsupported { what, name: MAPPED_RAM.into() };
        return Err(FormatError::new(start, kind));
    }
    Ok(())
}

/// Decodes the header of the "ram" section and the MEM_SIZE word: the section's id, and the total
/// length of the blocks.
fn decode_ram_start(cursor: &mut Cursor<'_>) -> Result<(u32, u64), FormatError> {
    cursor.expect_u8("type of the first section", section::START)?;
    let section_id = cursor.be32("section id")?;
    let offset = cursor.offset();
    let name = cursor.counted_text("section name")?;
    if name != "ram" {
        let kind = FormatErrorKind::Unsupported { what: "first section", name };
        return Err(FormatError::new(offset, kind));
    }
    cursor.expect_be32("instance of the RAM section", 0)?;
    cursor.expect_be32("version of the RAM section", RAM_SECTION_VERSION)?;
    let offset = cursor.offset();
    let word = cursor.be64("MEM_SIZE word")?;
    // The smallest page has 512 bytes: the flags lie below.
    let (flags, total) = (word & 0x1ff, word & !0x1ff);
    if flags != ram_flag::MEM_SIZE {
        let (field, expected) = ("flags of the first RAM word", ram_flag::MEM_SIZE);
        let kind = FormatErrorKind::Differs { field, found: flags, expected };
        return Err(FormatError::new(offset, kind));
    }
    let max = BLOCK_LEN_MAX.saturating_mul(BLOCKS_MAX as u64);
    if total > max {
        let kind = FormatErrorKind::TooLarge { field: "total of the RAM", found: total, max };
        return Err(FormatError::new(offset, kind));
    }
    Ok((section_id, total))
}

fn decode_block(bytes: &[u8], offset: u64, file_len: u64) -> Result<PlacedBlock, FormatError> {
    let mut cursor = Cursor::new(bytes, offset);
    let name = cursor.counted_text("name of a RAM block")?;
    let used_length = cursor.be64("length of a RAM block")?;
    let header = MappedRamHeader::decode(&mut cursor)?;
    let record_end = cursor.offset();
    let block = at(offset, RamBlock::new(name, used_length, header.page_size))?;
    let MappedRamHeader { bitmap_offset, pages_offset, .. } = header;
    let placed = PlacedBlock { block, record_offset: offset, bitmap_offset, pages_offset };
    let limit = file_len.min(FILE_LEN_MAX);
    let outside = |field, end, limit| {
        Err(FormatError::new(offset, FormatErrorKind::Outside { field, end, limit }))
    };
    let Some(pages_end) = pages_offset.checked_add(used_length).filter(|&end| end <= limit) else {
        return outside("RAM block's pages", placed.pages_end(), limit);
    };
    let bitmap_end = bitmap_offset.saturating_add(placed.bitmap_len());
    if bitmap_end > limit {
        return outside("RAM block's bitmap", bitmap_end, limit);
    }
    if record_end > pages_offset {
        return outside("RAM block's record", record_end, pages_offset);
    }
    if bitmap_offset < pages_end && bitmap_end > pages_offset {
        return outside("RAM block's bitmap", bitmap_end, pages_offset);
    }
    if bitmap_offset < record_end && bitmap_end > offset {
        return outside("RAM block's record", record_end, bitmap_offset);
    }
    Ok(placed)
}

fn expect_ram_end(cursor: &mut Cursor<'_>, section_id: u32) -> Result<(), FormatError> {
    let offset = cursor.offset();
    let found = cursor.be64("RAM word after the blocks")?;
    if found != ram_flag::EOS {
        let (field, expected) = ("RAM word after the blocks", ram_flag::EOS);
        return Err(FormatError::new(offset, FormatErrorKind::Differs { field, found, expected }));
    }
    cursor.expect_u8("footer", section::FOOTER)?;
    cursor.expect_be32("section id in the footer", section_id)
}

#[cfg(test)]
mod tests {
    use core::convert::Infallible;
    use std::string::ToString;
    use std::vec;

    use super::*;
    use crate::mapped_ram::MappedRamLayout;
    use crate::page::PageSize;
    use crate::stream::encoder;

    /// A whole file of two small blocks and one device section.
    fn sample() -> Vec<u8> {
        let block =
            |name: &str| RamBlock::new(name.to_string(), 3 * 4096, PageSize::KIB_4).unwrap();
        let ram = RamLayout::new(vec![block("pc.ram"), block("pc.bios")]).unwrap();
        let machine = "pc-i440fx-10.0".to_string();
        let source = Configuration { machine, ..Configuration::default() };
        let layout = MappedRamLayout::new(&source, ram, 1).unwrap();
        let mut file = vec![0; usize::try_from(layout.device_state_offset()).unwrap()];
        let mut put = |offset: u64, bytes: &[u8]| {
            let offset = usize::try_from(offset).unwrap();
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &layout.encode_head());
        for placed in layout.blocks() {
            put(placed.record_offset, &placed.encode_record());
        }
        let (offset, end) = layout.encode_end();
        put(offset, &end);
        file.extend_from_slice(b"\x04\0\0\0\x02\x05timer\0\0\0\0\0\0\0\x02PAYLOAD\x7e\0\0\0\x02\0");
        encoder::vm_description(&mut file);
        file
    }

    fn read(file: &[u8]) -> Result<MappedRamFile, FormatError> {
        let result = MappedRamFile::read(0, file.len() as u64, |offset, len| {
            let offset = usize::try_from(offset).unwrap();
            Ok::<_, Infallible>(file[offset..offset + len].to_vec())
        });
        result.map_err(|error| match error {
            ReadError::Format(error) => error,
            ReadError::Source(never) => match never {},
        })
    }

    #[test]
    fn reads_what_the_layout_places() {
        let file = sample();
        let structure = read(&file).unwrap();
        assert_eq!(structure.configuration.machine, "pc-i440fx-10.0");
        let names: Vec<&str> = structure.blocks.iter().map(|b| b.block.name()).collect();
        assert_eq!(names, ["pc.ram", "pc.bios"]);
        assert_eq!(structure.device_state.sections[0].name, "timer");
        assert_eq!(structure.device_state.stream_end, file.len() as u64);
    }

    #[test]
    fn a_file_cut_anywhere_before_the_description_is_refused() {
        let file = sample();
        let eof = usize::try_from(read(&file).unwrap().device_state.end).unwrap();
        let near_the_ends = (0..0x200).chain((0..eof).step_by(4099)).chain(eof - 64..eof);
        for len in near_the_ends {
            assert!(read(&file[..len]).is_err(), "cut at {len:#x}");
        }
    }

    #[test]
    fn blocks_that_do_not_add_up_are_refused() {
        let mut file = sample();
        let mem_size = usize::try_from(read(&file).unwrap().head_end).unwrap() - 8;
        file[mem_size + 6] = 0x50;
        let text = "at offset 0x203000: RAM blocks add up to 24576 bytes, expected 20480";
        assert_eq!(read(&file).unwrap_err().to_string(), text);
    }

    #[test]
    fn pages_outside_the_file_are_refused() {
        let file = sample();
        let error = read(&file[..0x20_2000]).unwrap_err();
        let text = "at offset 0x63: RAM block's pages ends at 0x203000, past 0x202000";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn a_feature_in_the_head_that_is_not_known_is_refused_by_name() {
        let configuration = Configuration {
            machine: "pc".into(),
            capabilities: Vec::from([MAPPED_RAM.into(), "vmfile-woven".into()]),
            ..Configuration::default()
        };
        let error = read(&configuration.encode()).unwrap_err();
        assert!(error.is_of_newer_version());
        let text = "at offset 0x0: the file has the feature \"woven\", which is not known";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn a_stream_without_mapped_ram_is_refused() {
        let file = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01";
        let text = "at offset 0x0: a stream without the capability \"mapped-ram\" is not supported";
        assert_eq!(read(file).unwrap_err().to_string(), text);
    }
}
