//! Compares `docs/format.md` with the code: its worked example is a whole vmfile that this crate
//! reads and would write in the same way, and its tables have the values of the constants.

use std::collections::BTreeSet;
use std::convert::Infallible;

use serde_json::Value;
use vmfile_format::manifest::{
    CpuSectionMeta, FOOTER_LEN, Footer, HASH_LEN, Meta, SurroundingsMeta, decode_hash,
    place_tables, table_len,
};
use vmfile_format::mapped_ram::{
    HEADER_LEN, MARK, MappedRamFile, MappedRamLayout, PAGES_ALIGNMENT,
};
use vmfile_format::stream::encoder;
use vmfile_format::{PageBitmap, PageIndex, PageRange, RamBlock, checksum, limits};

const FORMAT_MD: &str = include_str!("../../../docs/format.md");
const ERROR_RS: &str = include_str!("../src/error.rs");

/// Returns the text of the section whose heading begins with `heading`, up to the next heading of
/// any level.
fn section(heading: &str) -> &'static str {
    let start = FORMAT_MD.find(heading).expect("the heading is in the document");
    let body = &FORMAT_MD[start + heading.len()..];
    body.find("\n#").map_or(body, |end| &body[..end])
}

/// Returns the bodies of the fenced blocks of `language`, without the line feed before the fence.
fn fenced(language: &str) -> Vec<&'static str> {
    let opening = format!("\n```{language}\n");
    FORMAT_MD
        .split(opening.as_str())
        .skip(1)
        .map(|rest| rest.split_once("\n```").expect("a block that was opened is closed").0)
        .collect()
}

/// Returns the cells of all table rows in `text`, without the header rows and rules.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let lines: Vec<&str> = text.lines().collect();
    let is_rule = |line: &str| line.starts_with("|--");
    let mut rows = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let is_head = lines.get(index + 1).is_some_and(|next| is_rule(next));
        if line.starts_with("| ") && !is_head {
            rows.push(line.trim_matches('|').split(" | ").map(str::trim).collect());
        }
    }
    rows
}

/// Returns the first word of `text` that stands in backticks.
fn code(text: &str) -> &str {
    text.split('`').nth(1).expect("a word in backticks")
}

fn number(text: &str) -> u64 {
    let digits = text.replace('_', "");
    let parsed = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("{text:?} is no number"))
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("the example is small")
}

/// Decodes one line of a dump into its offset and its bytes. Two spaces end the bytes.
fn dump_line(line: &str) -> (u64, Vec<u8>) {
    let (offset, rest) = line.split_once(": ").expect("an offset and a colon");
    let offset = u64::from_str_radix(offset, 16).expect("a hexadecimal offset");
    let bytes = rest.split("  ").next().unwrap_or_default().trim_end();
    let byte = |text| u8::from_str_radix(text, 16).expect("a hexadecimal byte");
    if let Some((value, count)) = bytes.split_once(" x ") {
        return (offset, vec![byte(value); count.parse().expect("a decimal count")]);
    }
    (offset, bytes.split(' ').map(byte).collect())
}

/// Assembles the worked example: the dumps, zeros between them, and the metadata at its offset.
fn example() -> Vec<u8> {
    let mut file = Vec::new();
    let mut footer = Vec::new();
    let dumps = fenced("hex");
    let footer_offset = dump_line(dumps.last().expect("the footer").lines().next().expect("it"));
    for line in dumps.iter().flat_map(|dump| dump.lines()) {
        let (offset, bytes) = dump_line(line);
        if offset >= footer_offset.0 {
            assert_eq!(offset, footer_offset.0 + footer.len() as u64, "{line}");
            footer.extend_from_slice(&bytes);
            continue;
        }
        assert!(offset >= file.len() as u64, "out of order or over another line: {line}");
        file.resize(index(offset), 0);
        file.extend_from_slice(&bytes);
    }
    let [metadata] = fenced("json")[..] else { panic!("one block of metadata") };
    file.resize(index(footer_offset.0) - metadata.len(), 0);
    file.extend_from_slice(metadata.as_bytes());
    file.extend_from_slice(&footer);
    file
}

fn structure(file: &[u8]) -> MappedRamFile {
    let read = MappedRamFile::read(0, file.len() as u64, |offset, len| {
        Ok::<_, Infallible>(file[index(offset)..index(offset) + len].to_vec())
    });
    read.expect("a whole file")
}

fn manifest(file: &[u8]) -> (Footer, Meta) {
    let (_, last) = file.split_at(file.len() - index(FOOTER_LEN));
    let footer = Footer::decode(last, file.len() as u64).expect("a good footer").expect("one");
    let end = footer.metadata_offset + footer.metadata_len;
    let json = &file[index(footer.metadata_offset)..index(end)];
    if checksum(json) != footer.metadata_hash {
        let fixed = Footer { metadata_hash: checksum(json), ..footer };
        panic!("the metadata changed; its footer is {:02x?}", fixed.encode());
    }
    (footer, Meta::decode(json, &footer).expect("metadata"))
}

#[test]
fn the_worked_example_says_what_the_text_says() {
    let file = example();
    assert!(FORMAT_MD.contains("A whole vmfile of 4,213,834 bytes."));
    assert_eq!(file.len(), 4_213_834);

    let structure = structure(&file);
    assert_eq!(structure.configuration.machine, "pc-i440fx-10.0");
    assert_eq!(structure.configuration.capabilities, ["mapped-ram"]);
    assert_eq!(structure.head_end, 99);
    let places: Vec<_> = structure
        .blocks
        .iter()
        .map(|b| (b.block.name(), b.block.used_length(), b.record_offset, b.pages_offset))
        .collect();
    let expected = [("pc.ram", 0x3000, 0x63, 0x20_0000), ("pc.bios", 0x1000, 0x20_3000, 0x40_0000)];
    assert_eq!(places, expected);
    let ram = structure.block("pc.ram").unwrap();
    let bitmap = &file[index(ram.bitmap_offset)..index(ram.bitmap_offset + ram.bitmap_len())];
    let bitmap = PageBitmap::decode(bitmap, ram.block.page_count()).unwrap();
    let runs: Vec<PageRange> = bitmap.data_runs().collect();
    assert_eq!(runs, [PageRange::new(0, 1), PageRange::new(2, 3)]);

    let state = &structure.device_state;
    let sections: Vec<_> =
        state.sections.iter().map(|s| (s.name.as_str(), s.id, s.version)).collect();
    assert_eq!(sections, [("timer", 0, 2), ("cpu", 3, 12), ("globalstate", 2, 1)]);
    assert_eq!((structure.ram_end_offset, state.stream_end), (0x40_1000, 0x40_1124));

    let (footer, meta) = manifest(&file);
    assert_eq!((footer.stream_end, footer.metadata_offset), (0x40_1124, 0x40_4000));
    assert_eq!(meta.check(&structure, &footer), Ok(()));
    assert_eq!(meta.vm.name.as_deref(), Some("tiny"));
    let parts: Vec<&str> = meta.extents.iter().map(|extent| extent.what.as_str()).collect();
    let expected =
        ["head", "mark", "record", "bitmap", "record", "bitmap", "device_state", "vm_description"];
    assert_eq!(parts, expected);
    assert_eq!(meta.cpu_sections, CpuSectionMeta::find(state, state.start));
    let tables: Vec<u64> = meta.blocks.iter().map(|block| block.hashes_offset).collect();
    assert_eq!(tables, [0x40_2000, 0x40_3000]);
}

#[test]
fn every_byte_of_the_worked_example_has_a_checksum_or_is_zero() {
    let mut file = example();
    let structure = structure(&file);
    let (footer, meta) = manifest(&file);
    for (placed, block) in structure.blocks.iter().zip(&meta.blocks) {
        let bitmap = index(placed.bitmap_offset)..index(placed.bitmap_offset + placed.bitmap_len());
        let bitmap = PageBitmap::decode(&file[bitmap], placed.block.page_count()).unwrap();
        assert_eq!(bitmap.data_count().0, block.pages_data);
        for page in (0..bitmap.page_count().0).map(PageIndex) {
            let start = index(placed.page_offset(page).unwrap());
            let data = &mut file[start..start + 4096];
            let expected = if bitmap.contains(page) { checksum(data) } else { 0 };
            data.fill(0);
            let entry = index(block.hashes_offset + HASH_LEN * page.0);
            let entry = &mut file[entry..entry + 16];
            assert_eq!(decode_hash((&*entry).try_into().unwrap()), expected, "{page}");
            entry.fill(0);
        }
    }
    for extent in &meta.extents {
        let bytes = &mut file[index(extent.offset)..index(extent.offset + extent.bytes)];
        assert!(extent.matches(bytes), "{} at {:#x}", extent.what, extent.offset);
        bytes.fill(0);
    }
    let rest = &file[..index(footer.metadata_offset)];
    assert_eq!(rest.iter().position(|&byte| byte != 0), None);
}

#[test]
fn the_encoders_write_the_worked_example() {
    let file = example();
    let structure = structure(&file);
    let (footer, meta) = manifest(&file);
    let layout = MappedRamLayout::new(&structure.configuration, structure.ram(), 1).unwrap();
    assert_eq!(layout.blocks(), structure.blocks);
    assert_eq!(layout.device_state_offset(), structure.device_state.start);
    let (end_offset, end) = layout.encode_end();
    let mut parts = vec![(0, layout.encode_head()), (end_offset, end)];
    let mark_offset = layout.blocks()[0].mark_offset().unwrap();
    assert_eq!(mark_offset + MARK.len() as u64, layout.blocks()[0].pages_offset);
    parts.push((mark_offset, MARK.to_vec()));
    parts.extend(layout.blocks().iter().map(|block| (block.record_offset, block.encode_record())));
    let mut description = Vec::new();
    encoder::vm_description(&mut description);
    parts.push((structure.device_state.end, description));
    parts.push((file.len() as u64 - FOOTER_LEN, footer.encode()));
    for (offset, bytes) in parts {
        let offset = index(offset);
        assert_eq!(&file[offset..offset + bytes.len()], bytes, "{offset:#x}");
    }
    let pages: Vec<_> = structure.blocks.iter().map(|block| block.block.page_count()).collect();
    let tables = meta.blocks.iter().map(|block| block.hashes_offset).collect();
    let placed = place_tables(footer.stream_end, &pages);
    assert_eq!(placed, Some((tables, footer.metadata_offset)));
    assert_eq!(table_len(pages[0]), 4096);
}

#[test]
fn any_bit_changed_in_the_worked_example_before_the_pages_is_noticed() {
    let file = example();
    let (_, meta) = manifest(&file);
    let mut changes = 0;
    for extent in meta.extents {
        let bytes = &file[index(extent.offset)..index(extent.offset + extent.bytes)];
        for changed in 0..bytes.len() {
            let mut bytes = bytes.to_vec();
            bytes[changed] ^= 1;
            assert!(!extent.matches(&bytes), "{} byte {changed}", extent.what);
            changes += 1;
        }
    }
    println!("cases: {changes} flips");
}

#[test]
fn the_table_of_limits_is_that_of_the_code() {
    let expected = [
        ("BLOCK_NAME_LEN_MAX", limits::BLOCK_NAME_LEN_MAX as u64),
        ("BLOCKS_MAX", limits::BLOCKS_MAX as u64),
        ("BLOCK_LEN_MAX", limits::BLOCK_LEN_MAX),
        ("BLOCK_PAGES_MAX", limits::BLOCK_PAGES_MAX),
        ("MACHINE_NAME_LEN_MAX", limits::MACHINE_NAME_LEN_MAX.into()),
        ("CAPABILITIES_MAX", limits::CAPABILITIES_MAX.into()),
        ("CONFIGURATION_LEN_MAX", limits::CONFIGURATION_LEN_MAX as u64),
        ("COMPRESSED_EXTRA_LEN_MAX", limits::COMPRESSED_EXTRA_LEN_MAX as u64),
        ("MULTIFD_DATA_LEN_MAX", limits::MULTIFD_DATA_LEN_MAX),
        ("DEVICE_STATE_LEN_MAX", limits::DEVICE_STATE_LEN_MAX),
        ("VM_DESCRIPTION_LEN_MAX", limits::VM_DESCRIPTION_LEN_MAX),
        ("DEVICE_SECTIONS_MAX", limits::DEVICE_SECTIONS_MAX as u64),
        ("CHAIN_LEN_MAX", limits::CHAIN_LEN_MAX as u64),
        ("MANIFEST_VALUES_MAX", limits::MANIFEST_VALUES_MAX),
        ("MANIFEST_OBJECTS_MAX", limits::MANIFEST_OBJECTS_MAX),
        ("MANIFEST_LEN_MAX", limits::MANIFEST_LEN_MAX),
        ("FILE_LEN_MAX", limits::FILE_LEN_MAX),
    ];
    let found: Vec<(&str, u64)> =
        rows(section("## 8. Limits")).iter().map(|row| (code(row[0]), number(row[1]))).collect();
    assert_eq!(found, expected);
    let declared = include_str!("../src/limits.rs").matches("pub const ").count();
    assert_eq!(declared, expected.len(), "limits.rs has constants that the table lacks");
}

/// Asserts that the rows of a table of fields follow one another; returns their names and places.
fn fields(heading: &str, len: u64) -> Vec<(&'static str, u64, u64)> {
    let mut end = 0;
    let mut fields = Vec::new();
    for row in rows(section(heading)) {
        let (offset, size) = (number(row[0]), number(row[1]));
        assert_eq!(offset, end, "{} in {heading}", row[2]);
        end = offset + size;
        fields.push((row[2], offset, size));
    }
    assert_eq!(end, len, "{heading}");
    fields
}

#[test]
fn the_table_of_the_footer_is_what_the_footer_encodes() {
    let footer = Footer {
        version: 2,
        stream_end: 0x0102_0304_0506_0708,
        metadata_offset: 0x1112_1314_1516_1718,
        metadata_len: 0x2122_2324_2526_2728,
        metadata_hash: 0x3132_3334_3536_3738_4142_4344_4546_4748,
    };
    let bytes = footer.encode();
    let footer_hash = u64::try_from(checksum(&bytes[..56]) >> 64).unwrap();
    for (name, offset, size) in fields("### 7.3 The footer", FOOTER_LEN) {
        let expected = match name {
            "magic" => b"vmfile\r\n".to_vec(),
            "version" => 2_u32.to_be_bytes().to_vec(),
            "footer_len" => 64_u32.to_be_bytes().to_vec(),
            "stream_end" => footer.stream_end.to_be_bytes().to_vec(),
            "metadata_offset" => footer.metadata_offset.to_be_bytes().to_vec(),
            "metadata_len" => footer.metadata_len.to_be_bytes().to_vec(),
            "metadata_hash" => footer.metadata_hash.to_be_bytes().to_vec(),
            "footer_hash" => footer_hash.to_be_bytes().to_vec(),
            _ => panic!("{name} is no field of the footer"),
        };
        assert_eq!(&bytes[index(offset)..index(offset + size)], expected, "{name}");
    }
}

#[test]
fn the_table_of_the_header_is_what_a_record_ends_with() {
    let file = example();
    let placed = structure(&file).blocks.remove(0);
    let record = placed.encode_record();
    let header = &record[record.len() - HEADER_LEN..];
    for (name, offset, size) in fields("### 5.2 The mapped-ram header", HEADER_LEN as u64) {
        let expected = match name {
            "version" => 1,
            "page_size" => 4096,
            "bitmap_offset" => placed.bitmap_offset,
            "pages_offset" => placed.pages_offset,
            _ => panic!("{name} is no field of the header"),
        };
        let field = &header[index(offset)..index(offset + size)];
        let found = field.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
        assert_eq!(found, expected, "{name}");
    }
    assert!(FORMAT_MD.contains("(`0x20_0000`)") && PAGES_ALIGNMENT == 0x20_0000);
}

#[test]
fn every_member_of_the_metadata_is_documented_and_no_other() {
    let (_, mut meta) = manifest(&example());
    // The example has none.
    meta.vm.surroundings = Some(SurroundingsMeta::default());
    let mut members = BTreeSet::new();
    collect_members(&serde_json::to_value(meta).unwrap(), &mut members);
    let documented: BTreeSet<String> =
        rows(section("### 7.2 Metadata")).iter().map(|row| code(row[0]).to_owned()).collect();
    assert_eq!(documented, members);
}

fn collect_members(value: &Value, members: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                members.insert(name.clone());
                collect_members(value, members);
            }
        }
        Value::Array(elements) => elements.iter().for_each(|e| collect_members(e, members)),
        _ => {}
    }
}

#[test]
fn every_error_is_in_the_table_of_refusals_and_no_other() {
    let is_name = |c: char| c.is_ascii_alphanumeric();
    let declared: BTreeSet<&str> = ERROR_RS
        .split("FormatErrorKind::")
        .skip(1)
        .map(|rest| rest.split(|c| !is_name(c)).next().unwrap_or_default())
        .collect();
    let listed: BTreeSet<&str> = rows(section("## 9. What a reader refuses"))
        .iter()
        .flat_map(|row| row[1].split('`').skip(1).step_by(2))
        .collect();
    assert_eq!(listed, declared);
}

#[test]
fn a_block_that_the_document_calls_legal_is() {
    let longest = "n".repeat(limits::BLOCK_NAME_LEN_MAX);
    let page_size = vmfile_format::PageSize::KIB_4;
    assert!(RamBlock::new(longest, limits::BLOCK_LEN_MAX, page_size).is_ok());
}
