//! `save --route native`: QEMU writes the file, vmfile completes it, and QEMU's settings stay as
//! they were.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use vmfile::error::SaveError;
use vmfile::restore::Mode;
use vmfile::save::{After, Route, RouteUsed, SaveOptions};
use vmfile::{Channels, Control, DirectIo, Progress, Snapshot, Vm};
use vmfile_testing::migration::{qemu_reads, set_capability};
use vmfile_testing::verbs::{check_is_clean, pages};
use vmfile_testing::{
    Guest, GuestConfig, Machine, Mount, Qemu, Ram, Release, Saved, TestResult, requires,
};

fn by_qemu(after: After) -> SaveOptions {
    SaveOptions::default().route(Route::Native).after(after)
}

fn round_trip(qemu: &Qemu, config: &GuestConfig) -> TestResult {
    let saved = config.boot_to(qemu, 2)?.save(&by_qemu(After::Quit))?;
    let report = &saved.report;
    assert_eq!((report.route, report.route_reason.as_str()), (RouteUsed::Native, "asked for"));
    assert!(report.direct_io.to_string().starts_with("yes"), "{}", report.direct_io);
    let snapshot = Snapshot::open(&saved.file, 0)?;
    let meta = &snapshot.manifest().ok_or("no manifest")?.meta;
    assert_eq!(meta.route, "native");
    assert!(meta.extents.iter().any(|extent| extent.what == "mark"));
    saved.comes_back(qemu, [Mode::Map, Mode::Load])?;
    saved.goes_on_in(&qemu_reads(qemu, config, &saved.file)?)?;
    check_is_clean(&saved.file)
}

#[test]
fn a_guest_with_private_ram_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    round_trip(&qemu, &Guest::boot_sector(Ram::private(64)).seed(111))
}

#[test]
fn a_linux_guest_with_shared_ram_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    round_trip(&qemu, &Guest::linux(Ram::memfd(256)).vcpus(2).virtio())
}

#[test]
fn a_guest_of_the_newest_with_shared_ram_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    round_trip(&qemu, &Guest::boot_sector(Ram::memfd(64)).seed(112).machine(Machine::Q35))
}

#[test]
fn a_linux_guest_of_the_newest_with_private_ram_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::linux(Ram::private(256)).machine(Machine::Q35).vcpus(2).virtio().disk(16);
    round_trip(&qemu, &config)
}

fn settings(guest: &mut Guest) -> TestResult<(Value, Value)> {
    let capabilities = guest.qmp("query-migrate-capabilities", json!({}))?;
    Ok((capabilities, guest.qmp("query-migrate-parameters", json!({}))?))
}

fn both_routes_write_the_same_pages(release: Release) -> TestResult {
    let qemu = requires!(Qemu::of(release));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(113).boot_to(&qemu, 1)?;
    set_capability(&mut guest, "xbzrle")?;
    // Mapped RAM works with neither compression nor TLS.
    let parameters = json!({
        "tls-creds": "tls0",
        "max-bandwidth": 77_000_000,
        "multifd-channels": 5,
        "multifd-compression": "zlib",
        "zero-page-detection": "legacy",
    });
    guest.qmp("migrate-set-parameters", parameters)?;
    let before = settings(&mut guest)?;
    guest.stop()?;
    let direct = guest.save(&SaveOptions::default().after(After::Pause))?;
    let channels = Channels::new(3).ok_or("zero")?;
    let native = guest.save(&by_qemu(After::Pause).channels(Some(channels)))?;
    assert_eq!(settings(&mut guest)?, before);
    let sets = guest.qmp("query-fdsets", json!({}))?;
    assert_eq!(sets, json!([]), "QEMU keeps no descriptor");
    for block in ["pc.ram", "pc.bios", "/rom@etc/acpi/tables"] {
        assert!(pages(&direct.file, block)? == pages(&native.file, block)?, "{block}");
    }
    // The direct route writes short gaps of zero pages as zeros; QEMU leaves them out.
    let room = |saved: &Saved| fs::metadata(&saved.file).map(|data| data.blocks() * 512);
    assert!(room(&native)? < room(&direct)? + (1 << 20));
    assert!(native.report.pages_zero > 0 && native.report.bytes_written > 1 << 20);
    check_is_clean(&native.file)
}

#[test]
fn both_routes_write_the_same_pages_and_leave_qemu_as_it_was() -> TestResult {
    both_routes_write_the_same_pages(Release::Distribution)
}

#[test]
fn both_routes_write_the_same_pages_and_leave_the_newest_as_it_was() -> TestResult {
    both_routes_write_the_same_pages(Release::Newest)
}

#[test]
fn a_vm_runs_on_or_comes_back_paused_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(114).boot_to(&qemu, 1)?;
    guest.save(&by_qemu(After::Resume))?;
    guest.runs_on(2)?;

    guest.stop()?;
    let saved = guest.save(&by_qemu(After::Quit))?;
    drop(guest);
    saved.comes_back_paused_on(&qemu, Mode::Map)
}

#[test]
fn a_file_system_without_direct_io_is_written_through_the_page_cache() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mount = requires!(Mount::tmpfs(200));
    let mut guest = Guest::boot_sector(Ram::memfd(64)).seed(115).boot_to(&qemu, 1)?;
    let required = by_qemu(After::Quit).direct_io(DirectIo::Required);
    assert!(guest.save_below(mount.path(), &required).is_err());
    let saved = guest.save_below(mount.path(), &by_qemu(After::Quit))?;
    drop(guest);
    let direct_io = saved.report.direct_io.to_string();
    assert_eq!(direct_io, "no: tmpfs is page cache and nothing else");
    saved.comes_back(&qemu, [Mode::Map])
}

#[test]
fn direct_io_that_is_not_wanted_is_not_used() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(116).boot_to(&qemu, 1)?;
    let saved = guest.save(&by_qemu(After::Quit).direct_io(DirectIo::Off))?;
    assert_eq!(saved.report.direct_io.to_string(), "no: not asked for");
    check_is_clean(&saved.file)
}

#[test]
fn a_qemu_that_is_too_old_is_refused_and_its_guest_runs_on() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(117).boot_to(&qemu, 1)?;
    let before = settings(&mut guest)?;
    let error = guest.save_fails(&by_qemu(After::Quit))?;
    let found = qemu.version();
    let expected = format!("the route native needs QEMU 9.1.0 or later, found {found}");
    assert_eq!(error.to_string(), expected);
    assert_eq!(settings(&mut guest)?, before);
    guest.runs_on(2)
}

/// Runs a save that fails, or that is stopped once the share `stop_at` is done. Expects that the
/// guest runs on with its settings, and that no file is left.
fn harms_nobody(guest: &mut Guest, directory: &Path, stop_at: f64) -> TestResult<SaveError> {
    let mut vm = Vm::connect(&guest.qmp_path())?;
    let flag = Arc::new(AtomicBool::new(false));
    let progress = |progress: Progress| {
        let part = |bytes: u64| u32::try_from(bytes >> 10).map_or(f64::MAX, f64::from);
        if part(progress.done_bytes) >= part(progress.total_bytes) * stop_at {
            flag.store(true, Ordering::Relaxed);
        }
    };
    let before = settings(guest)?;
    let control = Control::new(&flag, &progress);
    let options = by_qemu(After::Quit);
    let result = vmfile::save::save(&mut vm, &directory.join("vm.vmf"), &options, &control);
    let error = result.expect_err("the save failed");
    drop(vm);
    assert_eq!(guest.status()?, "running", "{error}");
    assert_eq!(settings(guest)?, before, "{error}");
    assert_eq!(guest.qmp("query-fdsets", json!({}))?, json!([]), "{error}");
    guest.counts_on(2)?;
    assert_eq!(fs::read_dir(directory)?.count(), 0, "{error}");
    Ok(error)
}

fn a_save_that_fails_harms_nobody(release: Release) -> TestResult {
    let qemu = requires!(Qemu::of(release));
    let mount = requires!(Mount::tmpfs(40));
    let config = Guest::boot_sector(Ram::private(256)).seed(118).data_share(200);
    let mut guest = config.boot_to(&qemu, 1)?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    // Stops while QEMU writes, and while vmfile reads.
    for stop_at in [0.0, 0.1, 0.7] {
        let error = harms_nobody(&mut guest, directory.path(), stop_at)?;
        assert!(error.is_stopped(), "{stop_at}: {error}");
    }
    let error = harms_nobody(&mut guest, mount.path(), 2.0)?;
    assert!(matches!(error, SaveError::NoSpace { .. }), "{error}");
    // A save that does not fail succeeds afterwards.
    check_is_clean(&guest.save(&by_qemu(After::Quit))?.file)
}

#[test]
fn a_save_that_is_stopped_or_finds_no_room_harms_nobody() -> TestResult {
    a_save_that_fails_harms_nobody(Release::Distribution)
}

#[test]
fn a_save_of_the_newest_that_is_stopped_or_finds_no_room_harms_nobody() -> TestResult {
    a_save_that_fails_harms_nobody(Release::Newest)
}
