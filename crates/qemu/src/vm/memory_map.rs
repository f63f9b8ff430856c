//! The guest-physical map, from the text that QEMU prints for a human.
//!
//! ```text
//! FlatView #1
//!  AS "memory", root: system
//!  AS "cpu-memory-0", root: system
//!  Root memory region: system
//!   0000000000000000-000000000009ffff (prio 0, ram): pc.ram
//!   00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000 KVM
//! ```

use serde_json::{Value, json};

use super::{RamBlockInfo, Vm, VmError};
use crate::qmp::QmpError;

/// Most ranges accepted: a PC with thirty devices has two dozen.
const RANGES_MAX: usize = 4096;

/// A range of the guest's physical addresses with memory behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Its first guest-physical address.
    pub guest_address: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// The RAM block that is mapped there; `None` if a save does not contain it, or if QEMU's text
    /// matches several blocks.
    pub block: Option<String>,
    /// Where in the block it begins, in bytes.
    pub offset: u64,
    /// Whether the guest may write there.
    pub writable: bool,
}

impl Vm {
    /// Returns the guest-physical ranges with memory, by ascending address; `None` if we do not
    /// understand QEMU's text (we do from 2.10 to 11.1), or if QEMU cannot list its RAM blocks
    /// (before 6.2).
    ///
    /// A guest can change the map while it runs: firmware hides and shows its ROMs, and a driver
    /// moves a device's memory.
    ///
    /// # Errors
    ///
    /// [`VmError`] if QEMU does not answer, or if its list of RAM blocks is not understood.
    pub fn memory_map(&mut self) -> Result<Option<Vec<MemoryRange>>, VmError> {
        let arguments = json!({ "command-line": "info mtree -f" });
        let text = match self.execute("human-monitor-command", arguments) {
            Ok(Value::String(text)) => text,
            Ok(_) | Err(QmpError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match self.ram_blocks() {
            Ok(blocks) => Ok(parse(&text, &blocks)),
            // QEMU before 6.2 has no command that lists its RAM blocks.
            Err(VmError::Qmp(QmpError::Refused { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn parse(text: &str, blocks: &[RamBlockInfo]) -> Option<Vec<MemoryRange>> {
    let view = text
        .split("FlatView #")
        .find(|view| view.lines().any(|line| line.trim_start().starts_with("AS \"memory\",")))?;
    let lines = view.lines().filter(|line| line.contains(" (prio "));
    let mut ranges = Vec::new();
    for line in lines {
        let (addresses, rest) = line.trim_start().split_once(" (prio ")?;
        let (kind, region) = rest.split_once("): ")?;
        let writable = match kind.split_once(", ")?.1.trim_start_matches("nv-") {
            "ram" | "ramd" => true,
            "rom" | "romd" => false,
            _ => continue,
        };
        let (first, last) = addresses.split_once('-')?;
        let (first, last) = (hex(first)?, hex(last)?);
        let bytes = last.checked_sub(first)?.checked_add(1)?;
        let (name, offset) = region_and_offset(region);
        let block = block_of(name, blocks)
            .filter(|block| offset.checked_add(bytes).is_some_and(|end| end <= block.used_length));
        let block = block.map(|block| block.name.clone());
        ranges.push(MemoryRange { guest_address: first, bytes, block, offset, writable });
        if ranges.len() > RANGES_MAX {
            return None;
        }
    }
    Some(ranges)
}

/// Splits the end of a line into the region's name and offset. QEMU omits an offset of 0, and may
/// append the accelerator's name.
fn region_and_offset(text: &str) -> (&str, u64) {
    let offset = |rest: &str| hex(rest.get(..16)?);
    match text.rsplit_once(" @") {
        Some((name, rest)) if offset(rest).is_some() => (name, offset(rest).unwrap_or_default()),
        _ => (text.strip_suffix(" KVM").unwrap_or(text), 0),
    }
}

/// Finds the block of the region `name`. The region's name is the block's name, or its last part
/// without the device's path; `None` if several blocks match.
fn block_of<'a>(name: &str, blocks: &'a [RamBlockInfo]) -> Option<&'a RamBlockInfo> {
    if let Some(block) = blocks.iter().find(|block| block.name == name) {
        return Some(block);
    }
    let is_of_device = |block: &&RamBlockInfo| {
        block.name.strip_suffix(name).is_some_and(|device| device.ends_with('/'))
    };
    let mut found = blocks.iter().filter(is_of_device);
    let first = found.next();
    first.filter(|_| found.next().is_none())
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU 10.0.2, `-m 256M -machine pc`, shortened, with two graphics cards and KVM.
    const TEXT: &str = "\
FlatView #0
 AS \"VGA\", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #1
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000 KVM
  0000000000100000-000000000fffffff (prio 0, ram): pc.ram @0000000000100000 KVM
  00000000fc000000-00000000fcffffff (prio 1, ram): vga.vram
  00000000fd000000-00000000fdffffff (prio 1, nv-ram): odd name @0000000000000000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  0000000140000000-000000014fffffff (prio 0, ram): /objects/m0

FlatView #2
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
";

    fn block(name: &str, len: u64) -> RamBlockInfo {
        RamBlockInfo {
            name: name.to_owned(),
            page_size: 4096,
            used_length: len,
            total_length: len,
            host_address: None,
            read_only: false,
        }
    }

    fn blocks() -> Vec<RamBlockInfo> {
        vec![
            block("pc.ram", 256 << 20),
            block("0000:00:02.0/vga.vram", 16 << 20),
            block("pc.bios", 256 << 10),
            block("/objects/m0", 256 << 20),
        ]
    }

    #[test]
    fn memory_is_found_with_its_block() {
        let map = parse(TEXT, &blocks()).unwrap();
        let short = |range: &MemoryRange| {
            (range.guest_address, range.block.clone(), range.offset, range.writable)
        };
        let found: Vec<_> = map.iter().map(short).collect();
        let named = |name: &str| Some(name.to_owned());
        let expected = [
            (0, named("pc.ram"), 0, true),
            (0xe_0000, named("pc.bios"), 0x2_0000, false),
            (0x10_0000, named("pc.ram"), 0x10_0000, true),
            (0xfc00_0000, named("0000:00:02.0/vga.vram"), 0, true),
            (0xfd00_0000, None, 0, true),
            (0x1_4000_0000, named("/objects/m0"), 0, true),
        ];
        assert_eq!(found, expected);
        assert_eq!(map[0].bytes, 0xa_0000);
    }

    #[test]
    fn a_region_that_could_be_of_two_blocks_is_of_none() {
        let mut blocks = blocks();
        blocks.push(block("0000:00:03.0/vga.vram", 16 << 20));
        let map = parse(TEXT, &blocks).unwrap();
        assert_eq!(map[3].block, None);
    }

    #[test]
    fn a_range_past_the_end_of_its_block_has_none() {
        let mut blocks = blocks();
        blocks[1].used_length = 8 << 20;
        assert_eq!(parse(TEXT, &blocks).unwrap()[3].block, None);
    }

    #[test]
    fn what_is_no_map_is_not_known() {
        assert_eq!(parse("unknown command: 'info mtree'", &blocks()), None);
        let broken = TEXT.replace("000000009ffff", "00000000 9ffff");
        assert_eq!(parse(&broken, &blocks()), None);
    }
}
