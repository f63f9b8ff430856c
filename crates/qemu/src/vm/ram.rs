//! The RAM blocks, from the text that QEMU prints for a human.

use serde_json::Value;

use super::{Vm, VmError};
use crate::qmp::unexpected;

/// Longest block name accepted: QEMU's buffer for it has 256 bytes, with the terminator.
const BLOCK_NAME_LEN_MAX: usize = 255;

/// One RAM block of a running VM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamBlockInfo {
    /// QEMU's name of the block, e.g. `pc.ram`; empty for a block that no save contains.
    pub name: String,
    /// The page size of the memory behind it; with huge pages larger than the guest's.
    pub page_size: u64,
    /// Bytes in use.
    pub used_length: u64,
    /// Bytes reserved; more than in use for a block that may grow.
    pub total_length: u64,
    /// Where the block lies in QEMU's memory; `None` before QEMU 8.0.
    pub host_address: Option<u64>,
    /// The guest cannot write it. QEMU still saves it.
    pub read_only: bool,
}

impl Vm {
    /// Returns the RAM blocks that a save contains, in QEMU's order.
    ///
    /// # Errors
    ///
    /// [`VmError::RamBlocks`] when QEMU prints something that we do not understand.
    pub fn ram_blocks(&mut self) -> Result<Vec<RamBlockInfo>, VmError> {
        let mut blocks = self.all_ram_blocks()?;
        blocks.retain(|block| !block.name.is_empty());
        Ok(blocks)
    }

    /// Returns every RAM block, also those without a name, which no QEMU saves.
    ///
    /// A block gets its name when QEMU registers it for migration; memory of a passed-through
    /// device, for one, is not registered.
    ///
    /// # Errors
    ///
    /// As for [`Vm::ram_blocks`].
    pub fn all_ram_blocks(&mut self) -> Result<Vec<RamBlockInfo>, VmError> {
        let answer = self.execute("x-query-ramblock", Value::Null)?;
        let text = answer.get("human-readable-text").and_then(Value::as_str);
        parse(text.ok_or_else(|| unexpected("x-query-ramblock", "human-readable-text"))?)
    }
}

/// Which of the optional columns the headline has.
#[derive(Clone, Copy)]
struct Columns {
    address: bool,
    read_only: bool,
}

fn parse(text: &str) -> Result<Vec<RamBlockInfo>, VmError> {
    let mut lines = text.lines().enumerate();
    let bad = |index: usize, reason| VmError::RamBlocks { line: index + 1, reason };
    let Some((_, headline)) = lines.next() else {
        return Err(bad(0, "no headline"));
    };
    let mut titles = headline.split_ascii_whitespace().rev().peekable();
    let read_only = titles.next_if_eq(&"RO").is_some();
    let address = titles.next_if_eq(&"HVA").is_some();
    if !titles.eq(["Total", "Used", "Offset", "PSize", "Name", "Block"]) {
        return Err(bad(0, "unknown columns"));
    }
    let columns = Columns { address, read_only };
    let mut blocks: Vec<RamBlockInfo> = Vec::new();
    for (index, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let block = parse_line(line, columns).map_err(|reason| bad(index, reason))?;
        if !block.name.is_empty() && blocks.iter().any(|known| known.name == block.name) {
            return Err(bad(index, "a block name occurs twice"));
        }
        blocks.push(block);
    }
    Ok(blocks)
}

/// Reads a line from its right end: a name may contain anything, the columns may not.
fn parse_line(line: &str, columns: Columns) -> Result<RamBlockInfo, &'static str> {
    let mut rest = line;
    let read_only = columns.read_only
        && match take_last(&mut rest) {
            "ro" => true,
            "rw" => false,
            _ => return Err("RO is neither ro nor rw"),
        };
    let host_address = if columns.address { Some(take_hex(&mut rest)?) } else { None };
    let total_length = take_hex(&mut rest)?;
    let used_length = take_hex(&mut rest)?;
    let _offset = take_hex(&mut rest)?;
    let page_size = take_page_size(&mut rest)?;
    let name = rest.trim_ascii().to_owned();
    if name.len() > BLOCK_NAME_LEN_MAX {
        return Err("a block name of more than 255 bytes");
    }
    if used_length > total_length {
        return Err("more bytes used than reserved");
    }
    if !page_size.is_power_of_two() {
        return Err("a page size that is not a power of two");
    }
    if host_address.is_some_and(|start| start.checked_add(total_length).is_none()) {
        return Err("a block past the end of the address space");
    }
    let host_address = host_address.filter(|&start| start != 0);
    Ok(RamBlockInfo { name, page_size, used_length, total_length, host_address, read_only })
}

/// Takes the last word off `rest`; empty when there is none.
fn take_last<'a>(rest: &mut &'a str) -> &'a str {
    let trimmed = rest.trim_ascii_end();
    let (before, word) = trimmed.rsplit_once(' ').unwrap_or(("", trimmed));
    *rest = before;
    word
}

fn take_hex(rest: &mut &str) -> Result<u64, &'static str> {
    let digits = take_last(rest).strip_prefix("0x").ok_or("a column that is not hexadecimal")?;
    u64::from_str_radix(digits, 16).map_err(|_| "a column that is not hexadecimal")
}

/// Reads a page size as QEMU prints sizes: `4 KiB`, `2 MiB`, `1 GiB`.
fn take_page_size(rest: &mut &str) -> Result<u64, &'static str> {
    let shift = match take_last(rest) {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err("a page size in an unknown unit"),
    };
    let number: u64 = take_last(rest).parse().map_err(|_| "a page size that is not a number")?;
    number.checked_mul(1 << shift).ok_or("a page size past the end of u64")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Printed by QEMU 10.0.2 for `-machine pc -m 64M` with an ivshmem and no other device.
    const QEMU_10_0: &str = concat!(
        "              Block Name    PSize              Offset               Used              Total                HVA  RO\n",
        "                  pc.ram    4 KiB  0x0000000001000000 0x0000000004000000 0x0000000004000000 0x00007fda57e00000  rw\n",
        "         0000:00:03.0/m1    4 KiB  0x0000000000000000 0x0000000001000000 0x0000000001000000 0x00007fdaaa400000  rw\n",
        "    /rom@etc/acpi/tables    4 KiB  0x0000000005080000 0x0000000000020000 0x0000000000200000 0x00007fdaa8e00000  ro\n",
    );

    /// The form before QEMU 8.0, which prints no address.
    const QEMU_7_2: &str = concat!(
        "              Block Name    PSize              Offset               Used              Total\n",
        "                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\n",
    );

    fn with_line(line: &str) -> String {
        format!("{}{line}\n", QEMU_10_0.split_inclusive('\n').next().unwrap())
    }

    #[test]
    fn the_blocks_of_qemu_10_are_read() {
        let blocks = parse(QEMU_10_0).unwrap();
        let names: Vec<_> = blocks.iter().map(|block| block.name.as_str()).collect();
        assert_eq!(names, ["pc.ram", "0000:00:03.0/m1", "/rom@etc/acpi/tables"]);
        let tables = blocks.last().unwrap();
        assert_eq!(tables.page_size, 4096);
        assert_eq!(tables.used_length, 0x2_0000);
        assert_eq!(tables.total_length, 0x20_0000);
        assert_eq!(tables.host_address, Some(0x7fda_a8e0_0000));
        assert!(tables.read_only);
        assert!(!blocks.first().unwrap().read_only);
    }

    #[test]
    fn the_blocks_of_qemu_7_have_no_address() {
        let blocks = parse(QEMU_7_2).unwrap();
        let block = blocks.first().unwrap();
        assert_eq!(block.host_address, None);
        assert_eq!(block.used_length, 64 << 20);
    }

    #[test]
    fn a_name_may_look_like_columns() {
        let text = with_line(
            "a 4 KiB 0x1 rw    2 MiB  0x0000000000000000 0x0000000000200000 0x0000000000200000 0x00007f0000000000  rw",
        );
        let blocks = parse(&text).unwrap();
        assert_eq!(blocks.first().unwrap().name, "a 4 KiB 0x1 rw");
        assert_eq!(blocks.first().unwrap().page_size, 2 << 20);
    }

    #[test]
    fn a_block_without_a_name_is_kept_as_such() {
        let text = with_line(
            "                            4 KiB  0x0000000000000000 0x0000000000001000 0x0000000000001000 0x00007f0000000000  rw",
        );
        assert_eq!(parse(&text).unwrap().first().unwrap().name, "");
    }

    #[test]
    fn nonsense_is_refused_with_its_line() {
        let zeros = "0x0000000000000000";
        for (line, expected) in [
            (format!("x 4 KiB {zeros} 0x2000 0x1000 {zeros} rw"), "more bytes used than reserved"),
            (format!("x 3 KiB {zeros} {zeros} {zeros} {zeros} rw"), "not a power of two"),
            (format!("x 4 kiB {zeros} {zeros} {zeros} {zeros} rw"), "unknown unit"),
            (format!("x 4 KiB {zeros} {zeros} {zeros} {zeros} rx"), "neither ro nor rw"),
            (format!("x 4 KiB {zeros} {zeros} zero {zeros} rw"), "not hexadecimal"),
            (format!("x 4 KiB {zeros} 0x1 0x1 0xffffffffffffffff rw"), "address space"),
            (String::from("x"), "neither ro nor rw"),
        ] {
            let error = parse(&with_line(&line)).unwrap_err().to_string();
            assert!(error.starts_with("line 2 "), "{error}");
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn columns_of_a_future_qemu_are_refused_and_not_guessed() {
        let text = QEMU_10_0.replace("HVA  RO", "HVA RO NUMA");
        assert!(parse(&text).unwrap_err().to_string().contains("unknown columns"));
        assert!(parse("").is_err());
    }

    #[test]
    fn a_name_that_occurs_twice_is_refused() {
        let line = QEMU_10_0.lines().nth(1).unwrap();
        let text = format!("{QEMU_10_0}{line}\n");
        assert!(parse(&text).unwrap_err().to_string().contains("twice"));
    }
}
