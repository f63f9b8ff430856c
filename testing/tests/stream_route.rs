//! `save --route stream`: QEMU sends the VM, vmfile writes the file, and QEMU's settings stay as
//! they were.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde_json::{Value, json};
use vmfile::PagesError;
use vmfile::error::SaveError;
use vmfile::restore::Mode;
use vmfile::save::{After, Route, RouteUsed, SaveOptions};
use vmfile::{Channels, Control, Progress, Vm};
use vmfile_testing::migration::{set_capability, set_parameter};
use vmfile_testing::verbs::{check_is_clean, pages};
use vmfile_testing::{
    Case, Guest, GuestConfig, Machine, Mount, Qemu, Ram, Release, Saved, TestResult, cases,
    requires,
};

fn by_stream(after: After) -> SaveOptions {
    SaveOptions::default().route(Route::Stream).after(after)
}

fn round_trip(qemu: &Qemu, config: &GuestConfig) -> TestResult {
    let saved = config.boot_to(qemu, 2)?.save(&by_stream(After::Quit))?;
    let report = &saved.report;
    assert_eq!((report.route, report.route_reason.as_str()), (RouteUsed::Stream, "asked for"));
    saved.comes_back(qemu, [Mode::Map, Mode::Load])
}

#[test]
fn a_guest_with_private_ram_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    round_trip(&qemu, &Guest::boot_sector(Ram::private(64)).seed(101))
}

#[test]
fn a_linux_guest_with_shared_ram_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::linux(Ram::memfd(256)).machine(Machine::Q35).vcpus(2).virtio().disk(16);
    round_trip(&qemu, &config)
}

/// Saves with the pages sent over channels, and restores on the installed QEMU.
fn comes_back_by_channels(source: &Qemu, config: &GuestConfig, channels: u8) -> TestResult {
    let destination = requires!(Qemu::of(Release::Distribution));
    let mut guest = config.boot_to(source, 2)?;
    let settings = guest.qmp("query-migrate-parameters", json!({}))?;
    let saved = guest.save(&by_stream(After::Resume).channels(Channels::new(channels)))?;
    assert_eq!(guest.qmp("query-migrate-parameters", json!({}))?, settings);
    guest.counts_on(1)?;
    drop(guest);
    saved.comes_back(&destination, [Mode::Map])
}

#[test]
fn a_guest_of_the_oldest_comes_back_by_channels() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    let config = Guest::boot_sector(Ram::private(64)).seed(105).machine_version("7.2");
    comes_back_by_channels(&qemu, &config, 2)
}

#[test]
fn a_guest_comes_back_by_channels() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    comes_back_by_channels(&qemu, &Guest::linux(Ram::memfd(256)).vcpus(2).virtio(), 16)
}

#[test]
fn a_guest_of_the_newest_comes_back_by_channels() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::boot_sector(Ram::private(64)).seed(106).machine_version("10.0");
    comes_back_by_channels(&qemu, &config, 1)
}

#[test]
fn both_routes_write_the_same_pages_and_leave_qemu_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(102).boot_to(&qemu, 1)?;
    set_capability(&mut guest, "xbzrle")?;
    set_parameter(&mut guest, "max-bandwidth", json!(77_000_000))?;
    let settings = |guest: &mut Guest| -> TestResult<(Value, Value)> {
        let capabilities = guest.qmp("query-migrate-capabilities", json!({}))?;
        Ok((capabilities, guest.qmp("query-migrate-parameters", json!({}))?))
    };
    let before = settings(&mut guest)?;
    guest.stop()?;
    let direct = guest.save(&SaveOptions::default().after(After::Pause))?;
    let stream = guest.save(&by_stream(After::Pause))?;
    assert_eq!(settings(&mut guest)?, before);
    for block in ["pc.ram", "pc.bios", "/rom@etc/acpi/tables"] {
        assert!(pages(&direct.file, block)? == pages(&stream.file, block)?, "{block}");
    }
    // The direct route writes short gaps of zero pages as zeros; the others leave them out.
    let room = |saved: &Saved| fs::metadata(&saved.file).map(|data| data.blocks() * 512);
    assert!(room(&stream)? < room(&direct)? + (1 << 20));
    Ok(())
}

#[test]
fn a_vm_that_was_sent_runs_on_or_comes_back_paused_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(103).boot_to(&qemu, 1)?;
    guest.save(&by_stream(After::Resume))?;
    guest.runs_on(2)?;

    guest.stop()?;
    let saved = guest.save(&by_stream(After::Quit))?;
    drop(guest);
    saved.comes_back_paused_on(&qemu, Mode::Map)
}

/// Runs a save that fails or is stopped. Expects that the guest runs on with its settings, and that
/// no file is left.
fn harms_nobody(
    guest: &mut Guest,
    directory: &Path,
    (stop, channels): (bool, u8),
) -> TestResult<SaveError> {
    let mut vm = Vm::connect(&guest.qmp_path())?;
    let flag = Arc::new(AtomicBool::new(false));
    let calls = AtomicU32::new(0);
    let progress = |_: Progress| {
        // In the middle, when some pages have arrived.
        if calls.fetch_add(1, Ordering::Relaxed) == 20 {
            flag.store(stop, Ordering::Relaxed);
        }
    };
    let parameters = guest.qmp("query-migrate-parameters", json!({}))?;
    let control = Control::new(&flag, &progress);
    let options = by_stream(After::Quit).channels(Channels::new(channels));
    let result = vmfile::save::save(&mut vm, &directory.join("vm.vmf"), &options, &control);
    let error = result.expect_err("the save failed");
    assert_eq!(guest.status()?, "running", "{error}");
    assert_eq!(guest.qmp("query-migrate-parameters", json!({}))?, parameters);
    guest.counts_on(2)?;
    assert_eq!(fs::read_dir(directory)?.count(), 0, "{error}");
    cases(1, if stop { Case::Signal } else { Case::Shortage });
    Ok(error)
}

#[test]
fn a_save_by_stream_that_is_stopped_or_finds_no_room_harms_nobody() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mount = requires!(Mount::tmpfs(40));
    let config = Guest::boot_sector(Ram::private(64)).seed(104).data_share(200);
    let mut guest = config.boot_to(&qemu, 1)?;
    let directory = tempfile::tempdir()?;
    for channels in [0, 3] {
        let error = harms_nobody(&mut guest, directory.path(), (true, channels))?;
        assert!(error.is_stopped(), "{channels}: {error}");
        let error = harms_nobody(&mut guest, mount.path(), (false, channels))?;
        assert!(
            matches!(error, SaveError::Pages(PagesError::WriteFile { .. })),
            "{channels}: {error}"
        );
    }
    // A save that does not fail succeeds afterwards.
    guest.save(&by_stream(After::Quit)).map(drop)
}

/// A save by stream left a paused VM in `postmigrate`, and every later save refused it as "already
/// migrated".
#[test]
fn a_paused_vm_is_paused_after_a_save_by_its_stream_and_can_be_saved_again() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let config = Guest::boot_sector(Ram::private(64)).seed(33);
        let mut guest = config.boot_to(&qemu, 1)?;
        guest.stop()?;
        let first = guest.save(&by_stream(After::Resume))?;
        if release == Release::Oldest {
            // QEMU 7.2 would run the guest after a background snapshot, so vmfile leaves the VM in
            // `postmigrate` and warns.
            assert!(first.report.warnings.iter().any(|warning| warning.contains("postmigrate")));
            assert_eq!(guest.status()?, "postmigrate");
            continue;
        }
        assert_eq!(first.report.warnings, [""; 0]);
        assert_eq!(guest.status()?, "paused");
        let second = guest.save(&by_stream(After::Resume))?;
        check_is_clean(&second.file)?;
        guest.resume()?;
        guest.counts_on(1)?;
        drop(guest);
        second.comes_back_paused_on(&qemu, Mode::Map)?;
    }
    Ok(())
}
