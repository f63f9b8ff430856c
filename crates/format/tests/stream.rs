//! The sequential stream: the decoder returns what the encoder wrote, however the stream is cut
//! into pieces, and refuses invalid streams.

use proptest::prelude::*;
use vmfile_format::error::FormatErrorKind;
use vmfile_format::limits::{BLOCK_LEN_MAX, BLOCKS_MAX, DEVICE_STATE_LEN_MAX};
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::decoder::{EVENT_LEN_MAX, Event, StreamDecoder};
use vmfile_format::stream::encoder::{self, RamSection};
use vmfile_format::{FormatError, PageIndex, PageSize, RamBlock, RamLayout};

const RAM_ID: u32 = 1;

/// The device state of a VM of one device, up to QEMU's last byte.
const DEVICES: &[u8] = b"\x04\0\0\0\x02\x05timer\0\0\0\0\0\0\0\x02PAYLOAD\x7e\0\0\0\x02\0";

fn configuration() -> Configuration {
    Configuration { machine: "pc-i440fx-10.0".into(), ..Configuration::default() }
}

fn ram() -> RamLayout {
    let block = |(name, pages): (&str, u64)| {
        RamBlock::new(name.into(), pages * 4096, PageSize::KIB_4).expect("a block")
    };
    RamLayout::new([("pc.ram", 64), ("pc.bios", 4)].map(block).into()).expect("a layout")
}

/// Returns a stream up to the block list, where the first word of pages follows.
fn begun() -> Vec<u8> {
    let mut bytes = configuration().encode();
    encoder::start_ram(&mut bytes, RAM_ID, &ram());
    for block in ram().blocks() {
        encoder::block_record(&mut bytes, block);
    }
    bytes
}

/// Returns the stream of `begun` with its section ended, where the next section follows.
fn between_sections() -> Vec<u8> {
    let mut bytes = begun();
    encoder::end_part(&mut bytes, RAM_ID);
    bytes
}

/// An event that owns its bytes. Neighboring pieces of device state are joined.
#[derive(Debug, PartialEq)]
enum Owned {
    Configuration(Configuration),
    RamBlocks(u32, RamLayout),
    Page(usize, u64, Vec<u8>),
    Zero(usize, u64),
    Xbzrle(usize, u64, Vec<u8>),
    Compressed(usize, u64, Vec<u8>),
    MultifdFlush,
    RoundEnd,
    Command(u16, Vec<u8>),
    DeviceState(Vec<u8>),
}

fn own(event: Event<'_>) -> Owned {
    match event {
        Event::Configuration(configuration) => Owned::Configuration(configuration),
        Event::RamBlocks { section_id, ram } => Owned::RamBlocks(section_id, ram),
        Event::Page { block, page, data } => Owned::Page(block, page.0, data.into()),
        Event::ZeroPage { block, page } => Owned::Zero(block, page.0),
        Event::Xbzrle { block, page, delta } => Owned::Xbzrle(block, page.0, delta.into()),
        Event::CompressedPage { block, page, zlib } => {
            Owned::Compressed(block, page.0, zlib.into())
        }
        Event::MultifdFlush => Owned::MultifdFlush,
        Event::RoundEnd => Owned::RoundEnd,
        Event::Command { code, payload } => Owned::Command(code, payload.into()),
        Event::DeviceState(bytes) => Owned::DeviceState(bytes.into()),
    }
}

/// Decodes `bytes`. Each time the decoder needs more of them, it gets as many more as `cut`
/// returns.
fn decode(bytes: &[u8], mut cut: impl FnMut() -> usize) -> (Vec<Owned>, Result<(), FormatError>) {
    let mut decoder = StreamDecoder::new();
    let mut events: Vec<Owned> = Vec::new();
    let (mut start, mut end) = (0, 0);
    loop {
        let step = match decoder.next(&bytes[start..end]) {
            Ok(step) => step,
            Err(error) => {
                assert_eq!(decoder.next(&bytes[end..]), Err(error.clone()));
                assert_eq!(decoder.finish(), Err(error.clone()));
                return (events, Err(error));
            }
        };
        start += step.consumed;
        assert_eq!(decoder.offset(), start as u64);
        match step.event.map(own) {
            Some(Owned::DeviceState(piece)) => match events.last_mut() {
                Some(Owned::DeviceState(bytes)) => bytes.extend(piece),
                _ => events.push(Owned::DeviceState(piece)),
            },
            Some(event) => events.push(event),
            None if end == bytes.len() => return (events, decoder.finish()),
            None => {
                assert!(end - start < EVENT_LEN_MAX, "so many bytes are enough");
                end = bytes.len().min(end + cut().max(1));
            }
        }
    }
}

fn decode_whole(bytes: &[u8]) -> (Vec<Owned>, Result<(), FormatError>) {
    decode(bytes, || bytes.len())
}

/// Returns the decoder's error for a stream that ends with something invalid.
fn refusal(bytes: &[u8]) -> FormatError {
    let whole = decode_whole(bytes);
    let error = whole.1.clone().expect_err("a refusal");
    assert!(!matches!(error.kind, FormatErrorKind::Ends { .. }), "only cut: {error}");
    assert_eq!(decode(bytes, || 1), whole, "byte by byte");
    error
}

fn refused_word(word: u64, after: &[u8]) -> String {
    let mut bytes = begun();
    encoder::word(&mut bytes, word);
    bytes.extend_from_slice(after);
    let error = refusal(&bytes);
    error.kind.to_string()
}

fn refused_section(section: &[u8]) -> String {
    let mut bytes = between_sections();
    let offset = bytes.len() as u64;
    bytes.extend_from_slice(section);
    let error = refusal(&bytes);
    assert_eq!(error.offset, offset);
    error.kind.to_string()
}

/// One entry of the section "ram".
#[derive(Clone, Debug)]
enum Item {
    Page(usize, u64, u8),
    Zero(usize, u64),
    Xbzrle(usize, u64, Vec<u8>),
    Compressed(usize, u64, Vec<u8>),
    Flush,
    NextPart,
}

fn items() -> impl Strategy<Value = Vec<Item>> {
    let place = prop_oneof![(Just(0_usize), 0_u64..64), (Just(1_usize), 0_u64..4)];
    let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
    let item = prop_oneof![
        (place.clone(), any::<u8>())
            .prop_map(|((block, page), fill)| Item::Page(block, page, fill)),
        place.clone().prop_map(|(block, page)| Item::Zero(block, page)),
        (place.clone(), bytes()).prop_map(|((block, page), d)| Item::Xbzrle(block, page, d)),
        (place, bytes()).prop_map(|((block, page), d)| Item::Compressed(block, page, d)),
        Just(Item::Flush),
        Just(Item::NextPart),
    ];
    proptest::collection::vec(item, 0..20)
}

/// Encodes `items`; returns the stream and the expected events.
fn stream_of(items: &[Item]) -> (Vec<u8>, Vec<Owned>) {
    let ram = ram();
    let block = |index: usize| (index, &ram.blocks()[index]);
    let mut bytes = configuration().encode();
    let mut section = RamSection::begin(&mut bytes, RAM_ID, &ram);
    let mut events = vec![
        Owned::Configuration(configuration()),
        Owned::RamBlocks(RAM_ID, ram.clone()),
        Owned::RoundEnd,
    ];
    for item in items {
        if let Item::Xbzrle(index, ..) | Item::Compressed(index, ..) = item {
            // The encoder cannot write such pages. This zero page makes the block the last one
            // named.
            section.zero_page(&mut bytes, block(*index), PageIndex(0));
            events.push(Owned::Zero(*index, 0));
        }
        events.push(match item {
            &Item::Page(index, page, fill) => {
                section.page(&mut bytes, block(index), PageIndex(page), &[fill; 4096]);
                Owned::Page(index, page, vec![fill; 4096])
            }
            &Item::Zero(index, page) => {
                section.zero_page(&mut bytes, block(index), PageIndex(page));
                Owned::Zero(index, page)
            }
            Item::Xbzrle(index, page, delta) => {
                encoder::word(&mut bytes, (page * 4096) | 0x60);
                bytes.extend_from_slice(&[1, 0, u8::try_from(delta.len()).expect("short")]);
                bytes.extend_from_slice(delta);
                Owned::Xbzrle(*index, *page, delta.clone())
            }
            Item::Compressed(index, page, zlib) => {
                encoder::word(&mut bytes, (page * 4096) | 0x100);
                encoder::counted_text(&mut bytes, ram.blocks()[*index].name());
                bytes.extend_from_slice(&[0, 0, 0, u8::try_from(zlib.len()).expect("short")]);
                bytes.extend_from_slice(zlib);
                Owned::Compressed(*index, *page, zlib.clone())
            }
            Item::Flush => {
                encoder::word(&mut bytes, 0x200);
                Owned::MultifdFlush
            }
            Item::NextPart => {
                section.next_part(&mut bytes);
                Owned::RoundEnd
            }
        });
    }
    section.finish(&mut bytes);
    encoder::switchover_start(&mut bytes);
    bytes.extend_from_slice(DEVICES);
    events.extend([Owned::RoundEnd, Owned::RoundEnd, Owned::Command(11, Vec::new())]);
    events.push(Owned::DeviceState(DEVICES.to_vec()));
    (bytes, events)
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded_however_it_is_cut(
        items in items(),
        cuts in proptest::collection::vec(prop_oneof![1_usize..20, 1_usize..6000], 1..50),
    ) {
        let (bytes, events) = stream_of(&items);
        let mut cuts = cuts.iter().cycle();
        let decoded = decode(&bytes, || *cuts.next().expect("a cycle"));
        prop_assert_eq!(decoded, (events, Ok(())));
        println!("cases: 1 mutations");
    }

    #[test]
    fn any_change_of_a_byte_gives_the_same_however_it_is_cut(
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        cut in 1_usize..40,
    ) {
        let items = [Item::Page(1, 2, 9), Item::Zero(1, 3), Item::Compressed(0, 7, vec![5; 9])];
        let (mut bytes, _) = stream_of(&items);
        let at = at.index(bytes.len());
        bytes[at] = value;
        prop_assert_eq!(decode(&bytes, || cut), decode_whole(&bytes));
        println!("cases: 1 mutations");
    }
}

#[test]
fn what_qemu_writes_byte_by_byte_is_read() {
    // From streams of QEMU 10.0.2, without capabilities and without most pages.
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0".to_vec();
    bytes.extend_from_slice(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    bytes.extend_from_slice(&[0, 0, 0, 0, 0x10, 0x02, 0, 0x04]);
    bytes.extend_from_slice(b"\x06pc.ram\0\0\0\0\x10\0\0\0");
    bytes.extend_from_slice(b"\x06pc.rom\0\0\0\0\0\x02\0\0");
    bytes.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
    bytes.extend_from_slice(b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x02\x06pc.ram\0");
    bytes.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
    bytes.extend_from_slice(b"\x02\0\0\0\x01\0\0\0\0\x0f\xff\xf0\x22\0");
    bytes.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
    bytes.extend_from_slice(b"\x08\0\x0b\0\0");
    bytes.extend_from_slice(b"\x03\0\0\0\x01\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
    bytes.extend_from_slice(DEVICES);
    let (events, end) = decode_whole(&bytes);
    let block = |(name, len): (&str, u64)| RamBlock::new(name.into(), len, PageSize::KIB_4);
    let blocks = [("pc.ram", 0x1000_0000), ("pc.rom", 0x2_0000)].map(|of| block(of).unwrap());
    let expected = [
        Owned::Configuration(configuration()),
        Owned::RamBlocks(1, RamLayout::new(blocks.into()).unwrap()),
        Owned::RoundEnd,
        Owned::Zero(0, 0),
        Owned::RoundEnd,
        // CONTINUE refers to the block that the section part before named.
        Owned::Zero(0, 0xffff),
        Owned::RoundEnd,
        Owned::Command(11, Vec::new()),
        Owned::RoundEnd,
        Owned::DeviceState(DEVICES.to_vec()),
    ];
    assert_eq!(events, expected);
    assert_eq!(end, Ok(()));
}

#[test]
fn a_stream_of_background_snapshot_has_no_end_of_ram() {
    let mut bytes = between_sections();
    bytes.extend_from_slice(DEVICES);
    let (events, end) = decode_whole(&bytes);
    assert_eq!(events.last(), Some(&Owned::DeviceState(DEVICES.to_vec())));
    assert_eq!(end, Ok(()));
}

#[test]
fn pages_have_the_size_that_the_configuration_says() {
    let block = RamBlock::new("ram".into(), 0x8000, PageSize::new(16384).unwrap()).unwrap();
    let layout = RamLayout::new(vec![block]).unwrap();
    let mut bytes = Configuration { page_bits: Some(14), ..configuration() }.encode();
    let mut section = RamSection::begin(&mut bytes, RAM_ID, &layout);
    section.page(&mut bytes, (0, &layout.blocks()[0]), PageIndex(1), &[3; 16384]);
    section.finish(&mut bytes);
    bytes.extend_from_slice(DEVICES);
    let (events, end) = decode_whole(&bytes);
    assert!(events.contains(&Owned::Page(0, 1, vec![3; 16384])));
    assert_eq!(end, Ok(()));

    let bytes = Configuration { page_bits: Some(64), ..configuration() }.encode();
    let error = refusal(&[bytes, vec![1]].concat());
    let text = "at offset 0x0: page size 0 is not a power of two from 512 to 65536";
    assert_eq!(error.to_string(), text);
}

#[test]
fn a_stream_may_end_only_after_its_device_state_has_begun() {
    let (bytes, _) = stream_of(&[Item::Page(0, 1, 2)]);
    let first_device = bytes.len() - DEVICES.len();
    let mut cuts = 0;
    for len in 0..bytes.len() {
        let (_, end) = decode_whole(&bytes[..len]);
        // An incomplete header may be one of another kind: it is not recognized as a device
        // section.
        assert_eq!(end.is_ok(), len >= first_device + 11, "cut at {len}");
        cuts += 1;
    }
    println!("cases: {cuts} truncations");
    let (_, end) = decode_whole(&between_sections());
    let text = format!(
        "at offset {:#x}: section type needs 1 bytes, 0 are left",
        between_sections().len()
    );
    assert_eq!(end.unwrap_err().to_string(), text);
    let page = begun().len() + 13 + 5;
    let (_, end) = decode_whole(&bytes[..page + 100]);
    let text = format!("at offset {:#x}: page needs 4096 bytes, 85 are left", page + 15);
    assert_eq!(end.unwrap_err().to_string(), text);
    let text = "at offset 0x0: header of the stream needs 1 bytes, 0 are left";
    assert_eq!(StreamDecoder::new().finish().unwrap_err().to_string(), text);
}

#[test]
fn capabilities_that_change_the_stream_are_refused_by_name() {
    for name in ["mapped-ram", "x-ignore-shared"] {
        let capabilities = vec![name.to_string()];
        let bytes = Configuration { capabilities, ..configuration() }.encode();
        let error = refusal(&[bytes, vec![1]].concat());
        let text = format!("at offset 0x0: capability {name:?} is not supported");
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_configuration_without_end_is_refused() {
    let mut bytes = configuration().encode();
    while bytes.len() < EVENT_LEN_MAX {
        bytes.extend_from_slice(b"\x05\x12configuration/uuid\0\0\0\x01");
        bytes.extend_from_slice(&[7; 16]);
    }
    let text = "length of the configuration is 32769, at most 32768 is accepted";
    assert_eq!(decode_whole(&bytes).1.unwrap_err().kind.to_string(), text);
    assert_eq!(decode(&bytes, || 1000).1.unwrap_err().kind.to_string(), text);
}

#[test]
fn words_that_no_file_has_are_refused_by_name() {
    assert_eq!(refused_word(0x1001, b""), "RAM flag \"FULL\" is not supported");
    assert_eq!(refused_word(0x80, b""), "RAM flag of RDMA \"HOOK\" is not supported");
    assert_eq!(refused_word(0x8004, b""), "second block list \"MEM_SIZE\" is not supported");
    assert_eq!(refused_word(0x400, b""), "RAM word \"0x400\" is not supported");
}

#[test]
fn pages_that_are_not_in_the_block_list_are_refused() {
    let text = "RAM block \"pc.rom\" is not in the block list";
    assert_eq!(refused_word(0x08, b"\x06pc.rom"), text);
    let text = "first page with the RAM flag \"CONTINUE\" is not supported";
    assert_eq!(refused_word(0x28, b""), text);
    let text = "page ends at 0x5000, past 0x4000";
    assert_eq!(refused_word(0x4008, b"\x07pc.bios"), text);
    assert_eq!(refused_word(0x02, b"\x01\xff"), "name of a RAM block is not UTF-8");
}

#[test]
fn page_contents_out_of_their_limits_are_refused() {
    let text = "fill byte of a zero page is 0x1, expected 0x0";
    assert_eq!(refused_word(0x02, b"\x06pc.ram\x01"), text);
    let text = "kind of an XBZRLE page is 0x2, expected 0x1";
    assert_eq!(refused_word(0x40, b"\x06pc.ram\x02"), text);
    let text = "length of an XBZRLE page is 4097, at most 4096 is accepted";
    assert_eq!(refused_word(0x40, b"\x06pc.ram\x01\x10\x01"), text);
    let text = "length of a compressed page is 4294967295, at most 5120 is accepted";
    assert_eq!(refused_word(0x100, b"\x06pc.ram\xff\xff\xff\xff"), text);
}

#[test]
fn a_footer_of_another_section_is_refused() {
    let text = "footer is 0x2, expected 0x7e";
    assert_eq!(refused_word(0x10, b"\x02"), text);
    let text = "section id in the footer is 0x2, expected 0x1";
    assert_eq!(refused_word(0x10, b"\x7e\0\0\0\x02"), text);
}

#[test]
fn a_block_list_that_does_not_add_up_is_refused() {
    let mut bytes = configuration().encode();
    encoder::start_ram(&mut bytes, RAM_ID, &ram());
    encoder::block_record(&mut bytes, &ram().blocks()[0]);
    encoder::block_record(
        &mut bytes,
        &RamBlock::new("more".into(), 0x1_0000, PageSize::KIB_4).unwrap(),
    );
    let text = "at offset 0x43: RAM blocks add up to 327680 bytes, expected 278528";
    assert_eq!(refusal(&bytes).to_string(), text);
}

#[test]
fn a_block_that_occurs_twice_is_refused() {
    let mut bytes = configuration().encode();
    let block = &ram().blocks()[1].clone();
    bytes.extend_from_slice(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x80\x04");
    encoder::block_record(&mut bytes, block);
    encoder::block_record(&mut bytes, block);
    let text = "RAM block \"pc.bios\" occurs twice";
    assert_eq!(refusal(&bytes).kind.to_string(), text);
}

#[test]
fn another_ram_section_than_the_one_that_is_known_is_refused() {
    let refused = |section: &[u8]| {
        refusal(&[configuration().encode(), section.to_vec()].concat()).kind.to_string()
    };
    let text = "version of the RAM section is 0x3, expected 0x4";
    assert_eq!(refused(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x03"), text);
    let text = "flags of the first RAM word is 0x8, expected 0x4";
    assert_eq!(refused(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x08"), text);
    let text = "total of the RAM is 9223372036854775808, at most 288230376151711744 is accepted";
    assert_eq!(refused(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\x80\0\0\0\0\0\0\x04"), text);
    assert_eq!(refused(b"\x00"), "section type \"0x00\" is not supported");
    assert_eq!(refused(b"\x02\0\0\0\x01"), "part of unknown section \"1\" is not supported");
    let text = "early device section \"timer\" is not supported";
    assert_eq!(refused(b"\x04\0\0\0\x01\x05timer"), text);
    let text = "second section \"ram\" is not supported";
    assert_eq!(refused_section(b"\x01\0\0\0\x09\x03ram"), text);
}

#[test]
fn sections_whose_length_nobody_knows_are_refused_by_name() {
    let text = "section with parts \"dirty-bitmap\" is not supported";
    assert_eq!(refused_section(b"\x01\0\0\0\x05\x0cdirty-bitmap"), text);
    let text = "part of unknown section \"5\" is not supported";
    assert_eq!(refused_section(b"\x02\0\0\0\x05"), text);
    assert_eq!(refused_section(b"\x03\0\0\0\x05"), text);
    assert_eq!(refused_section(b"\x06"), "section type \"0x06\" is not supported");
    let early = b"\x04\0\0\0\x05\x24/devices/virtio-mem-pci-device-early";
    let text = "early device section \"/devices/virtio-mem-pci-device-early\" is not supported";
    assert_eq!(refused_section(early), text);
}

#[test]
fn the_device_state_of_virtio_mem_after_ram_is_no_early_one() {
    let mut bytes = between_sections();
    bytes.extend_from_slice(b"\x03\0\0\0\x01");
    encoder::end_part(&mut bytes, RAM_ID);
    bytes.extend_from_slice(b"\x04\0\0\0\x05\x0avirtio-mem");
    assert_eq!(decode_whole(&bytes).1, Ok(()));
}

#[test]
fn commands_that_ask_for_an_answer_are_refused_by_name() {
    let refusals = [
        (1, "return-path command \"open return path\" is not supported"),
        (2, "return-path command \"ping\" is not supported"),
        (3, "postcopy-ram command \"postcopy advise\" is not supported"),
        (4, "postcopy-ram command \"postcopy listen\" is not supported"),
        (5, "postcopy-ram command \"postcopy run\" is not supported"),
        (6, "postcopy-ram command \"postcopy RAM discard\" is not supported"),
        (7, "postcopy-ram command \"packaged\" is not supported"),
        (8, "x-colo command \"enable COLO\" is not supported"),
        (9, "postcopy-ram command \"postcopy resume\" is not supported"),
        (10, "postcopy-ram command \"receive bitmap\" is not supported"),
        (12, "command \"12\" is not supported"),
    ];
    for (code, text) in refusals {
        assert_eq!(refused_section(&[8, 0, code]), text);
    }
}

#[test]
fn what_is_refused_is_refused_at_once() {
    let mut decoder = StreamDecoder::new();
    let error = decoder.next(b"\x7fELF").unwrap_err();
    assert!(matches!(error.kind, FormatErrorKind::NotAStream { .. }), "{error}");
    assert_eq!(decoder.next(&configuration().encode()), Err(error.clone()));
    assert_eq!(decoder.finish(), Err(error));
}

/// What was missing of an earlier piece is no reason any more once that piece has come.
#[test]
fn the_end_of_a_stream_names_what_is_missing_there() {
    let bytes = [configuration().encode(), vec![1]].concat();
    let mut decoder = StreamDecoder::new();
    assert_eq!(decoder.next(&bytes[..9]).unwrap().event, None);
    let text = "at offset 0x9: length of the machine type needs 4 bytes, 0 are left";
    assert_eq!(decoder.finish().unwrap_err().to_string(), text);
    assert!(decoder.next(&bytes).unwrap().event.is_some());
    let text = "at offset 0x1b: section \"ram\" needs 1 bytes, 0 are left";
    assert_eq!(decoder.finish().unwrap_err().to_string(), text);
}

/// Returns a stream up to the word that announces a block list of `total` bytes.
fn with_total(total: u64) -> Vec<u8> {
    let mut bytes = configuration().encode();
    bytes.extend_from_slice(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    encoder::word(&mut bytes, total | 4);
    bytes
}

#[test]
fn a_block_list_is_as_long_as_its_limits() {
    let most = BLOCK_LEN_MAX * BLOCKS_MAX as u64;
    let error = decode_whole(&with_total(most)).1.unwrap_err();
    assert!(matches!(error.kind, FormatErrorKind::Ends { .. }), "{error}");
    assert!(matches!(refusal(&with_total(most + 4096)).kind, FormatErrorKind::TooLarge { .. }));

    let with_blocks = |count: usize| {
        let mut bytes = with_total(count as u64 * 4096);
        for number in 0..count {
            let name = format!("block{number}");
            encoder::block_record(&mut bytes, &RamBlock::new(name, 4096, PageSize::KIB_4).unwrap());
        }
        encoder::word(&mut bytes, 0x10);
        decode_whole(&bytes)
    };
    let (events, _) = with_blocks(BLOCKS_MAX);
    let Owned::RamBlocks(_, ram) = &events[1] else { panic!("{:?}", events[1]) };
    assert_eq!(ram.blocks().len(), BLOCKS_MAX);
    let text = "number of RAM blocks is 4097, at most 4096 is accepted";
    assert_eq!(with_blocks(BLOCKS_MAX + 1).1.unwrap_err().kind.to_string(), text);
}

#[test]
fn a_device_state_is_as_long_as_its_limit() {
    let bytes = [between_sections(), DEVICES.to_vec()].concat();
    let mut decoder = StreamDecoder::new();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        rest = &rest[decoder.next(rest).unwrap().consumed..];
    }
    let piece = vec![0; 1 << 20];
    let end = between_sections().len() as u64 + DEVICE_STATE_LEN_MAX;
    while decoder.offset() < end {
        let expected = (end - decoder.offset()).min(piece.len() as u64);
        let step = decoder.next(&piece).unwrap();
        assert_eq!(step.consumed as u64, expected);
        assert_eq!(step.event, Some(Event::DeviceState(&piece[..step.consumed])));
    }
    assert_eq!(decoder.finish(), Ok(()));
    let text = "length of the device state is 268435457, at most 268435456 is accepted";
    assert_eq!(decoder.next(&piece).unwrap_err().kind.to_string(), text);
}
