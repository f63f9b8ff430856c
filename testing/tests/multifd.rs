//! QEMU sends a VM over several connections at once, and the restored guest judges its RAM.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::receive::{ReceiveOptions, ReceiveReport, StreamFrom, receive};
use vmfile::restore::Mode;
use vmfile::{Channels, Control};
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::encoder::RamSection;
use vmfile_format::stream::multifd::{Compression, Init, Packet, PacketPages};
use vmfile_format::{PageIndex, PageSize, RamBlock, RamLayout};
use vmfile_testing::migration::{Outcome, received, send_to, set_capability, set_parameter};
use vmfile_testing::{Case, Guest, GuestConfig, Qemu, Ram, Release, TestResult, cases, requires};

fn channels(count: u8) -> ReceiveOptions {
    ReceiveOptions::default().channels(Channels::new(count))
}

/// Boots on `source`, receives over `count` channels with these migration parameters, and restores
/// on `destination`.
fn round_trip(
    (source, destination): (&Qemu, &Qemu),
    config: &GuestConfig,
    count: u8,
    parameters: &[(&str, Value)],
) -> TestResult<ReceiveReport> {
    let mut guest = config.boot_to(source, 2)?;
    for (name, value) in parameters {
        set_parameter(&mut guest, name, value.clone())?;
    }
    let saved = received(&mut guest, &channels(count))?;
    assert_eq!(saved.report.channels, count);
    drop(guest);
    saved.comes_back(destination, [Mode::Map, Mode::Load])?;
    Ok(saved.report)
}

#[test]
fn pages_of_one_channel_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(101);
    let report = round_trip((&qemu, &qemu), &config, 1, &[])?;
    assert!(report.pages_zero > 0 && report.bytes_written > 0, "{report:?}");
    assert!(report.direct_io.to_string().starts_with("yes"), "{report:?}");
    Ok(())
}

#[test]
fn pages_of_two_channels_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::memfd(64)).seed(102);
    round_trip((&qemu, &qemu), &config, 2, &[]).map(drop)
}

#[test]
fn pages_of_eight_channels_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(103);
    round_trip((&qemu, &qemu), &config, 8, &[]).map(drop)
}

#[test]
fn pages_of_the_oldest_qemu_come_back_on_the_installed_one() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(104).machine_version("7.2");
    round_trip((&oldest, &qemu), &config, 2, &[]).map(drop)
}

#[test]
fn pages_of_an_old_machine_type_on_the_installed_qemu_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(105).machine_version("7.2");
    round_trip((&qemu, &qemu), &config, 2, &[]).map(drop)
}

#[test]
fn pages_of_the_newest_qemu_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::boot_sector(Ram::memfd(64)).seed(106);
    round_trip((&qemu, &qemu), &config, 2, &[]).map(drop)
}

#[test]
fn zero_pages_that_come_by_the_stream_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(107);
    let legacy = [("zero-page-detection", json!("legacy"))];
    let report = round_trip((&qemu, &qemu), &config, 2, &legacy)?;
    assert!(report.pages_zero > 0, "{report:?}");
    Ok(())
}

#[test]
fn pages_without_zero_detection_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(108);
    let none = [("zero-page-detection", json!("none"))];
    let report = round_trip((&qemu, &qemu), &config, 2, &none)?;
    assert!(report.pages_zero > 0 && report.stream_bytes > 64 << 20, "{report:?}");
    Ok(())
}

#[test]
fn compressed_pages_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    for method in ["zlib", "zstd"] {
        let config = Guest::boot_sector(Ram::private(64)).seed(109);
        // Compression never catches up with the guest, so QEMU may pause it for a minute.
        let parameters =
            [("multifd-compression", json!(method)), ("downtime-limit", json!(60_000))];
        round_trip((&qemu, &qemu), &config, 2, &parameters)?;
    }
    Ok(())
}

#[test]
fn compressed_pages_of_the_oldest_qemu_come_back() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    for method in ["zlib", "zstd"] {
        let config = Guest::boot_sector(Ram::private(64)).seed(110).machine_version("7.2");
        // Compression never catches up with the guest, so QEMU may pause it for a minute.
        let parameters =
            [("multifd-compression", json!(method)), ("downtime-limit", json!(60_000))];
        round_trip((&oldest, &qemu), &config, 2, &parameters)?;
    }
    Ok(())
}

/// Receives a guest while it runs and rewrites its memory. On a busy host QEMU may send all of it
/// before the guest writes again; then the test starts anew.
fn live((source, destination): (&Qemu, &Qemu), config: &GuestConfig) -> TestResult {
    for _ in 0..5 {
        let mut guest = config.boot_to(source, 2)?;
        set_parameter(&mut guest, "downtime-limit", json!(300))?;
        let saved = received(&mut guest, &channels(2))?;
        drop(guest);
        if saved.report.bytes_rewritten > 0 {
            return saved.comes_back(destination, [Mode::Map, Mode::Load]);
        }
    }
    Err("five guests, and no page of them came again".into())
}

#[test]
fn a_guest_that_runs_while_it_is_sent_is_of_one_moment() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    live((&qemu, &qemu), &Guest::boot_sector(Ram::private(64)).seed(111).busy())
}

#[test]
fn a_guest_that_runs_while_the_oldest_qemu_sends_it_is_of_one_moment() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(112).busy().machine_version("7.2");
    live((&oldest, &qemu), &config)
}

#[test]
fn channels_that_nobody_expects_are_refused() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    for (qemu, version) in [(&oldest, "7.2"), (&qemu, "7.2"), (&qemu, "10.0")] {
        let config = Guest::boot_sector(Ram::private(64)).seed(113).machine_version(version);
        let mut guest = config.boot_to(qemu, 1)?;
        set_capability(&mut guest, "multifd")?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("vm.vmf");
        let (received, _) = send_to(&mut guest, &file, &ReceiveOptions::default())?;
        let error = received.expect_err("two channels");
        let text = "the sender uses multifd channels, and none are expected";
        assert_eq!(error.to_string(), text);
        assert_eq!(fs::read_dir(directory.path())?.count(), 0);
    }
    Ok(())
}

/// A running receive of two channels that fails after half a second without a byte.
struct Receiving {
    directory: tempfile::TempDir,
    socket: PathBuf,
    receiver: JoinHandle<Outcome>,
}

impl Receiving {
    fn begin() -> TestResult<Receiving> {
        let directory = tempfile::tempdir()?;
        let (socket, file) = (directory.path().join("socket"), directory.path().join("vm.vmf"));
        let stall_timeout = Some(Duration::from_millis(500));
        let options = channels(2).stall_timeout(stall_timeout);
        let from = StreamFrom::Listen(socket.clone());
        let receiver = thread::spawn(move || receive(from, &file, &options, &Control::none()));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "the receiver listens");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Receiving { directory, socket, receiver })
    }

    fn connect(&self, bytes: &[u8]) -> TestResult<UnixStream> {
        let mut connection = UnixStream::connect(&self.socket)?;
        connection.write_all(bytes)?;
        Ok(connection)
    }

    /// Waits for the receive to fail, and returns its error with all sources. Expects that no file
    /// is left.
    fn failure(self) -> TestResult<String> {
        let error = self.receiver.join().expect("no panic").expect_err("a failure");
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        assert_eq!(fs::read_dir(self.directory.path())?.count(), 0, "{text}");
        cases(1, Case::WrongInput);
        Ok(text)
    }
}

fn ram() -> RamLayout {
    let block = RamBlock::new("pc.ram".to_owned(), 1 << 20, PageSize::KIB_4).expect("a block");
    RamLayout::new(vec![block]).expect("a layout")
}

/// A stream of an old machine type up to its first page, where the second round begins.
fn stream() -> Vec<u8> {
    let mut bytes =
        Configuration { machine: "pc-i440fx-7.2".to_owned(), ..Configuration::default() }.encode();
    RamSection::begin(&mut bytes, 1, &ram());
    bytes
}

fn init(channel: u8) -> Vec<u8> {
    Init { uuid: [0; 16], channel }.encode()
}

fn packet(sync: bool, normal: &[u64]) -> Vec<u8> {
    let normal: Vec<_> = normal.iter().copied().map(PageIndex).collect();
    let data_len = u32::try_from(normal.len() * 4096).expect("few pages");
    let pages = PacketPages { block: 0, normal, zero: Vec::new() };
    let pages = Some(pages).filter(|pages| !pages.normal.is_empty());
    Packet { sync, compression: Compression::None, number: 0, pages, data_len }.encode(&ram())
}

/// Receives over two channels, the first of which sends `bytes`; returns the error of the receive.
fn failure_of_channel(bytes: &[u8], hang_up: bool) -> TestResult<String> {
    let receiving = Receiving::begin()?;
    let first = receiving.connect(&[init(0), packet(true, &[]), bytes.to_vec()].concat())?;
    let _second = receiving.connect(&[init(1), packet(true, &[])].concat())?;
    let _stream = receiving.connect(&stream())?;
    let _first = (!hang_up).then_some(first);
    receiving.failure()
}

#[test]
fn two_channels_with_one_number_are_refused() -> TestResult {
    let receiving = Receiving::begin()?;
    let _first = receiving.connect(&init(1))?;
    let _second = receiving.connect(&init(1))?;
    // The receive may have failed before this connection is made, here and below.
    let _stream = receiving.connect(&stream()).ok();
    assert_eq!(receiving.failure()?, "two multifd channels have the number 1");
    Ok(())
}

#[test]
fn channels_that_belong_to_no_one_sender_are_refused() -> TestResult {
    let receiving = Receiving::begin()?;
    let _ours = [receiving.connect(&init(0))?, receiving.connect(&init(2))?];
    let _stream = receiving.connect(&stream()).ok();
    assert_eq!(receiving.failure()?, "a multifd channel has the number 2, of 2 from 0 on");

    let receiving = Receiving::begin()?;
    let other = Init { uuid: [7; 16], channel: 1 }.encode();
    let _ours = [receiving.connect(&init(0))?, receiving.connect(&other)?];
    let _stream = receiving.connect(&stream()).ok();
    assert_eq!(receiving.failure()?, "multifd channel 1 has another uuid than the one before it");

    let receiving = Receiving::begin()?;
    let _ours = [receiving.connect(&stream())?, receiving.connect(&stream())?];
    let _channel = receiving.connect(&init(0)).ok();
    assert_eq!(receiving.failure()?, "2 of the connections begin as a stream, expected 1");

    let receiving = Receiving::begin()?;
    let _ours = [receiving.connect(&init(0))?, receiving.connect(b"GET / HTTP/1.1")?];
    let _stream = receiving.connect(&stream()).ok();
    let text = "the stream: at offset 0x0: multifd magic is 0x47455420, expected 0x11223344";
    assert_eq!(receiving.failure()?, text);
    Ok(())
}

#[test]
fn connections_that_do_not_come_are_not_waited_for() -> TestResult {
    let receiving = Receiving::begin()?;
    let _stream = receiving.connect(&stream())?;
    let _channel = receiving.connect(&init(0))?;
    let text = "2 of 3 connections came: the stream and its multifd channels";
    assert_eq!(receiving.failure()?, text);
    Ok(())
}

#[test]
fn connections_beyond_those_that_were_asked_for_are_refused() -> TestResult {
    let receiving = Receiving::begin()?;
    let _channels =
        [0, 1].map(|channel| receiving.connect(&[init(channel), packet(true, &[])].concat()));
    let mut stream_socket = receiving.connect(&stream()[..8])?;
    let _third = receiving.connect(&init(2))?;
    stream_socket.write_all(&stream()[8..])?;
    let text = "more connections came than the stream and 2 multifd channels";
    assert_eq!(receiving.failure()?, text);
    Ok(())
}

#[test]
fn a_channel_that_is_cut_is_named() -> TestResult {
    let whole = [packet(false, &[3]), vec![7; 4096]].concat();
    let text = failure_of_channel(&whole[..1000], true)?;
    let expected = "multifd channel 0: the stream: at offset 0x968: multifd packet needs 1344 bytes, \
                    1000 are left";
    assert_eq!(text, expected);
    let text = failure_of_channel(&whole[..3000], true)?;
    let expected = "multifd channel 0: the stream: at offset 0x1138: pages of a multifd packet needs \
                    4096 bytes, 1656 are left";
    assert_eq!(text, expected);
    Ok(())
}

#[test]
fn a_page_outside_its_block_is_refused() -> TestResult {
    let text = failure_of_channel(&packet(false, &[256]), false)?;
    let expected =
        "multifd channel 0: the stream: at offset 0x6c0: page ends at 0x101000, past 0x100000";
    assert_eq!(text, expected);
    Ok(())
}

#[test]
fn a_sender_of_which_nothing_moves_is_given_up() -> TestResult {
    let text = failure_of_channel(&packet(false, &[3]), false)?;
    assert!(text.starts_with("no byte came for 500ms"), "{text}");
    Ok(())
}

#[test]
fn a_channel_that_ends_before_its_round_is_an_error() -> TestResult {
    let receiving = Receiving::begin()?;
    let mut stream_bytes = stream();
    drop(receiving.connect(&[init(0), packet(true, &[])].concat())?);
    let _second = receiving.connect(&[init(1), packet(true, &[]), packet(true, &[])].concat())?;
    // This word ends the second round, in a section of "ram".
    stream_bytes.extend_from_slice(&0x10_u64.to_be_bytes());
    let _stream = receiving.connect(&stream_bytes)?;
    assert_eq!(receiving.failure()?, "a multifd channel ended inside a round");
    Ok(())
}

#[test]
fn channels_without_a_socket_are_wrong_usage() -> TestResult {
    let directory = tempfile::tempdir()?;
    let file: &Path = &directory.path().join("vm.vmf");
    let (_ours, theirs) = UnixStream::pair()?;
    let from = StreamFrom::Descriptor(theirs.into());
    let error = receive(from, file, &channels(1), &Control::none()).expect_err("one descriptor");
    let text = "channels need a socket to connect to; there is one descriptor";
    assert_eq!(error.to_string(), text);
    Ok(())
}
