//! QEMUs of several versions: a guest finds its RAM as it left it on each of them, and after a move
//! from one to another.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Value, json};
use vmfile::restore::Mode;
use vmfile::save::{Route, RouteUsed, SaveOptions};
use vmfile_qemu::{Feature, QemuVersion};
use vmfile_testing::{Guest, GuestConfig, Machine, Qemu, Ram, Release, TestResult, requires};

/// Boots the boot-sector guest on both machine types and lets it judge its RAM.
fn counts(qemu: &Qemu) -> TestResult {
    for machine in [Machine::Pc, Machine::Q35] {
        let guest = Guest::boot_sector(Ram::private(64)).machine(machine).boot_to(qemu, 3)?;
        guest.judge_counts()?;
    }
    Ok(())
}

#[test]
fn the_guest_counts_on_the_oldest() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    counts(&qemu)
}

#[test]
fn the_guest_counts_on_the_installed_one() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    counts(&qemu)
}

#[test]
fn the_guest_counts_on_the_newest() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    counts(&qemu)
}

#[test]
fn the_linux_guest_counts_on_the_newest_with_all_its_devices() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let guest = Guest::linux(Ram::memfd(256)).vcpus(2).virtio().disk(16).boot_to(&qemu, 2)?;
    guest.judge_counts()
}

#[test]
fn the_linux_guest_counts_on_the_oldest_with_all_its_devices() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    let guest = Guest::linux(Ram::memfd(256)).vcpus(2).virtio().disk(16).boot_to(&qemu, 2)?;
    guest.judge_counts()
}

#[test]
fn a_qemu_that_is_not_installed_runs_as_itself_and_with_its_own_libraries() -> TestResult {
    for release in [Release::Oldest, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let guest = Guest::boot_sector(Ram::private(64)).boot_to(&qemu, 1)?;
        let process = format!("/proc/{}", guest.pid()?);
        assert_eq!(std::fs::read_link(format!("{process}/exe"))?, qemu.program().canonicalize()?);
        let tree = qemu.program().ancestors().nth(3).ok_or("a tree")?.canonicalize()?;
        let maps = std::fs::read_to_string(format!("{process}/maps"))?;
        let files = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
        let libraries: Vec<&str> = files.filter(|path| path.contains(".so")).collect();
        assert!(!libraries.is_empty(), "{maps}");
        for library in libraries {
            assert!(Path::new(library).starts_with(&tree), "{library}");
        }
    }
    Ok(())
}

/// Saves with `source` and restores with `destination` by `map` and by `load`.
fn moves(source: Release, destination: Release, config: &GuestConfig) -> TestResult {
    let (source, destination) = (requires!(Qemu::of(source)), requires!(Qemu::of(destination)));
    let saved = config.boot_to(&source, 2)?.save(&SaveOptions::default())?;
    saved.comes_back(&destination, [Mode::Map, Mode::Load])
}

#[test]
fn a_vm_of_the_newest_comes_back() -> TestResult {
    let config = Guest::boot_sector(Ram::private(64)).seed(31);
    moves(Release::Newest, Release::Newest, &config)
}

#[test]
fn a_vm_of_the_installed_one_comes_back_in_the_newest() -> TestResult {
    let config = Guest::boot_sector(Ram::memfd(64)).seed(32).machine_version("10.0");
    moves(Release::Distribution, Release::Newest, &config.machine(Machine::Q35))
}

#[test]
fn a_vm_of_the_newest_comes_back_in_the_installed_one() -> TestResult {
    let config = Guest::boot_sector(Ram::private(64)).seed(33).machine_version("10.0");
    moves(Release::Newest, Release::Distribution, &config)
}

/// With machine types before 4.0, a file or memfd backend names its RAM block by the backend's
/// whole path. So a mapped file gave the machine's RAM another name than it had when it was saved.
#[test]
fn a_vm_of_an_old_machine_type_comes_back() -> TestResult {
    for (machine, version) in [(Machine::Pc, "2.8"), (Machine::Q35, "3.1")] {
        for ram in [Ram::machine(64), Ram::private(64), Ram::memfd(64), Ram::tmpfs(64)] {
            let config = Guest::boot_sector(ram).seed(36).machine(machine).machine_version(version);
            moves(Release::Distribution, Release::Distribution, &config)?;
        }
        let dimm = Guest::linux(Ram::private(256)).dimm(128).machine(machine);
        let dimm = dimm.machine_version(version);
        moves(Release::Distribution, Release::Distribution, &dimm)?;
    }
    Ok(())
}

/// QEMU 7.2 does not report the addresses of RAM: only `stream` works, and `auto` chooses it.
#[test]
fn a_vm_of_the_installed_one_is_streamed_to_the_oldest() -> TestResult {
    let source = requires!(Qemu::of(Release::Distribution));
    let oldest = requires!(Qemu::of(Release::Oldest));
    let config = Guest::boot_sector(Ram::private(64)).seed(35).machine_version("7.2");
    let saved = config.boot_to(&source, 2)?.save(&SaveOptions::default())?;
    let error = saved.restore(&oldest, Mode::Map).expect_err("no rom=off").to_string();
    assert!(error.contains("8.2"), "{error}");
    let error = saved.restore(&oldest, Mode::Load).expect_err("no addresses").to_string();
    assert!(error.contains("does not say where RAM lies, 8.0.0 does"), "{error}");
    saved.comes_back(&oldest, [Mode::Stream, Mode::Auto])
}

/// QEMU migrates the VM without vmfile: the tests of streams rely on this.
#[test]
fn a_machine_of_version_7_2_moves_from_the_oldest_to_the_others() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    for release in [Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let config = Guest::boot_sector(Ram::private(64)).seed(34).machine_version("7.2");
        let mut source = config.boot(&oldest)?;
        let before = source.wait_for_count(2)?;
        let socket = source.directory().join("stream");
        let uri = format!("unix:{}", socket.display());
        let destination = config.incoming(&qemu, &uri)?;
        source.qmp("migrate", json!({ "uri": uri }))?;
        let after = destination.wait_for_passes(2)?;
        assert!(after.number > before.number, "{} after {}", after.number, before.number);
        destination.judge_counts()?;
    }
    Ok(())
}

#[test]
fn the_oldest_shows_no_addresses_and_is_saved_by_its_stream() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    let newer = requires!(Qemu::of(Release::Distribution));
    let mut guest =
        Guest::boot_sector(Ram::private(64)).machine_version("7.2").boot_to(&qemu, 1)?;
    let error = guest.save_fails(&SaveOptions::default().route(Route::Direct))?.to_string();
    assert!(error.contains("pc.ram"), "{error}");
    guest.counts_on(1)?;

    let saved = guest.save(&SaveOptions::default())?;
    drop(guest);
    let report = &saved.report;
    assert_eq!(report.route, RouteUsed::Stream);
    assert!(report.route_reason.contains("prints no address of RAM block"), "{report:?}");
    saved.comes_back(&newer, [Mode::Map])
}

/// Returns, for each feature that QMP can show, whether this QEMU has it.
fn features_of(guest: &mut Guest) -> TestResult<Vec<(Feature, bool)>> {
    let capabilities = guest.qmp("query-migrate-capabilities", json!({}))?;
    let capabilities = names(&capabilities, "capability");
    let parameters = guest.qmp("query-migrate-parameters", json!({}))?;
    let backend = json!({ "typename": "memory-backend-file" });
    let backend = names(&guest.qmp("qom-list-properties", backend)?, "name");
    let blocks = guest.qmp("x-query-ramblock", json!({}))?;
    let schema = guest.qmp("query-qmp-schema", json!({}))?;
    let find = |name: &Value| {
        let mut entries = schema.as_array().into_iter().flatten();
        entries.find(|entry| entry["name"] == *name).cloned().unwrap_or_default()
    };
    let incoming = find(&find(&json!("migrate-incoming"))["arg-type"]);
    guest.stop()?;
    let file = guest.directory().join("stream");
    let file_uri = guest.qmp("migrate", json!({ "uri": format!("file:{}", file.display()) }));
    Ok(vec![
        (Feature::CompressedPages, capabilities.contains("compress")),
        (Feature::BackgroundSnapshot, capabilities.contains("background-snapshot")),
        (Feature::MappedRam, capabilities.contains("mapped-ram")),
        (Feature::MultifdZeroPages, parameters.get("zero-page-detection").is_some()),
        (Feature::MigrationDirectIo, parameters.get("direct-io").is_some()),
        (Feature::BackendOffset, backend.contains("offset")),
        (Feature::BackendRom, backend.contains("rom")),
        (Feature::RamBlockAddresses, blocks.to_string().contains("HVA")),
        (Feature::ExitOnError, names(&incoming["members"], "name").contains("exit-on-error")),
        (Feature::FileUri, file_uri.is_ok()),
        (Feature::MonitorObject, schema.to_string().contains("\"monitor-qmp\"")),
    ])
}

/// Collects one field of every object of an array.
fn names(array: &Value, field: &str) -> HashSet<String> {
    let objects = array.as_array().into_iter().flatten();
    objects.filter_map(|object| Some(object[field].as_str()?.to_owned())).collect()
}

#[test]
fn each_qemu_has_the_features_that_the_table_says() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let version: QemuVersion = qemu.version().to_string().parse()?;
        let mut guest = Guest::boot_sector(Ram::private(16)).boot(&qemu)?;
        for (feature, is_there) in features_of(&mut guest)? {
            assert_eq!(version.has(feature), is_there, "{feature} in {version}");
        }
    }
    Ok(())
}
