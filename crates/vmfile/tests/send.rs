//! The streams that `send` writes, as the decoder reads them.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "helpers of tests, with lengths of their own"
)]

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use proptest::prelude::*;
use vmfile::send::{SendOptions, SendReport, SendTo, send};
use vmfile::{Backend, Channels, Control, DirectIo, Snapshot};
use vmfile_format::mapped_ram::MappedRamLayout;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::decoder::{Event, StreamDecoder};
use vmfile_format::stream::multifd::{INIT_LEN, Init, Packet};
use vmfile_format::stream::{encoder, section};
use vmfile_format::{PageBitmap, PageIndex, PageSize, RamBlock, RamLayout};

const PAGE_LEN: usize = 4096;
const RAM_ID: u32 = 2;

/// The pages of a block: a byte for each page, 0 for a zero page.
type Pages = Vec<u8>;

/// Makes a file such as QEMU writes: the place of a zero page has stale bytes.
fn make_file(directory: &Path, blocks: &[Pages], description: Option<&str>) -> PathBuf {
    make_file_of("pc-i440fx-10.0", directory, blocks, description)
}

fn make_file_of(
    machine: &str,
    directory: &Path,
    blocks: &[Pages],
    description: Option<&str>,
) -> PathBuf {
    let path = directory.join("vm.mig");
    let file = File::options().create_new(true).write(true).open(&path).unwrap();
    let ram_block = |(index, pages): (usize, &Pages)| {
        let len = (pages.len() * PAGE_LEN) as u64;
        RamBlock::new(format!("block {index}"), len, PageSize::KIB_4).unwrap()
    };
    let ram = RamLayout::new(blocks.iter().enumerate().map(ram_block).collect()).unwrap();
    let configuration = Configuration { machine: machine.into(), ..Configuration::default() };
    let layout = MappedRamLayout::new(&configuration, ram, RAM_ID).unwrap();
    file.write_all_at(&layout.encode_head(), 0).unwrap();
    for (placed, pages) in layout.blocks().iter().zip(blocks) {
        let mut bitmap = PageBitmap::new(placed.block.page_count());
        for (index, &page) in (0..).zip(pages) {
            bitmap.set(PageIndex(index), page != 0);
            let bytes = [if page == 0 { 0xee } else { page }; PAGE_LEN];
            let offset = placed.page_offset(PageIndex(index)).unwrap();
            file.write_all_at(&bytes, offset).unwrap();
        }
        file.write_all_at(&placed.encode_record(), placed.record_offset).unwrap();
        file.write_all_at(&bitmap.encode(), placed.bitmap_offset).unwrap();
    }
    let (offset, mut tail) = layout.encode_end();
    tail.extend_from_slice(&devices());
    if let Some(json) = description {
        encoder::begin_vm_description(&mut tail, json.len() as u64);
        tail.extend_from_slice(json.as_bytes());
    }
    file.write_all_at(&tail, offset).unwrap();
    path
}

/// Returns one device section and EOF.
fn devices() -> Vec<u8> {
    let mut bytes = vec![section::FULL, 0, 0, 0, 7];
    encoder::counted_text(&mut bytes, "timer");
    bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 2, 0xaa, 0xbb, 0xcc]);
    bytes.extend_from_slice(&[section::FOOTER, 0, 0, 0, 7, section::EOF]);
    bytes
}

/// A decoded stream: for each block, a byte for each page that was sent; the bytes after RAM; and
/// how its parts end.
#[derive(Debug, PartialEq)]
struct Decoded {
    blocks: Vec<Vec<Option<u8>>>,
    tail: Vec<u8>,
    flushes: u32,
    rounds: u32,
}

fn decode(stream: &[u8]) -> Decoded {
    let mut decoder = StreamDecoder::new();
    let mut decoded = Decoded { blocks: Vec::new(), tail: Vec::new(), flushes: 0, rounds: 0 };
    let mut rest = stream;
    while !rest.is_empty() {
        let step = decoder.next(rest).unwrap();
        match step.event.expect("the stream is whole") {
            Event::Configuration(found) => assert!(found.machine.starts_with("pc-i440fx-")),
            Event::RamBlocks { ram, .. } => {
                let pages = |block: &RamBlock| vec![None; block.page_count().0 as usize];
                decoded.blocks = ram.blocks().iter().map(pages).collect();
            }
            Event::Page { block, page, data } => {
                assert!(data.iter().all(|byte| byte == &data[0]), "bytes of one page");
                let place = &mut decoded.blocks[block][page.0 as usize];
                assert_eq!(place.replace(data[0]), None, "page {page:?} comes once");
            }
            Event::ZeroPage { block, page } => {
                let place = &mut decoded.blocks[block][page.0 as usize];
                assert_eq!(place.replace(0), None, "page {page:?} comes once");
            }
            Event::RoundEnd => decoded.rounds += 1,
            Event::MultifdFlush => decoded.flushes += 1,
            Event::DeviceState(bytes) => decoded.tail.extend_from_slice(bytes),
            event => panic!("{event:?}"),
        }
        rest = &rest[step.consumed..];
    }
    decoder.finish().unwrap();
    decoded
}

fn send_file(path: &Path, options: &SendOptions) -> (SendReport, Vec<u8>) {
    let snapshot = Snapshot::open(path, 0).unwrap();
    let mut stream = tempfile::tempfile().unwrap();
    let to = SendTo::Descriptor(stream.try_clone().unwrap().into());
    let report = send(&snapshot, to, options, &Control::none()).unwrap();
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut stream).unwrap();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(report.bytes_sent, bytes.len() as u64);
    (report, bytes)
}

/// Pages in runs, so that windows, gaps and single pages all occur.
fn pages() -> impl Strategy<Value = Pages> {
    let run = (0_u8..4, 1_usize..90);
    proptest::collection::vec(run, 1..30)
        .prop_map(|runs| runs.into_iter().flat_map(|(page, count)| vec![page; count]).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_page_is_sent_once_and_is_what_the_bitmap_says(
        blocks in proptest::collection::vec(pages(), 1..4),
        assume_zeroed: bool,
        threads: bool,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = make_file(directory.path(), &blocks, None);
        let io = if threads { Backend::Threads } else { Backend::Auto };
        let options = SendOptions::default().direct_io(DirectIo::Off).io(io).assume_zeroed(assume_zeroed);
        let (report, stream) = send_file(&path, &options);
        let decoded = decode(&stream);
        let expected = blocks.iter().map(|pages| {
            let left_out = assume_zeroed && pages.len() * PAGE_LEN >= 4 << 20;
            pages.iter().map(|&page| (page != 0 || !left_out).then_some(page)).collect()
        });
        prop_assert_eq!(&decoded.blocks, &expected.collect::<Vec<Vec<Option<u8>>>>());
        prop_assert!(decoded.tail.starts_with(&devices()));
        let sent = decoded.blocks.iter().flatten().flatten();
        let zero = sent.clone().filter(|&&page| page == 0).count() as u64;
        prop_assert_eq!((report.pages_data, report.pages_zero), (sent.count() as u64 - zero, zero));
        println!("cases: 1 mutations");
    }
}

#[test]
fn the_description_is_that_of_the_file_and_an_empty_one_where_there_is_none() {
    let json = r#"{"configuration":{},"page_size":4096,"devices":[]}"#;
    for description in [Some(json), None] {
        let directory = tempfile::tempdir().unwrap();
        let path = make_file(directory.path(), &[vec![1]], description);
        let (_, stream) = send_file(&path, &SendOptions::default());
        let mut expected = devices();
        match description {
            Some(json) => {
                encoder::begin_vm_description(&mut expected, json.len() as u64);
                expected.extend_from_slice(json.as_bytes());
            }
            None => encoder::vm_description(&mut expected),
        }
        assert_eq!(decode(&stream).tail, expected);
    }
}

#[test]
fn nothing_is_sent_of_zero_pages_however_many_there_are() {
    let directory = tempfile::tempdir().unwrap();
    let mut pages = vec![0; 1 << 14];
    pages[9000] = 3;
    let path = make_file(directory.path(), &[pages], None);
    let options = SendOptions::default().assume_zeroed(true);
    let (report, stream) = send_file(&path, &options);
    assert_eq!((report.pages_total, report.pages_data, report.pages_zero), (1 << 14, 1, 0));
    assert!(stream.len() < 2 * PAGE_LEN, "{} bytes", stream.len());
}

/// Reads everything that a sender writes on one connection.
fn read_all(mut connection: UnixStream) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Sends over channels; returns the bytes of the stream and of each channel.
fn send_over(path: &Path, channels: u8) -> (Vec<u8>, Vec<Vec<u8>>) {
    let socket = path.with_extension("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let receiver = thread::spawn(move || {
        let connections = (0..=channels).map(|_| read_all(listener.accept().unwrap().0));
        // Accepts all connections before it waits for the first to end.
        let connections: Vec<_> = connections.collect();
        connections.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<_>>()
    });
    let snapshot = Snapshot::open(path, 0).unwrap();
    let options = SendOptions::default().channels(Channels::new(channels));
    let report = send(&snapshot, SendTo::Connect(socket), &options, &Control::none()).unwrap();
    let mut found = receiver.join().unwrap();
    assert_eq!(report.bytes_sent, found.iter().map(|bytes| bytes.len() as u64).sum::<u64>());
    (found.remove(0), found)
}

/// Adds the pages of a channel to those of the stream; returns the number of its SYNC packets.
fn add_channel(bytes: &[u8], ram: &RamLayout, decoded: &mut Decoded) -> u32 {
    let (init, mut rest) = bytes.split_at(INIT_LEN);
    assert!(Init::decode(init).unwrap().channel < 16);
    let mut syncs = 0;
    while !rest.is_empty() {
        let (packet, len) = Packet::decode(rest, 0, ram).unwrap().expect("the packet is whole");
        let (data, after) = rest[len..].split_at(packet.data_len as usize);
        syncs += u32::from(packet.sync);
        if let Some(pages) = packet.pages {
            assert_eq!(pages.zero, [], "zero pages go into the stream");
            for (page, data) in pages.normal.iter().zip(data.chunks(PAGE_LEN)) {
                assert!(data.iter().all(|byte| byte == &data[0]), "bytes of one page");
                let place = &mut decoded.blocks[pages.block][page.0 as usize];
                assert_eq!(place.replace(data[0]), None, "page {page:?} comes once");
            }
        }
        rest = after;
    }
    syncs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn every_page_comes_once_over_channels_and_each_part_ends_on_all_of_them(
        blocks in proptest::collection::vec(pages(), 1..3),
        channels in 1_u8..5,
        is_old: bool,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let machine = if is_old { "pc-i440fx-8.0" } else { "pc-i440fx-8.1" };
        let path = make_file_of(machine, directory.path(), &blocks, None);
        let (stream, others) = send_over(&path, channels);
        let mut decoded = decode(&stream);
        prop_assert_eq!((decoded.rounds, decoded.flushes), (3, if is_old { 0 } else { 3 }));
        let ram = Snapshot::open(&path, 0).unwrap().structure().ram();
        for bytes in &others {
            prop_assert_eq!(add_channel(bytes, &ram, &mut decoded), 3);
        }
        let expected: Vec<Vec<_>> =
            blocks.iter().map(|pages| pages.iter().copied().map(Some).collect()).collect();
        prop_assert_eq!(decoded.blocks, expected);
        println!("cases: 1 mutations");
    }
}
