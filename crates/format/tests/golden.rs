//! Files that a real QEMU wrote, and vmfiles of the format's first version, all without their
//! pages: see `testing/src/bin/fixtures.rs`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::path::Path;

use vmfile_format::manifest::{FOOTER_LEN, Features, Footer, Meta};
use vmfile_format::mapped_ram::MappedRamFile;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::decoder::{Event, StreamDecoder};
use vmfile_format::stream::description::VmDescription;
use vmfile_format::stream::device_state::DeviceState;
use vmfile_format::stream::encoder::{self, RamSection};
use vmfile_format::{PageBitmap, PageIndex, RamBlock, ReadError};

/// A file of which only some pieces are stored; the rest reads as zeros.
struct Sparse {
    pieces: BTreeMap<u64, Vec<u8>>,
}

impl Sparse {
    fn load(name: &str) -> Sparse {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let bytes = fs::read(&path).expect("a golden file");
        let mut rest = bytes.as_slice();
        let mut pieces = BTreeMap::new();
        while let Some((head, after)) = rest.split_first_chunk::<16>() {
            let (offset, len) = head.split_at(8);
            let offset = u64::from_be_bytes(offset.try_into().expect("a golden file is whole"));
            let len = u64::from_be_bytes(len.try_into().expect("a golden file is whole"));
            let (piece, after) =
                after.split_at(usize::try_from(len).expect("a golden file is whole"));
            rest = after;
            if offset != u64::MAX {
                pieces.insert(offset, piece.to_vec());
            }
        }
        Sparse { pieces }
    }

    fn len(&self) -> u64 {
        let (offset, last) = self.pieces.last_key_value().expect("pieces");
        offset + last.len() as u64
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let end = offset + len as u64;
        for (&start, piece) in self.pieces.range(..end) {
            for (at, &byte) in (start..).zip(piece) {
                if (offset..end).contains(&at) {
                    bytes[usize::try_from(at - offset).expect("a golden file is whole")] = byte;
                }
            }
        }
        bytes
    }

    fn structure(&self) -> MappedRamFile {
        let read = |offset, len| Ok::<_, Infallible>(self.read(offset, len));
        MappedRamFile::read(0, self.len(), read).unwrap_or_else(|error| match error {
            ReadError::Format(error) => panic!("{error}"),
            ReadError::Source(never) => match never {},
        })
    }
}

fn assert_is_read(name: &str, machine: &str) {
    let file = Sparse::load(name);
    let structure = file.structure();
    assert_eq!(structure.configuration.machine, machine);
    assert_eq!(structure.configuration.capabilities, ["mapped-ram"]);
    let ram = structure.block("pc.ram").expect("the main RAM");
    assert_eq!(ram.block.used_length(), 16 << 20);
    assert_eq!(ram.pages_offset % (1 << 20), 0);
    let bitmap = file.read(
        ram.bitmap_offset,
        usize::try_from(ram.bitmap_len()).expect("a golden file is whole"),
    );
    let bitmap =
        PageBitmap::decode(&bitmap, ram.block.page_count()).expect("a golden file is whole");
    let pages = bitmap.data_count().0;
    assert!((1000..=4096).contains(&pages), "{pages} pages hold data");

    let state = &structure.device_state;
    let names: Vec<&str> = state.sections.iter().map(|section| section.name.as_str()).collect();
    assert_eq!(names.first(), Some(&"timer"));
    assert_eq!(names.last(), Some(&"globalstate"));
    for device in ["cpu", "apic", "i8259", "serial"] {
        assert!(names.contains(&device), "{device} is among {names:?}");
    }
    assert_eq!(state.stream_end, file.len(), "QEMU's last byte is the file's");
    let (offset, len) = state.vm_description.expect("QEMU describes the devices");
    let description = file.read(offset, usize::try_from(len).expect("a golden file is whole"));
    let description: serde_json::Value =
        serde_json::from_slice(&description).expect("a golden file is whole");
    let devices = description["devices"].as_array().expect("a golden file is whole");
    assert_eq!(names.len(), devices.len(), "as many sections as QEMU says");
    for (name, device) in names.iter().zip(devices) {
        assert_eq!(*name, device["name"]);
    }
}

/// Asserts that QEMU's description and the footers yield the same device sections.
fn assert_description_and_footers_agree(name: &str) {
    let file = Sparse::load(name);
    let state = file.structure().device_state;
    let read = |offset: u64, end: u64| {
        file.read(offset, usize::try_from(end - offset).expect("a golden file is whole"))
    };
    let (offset, len) = state.vm_description.expect("QEMU describes the devices");
    let description = VmDescription::decode(&read(offset, offset + len));
    let described: Vec<_> = description
        .expect("QEMU's JSON")
        .devices
        .into_iter()
        .map(|d| {
            // The header has 14 bytes and the name, the footer 5.
            let len = d.payload_len + 14 + d.name.len() as u64 + 5;
            (d.name, d.instance, d.version, len)
        })
        .collect();
    let by_footers = DeviceState::locate(&read(state.start, state.end), state.start, u32::MAX);
    let by_footers = by_footers.expect("a golden file is whole");
    assert_eq!(by_footers.vm_description, None);
    assert_eq!(by_footers.sections, state.sections);
    let found: Vec<_> = state
        .sections
        .into_iter()
        .map(|section| (section.name, section.instance, section.version, section.len))
        .collect();
    assert_eq!(described, found);
}

#[test]
fn the_description_of_a_pc_gives_the_sections_that_the_footers_give() {
    assert_description_and_footers_agree("qemu-10.0.2-pc-plain.pieces");
    assert_description_and_footers_agree("qemu-10.0.2-pc-multifd.pieces");
}

#[test]
fn the_description_of_a_q35_gives_the_sections_that_the_footers_give() {
    assert_description_and_footers_agree("qemu-10.0.2-q35-plain.pieces");
    assert_description_and_footers_agree("qemu-10.0.2-q35-multifd.pieces");
}

/// A stream with QEMU's device state, and a page of each block before it.
#[test]
fn a_sequential_stream_hands_over_the_device_state_of_qemu() {
    let file = Sparse::load("qemu-10.0.2-q35-plain.pieces");
    let structure = file.structure();
    let expected = &structure.device_state;
    let ram = structure.ram();
    let configuration = structure.configuration.clone();
    let configuration = Configuration { capabilities: Vec::new(), ..configuration };
    let mut stream = configuration.encode();
    let mut section = RamSection::begin(&mut stream, 1, &ram);
    for block in ram.blocks().iter().enumerate() {
        section.page(&mut stream, block, PageIndex(0), &[9; 4096]);
    }
    section.finish(&mut stream);
    encoder::switchover_start(&mut stream);
    let start = stream.len() as u64;
    let len = usize::try_from(expected.stream_end - expected.start).expect("short");
    stream.extend_from_slice(&file.read(expected.start, len));

    let mut decoder = StreamDecoder::new();
    let (mut pages, mut state) = (0, Vec::new());
    let (mut taken, mut end) = (0, 0);
    while end < stream.len() {
        end = stream.len().min(end + 1000);
        while let Some(event) = {
            let step = decoder.next(&stream[taken..end]).expect("a stream without faults");
            taken += step.consumed;
            step.event
        } {
            match event {
                Event::Page { data, .. } => pages += u64::from(data[0] == 9),
                Event::DeviceState(piece) => state.extend_from_slice(piece),
                _ => {}
            }
        }
    }
    assert_eq!(decoder.finish(), Ok(()));
    assert_eq!(pages, ram.blocks().len() as u64);
    let located = DeviceState::locate(&state, start, 1).expect("QEMU's device state");
    let names = |state: &DeviceState| -> Vec<(String, u64)> {
        state.sections.iter().map(|section| (section.name.clone(), section.len)).collect()
    };
    assert_eq!(names(&located), names(expected));
    assert_eq!(located.stream_end, stream.len() as u64);
}

#[test]
fn a_file_of_a_pc_is_read() {
    assert_is_read("qemu-10.0.2-pc-plain.pieces", "pc-i440fx-10.0");
}

#[test]
fn a_file_of_a_pc_that_was_written_with_multifd_is_read() {
    assert_is_read("qemu-10.0.2-pc-multifd.pieces", "pc-i440fx-10.0");
}

#[test]
fn a_file_of_a_q35_is_read() {
    assert_is_read("qemu-10.0.2-q35-plain.pieces", "pc-q35-10.0");
}

#[test]
fn a_file_of_a_q35_that_was_written_with_multifd_is_read() {
    assert_is_read("qemu-10.0.2-q35-multifd.pieces", "pc-q35-10.0");
}

/// Asserts that QEMU's own stream decodes to every page of every block once, and then the devices.
fn assert_stream_is_decoded(name: &str, machine: &str, piece_len: usize) {
    let file = Sparse::load(name);
    let stream = file.read(0, usize::try_from(file.len()).expect("short"));
    let mut decoder = StreamDecoder::new();
    let (mut ram, mut id, mut seen, mut state) = (None, 0, Vec::new(), Vec::new());
    let (mut taken, mut end) = (0, 0);
    while end < stream.len() {
        end = stream.len().min(end + piece_len);
        while let Some(event) = {
            let step = decoder.next(&stream[taken..end]).expect("QEMU's stream");
            taken += step.consumed;
            step.event
        } {
            match event {
                Event::Configuration(configuration) => assert_eq!(configuration.machine, machine),
                Event::RamBlocks { section_id, ram: found } => {
                    let pages = |block: &RamBlock| {
                        vec![0_u8; usize::try_from(block.page_count().0).expect("small")]
                    };
                    seen = found.blocks().iter().map(pages).collect();
                    (ram, id) = (Some(found), section_id);
                }
                Event::Page { block, page, .. } | Event::ZeroPage { block, page } => {
                    seen[block][usize::try_from(page.0).expect("small")] += 1;
                }
                Event::DeviceState(piece) => state.extend_from_slice(piece),
                Event::Xbzrle { .. } | Event::CompressedPage { .. } | Event::MultifdFlush => {
                    panic!("no such capability is on")
                }
                Event::RoundEnd | Event::Command { .. } => {}
            }
        }
    }
    assert_eq!(decoder.finish(), Ok(()));
    assert_eq!(ram.expect("blocks").blocks()[0].used_length(), 16 << 20);
    assert!(seen.iter().flatten().all(|&times| times == 1), "each page once");
    let start = stream.len() as u64 - state.len() as u64;
    let located = DeviceState::locate(&state, start, id).expect("QEMU's device state");
    let names: Vec<&str> = located.sections.iter().map(|section| section.name.as_str()).collect();
    for device in ["timer", "cpu", "apic", "i8259", "serial", "globalstate"] {
        assert!(names.contains(&device), "{device} is among {names:?}");
    }
    assert_eq!(located.stream_end, stream.len() as u64);
}

#[test]
fn a_stream_of_each_version_is_decoded() {
    for (name, machine) in [
        ("qemu-7.2.22-pc-stream.pieces", "pc-i440fx-7.2"),
        ("qemu-10.0.2-pc-stream.pieces", "pc-i440fx-10.0"),
        ("qemu-11.1.3-pc-stream.pieces", "pc-i440fx-11.1"),
    ] {
        for piece_len in [4096, 64 << 10, usize::MAX >> 1] {
            assert_stream_is_decoded(name, machine, piece_len);
        }
    }
}

/// Reads a file that vmfile wrote before the metadata had features, further tables, the
/// guest-physical map and the CPUs' registers.
fn assert_first_version_is_read(name: &str, machine: &str) {
    let file = Sparse::load(name);
    let structure = file.structure();
    assert_eq!(structure.configuration.machine, machine);
    let read = |offset, len: u64| file.read(offset, usize::try_from(len).expect("short"));
    let last = read(file.len() - FOOTER_LEN, FOOTER_LEN);
    let footer = Footer::decode(&last, file.len()).expect("a good footer").expect("one");
    assert_eq!(footer.version, 1);
    let json = read(footer.metadata_offset, footer.metadata_len);
    let meta = Meta::decode(&json, &footer).expect("metadata");
    assert_eq!(meta.check(&structure, &footer), Ok(()));
    for extent in &meta.extents {
        let bytes = read(extent.offset, extent.bytes);
        assert!(extent.matches(&bytes), "{} at {:#x}", extent.what, extent.offset);
    }
    assert_eq!(meta.vm.machine, machine);
    assert_eq!(meta.vm.memory_map, None);
    assert_eq!((meta.features, meta.tables), (Features::default(), vec![]));
    assert_eq!((meta.cpu_sections, meta.working_set_known), (vec![], false));
}

#[test]
fn a_vmfile_of_the_first_version_is_read() {
    assert_first_version_is_read("vmfile-v1-example.pieces", "pc-i440fx-10.0");
    assert_first_version_is_read("vmfile-v1-direct.pieces", "pc-i440fx-10.0");
    assert_first_version_is_read("vmfile-v1-stream.pieces", "pc-i440fx-10.0");
    assert_first_version_is_read("vmfile-v1-native.pieces", "pc-q35-10.0");
}
