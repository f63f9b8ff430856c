//! `save --live`: the guest runs while it is saved, and the file holds one moment.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::Control;
use vmfile::error::{SaveError, UserfaultError};
use vmfile::restore::Mode;
use vmfile::save::{After, Live, LiveMethod, Route, RouteUsed, SaveOptions, SaveReport};
use vmfile_qemu::{Outgoing, Vm, VmError};
use vmfile_testing::migration::{set_capability, set_parameter};
use vmfile_testing::verbs::save_with;
use vmfile_testing::{
    Case, Guest, GuestConfig, HugePages, Machine, Missing, Mount, Qemu, Ram, Release, TestResult,
    cases, requires,
};

fn live() -> SaveOptions {
    let live = Some(Live::default().pause_max(Duration::from_secs(2)));
    SaveOptions::default().live(live).after(After::Resume)
}

/// Saves a guest that rewrites its memory all the time; expects that it runs on, and that the file
/// comes back.
fn round_trip(
    source: &Qemu,
    destination: &Qemu,
    config: &GuestConfig,
    options: &SaveOptions,
) -> TestResult<SaveReport> {
    round_trip_of(source, destination, config, options, |_| true)
}

/// As [`round_trip`], with the first of at most 50 saves whose report `is_it` accepts.
fn round_trip_of(
    source: &Qemu,
    destination: &Qemu,
    config: &GuestConfig,
    options: &SaveOptions,
    is_it: impl Fn(&SaveReport) -> bool,
) -> TestResult<SaveReport> {
    let mut guest = config.boot_to(source, 2)?;
    let settings = guest.qmp("query-migrate-capabilities", json!({}))?;
    let mut saved = guest.save(options)?;
    for _ in 1..50 {
        if is_it(&saved.report) {
            break;
        }
        saved = guest.save(options)?;
    }
    let report = &saved.report;
    assert!(report.live && is_it(report), "{report:?}");
    assert_eq!(guest.qmp("query-migrate-capabilities", json!({}))?, settings);
    guest.runs_on(2)?;
    drop(guest);
    let room = fs::metadata(&saved.file)?.blocks() * 512;
    assert!(room < (report.pages_total * 4096) + (16 << 20), "{room} bytes: {report:?}");
    saved.comes_back(destination, [Mode::Map, Mode::Load])?;
    Ok(saved.report)
}

#[test]
fn a_busy_guest_with_private_ram_is_saved_by_userfault() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(111).busy();
    let report = round_trip(&qemu, &qemu, &config, &live())?;
    assert_eq!(report.live_method, Some(LiveMethod::Userfault));
    assert_eq!(report.route, RouteUsed::Direct);
    assert_eq!(report.bytes_rewritten, 0, "each page comes once");
    assert!(report.pause_seconds > 0.0 && report.pause_seconds < report.total_seconds);
    let waits = report.guest_waits.ok_or("a save by userfault says how the guest waited")?;
    assert!(waits.longest_seconds <= waits.total_seconds, "{waits:?}");
    Ok(())
}

/// Each vCPU of these guests proves memory of its own.
#[test]
fn busy_guests_with_other_ram_and_vcpus_are_saved_by_userfault() -> TestResult {
    let _pages = requires!(HugePages::reserve(192));
    for (release, ram, vcpus) in [
        (Release::Distribution, Ram::memfd(64), 2),
        (Release::Newest, Ram::hugetlb_memfd(64), 1),
        (Release::Newest, Ram::private(64), 2),
    ] {
        let qemu = requires!(Qemu::of(release));
        let config = Guest::boot_sector(ram).seed(116).vcpus(vcpus).busy();
        let options = live().route(Route::Direct);
        let report = round_trip(&qemu, &qemu, &config, &options)?;
        assert_eq!(report.live_method, Some(LiveMethod::Userfault), "{release:?} {vcpus}");
    }
    Ok(())
}

#[test]
fn a_busy_guest_is_saved_by_background_snapshot_if_qemu_is_to_send_it() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(117).busy();
    let report = round_trip(&qemu, &qemu, &config, &live().route(Route::Stream))?;
    let Some(LiveMethod::BackgroundSnapshot { reason }) = &report.live_method else {
        panic!("{report:?}")
    };
    assert!(reason.contains("asked for"), "{reason}");
    assert_eq!((report.route, report.bytes_rewritten), (RouteUsed::Stream, 0));
    Ok(())
}

/// QEMU protects the memory page by page and lifts the protection page by page: after a save by its
/// stream the guest has no huge pages left.
#[test]
fn the_huge_pages_of_a_guest_survive_ten_saves() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(256)).seed(118).boot_to(&qemu, 1)?;
    let pid = guest.pid()?;
    let before = huge_pages(pid)?;
    let reason = format!("the kernel gave the guest {before} KiB in huge pages");
    requires!((before >= 32 << 10).then_some(()).ok_or(Missing::beyond_setup(reason)));
    for _ in 0..10 {
        let report = guest.save(&live())?.report;
        assert_eq!(report.live_method, Some(LiveMethod::Userfault));
    }
    let after = huge_pages(pid)?;
    assert!(after * 100 >= before * 95, "{after} KiB of {before} KiB are left");
    guest.runs_on(1)
}

/// How much private memory a process has in huge pages, in KiB.
fn huge_pages(pid: u32) -> TestResult<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let number = line.and_then(|line| line.split_whitespace().next()).ok_or("no AnonHugePages")?;
    Ok(number.parse()?)
}

#[test]
fn a_busy_linux_guest_with_shared_ram_is_saved_live() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::linux(Ram::memfd(256)).vcpus(2).virtio().busy().machine(Machine::Q35);
    round_trip(&qemu, &qemu, &config, &live()).map(drop)
}

#[test]
fn the_oldest_qemu_is_saved_live_and_comes_back_on_the_installed_one() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(112).busy().machine_version("7.2");
    round_trip(&oldest, &qemu, &config, &live()).map(drop)
}

#[test]
fn ram_in_a_file_on_a_disk_is_saved_by_pre_copy() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = Guest::boot_sector(Ram::file(64, directory.path())).seed(113).busy();
    // The guest writes only a tenth of the time, so a save may see no write.
    let is_rewritten = |report: &SaveReport| report.bytes_rewritten > 0;
    let options = live().route(Route::Stream);
    let report = round_trip_of(&qemu, &qemu, &config, &options, is_rewritten)?;
    let Some(LiveMethod::PreCopy { reason }) = &report.live_method else { panic!("{report:?}") };
    assert!(reason.contains("not compatible"), "{reason}");
    Ok(())
}

#[test]
fn ram_in_a_file_on_a_disk_is_saved_from_a_copy() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = Guest::boot_sector(Ram::file(64, directory.path())).seed(120).busy();
    let report = round_trip(&qemu, &qemu, &config, &live().route(Route::Direct))?;
    let Some(LiveMethod::Aside { reason }) = &report.live_method else { panic!("{report:?}") };
    assert!(reason.contains("not compatible"), "{reason}");
    Ok(())
}

/// Of a guest that was restored by `map`, only what it has written since is copied.
#[test]
fn a_guest_that_was_restored_by_map_is_saved_from_a_copy_of_what_it_wrote() -> TestResult {
    for release in [Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let config = Guest::boot_sector(Ram::private(128)).seed(121).fill_mib(96).busy();
        let mut guest = config.boot_to(&qemu, 1)?;
        let saved = guest.save(&SaveOptions::default().after(After::Resume))?;
        drop(guest);
        let mut clone = saved.restore(&qemu, Mode::Map)?;
        clone.wait_for_passes(1)?;
        let again = clone.save(&live())?;
        let Some(LiveMethod::Aside { reason }) = &again.report.live_method else {
            panic!("{:?}", again.report)
        };
        assert!(reason.contains("mapped from a file"), "{reason}");
        let waits = again.report.guest_waits.ok_or("it says how much was copied")?;
        assert!(waits.aside_bytes < 120 << 20 && waits.count == 0, "{waits:?}");
        clone.runs_on(1)?;
        drop(clone);
        again.comes_back(&qemu, [Mode::Map, Mode::Load])?;
    }
    Ok(())
}

#[test]
fn a_guest_whose_memory_cannot_be_read_in_time_is_not_saved_by_a_stream_if_asked() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = Guest::boot_sector(Ram::file(64, directory.path())).seed(119);
    let mut guest = config.boot_to(&qemu, 1)?;
    let settings = guest.qmp("query-migrate-capabilities", json!({}))?;
    let short = Live::default().pause_max(Duration::from_millis(1));
    let error = guest.save_fails(&live().live(Some(short)).route(Route::Direct))?;
    let SaveError::Userfault(UserfaultError::NotPossible { reason }) = &error else {
        panic!("{error}")
    };
    assert!(reason.contains("not compatible") && reason.contains("within 1ms"), "{reason}");
    assert_eq!(guest.qmp("query-migrate-capabilities", json!({}))?, settings);
    guest.runs_on(1)
}

#[test]
fn a_guest_that_is_too_busy_is_given_up_and_runs_on() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let ram_directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = Guest::boot_sector(Ram::file(64, ram_directory.path())).seed(114).busy();
    let mut guest = config.boot_to(&qemu, 1)?;
    let live =
        Live::default().timeout(Duration::from_millis(20)).pause_max(Duration::from_millis(1));
    let error = guest.save_fails(&self::live().live(Some(live)))?;
    assert!(matches!(error, SaveError::NotConverged { .. }), "{error}");
    guest.runs_on(2)
}

#[test]
fn a_paused_guest_is_saved_as_it_is_and_the_route_native_is_refused() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(115).boot_to(&qemu, 1)?;
    let error = guest.save_fails(&live().route(Route::Native))?;
    assert!(matches!(error, SaveError::NotLive), "{error}");
    assert_eq!(guest.status()?, "running");
    guest.stop()?;
    let report = guest.save(&live())?.report;
    assert!(!report.live && report.route == RouteUsed::Direct, "{report:?}");
    assert_eq!(guest.status()?, "paused");
    Ok(())
}

/// A save and its guardian were killed while QEMU paused the VM for the overlays. The next vmfile
/// never cancelled that migration: it waited until its timeout, and the guest stayed paused for
/// ever.
#[test]
fn a_migration_that_waits_before_its_switchover_is_cancelled() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    for release in [Release::Oldest, Release::Distribution] {
        let qemu =
            if release == Release::Oldest { requires!(Qemu::of(release)) } else { qemu.clone() };
        let mut guest = Guest::boot_sector(Ram::private(64)).seed(151).boot_to(&qemu, 1)?;
        set_capability(&mut guest, "pause-before-switchover")?;
        set_parameter(&mut guest, "max-bandwidth", json!(0))?;
        guest.qmp("migrate", json!({ "uri": "exec:cat > /dev/null" }))?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while guest.qmp("query-migrate", json!({}))?["status"] != "pre-switchover" {
            assert!(Instant::now() < deadline, "the migration reaches its switchover");
            thread::sleep(Duration::from_millis(5));
        }
        let mut vm = Vm::connect(&guest.qmp_path())?;
        let ended = vm.cancel_file(Duration::from_secs(30))?;
        assert_eq!(ended, Outgoing::Cancelled);
        drop(vm);
        if guest.status()? != "running" {
            guest.resume()?;
        }
        guest.counts_on(2)?;
    }
    Ok(())
}

/// A `device_add` of another client that fails waits for QEMU's migration thread, and vmfile kept that
/// waiting: QEMU's main loop stood still, and with it the save, for minutes.
#[test]
fn a_client_that_adds_devices_meanwhile_ends_a_live_save_at_most() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::boot_sector(Ram::machine(128)).seed(122).vcpus(2).busy();
    let mut guest = config.arguments(["-m", "128M,slots=4,maxmem=1G"]).boot_to(&qemu, 1)?;
    let settings = guest.qmp("query-migrate-capabilities", json!({}))?;
    // Too small for a DIMM: every attempt fails.
    let memory = json!({ "qom-type": "memory-backend-ram", "id": "m", "size": 1 << 20 });
    guest.qmp("object-add", memory)?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (file, socket) = (directory.path().join("vm.vmf"), guest.qmp_path());
    let began = Instant::now();
    let saved = thread::scope(|scope| -> TestResult<_> {
        let save = scope.spawn(|| -> TestResult<SaveReport> {
            let mut vm = Vm::connect(&socket)?;
            Ok(vmfile::save::save(&mut vm, &file, &live(), &Control::none())?)
        });
        while !save.is_finished() {
            let device = json!({ "driver": "pc-dimm", "memdev": "m", "id": "d" });
            assert!(guest.qmp("device_add", device).is_err(), "it is too small");
        }
        Ok(save.join().expect("no panic"))
    })?;
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}: {saved:?}", began.elapsed());
    let stuck =
        |error: &SaveError| matches!(error, SaveError::Userfault(UserfaultError::Stuck { .. }));
    match saved {
        Ok(report) => assert_eq!(report.live_method, Some(LiveMethod::Userfault)),
        Err(error) => {
            assert!(error.downcast_ref().is_some_and(stuck), "{error}");
            assert!(!file.exists(), "{error}");
        }
    }
    assert_eq!(guest.qmp("query-migrate-capabilities", json!({}))?, settings);
    cases(1, Case::Interference);
    guest.runs_on(1)
}

/// QEMU stops the guest in a thread of its own, for the saved moment. If another client let the guest run
/// just then, that thread waited for the CPUs until a client stopped the guest again: vmfile waited for
/// up to ten minutes, and QEMU could not be told to end the migration.
#[test]
fn a_client_that_lets_the_guest_run_again_and_again_ends_a_live_save_at_most() -> TestResult {
    let mut all = 0;
    for (release, route, with_disks) in [
        (Release::Newest, Route::Auto, false),
        (Release::Newest, Route::Stream, false),
        (Release::Distribution, Route::Auto, false),
        (Release::Distribution, Route::Stream, false),
        (Release::Distribution, Route::Stream, true),
    ] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let (file, other) = (directory.path().join("vm.vmf"), directory.path().join("other"));
        let monitor = format!("unix:{},server=on,wait=off", other.display());
        let config = Guest::boot_sector(Ram::private(128)).seed(127).vcpus(2);
        let mut guest = config.arguments(["-qmp", &monitor]).boot_to(&qemu, 1)?;
        let settings = guest.qmp("query-migrate-capabilities", json!({}))?;
        let mut other = Vm::connect(&other)?;
        let mut ended = 0;
        for _ in 0..2 {
            let began = Instant::now();
            let socket = guest.qmp_path();
            let saved = thread::scope(|scope| -> TestResult<_> {
                let save = scope.spawn(|| -> TestResult<Result<SaveReport, SaveError>> {
                    let options = live().route(route).with_disks(with_disks);
                    let mut vm = Vm::connect(&socket)?;
                    Ok(vmfile::save::save(&mut vm, &file, &options, &Control::none()))
                });
                while !save.is_finished() {
                    // It does nothing to a guest that runs.
                    other.execute("cont", Value::Null)?;
                }
                save.join().expect("no panic")
            })?;
            assert!(began.elapsed() < Duration::from_secs(9), "{:?}: {saved:?}", began.elapsed());
            match saved {
                // Then the guest ran on after its disks were frozen.
                Ok(_) if with_disks => return Err("memory and disks are not of one moment".into()),
                Ok(_) => fs::remove_file(&file)?,
                Err(SaveError::Vm(VmError::NotStill { .. } | VmError::WrongState { .. })) => {
                    ended += 1;
                }
                Err(error) => return Err(error.into()),
            }
            assert!(!file.exists());
            assert_eq!(guest.qmp("query-migrate-capabilities", json!({}))?, settings);
            assert_eq!(guest.status()?, "running");
            cases(1, Case::Interference);
        }
        guest.runs_on(1)?;
        println!("{release:?} {route:?}: {ended} of 2 saves ended");
        all += ended;
    }
    assert!(all > 0, "no client was quick enough");
    Ok(())
}

/// vmfile let a guest run on that another client had stopped before the saved moment, and waited ten
/// seconds for it by userfault.
#[test]
fn a_guest_that_another_client_stops_at_any_moment_stays_stopped() -> TestResult {
    let moments = [0, 20, 40, 60, 80, 100, 120, 140, 160];
    // How often the guest has been let run again once the saved moment is over. Pre-copy, of 7.2, ends
    // with that; if the guest is stopped right before, it ends a moment later, while the save gives up.
    for (release, route, resumes, moments) in [
        (Release::Distribution, Route::Auto, 2, moments.to_vec()),
        (Release::Newest, Route::Auto, 2, moments.to_vec()),
        (Release::Distribution, Route::Stream, 1, moments.to_vec()),
        (Release::Oldest, Route::Stream, u64::MAX, (0..180).step_by(5).collect()),
    ] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let (file, other) = (directory.path().join("vm.vmf"), directory.path().join("other"));
        let monitor = format!("unix:{},server=on,wait=off", other.display());
        let config = Guest::boot_sector(Ram::private(128)).seed(125).arguments(["-qmp", &monitor]);
        let mut guest = config.boot_to(&qemu, 1)?;
        let settings = guest.qmp("query-migrate-capabilities", json!({}))?;
        let (mut refused, mut after) = (0, 0);
        for delay in moments.into_iter().map(Duration::from_millis) {
            let began = Instant::now();
            let mut other = Vm::connect(&other)?;
            let socket = guest.qmp_path();
            let (result, is_after) = thread::scope(|scope| -> TestResult<_> {
                let save = scope.spawn(|| -> TestResult<Result<SaveReport, SaveError>> {
                    let options = live().route(route);
                    let mut vm = Vm::connect(&socket)?;
                    Ok(vmfile::save::save(&mut vm, &file, &options, &Control::none()))
                });
                thread::sleep(delay);
                let runs = other.is_running()?;
                let is_after = runs && other.resumes() >= resumes;
                other.stop()?;
                Ok((save.join().expect("no panic")?, is_after))
            })?;
            let what = format!("{release:?} {route:?} {delay:?}: {result:?}");
            assert!(began.elapsed() < Duration::from_secs(8), "{what}");
            // If it came in a pause of the save's own, QEMU stopped the guest once.
            let is_still = guest.status()? != "running";
            match result {
                Ok(_) => fs::remove_file(&file)?,
                Err(SaveError::StoppedMeanwhile { .. }) => refused += 1,
                Err(SaveError::Vm(VmError::NotStill { .. })) => {}
                Err(_) => return Err(what.into()),
            }
            let is_refused = matches!(result, Err(SaveError::StoppedMeanwhile { .. }));
            assert!(is_still || !is_refused && !is_after, "{what}");
            after += u32::from(is_after);
            assert!(!file.exists(), "{what}");
            assert_eq!(guest.qmp("query-migrate-capabilities", json!({}))?, settings);
            if is_still {
                guest.resume()?;
            }
            cases(1, Case::Interference);
        }
        guest.runs_on(1)?;
        println!("{release:?} {route:?}: {refused} before the moment, {after} after it");
        assert!(refused + after > 0, "{release:?} {route:?}");
    }
    Ok(())
}

/// vmfile let a guest run on that another client had stopped while its memory was copied.
#[test]
fn a_guest_that_another_client_stops_meanwhile_stays_stopped() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(128)).seed(124).busy().boot_to(&qemu, 1)?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (file, socket) = (directory.path().join("vm.vmf"), guest.qmp_path());
    let (copying, is_copying) = mpsc::sync_channel(0);
    let (stopped, is_stopped) = mpsc::channel();
    let is_stopped = Mutex::new(Some(is_stopped));
    let progress = |_| {
        let first = is_stopped.lock().expect("no panic").take();
        if let Some(is_stopped) = first {
            // The other side has gone only after an error of its own.
            let _ = copying.send(());
            let _ = is_stopped.recv();
        }
    };
    let report = thread::scope(|scope| -> TestResult<_> {
        let save = scope.spawn(|| -> TestResult<SaveReport> {
            let flag = Arc::default();
            let mut vm = Vm::connect(&socket)?;
            Ok(vmfile::save::save(&mut vm, &file, &live(), &Control::new(&flag, &progress))?)
        });
        is_copying.recv()?;
        guest.qmp("stop", json!({}))?;
        stopped.send(())?;
        save.join().expect("no panic")
    })?;
    assert_eq!(report.live_method, Some(LiveMethod::Userfault));
    assert_eq!(guest.status()?, "paused");
    cases(1, Case::Interference);
    guest.resume()?;
    guest.runs_on(1)
}

/// vmfile waited a minute for a migration that could not go on, because it did not read the stream any
/// more; the guest stood still at its next write. 7.2 sends by pre-copy.
#[test]
fn a_disk_that_fills_up_while_qemu_sends_a_running_guest_does_not_stop_it() -> TestResult {
    for release in [Release::Distribution, Release::Oldest] {
        fills_up_while_sent(&requires!(Qemu::of(release)))?;
    }
    Ok(())
}

fn fills_up_while_sent(qemu: &Qemu) -> TestResult {
    let disk = requires!(Mount::ext4(60));
    let mut guest = Guest::boot_sector(Ram::private(128)).seed(123).busy().boot_to(qemu, 1)?;
    let settings = guest.qmp("query-migrate-capabilities", json!({}))?;
    let file = disk.path().join("vm.vmf");
    let began = Instant::now();
    let error = save_with(&guest, &file, &live().route(Route::Stream)).expect_err("no room");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}: {error}", began.elapsed());
    assert!(format!("{error}: {:?}", error.source()).contains("No space left"), "{error}");
    assert!(!file.exists());
    assert_eq!(guest.qmp("query-migrate-capabilities", json!({}))?, settings);
    cases(1, Case::Shortage);
    guest.runs_on(1)
}
