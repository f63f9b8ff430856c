//! Sections with parts other than "ram", between the parts of "ram" and after them, as QEMU sends them for
//! pseries and s390x.

use vmfile_format::error::FormatErrorKind;
use vmfile_format::limits::DEVICE_STATE_LEN_MAX;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::decoder::{Event, StreamDecoder};
use vmfile_format::stream::device_state::DeviceState;
use vmfile_format::stream::encoder;
use vmfile_format::{FormatError, PageSize, RamBlock, RamLayout};

const RAM_ID: u32 = 1;
const TABLE_ID: u32 = 0x231;
const ATTRIBUTES_ID: u32 = 6;

const START: u8 = 1;
const PART: u8 = 2;
const END: u8 = 3;

/// One device and what follows it.
const DEVICES: &[u8] = b"\x04\0\0\0\x02\x05timer\0\0\0\0\0\0\0\x02PAYLOAD\x7e\0\0\0\x02\0";

/// Returns a stream up to the end of the first part of "ram".
fn begun() -> Vec<u8> {
    let configuration = Configuration { machine: "pseries-10.0".into(), ..Default::default() };
    let block = RamBlock::new("ppc_spapr.ram".into(), 4096, PageSize::KIB_4).expect("a block");
    let ram = RamLayout::new([block].into()).expect("a layout");
    let mut bytes = configuration.encode();
    encoder::start_ram(&mut bytes, RAM_ID, &ram);
    for block in ram.blocks() {
        encoder::block_record(&mut bytes, block);
    }
    encoder::end_part(&mut bytes, RAM_ID);
    bytes
}

fn part(kind: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(id.to_be_bytes());
    bytes.extend(payload);
    bytes.push(0x7e);
    bytes.extend(id.to_be_bytes());
    bytes
}

fn start(id: u32, name: &str, payload: &[u8]) -> Vec<u8> {
    let mut head = Vec::new();
    encoder::counted_text(&mut head, name);
    head.extend([0; 7]);
    head.push(1);
    head.extend(payload);
    part(START, id, &head)
}

/// A part of a page table: groups of an index, a number of valid entries, and one of invalid ones.
fn groups(groups: &[(u32, u16, u16)]) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    for &(index, valid, invalid) in groups.iter().chain([&(0, 0, 0)]) {
        bytes.extend(index.to_be_bytes());
        bytes.extend(valid.to_be_bytes());
        bytes.extend(invalid.to_be_bytes());
        // They look like the end of the part.
        bytes.extend(b"\x7e\0\0\x02\x31\x03\0\0\x02\x31\0\0\0\0\0\0".repeat(valid.into()));
    }
    bytes
}

/// Words of storage attributes, each with the attributes behind it.
fn words(words: &[(u64, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (word, attributes) in words {
        bytes.extend(word.to_be_bytes());
        if word & 2 != 0 {
            bytes.extend((attributes.len() as u64).to_be_bytes());
            bytes.extend(*attributes);
        }
    }
    bytes
}

/// The parts of a VM that has both sections, in the order of a stream; `true` for those that are not "ram".
fn parts() -> Vec<(bool, Vec<u8>)> {
    let table = groups(&[(0, 3, 5), (7, 0, 9), (100, 20000, 0)]);
    vec![
        (true, start(TABLE_ID, "spapr/htab", &22_u32.to_be_bytes())),
        (true, start(ATTRIBUTES_ID, "s390-storage_attributes", &words(&[(1, &[])]))),
        (false, part(PART, RAM_ID, &16_u64.to_be_bytes())),
        (true, part(PART, TABLE_ID, &table)),
        (true, part(PART, ATTRIBUTES_ID, &words(&[(0x5002, &[7; 300_000]), (2, &[]), (1, &[])]))),
        (false, part(END, RAM_ID, &16_u64.to_be_bytes())),
        (true, part(END, TABLE_ID, &u32::MAX.to_be_bytes())),
        (true, part(END, ATTRIBUTES_ID, &words(&[(8, &[]), (1, &[])]))),
    ]
}

/// Decodes a stream in pieces of `piece` bytes; returns what is no RAM, and how often RAM's parts ended.
fn decode(bytes: &[u8], piece: usize) -> Result<(Vec<u8>, usize), FormatError> {
    let (mut decoder, mut taken, mut rounds) = (StreamDecoder::new(), Vec::new(), 0);
    let (mut first, mut end) = (0, 0);
    loop {
        let step = decoder.next(&bytes[first..end])?;
        first += step.consumed;
        match step.event {
            Some(Event::DeviceState(bytes)) => taken.extend(bytes),
            Some(Event::RoundEnd) => rounds += 1,
            Some(_) => {}
            None if end == bytes.len() => break,
            None => end = bytes.len().min(end + piece),
        }
    }
    decoder.finish()?;
    Ok((taken, rounds))
}

fn refused(stream: &[u8]) -> (&'static str, String) {
    match decode(stream, stream.len()).expect_err("it is refused").kind {
        FormatErrorKind::Unsupported { what, name } => (what, name),
        kind => panic!("{kind}"),
    }
}

#[test]
fn what_is_no_ram_is_the_same_however_the_stream_is_cut() {
    let (mut stream, mut expected) = (begun(), Vec::new());
    for (is_other, part) in parts() {
        stream.extend(&part);
        if is_other {
            expected.extend(part);
        }
    }
    stream.extend(DEVICES);
    expected.extend(DEVICES);
    for piece in [1, 7, 1000, 200_000, stream.len()] {
        assert!(decode(&stream, piece) == Ok((expected.clone(), 3)), "in pieces of {piece}");
    }
}

/// A file that QEMU wrote has empty parts of "ram" in between.
#[test]
fn parts_are_found_among_those_of_ram() {
    let (mut bytes, mut expected) = (Vec::new(), Vec::new());
    for (is_other, part) in parts() {
        if is_other {
            expected.extend(&part);
        }
        bytes.extend(part);
    }
    let devices = bytes.len() as u64;
    bytes.extend(DEVICES);
    let state = DeviceState::locate(&bytes, 0x1000, RAM_ID).expect("sections");
    assert_eq!((state.start, state.sections.len()), (0x1000 + devices, 1));
    let index = |offset: u64| usize::try_from(offset - 0x1000).expect("small");
    let found: Vec<u8> = state
        .parts
        .iter()
        .flat_map(|&(offset, len)| &bytes[index(offset)..index(offset + len)])
        .copied()
        .collect();
    assert!(found == expected);
    assert_eq!(state.parts.len(), 3, "neighbors are joined");
    assert_eq!(state.parts_len(), expected.len() as u64);
    assert_eq!(state.payload("timer", &[&expected, DEVICES].concat()), Some(&b"PAYLOAD"[..]));
    let others: Vec<u32> = (1..8).filter(|id| [2, ATTRIBUTES_ID].contains(id)).collect();
    assert!(!others.contains(&state.unused_id()) && state.unused_id() != TABLE_ID);
}

#[test]
fn what_is_not_known_or_not_whole_is_refused() {
    let then = |parts: &[Vec<u8>]| [begun(), parts.concat(), DEVICES.to_vec()].concat();
    let table = || start(TABLE_ID, "spapr/htab", &22_u32.to_be_bytes());
    let attributes = |payload: &[u8]| start(ATTRIBUTES_ID, "s390-storage_attributes", payload);
    assert_eq!(refused(&then(&[start(9, "slirp", &[])])), ("section with parts", "slirp".into()));
    assert_eq!(refused(&then(&[table(), table()])), ("second section", "spapr/htab".into()));
    let flag = attributes(&words(&[(4, &[])]));
    assert_eq!(refused(&then(&[flag])), ("flag of storage attributes", "0x4".into()));
    let unknown = part(PART, TABLE_ID, &u32::MAX.to_be_bytes());
    assert_eq!(refused(&then(&[unknown])), ("part of unknown section", "561".into()));
    // "ram" comes first in a file.
    let configuration = Configuration { machine: "pseries-10.0".into(), ..Default::default() };
    let early = [configuration.encode(), table()].concat();
    assert_eq!(refused(&early), ("section before \"ram\"", "spapr/htab".into()));
    // The last part has what changed while the guest ran, and a background snapshot has none.
    let error = DeviceState::locate(&[table(), DEVICES.to_vec()].concat(), 0, RAM_ID);
    let kind = error.expect_err("it is refused").kind;
    assert!(
        matches!(&kind, FormatErrorKind::Unsupported { what, .. } if *what == "section without an end")
    );
    // Only the count says how long it is.
    let long = attributes(&words(&[(2, &[])])[..8]);
    let long = [&long[..long.len() - 5], &(DEVICE_STATE_LEN_MAX).to_be_bytes()].concat();
    let mut stream = then(&[long]);
    let len = usize::try_from(DEVICE_STATE_LEN_MAX).expect("small");
    stream.resize(stream.len() + len, 0);
    let kind = decode(&stream, 1 << 20).expect_err("it is too long").kind;
    assert!(matches!(kind, FormatErrorKind::TooLarge { .. }), "{kind}");
}

#[test]
fn a_stream_that_is_cut_in_a_part_is_refused() {
    let others: Vec<u8> = parts().into_iter().flat_map(|(_, part)| part).collect();
    let stream = [begun(), others.clone()].concat();
    let first = begun().len();
    let lens = (first..first + 400).chain(stream.len() - 400..stream.len());
    for len in lens {
        assert!(decode(&stream[..len], len).is_err(), "cut at {len}");
        assert!(DeviceState::locate(&others[..len - first], 0, RAM_ID).is_err(), "cut at {len}");
    }
}
