//! The edges of what the format accepts: the last value that is accepted, and the first that is
//! refused.
//!
//! `cargo mutants` found these edges: code with another comparison passed all other tests.

use std::convert::Infallible;

use vmfile_format::error::FormatErrorKind;
use vmfile_format::limits::{
    BLOCK_LEN_MAX, BLOCKS_MAX, CAPABILITIES_MAX, DEVICE_SECTIONS_MAX, MACHINE_NAME_LEN_MAX,
    MANIFEST_LEN_MAX,
};
use vmfile_format::manifest::{
    BlockMeta, CpuSectionMeta, ExtentMeta, FOOTER_LEN, Features, Footer, MemoryRangeMeta, Meta,
    VmMeta, decode_hash, encode_hash,
};
use vmfile_format::mapped_ram::{MappedRamFile, MappedRamLayout, PlacedBlock};
use vmfile_format::qcow2::Qcow2Header;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::device_state::DeviceState;
use vmfile_format::stream::own_state::OwnState;
use vmfile_format::{
    FormatError, PageBitmap, PageCount, PageIndex, PageRange, PageSize, RamBlock, RamLayout,
    ReadError,
};

/// The offset of the example's metadata. The tables before it have a page each, at 0x60_2000 and
/// 0x60_3000.
const METADATA_OFFSET: u64 = 0x60_4000;

fn ram() -> RamLayout {
    let block = |name: &str, pages: u64| {
        RamBlock::new(name.to_owned(), pages * 4096, PageSize::KIB_4).expect("a block")
    };
    RamLayout::new(vec![block("pc.ram", 3), block("pc.bios", 1)]).expect("two blocks")
}

/// Returns a file of two blocks without a manifest, and its layout.
fn file() -> (Vec<u8>, MappedRamLayout) {
    let state = OwnState::new(&[("cpu", &[1; 8]), ("timer", &[2; 4])]);
    let source = Configuration { machine: "pc".to_owned(), ..Configuration::default() };
    let layout = MappedRamLayout::new(&source, ram(), state.unused_id).expect("a short file");
    let mut bytes = vec![0; usize::try_from(layout.device_state_offset()).expect("short")];
    let mut put = |offset: u64, part: &[u8]| {
        let offset = usize::try_from(offset).expect("short");
        bytes[offset..offset + part.len()].copy_from_slice(part);
    };
    put(0, &layout.encode_head());
    for placed in layout.blocks() {
        put(placed.record_offset, &placed.encode_record());
    }
    let (offset, end) = layout.encode_end();
    put(offset, &end);
    bytes.extend_from_slice(&state.sections);
    bytes.extend_from_slice(&state.description);
    (bytes, layout)
}

fn read(bytes: &[u8]) -> Result<MappedRamFile, FormatErrorKind> {
    let read = |offset, len| {
        let offset = usize::try_from(offset).expect("inside the file");
        Ok::<_, Infallible>(bytes[offset..offset + len].to_vec())
    };
    MappedRamFile::read(0, bytes.len() as u64, read).map_err(|error| match error {
        ReadError::Format(FormatError { kind, .. }) => kind,
        ReadError::Source(never) => match never {},
    })
}

fn meta() -> Meta {
    let block = |name: &str, pages: u64, hashes_offset| BlockMeta {
        name: name.to_owned(),
        bytes: pages * 4096,
        pages_data: 0,
        hashes_offset,
    };
    Meta {
        vmfile_version: "0.1.0".to_owned(),
        saved_at_unix_seconds: 0,
        route: "direct".to_owned(),
        live: None,
        pause_seconds: None,
        vm: VmMeta::of_machine("pc"),
        blocks: vec![block("pc.ram", 3, 0x60_2000), block("pc.bios", 1, 0x60_3000)],
        extents: Vec::new(),
        features: Features::default(),
        tables: Vec::new(),
        cpu_sections: Vec::new(),
        working_set_known: false,
        page_hash_seed: 0,
        base: None,
    }
}

/// Checks the example's metadata after `change`.
fn checked(change: impl FnOnce(&mut Meta, &MappedRamFile)) -> Result<(), FormatErrorKind> {
    let file = read(&file().0).expect("a whole file");
    let mut meta = meta();
    change(&mut meta, &file);
    let footer = Footer {
        version: 2,
        stream_end: file.device_state.stream_end,
        metadata_offset: METADATA_OFFSET,
        metadata_len: 0,
        metadata_hash: 0,
    };
    meta.check(&file, &footer).map_err(|error| error.kind)
}

fn is_outside(result: Result<(), FormatErrorKind>, name: &str) -> bool {
    matches!(result, Err(FormatErrorKind::Outside { field, .. }) if field == name)
}

#[test]
fn metadata_of_the_file_is_accepted_and_of_another_refused() {
    assert_eq!(checked(|_, _| {}), Ok(()));
    let fewer = checked(|meta, _| drop(meta.blocks.pop()));
    assert!(matches!(fewer, Err(FormatErrorKind::Differs { found: 1, expected: 2, .. })));
    let renamed = checked(|meta, _| meta.blocks[1].name = "other".to_owned());
    assert!(matches!(renamed, Err(FormatErrorKind::Unsupported { .. })), "{renamed:?}");
    let longer = checked(|meta, _| meta.blocks[1].bytes += 4096);
    assert!(matches!(longer, Err(FormatErrorKind::Unsupported { .. })), "{longer:?}");
}

#[test]
fn tables_of_hashes_lie_where_they_may() {
    let placed = |first, second| {
        checked(|meta, _| {
            meta.blocks[0].hashes_offset = first;
            meta.blocks[1].hashes_offset = second;
        })
    };
    assert_eq!(placed(0x60_1000, 0x60_3000), Ok(()));
    for (first, second) in [
        (0x60_2800, 0x60_3800),
        (0x60_2000, 0x60_2000),
        (0x60_2000, 0x60_4000),
        (0x20_0000, 0x60_3000),
    ] {
        assert!(is_outside(placed(first, second), "page hashes"), "{first:#x} {second:#x}");
    }
}

#[test]
fn extents_end_with_the_stream_and_are_no_longer_than_it() {
    let with = |lens: &'static [(u64, u64)]| {
        checked(move |meta, file| {
            let end = file.device_state.stream_end;
            let extent = |&(before_end, bytes): &(u64, u64)| ExtentMeta {
                bytes,
                ..ExtentMeta::of("any", end - before_end, b"")
            };
            meta.extents = lens.iter().map(extent).collect();
        })
    };
    assert_eq!(with(&[(8, 8)]), Ok(()));
    assert!(is_outside(with(&[(8, 9)]), "checked extent"));
    let all = checked(|meta, file| {
        let bytes = file.device_state.stream_end;
        meta.extents = vec![ExtentMeta { bytes, ..ExtentMeta::of("all", 0, b"") }];
    });
    assert_eq!(all, Ok(()));
    let more = checked(|meta, file| {
        let bytes = file.device_state.stream_end;
        let extent = |bytes| ExtentMeta { bytes, ..ExtentMeta::of("all", 0, b"") };
        meta.extents = vec![extent(bytes), extent(1)];
    });
    assert!(matches!(more, Err(FormatErrorKind::TooLarge { .. })), "{more:?}");
}

#[test]
fn ranges_of_the_guest_lie_in_their_blocks() {
    let range = |block: Option<&str>, guest_address: u64, offset: u64, bytes: u64| {
        let block = block.map(str::to_owned);
        let range = MemoryRangeMeta { guest_address, bytes, block, offset, writable: true };
        checked(|meta, _| meta.vm.memory_map = Some(vec![range]))
    };
    assert_eq!(range(Some("pc.ram"), 0, 4096, 8192), Ok(()));
    // The offset of memory that is not in the file is not checked.
    assert_eq!(range(None, 0, u64::MAX, 8192), Ok(()));
    assert_eq!(range(Some("pc.bios"), u64::MAX - 4096, 0, 4096), Ok(()));
    for wrong in [
        range(Some("pc.ram"), 0, 4096, 8193),
        range(Some("no.such"), 0, 0, 1),
        range(Some("pc.bios"), u64::MAX - 4095, 0, 4096),
        range(Some("pc.ram"), 0, u64::MAX, 2),
    ] {
        assert!(is_outside(wrong, "guest-physical map"));
    }
}

#[test]
fn registers_lie_in_the_device_state() {
    let section = |from_start: i64, past_end: i64| {
        checked(|meta, file| {
            let offset = file.device_state.start.saturating_add_signed(from_start);
            let bytes = file.device_state.end.saturating_add_signed(past_end) - offset;
            meta.cpu_sections = vec![CpuSectionMeta { cpu: 0, version: 12, offset, bytes }];
        })
    };
    assert_eq!(section(0, 0), Ok(()));
    assert_eq!(section(1, -1), Ok(()));
    assert!(is_outside(section(-1, 0), "registers of a CPU"));
    assert!(is_outside(section(0, 1), "registers of a CPU"));
    // CPU sections are found by their name, with the payload that was written.
    let (bytes, _) = file();
    let state = read(&bytes).expect("a whole file").device_state;
    let [found] = &CpuSectionMeta::find(&state, state.start)[..] else { panic!("one CPU") };
    assert_eq!((found.cpu, found.version, found.bytes), (0, 1, 8));
    let at = usize::try_from(found.offset).expect("short");
    assert_eq!(bytes[at - 1..=at + 8], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0x7e]);
}

/// Without the last section a VM would be restored without its last device.
#[test]
fn a_description_that_leaves_out_a_section_is_not_believed() {
    let both = OwnState::new(&[("cpu", &[1; 8]), ("timer", &[2; 4])]);
    let first = OwnState::new(&[("cpu", &[1; 8])]);
    let bytes = [both.sections, first.description].concat();
    let state = DeviceState::locate(&bytes, 0, both.unused_id).expect("whole sections");
    let names: Vec<&str> = state.sections.iter().map(|section| &*section.name).collect();
    assert_eq!(names, ["cpu", "timer"]);
}

#[test]
fn sections_without_a_description_are_as_many_as_their_limit() {
    let located = |count: usize| {
        let state = OwnState::new(&vec![("a", &[][..]); count]);
        DeviceState::locate(&state.sections, 0, state.unused_id)
    };
    let found = located(DEVICE_SECTIONS_MAX).expect("whole sections");
    assert_eq!(found.sections.len(), DEVICE_SECTIONS_MAX);
    let error = located(DEVICE_SECTIONS_MAX + 1).expect_err("one too many");
    assert_eq!(error.kind, FormatErrorKind::BrokenSections);
}

#[test]
fn names_of_sections_are_printable_and_have_up_to_255_bytes() {
    let located = |name: &str| {
        let state = OwnState::new(&[(name, &[])]);
        let found = DeviceState::locate(&state.sections, 0, state.unused_id);
        found.map(|found| found.sections.len()).map_err(|error| error.kind)
    };
    assert_eq!(located(&"n".repeat(255)), Ok(1));
    for name in ["", "a name", "caf\u{e9}", "tab\t"] {
        assert_eq!(located(name), Err(FormatErrorKind::BrokenSections), "{name:?}");
    }
}

#[test]
fn a_footer_says_what_may_be() {
    let decode = |stream_end: u64, metadata_len: u64| {
        let metadata_offset = 0x1000;
        let footer =
            Footer { version: 1, stream_end, metadata_offset, metadata_len, metadata_hash: 0 };
        Footer::decode(&footer.encode(), metadata_offset + metadata_len + FOOTER_LEN)
    };
    assert!(matches!(decode(0x1000, MANIFEST_LEN_MAX), Ok(Some(_))));
    assert!(decode(0x1001, 0x10).is_err());
    assert!(decode(0x1000, MANIFEST_LEN_MAX + 1).is_err());
    // Bytes that are no footer, with the length of one and shorter.
    assert_eq!(Footer::decode(&[0; 64], 64), Ok(None));
    assert_eq!(Footer::decode(b"vmfile\r\n", 64), Ok(None));
}

#[test]
fn a_newer_version_is_told_from_damage() {
    let newer = [
        FormatErrorKind::NewerFooter { found: 3, max: 2 },
        FormatErrorKind::UnknownFeature { name: "woven".to_owned() },
    ];
    for kind in newer {
        assert!(FormatError { offset: 0, kind }.is_of_newer_version());
    }
    assert!(
        !FormatError { offset: 0, kind: FormatErrorKind::BrokenSections }.is_of_newer_version()
    );
}

/// Reads the file with the second block placed elsewhere.
fn placed_elsewhere(
    change: impl FnOnce(&mut PlacedBlock),
) -> Result<MappedRamFile, FormatErrorKind> {
    let (mut bytes, layout) = file();
    let mut placed = layout.blocks()[1].clone();
    let at = usize::try_from(placed.record_offset).expect("short");
    change(&mut placed);
    let record = placed.encode_record();
    bytes[at..at + record.len()].copy_from_slice(&record);
    read(&bytes)
}

#[test]
fn a_bitmap_lies_anywhere_but_over_what_it_belongs_to() {
    let (bytes, layout) = file();
    let record = layout.blocks()[1].encode_record();
    let record_end = layout.blocks()[1].record_offset + record.len() as u64;
    assert!(placed_elsewhere(|_| {}).is_ok());
    // Right after the record, right before it, right before the pages, and right after them.
    assert!(placed_elsewhere(|placed| placed.bitmap_offset = record_end).is_ok());
    assert!(placed_elsewhere(|placed| placed.bitmap_offset = placed.record_offset - 8).is_ok());
    assert!(placed_elsewhere(|placed| placed.bitmap_offset = placed.pages_offset - 8).is_ok());
    assert!(placed_elsewhere(|placed| placed.bitmap_offset = placed.pages_end()).is_ok());
    for refused in [
        placed_elsewhere(|placed| placed.bitmap_offset = record_end - 1),
        placed_elsewhere(|placed| placed.bitmap_offset = placed.record_offset - 7),
        placed_elsewhere(|placed| placed.bitmap_offset = placed.pages_offset - 7),
        placed_elsewhere(|placed| placed.bitmap_offset = placed.pages_end() - 1),
        placed_elsewhere(|placed| placed.bitmap_offset = u64::MAX - 7),
    ] {
        assert!(matches!(refused, Err(FormatErrorKind::Outside { .. })), "{refused:?}");
    }
    let len = bytes.len() as u64;
    assert!(placed_elsewhere(|placed| placed.bitmap_offset = len - 8).is_ok());
    assert!(placed_elsewhere(|placed| placed.bitmap_offset = len - 7).is_err());
}

#[test]
fn a_total_of_all_blocks_at_their_longest_is_accepted() {
    let (mut bytes, layout) = file();
    let at = layout.encode_head().len() - 8;
    let most = BLOCK_LEN_MAX * BLOCKS_MAX as u64;
    let mut read_total = |total: u64| {
        bytes[at..at + 8].copy_from_slice(&(total | 4).to_be_bytes());
        read(&bytes)
    };
    let is_too_large = |found: Result<MappedRamFile, FormatErrorKind>| {
        let field = "total of the RAM";
        matches!(found, Err(FormatErrorKind::TooLarge { field: name, .. }) if name == field)
    };
    assert!(!is_too_large(read_total(most)));
    assert!(is_too_large(read_total(most + 512)));
}

#[test]
fn a_configuration_is_as_long_as_its_limits() {
    let kind = |configuration: &Configuration| read(&configuration.encode()).unwrap_err();
    let named = |len: u32| Configuration {
        machine: "m".repeat(usize::try_from(len).expect("short")),
        ..Configuration::default()
    };
    // A name of the greatest length is accepted: the error is about what is missing after it.
    assert!(matches!(kind(&named(MACHINE_NAME_LEN_MAX)), FormatErrorKind::Unsupported { .. }));
    assert!(matches!(kind(&named(MACHINE_NAME_LEN_MAX + 1)), FormatErrorKind::TooLarge { .. }));
    let with = |count: u32| Configuration {
        capabilities: (0..count).map(|number| format!("c{number}")).collect(),
        ..named(2)
    };
    assert!(matches!(kind(&with(CAPABILITIES_MAX)), FormatErrorKind::Unsupported { .. }));
    assert!(matches!(kind(&with(CAPABILITIES_MAX + 1)), FormatErrorKind::TooLarge { .. }));
}

#[test]
fn a_hash_is_written_as_it_is_read() {
    let hash = 0x0123_4567_89ab_cdef_fedc_ba98_7654_3210;
    assert_eq!(encode_hash(hash)[..4], [0x01, 0x23, 0x45, 0x67]);
    assert_eq!(decode_hash(encode_hash(hash)), hash);
}

#[test]
fn pages_are_counted_and_shown() {
    assert_eq!(PageRange::new(3, 7).count(), PageCount(4));
    assert_eq!(PageRange::new(7, 3).count(), PageCount(0));
    assert!(PageRange::new(3, 3).is_empty() && !PageRange::new(3, 4).is_empty());
    assert_eq!((PageIndex(5).to_string(), PageCount(6).to_string()), ("5".into(), "6".into()));
}

#[test]
#[should_panic(expected = "a bit past the last page")]
fn words_with_a_bit_past_the_last_page_are_refused() {
    PageBitmap::new(PageCount(66)).replace_words(PageIndex(64), &[0b100]);
}

#[test]
fn words_up_to_the_last_page_are_accepted() {
    let mut bitmap = PageBitmap::new(PageCount(66));
    bitmap.replace_words(PageIndex(64), &[0b11]);
    assert_eq!(bitmap.data_count(), PageCount(2));
    let mut bitmap = PageBitmap::new(PageCount(128));
    bitmap.replace_words(PageIndex(64), &[u64::MAX]);
    assert_eq!(bitmap.data_count(), PageCount(64));
}

/// Returns a qcow2 header of version 3, as `qemu-img create` makes one, with these feature bits and
/// a backing file name of `name_len` bytes.
fn qcow2(incompatible: u64, compatible: u64, name_len: usize) -> Vec<u8> {
    let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
    let name_offset = if name_len == 0 { 0_u64 } else { 112 };
    bytes.extend_from_slice(&name_offset.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(name_len).expect("short").to_be_bytes());
    bytes.resize(72, 0);
    for word in [incompatible, compatible, 0] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.extend_from_slice(&4_u32.to_be_bytes());
    bytes.extend_from_slice(&104_u32.to_be_bytes());
    // The end of the extensions.
    bytes.resize(112, 0);
    bytes.resize(112 + name_len, b'b');
    bytes
}

#[test]
fn each_bit_of_a_qcow2_header_means_what_it_means() {
    let header = |incompatible, compatible| {
        let header = Qcow2Header::decode(&qcow2(incompatible, compatible, 0)).expect("a header");
        (header.is_dirty, header.is_corrupt, header.changes_when_closed)
    };
    assert_eq!(header(0, 0), (false, false, false));
    assert_eq!(header(0b01, 0), (true, false, true));
    assert_eq!(header(0b10, 0), (false, true, false));
    assert_eq!(header(0, 0b1), (false, false, true));
    // All other bits.
    assert_eq!(header(!0b11, !0b1), (false, false, false));
}

#[test]
fn a_qcow2_name_is_as_long_as_qemu_allows() {
    let name = |len| Qcow2Header::decode(&qcow2(0, 0, len)).map(|header| header.backing_file);
    assert_eq!(name(1023).expect("QEMU's longest"), Some("b".repeat(1023)));
    assert!(name(1024).is_err());
    // The dirty bit does not change the identity of the image.
    let hash = |dirty| Qcow2Header::decode(&qcow2(dirty, 0, 0)).expect("a header").hash;
    assert_eq!(hash(0), hash(1));
    assert_ne!(hash(0), hash(2));
}

#[test]
fn a_qcow2_header_is_as_long_as_its_version_says() {
    let with_len = |len: u32| {
        let mut bytes = qcow2(0, 0, 0);
        bytes[100..104].copy_from_slice(&len.to_be_bytes());
        Qcow2Header::decode(&bytes)
    };
    assert!(with_len(104).is_ok());
    assert!(with_len(103).is_err());
}

#[test]
fn of_an_old_qcow2_header_nothing_is_left_out() {
    // Version 2 has no feature bits: at their offset in version 3, this header has the data of an
    // extension.
    let hash = |byte: u8| {
        let mut bytes = b"QFI\xfb\0\0\0\x02".to_vec();
        bytes.resize(72, 0);
        bytes.extend_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 32]);
        bytes.resize(72 + 8 + 32 + 8, 0);
        bytes[90] = byte;
        Qcow2Header::decode(&bytes).expect("a header").hash
    };
    assert_ne!(hash(0), hash(1));
}
