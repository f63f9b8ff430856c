//! QEMU sends a VM as a stream, vmfile writes it to a file, and the restored guest judges its RAM.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::json;
use vmfile::Control;
use vmfile::PagesError;
use vmfile::receive::{ReceiveError, ReceiveOptions, ReceiveReport, StreamFrom, receive};
use vmfile::restore::Mode;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::encoder::RamSection;
use vmfile_format::{PageIndex, PageSize, RamBlock, RamLayout};
use vmfile_testing::migration::{
    Outcome, migrate_all, received, send_to, set_capability, set_parameter,
};
use vmfile_testing::verbs::check_is_clean;
use vmfile_testing::{Guest, GuestConfig, Mount, Qemu, Ram, Release, TestResult, requires};

/// Boots on `source`, receives, checks, and restores on `destination` by `map` and by `load`.
fn round_trip(
    source: &Qemu,
    destination: &Qemu,
    config: &GuestConfig,
) -> TestResult<ReceiveReport> {
    let mut guest = config.boot_to(source, 2)?;
    let saved = received(&mut guest, &ReceiveOptions::default())?;
    drop(guest);
    saved.comes_back(destination, [Mode::Map, Mode::Load])?;
    Ok(saved.report)
}

#[test]
fn a_stream_of_the_installed_qemu_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let report = round_trip(&qemu, &qemu, &Guest::boot_sector(Ram::private(64)).seed(71))?;
    assert!(report.pages_zero > 0 && report.bytes_written > 0, "{report:?}");
    assert!(report.direct_io.to_string().starts_with("yes"), "{report:?}");
    Ok(())
}

#[test]
fn a_stream_of_the_oldest_qemu_comes_back_on_the_installed_one() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(72).machine_version("7.2");
    round_trip(&oldest, &qemu, &config).map(drop)
}

#[test]
fn a_stream_of_the_newest_qemu_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    round_trip(&qemu, &qemu, &Guest::boot_sector(Ram::memfd(64)).seed(73)).map(drop)
}

#[test]
fn a_linux_guest_with_its_devices_comes_back_from_a_stream() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::linux(Ram::memfd(256)).vcpus(2).virtio().disk(16);
    round_trip(&qemu, &qemu, &config).map(drop)
}

/// Sends a guest while it runs and rewrites its memory all the time.
fn live(qemu: &Qemu, capability: Option<&str>, seed: u32) -> TestResult {
    let config = Guest::boot_sector(Ram::private(64)).seed(seed).busy();
    let mut guest = config.boot_to(qemu, 2)?;
    if let Some(name) = capability {
        set_capability(&mut guest, name)?;
    }
    set_parameter(&mut guest, "downtime-limit", json!(300))?;
    let saved = received(&mut guest, &ReceiveOptions::default())?;
    drop(guest);
    assert!(saved.report.bytes_rewritten > 0, "pages came again: {:?}", saved.report);
    let blocks = fs::metadata(&saved.file)?.blocks() * 512;
    assert!(blocks < 80 << 20, "{blocks} bytes for 64 MiB of RAM");
    saved.comes_back(qemu, [Mode::Map, Mode::Load])
}

#[test]
fn a_guest_that_runs_while_it_is_sent_is_of_one_moment() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    live(&qemu, None, 74)
}

#[test]
fn xbzrle_is_understood() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    live(&qemu, Some("xbzrle"), 75)
}

#[test]
fn compressed_pages_of_the_oldest_qemu_are_understood() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(76).machine_version("7.2");
    let mut guest = config.boot_to(&oldest, 2)?;
    set_capability(&mut guest, "compress")?;
    // Compression never catches up with the guest, so QEMU may pause the guest for as long as it
    // needs.
    set_parameter(&mut guest, "downtime-limit", json!(60_000))?;
    let saved = received(&mut guest, &ReceiveOptions::default())?;
    drop(guest);
    saved.comes_back(&qemu, [Mode::Map, Mode::Load])
}

#[test]
fn what_a_stream_cannot_be_is_refused_and_the_vm_runs_on() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::memfd(64)).seed(77).boot_to(&qemu, 1)?;
    set_capability(&mut guest, "x-ignore-shared")?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let (received, _) = send_to(&mut guest, &file, &ReceiveOptions::default())?;
    let error = received.expect_err("RAM is not in such a stream");
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("capability \"x-ignore-shared\""), "{error}: {source}");
    assert_eq!(fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}

#[test]
fn a_disk_that_fills_up_ends_the_migration_and_the_guest_runs_on() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mount = requires!(Mount::tmpfs(20));
    let mut guest =
        Guest::boot_sector(Ram::private(64)).seed(78).data_share(200).boot_to(&qemu, 1)?;
    let file = mount.path().join("vm.vmf");
    let (received, status) = send_to(&mut guest, &file, &ReceiveOptions::default())?;
    let error = received.expect_err("no room");
    assert!(matches!(error, ReceiveError::Pages(PagesError::WriteFile { .. })), "{error}");
    assert_eq!(status["status"], "failed", "{status}");
    assert_eq!(fs::read_dir(mount.path())?.count(), 0);
    guest.runs_on(1)
}

/// Returns a whole stream, which QEMU writes through `exec:cat`.
fn captured(qemu: &Qemu, seed: u32) -> TestResult<Vec<u8>> {
    let mut guest = Guest::boot_sector(Ram::private(16)).seed(seed).boot_to(qemu, 1)?;
    let file = guest.directory().join("stream");
    migrate_all(&mut guest, &format!("exec:cat > {}", file.display()))?;
    Ok(fs::read(&file)?)
}

/// Receives from a connection that carries these bytes and then ends.
fn receive_bytes(bytes: &[u8], file: &Path) -> TestResult<Outcome> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let bytes = bytes.to_vec();
    let sender = thread::spawn(move || drop(ours.write_all(&bytes)));
    let from = StreamFrom::Descriptor(theirs.into());
    let outcome = receive(from, file, &ReceiveOptions::default(), &Control::none());
    sender.join().expect("no panic");
    Ok(outcome)
}

#[test]
fn a_stream_that_is_cut_leaves_no_file() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let stream = captured(&qemu, 79)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    // The VM description at the end is not needed; everything before it is.
    let description = stream.windows(2).rposition(|pair| pair == b"{\"").ok_or("JSON")?;
    let needed = stream[..description].len().saturating_sub(100_000);
    let lengths = (0..300).chain((300..needed).step_by(needed / 60));
    for len in lengths {
        let error = receive_bytes(&stream[..len], &file)?.expect_err("a cut stream");
        assert!(matches!(error, ReceiveError::Stream(_)), "{len}: {error}");
        assert_eq!(fs::read_dir(directory.path())?.count(), 0, "{len}");
    }
    receive_bytes(&stream, &file)??;
    check_is_clean(&file)
}

#[test]
fn a_sender_that_falls_silent_is_given_up() -> TestResult {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.write_all(b"QEVM\0\0\0\x03")?;
    let stall_timeout = Some(Duration::from_millis(300));
    let options = ReceiveOptions::default().stall_timeout(stall_timeout);
    let from = StreamFrom::Descriptor(theirs.into());
    let error = receive(from, &file, &options, &Control::none()).expect_err("silence");
    assert_eq!(error.to_string(), "no byte came for 300ms, at offset 0x0 of the stream");
    assert_eq!(fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}

#[test]
fn a_sender_without_an_end_is_given_up_in_time() -> TestResult {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let block = RamBlock::new("pc.ram".to_owned(), 1 << 20, PageSize::KIB_4).expect("a block");
    let ram = RamLayout::new(vec![block.clone()]).expect("a layout");
    let mut bytes =
        Configuration { machine: "pc-i440fx-10.0".to_owned(), ..Configuration::default() }.encode();
    let mut section = RamSection::begin(&mut bytes, 1, &ram);
    let (mut ours, theirs) = UnixStream::pair()?;
    // Sends page 3 for ever.
    let sender = thread::spawn(move || {
        while ours.write_all(&bytes).is_ok() {
            bytes.clear();
            section.page(&mut bytes, (0, &block), PageIndex(3), &[7; 4096]);
        }
    });
    let timeout = Some(Duration::from_secs(1));
    let options = ReceiveOptions::default().timeout(timeout);
    let from = StreamFrom::Descriptor(theirs.into());
    let error = receive(from, &file, &options, &Control::none()).expect_err("no end");
    assert!(matches!(error, ReceiveError::TimedOut { offset } if offset > 1 << 16), "{error}");
    sender.join().expect("no panic");
    assert_eq!(fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}
