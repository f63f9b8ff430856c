//! vmfile sends a file to QEMU as a stream, and the guest finds its memory as it left it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::json;
use vmfile::restore::{Mode, ModeUsed, RestoreOptions};
use vmfile::save::SaveOptions;
use vmfile::send::{SendOptions, SendReport, SendTo, send};
use vmfile::{Channels, Control, Snapshot};
use vmfile_testing::migration::{qemu_writes, set_capability, set_parameter, wait_until_complete};
use vmfile_testing::verbs::{self, restore};
use vmfile_testing::{
    Guest, GuestConfig, Machine, Qemu, Ram, Release, Saved, TestResult, requires,
};

/// Boots a guest and saves it, which ends its QEMU.
fn saved(qemu: &Qemu, config: &GuestConfig) -> TestResult<Saved> {
    config.boot_to(qemu, 2)?.save(&SaveOptions::default())
}

/// Restores by `stream` into the QEMU that wrote the file, and lets the guest judge.
fn comes_back(qemu: &Qemu, config: &GuestConfig) -> TestResult {
    saved(qemu, config)?.comes_back_on(qemu, Mode::Stream).map(drop)
}

#[test]
fn private_ram_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    comes_back(&qemu, &Guest::boot_sector(Ram::private(64)).seed(81))
}

#[test]
fn a_memfd_on_q35_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    comes_back(&qemu, &Guest::boot_sector(Ram::memfd(64)).seed(82).machine(Machine::Q35))
}

#[test]
fn ram_in_a_file_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    comes_back(&qemu, &Guest::boot_sector(Ram::tmpfs(64)).seed(83))
}

#[test]
fn a_linux_guest_with_its_devices_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::linux(Ram::private(256)).vcpus(2).virtio().disk(16);
    comes_back(&qemu, &config.numa_nodes(&[128, 128]))
}

#[test]
fn the_newest_takes_its_own_vm_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    comes_back(&qemu, &Guest::boot_sector(Ram::private(64)).seed(84))
}

#[test]
fn a_qemu_that_waits_takes_the_stream() -> TestResult {
    for release in [Release::Oldest, Release::Distribution] {
        let qemu = requires!(Qemu::of(release));
        let source = requires!(Qemu::of(Release::Distribution));
        let config = Guest::boot_sector(Ram::private(64)).seed(85).machine_version("7.2");
        let saved = saved(&source, &config)?;
        let waiting = config.incoming(&qemu, "defer")?;
        let options = RestoreOptions::default().mode(Mode::Stream);
        let restored = saved.restore_into(&waiting, &options)?;
        assert_eq!(restored.report.mode, ModeUsed::Stream);
        let snapshot = Snapshot::open(&saved.file, 0)?;
        let data = vmfile::info::info(&snapshot)?.blocks.iter().map(|b| b.pages_data).sum::<u64>();
        assert_eq!(restored.report.bytes_read, data * 4096);
        saved.goes_on_in(&waiting)?;
    }
    Ok(())
}

#[test]
fn a_machine_that_does_not_fit_is_refused_before_qemu_sees_a_byte() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &Guest::boot_sector(Ram::private(64)).seed(86))?;
    let other = Guest::boot_sector(Ram::private(64)).machine(Machine::Q35);
    let error = restore(&qemu, &other, &saved.file, Mode::Stream).expect_err("another machine");
    let error = error.to_string();
    assert!(error.contains("machine type"), "{error}");
    Ok(())
}

/// QEMU refuses the state of a device in a slot where it has none; the error has QEMU's message.
#[test]
fn what_qemu_refuses_is_an_error_with_its_words() -> TestResult {
    for release in [Release::Oldest, Release::Distribution] {
        let qemu = requires!(Qemu::of(release));
        let source = requires!(Qemu::of(Release::Distribution));
        let config = Guest::boot_sector(Ram::private(64)).seed(87).machine_version("7.2");
        let at =
            |slot| config.clone().arguments(["-device", &*format!("virtio-rng-pci,addr={slot}")]);
        let saved = saved(&source, &at(5))?;
        let error = restore(&qemu, &at(6), &saved.file, Mode::Stream).expect_err("another place");
        let error = error.to_string();
        assert!(error.contains("load the device state"), "{error}");
        assert!(error.contains("virtio-rng"), "{error}");
    }
    Ok(())
}

/// Fills the RAM file of a waiting QEMU with noise.
fn fill_with_noise(waiting: &Guest, len: usize) -> TestResult<PathBuf> {
    let path = waiting.ram_file("pc.ram").ok_or("no RAM file")?;
    let file = File::options().write(true).open(&path)?;
    file.set_len(len as u64)?;
    file.write_all_at(&vec![0xaa; len], 0)?;
    Ok(path)
}

#[test]
fn a_ram_file_that_was_used_before_is_cleared() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::tmpfs(64)).seed(88);
    let saved = saved(&qemu, &config)?;
    let waiting = config.incoming(&qemu, "defer")?;
    let ram = fill_with_noise(&waiting, 64 << 20)?;
    saved.restore_into(&waiting, &RestoreOptions::default().mode(Mode::Stream).paused(true))?;
    let found = std::fs::read(&ram)?;
    assert!(found == verbs::pages(&saved.file, "pc.ram")?, "RAM is what the file says");
    Ok(())
}

/// Sends `file` to a QEMU that listens at `socket`.
fn send_to(
    file: &Path,
    offset: u64,
    socket: &Path,
    options: &SendOptions,
) -> TestResult<SendReport> {
    let snapshot = Snapshot::open(file, offset)?;
    let to = SendTo::Connect(socket.to_path_buf());
    Ok(send(&snapshot, to, options, &Control::none())?)
}

#[test]
fn zero_pages_are_left_out_only_where_that_was_asked_for() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::tmpfs(64)).seed(89);
    let saved = saved(&qemu, &config)?;
    let socket = saved.directory.path().join("incoming");
    for assume_zeroed in [false, true] {
        let mut waiting = config.incoming(&qemu, "defer")?;
        let ram = fill_with_noise(&waiting, 64 << 20)?;
        waiting.qmp("migrate-incoming", json!({ "uri": format!("unix:{}", socket.display()) }))?;
        let options = SendOptions::default().assume_zeroed(assume_zeroed);
        let report = send_to(&saved.file, 0, &socket, &options)?;
        let zero = report.pages_total - report.pages_data;
        assert!(report.pages_zero == zero || assume_zeroed && report.pages_zero < zero / 2);
        wait_until_complete(&mut waiting)?;
        // The guest has run on, but it does not touch the last pages.
        let found = std::fs::read(&ram)?;
        let noise = found.chunks(4096).filter(|page| page.iter().all(|&byte| byte == 0xaa)).count();
        assert_eq!(noise > 0, assume_zeroed, "{noise} pages of noise");
    }
    Ok(())
}

/// Puts bytes at the places of zero pages, as QEMU's live save leaves stale bytes there.
fn make_stale(file: &Path, offset: u64) -> TestResult {
    let snapshot = Snapshot::open(file, offset)?;
    let file = File::options().write(true).open(file)?;
    for placed in &snapshot.structure().blocks {
        let bitmap = snapshot.bitmap(placed)?;
        let mut end = 0;
        for run in bitmap.data_runs() {
            for page in end..run.start.0 {
                file.write_all_at(&[0xee; 4096], placed.pages_offset + page * 4096)?;
            }
            end = run.end.0;
        }
    }
    Ok(())
}

#[test]
fn a_file_of_qemus_at_an_offset_with_stale_bytes_goes_to_the_oldest() -> TestResult {
    const OFFSET: u64 = 0x1_1921;
    let source = requires!(Qemu::of(Release::Distribution));
    let oldest = requires!(Qemu::of(Release::Oldest));
    let config = Guest::boot_sector(Ram::tmpfs(64)).seed(90).busy().machine_version("7.2");
    let mut guest = config.boot_to(&source, 2)?;
    // The guest writes faster than QEMU sends; these limits let QEMU send all of it again at most
    // once.
    let limits = json!({ "max-bandwidth": 100 << 20, "downtime-limit": 1000 });
    guest.qmp("migrate-set-parameters", limits)?;
    let saved = Saved::by(&mut guest, |guest, file| {
        qemu_writes(guest, &format!("file:{},offset={OFFSET}", file.display()))
    })?;
    drop(guest);
    make_stale(&saved.file, OFFSET)?;

    let socket = saved.directory.path().join("incoming");
    let destination = config.incoming(&oldest, &format!("unix:{}", socket.display()))?;
    send_to(&saved.file, OFFSET, &socket, &SendOptions::default())?;
    saved.goes_on_in(&destination)
}

/// Tells a waiting QEMU the number of channels, and has it listen.
fn listen(waiting: &mut Guest, socket: &Path, channels: u8) -> TestResult {
    set_capability(waiting, "multifd")?;
    set_parameter(waiting, "multifd-channels", json!(channels))?;
    let uri = format!("unix:{}", socket.display());
    waiting.qmp("migrate-incoming", json!({ "uri": uri }))?;
    Ok(())
}

/// Saves with the installed QEMU, sends to `release` over each number of channels, and lets the
/// guest judge.
fn comes_over_channels(release: Release, config: &GuestConfig, channels: &[u8]) -> TestResult {
    let (source, qemu) = (requires!(Qemu::of(Release::Distribution)), requires!(Qemu::of(release)));
    let saved = saved(&source, config)?;
    let socket = saved.directory.path().join("incoming");
    for &channels in channels {
        let mut waiting = config.incoming(&qemu, "defer")?;
        listen(&mut waiting, &socket, channels)?;
        let options = SendOptions::default().channels(Channels::new(channels));
        let report = send_to(&saved.file, 0, &socket, &options)?;
        assert_eq!(report.channels, channels);
        wait_until_complete(&mut waiting)?;
        saved.goes_on_in(&waiting)?;
    }
    Ok(())
}

#[test]
fn channels_bring_a_vm_to_the_installed_one() -> TestResult {
    let config = Guest::boot_sector(Ram::private(64)).seed(91);
    comes_over_channels(Release::Distribution, &config, &[1, 2, 8])
}

/// With machine type 7.2, QEMU waits for the channels at the end of each section.
#[test]
fn channels_bring_a_vm_to_the_oldest() -> TestResult {
    let config = Guest::boot_sector(Ram::memfd(64)).seed(92).machine_version("7.2");
    comes_over_channels(Release::Oldest, &config, &[1, 2, 8])
}

#[test]
fn channels_bring_an_old_machine_and_a_new_one_to_the_newest() -> TestResult {
    for version in ["7.2", "10.0"] {
        let config = Guest::boot_sector(Ram::private(64)).seed(93).machine_version(version);
        let uuid = ["-uuid", "00112233-4455-6677-8899-aabbccddeeff"];
        comes_over_channels(Release::Newest, &config.machine(Machine::Q35).arguments(uuid), &[2])?;
    }
    Ok(())
}

/// Packets could name zero pages as well, but QEMU would not clear them.
#[test]
fn a_ram_file_that_was_used_before_is_cleared_over_channels() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::tmpfs(64)).seed(94);
    let saved = saved(&qemu, &config)?;
    let socket = saved.directory.path().join("incoming");
    let mut waiting = config.prepare(&qemu)?.start(&["-incoming", "defer", "-S"])?;
    let ram = fill_with_noise(&waiting, 64 << 20)?;
    listen(&mut waiting, &socket, 2)?;
    let options = SendOptions::default().channels(Channels::new(2));
    send_to(&saved.file, 0, &socket, &options)?;
    wait_until_complete(&mut waiting)?;
    assert!(std::fs::read(&ram)? == verbs::pages(&saved.file, "pc.ram")?, "as the file says");
    Ok(())
}

#[test]
fn channels_that_the_receiver_closes_are_an_error_and_end_the_others() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &Guest::boot_sector(Ram::private(64)).seed(95))?;
    let socket = saved.directory.path().join("listener");
    let listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let receiver = thread::spawn(move || {
        let connections: std::io::Result<Vec<_>> = (0..4).map(|_| listener.accept()).collect();
        let mut connections = connections?;
        // One channel is closed; the others stay open, and nothing reads from them.
        drop(connections.remove(2));
        std::io::Result::Ok(connections)
    });
    let options = SendOptions::default().channels(Channels::new(3));
    let error = send_to(&saved.file, 0, &socket, &options).expect_err("closed").to_string();
    assert!(error.contains("the reader closed its end"), "{error}");
    drop(receiver.join().map_err(|_| "no panic")??);
    Ok(())
}

#[test]
fn channels_need_a_socket() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &Guest::boot_sector(Ram::private(16)).fill_mib(1).seed(96))?;
    let options = SendOptions::default().channels(Channels::new(1));
    let snapshot = Snapshot::open(&saved.file, 0)?;
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair()?;
    let to = SendTo::Descriptor(ours.into());
    let error = send(&snapshot, to, &options, &Control::none()).expect_err("no socket");
    let text = "channels need a socket to connect to; there is one descriptor";
    assert_eq!(error.to_string(), text);
    Ok(())
}
