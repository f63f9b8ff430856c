//! If a save fails, the VM runs on and no file is left. Every kind of damage to a file is found.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use vmfile::PagesError;
use vmfile::check::CheckOptions;
use vmfile::error::SaveError;
use vmfile::save::{After, Live, Route, SaveOptions};
use vmfile::{Backend, Control, DirectIo, Jobs, Progress, Snapshot, SnapshotError, Vm};
use vmfile_testing::verbs::check_is_clean;
use vmfile_testing::{
    Case, Guest, Monitor, Mount, Qemu, Ram, Release, TestResult, cases, requires,
};

fn boot(qemu: &Qemu) -> TestResult<Guest> {
    let guest = Guest::boot_sector(Ram::private(128)).seed(41).boot_to(qemu, 1)?;
    Ok(guest)
}

/// Expects that the guest runs and counts on, and that `directory` is empty.
fn nothing_happened(guest: &mut Guest, directory: &Path) -> TestResult {
    guest.runs_on(2)?;
    let left: Vec<_> = fs::read_dir(directory)?.collect::<Result<_, _>>()?;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

fn slow_options() -> SaveOptions {
    let jobs = Jobs::new(1).expect("1 is a number of jobs");
    SaveOptions::default().jobs(jobs).io(Backend::Threads)
}

/// The same while the guest stands still, and while it runs.
fn slow_and_live_options() -> [SaveOptions; 2] {
    let live = slow_options().live(Some(Live::default())).route(Route::Direct);
    [slow_options(), live.after(After::Resume)]
}

/// Saves, and calls `meddle` once the first pages are written; returns the error of the save.
fn save_with_meddling(
    guest: &Guest,
    file: &Path,
    options: &SaveOptions,
    meddle: impl Fn(&AtomicBool) + Sync,
) -> TestResult<SaveError> {
    let mut vm = Vm::connect(&guest.qmp_path())?;
    let stop = Arc::new(AtomicBool::new(false));
    let calls = AtomicU32::new(0);
    let progress = |_: Progress| {
        if calls.fetch_add(1, Ordering::Relaxed) == 0 {
            meddle(&stop);
        }
    };
    let result = vmfile::save::save(&mut vm, file, options, &Control::new(&stop, &progress));
    assert!(calls.into_inner() > 0, "the save came as far as its pages");
    Ok(result.expect_err("the save failed"))
}

#[test]
fn a_save_that_is_stopped_in_the_middle_harms_nobody() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = boot(&qemu)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let stop = |stop: &AtomicBool| stop.store(true, Ordering::Relaxed);
    for options in slow_and_live_options() {
        let error = save_with_meddling(&guest, &file, &options, stop)?;
        assert!(error.is_stopped(), "{error}");
        nothing_happened(&mut guest, directory.path())?;
    }
    Ok(())
}

/// QEMU then removes the write protection: what is read after that is not of the moment. If that client
/// starts a migration of its own, QEMU protects the memory anew, for that one: vmfile took it for the
/// protection of its own, and the file was not of one moment.
#[test]
fn a_live_save_whose_migration_another_client_cancels_leaves_no_file() -> TestResult {
    let releases = [Release::Distribution, Release::Newest];
    for (released, goes_on) in
        releases.map(|released| [(released, false), (released, true)]).concat()
    {
        let qemu = requires!(Qemu::of(released));
        let sockets = tempfile::tempdir()?;
        let second = sockets.path().join("second");
        let socket = format!("unix:{},server=on,wait=off", second.display());
        let config = Guest::boot_sector(Ram::private(128)).seed(42).busy();
        let mut guest = config.arguments(["-qmp", &socket]).boot_to(&qemu, 1)?;
        let settings = guest.qmp("query-migrate-capabilities", json!({}))?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("vm.vmf");
        let other = Mutex::new(Monitor::connect(&second, Duration::from_secs(10))?);
        let cancel = |_: &AtomicBool| {
            let mut other = other.lock().expect("no other thread panicked");
            other.execute("migrate_cancel", json!({})).expect("QEMU cancels its migration");
            let own = json!({ "uri": "exec:cat > /dev/null" });
            // QEMU refuses while the first one ends.
            let tries = if goes_on { 0..5000 } else { 0..0 };
            let begun = tries.map(|_| other.execute("migrate", own.clone())).find(Result::is_ok);
            assert_eq!(begun.is_some(), goes_on);
        };
        let [_, live] = slow_and_live_options();
        let error = save_with_meddling(&guest, &file, &live, cancel)?;
        let by_another = |reason: &str| reason.contains("another client");
        assert!(matches!(&error, SaveError::Migration { reason } if by_another(reason)), "{error}");
        nothing_happened(&mut guest, directory.path())?;
        assert_eq!(guest.qmp("query-migrate-capabilities", json!({}))?, settings);
        cases(1, Case::Interference);
    }
    Ok(())
}

/// A save that failed set each of QEMU's settings to its value before the save, also those that another
/// client had changed meanwhile.
#[test]
fn a_setting_that_another_client_changes_while_a_save_fails_stays_changed() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let sockets = tempfile::tempdir()?;
    let second = sockets.path().join("second");
    let socket = format!("unix:{},server=on,wait=off", second.display());
    let config = Guest::boot_sector(Ram::private(128)).seed(43);
    let mut guest = config.arguments(["-qmp", &socket]).boot_to(&qemu, 1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let other = Mutex::new(Monitor::connect(&second, Duration::from_secs(10))?);
    let changed = json!({ "max-bandwidth": 7_654_321, "downtime-limit": 999 });
    let meddle = |stop: &AtomicBool| {
        let mut other = other.lock().expect("no other thread panicked");
        other.execute("migrate-set-parameters", changed.clone()).expect("QEMU changes them");
        stop.store(true, Ordering::Relaxed);
    };
    let [_, live] = slow_and_live_options();
    let still = slow_options().after(After::Resume);
    for options in [live, still.clone().route(Route::Stream), still.route(Route::Native)] {
        // Both are what `native` sets, and what it limits QEMU to while it cancels is neither.
        let before = json!({ "max-bandwidth": 0, "downtime-limit": 0 });
        guest.qmp("migrate-set-parameters", before)?;
        let mut settings = guest.qmp("query-migrate-parameters", json!({}))?;
        for (name, value) in changed.as_object().ok_or("an object")? {
            settings[name] = value.clone();
        }
        let error = save_with_meddling(&guest, &file, &options, meddle)?;
        assert!(error.is_stopped(), "{error}");
        let found = guest.qmp("query-migrate-parameters", json!({}))?;
        assert_eq!(found, settings, "{options:?}");
        nothing_happened(&mut guest, directory.path())?;
        cases(1, Case::Interference);
    }
    Ok(())
}

#[test]
fn a_disk_that_fills_up_in_the_middle_harms_nobody() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = boot(&qemu)?;
    let mount = requires!(Mount::ext4(600));
    let (inside, other) = (mount.path().join("dir"), mount.path().join("other"));
    fs::create_dir(&inside)?;
    let [still, live] = slow_and_live_options();
    for options in
        [still.clone(), live.direct_io(DirectIo::Required), still.direct_io(DirectIo::Off)]
    {
        let fill_the_disk = |_: &AtomicBool| {
            let filler = File::options().create_new(true).write(true).open(&other);
            let filler = filler.expect("a file on the mount");
            let mib = vec![1; 1 << 20];
            let full = (0..).find_map(|i| filler.write_all_at(&mib, i << 20).err());
            assert_eq!(full.map(|error| error.kind()), Some(std::io::ErrorKind::StorageFull));
        };
        let file = inside.join("vm.vmf");
        let error = save_with_meddling(&guest, &file, &options, fill_the_disk)?;
        assert!(
            matches!(
                error,
                SaveError::Pages(PagesError::WriteFile { .. })
                    | SaveError::Pages(PagesError::Publish(_))
            ),
            "{error}"
        );
        nothing_happened(&mut guest, &inside)?;
        cases(1, Case::Shortage);
        fs::remove_file(&other)?;
    }
    Ok(())
}

#[test]
fn a_disk_that_is_too_small_is_refused_before_the_vm_is_paused() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = boot(&qemu)?;
    let mount = requires!(Mount::tmpfs(20));
    let mut vm = Vm::connect(&guest.qmp_path())?;
    let file = mount.path().join("vm.vmf");
    let error = vmfile::save::save(&mut vm, &file, &SaveOptions::default(), &Control::none());
    let error = error.expect_err("no room");
    assert!(matches!(error, SaveError::NoSpace { .. }), "{error}");
    let stopped = guest.qmp("query-status", json!({}))?;
    assert_eq!(stopped["status"], "running");
    cases(1, Case::Shortage);
    nothing_happened(&mut guest, mount.path())
}

#[test]
fn a_file_that_appears_meanwhile_is_not_replaced() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = boot(&qemu)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let appear = |_: &AtomicBool| fs::write(&file, "somebody else's").expect("a file");
    let error = save_with_meddling(&guest, &file, &slow_options(), appear)?;
    assert!(matches!(error, SaveError::Pages(PagesError::Publish(_))), "{error}");
    assert_eq!(fs::read_to_string(&file)?, "somebody else's");
    fs::remove_file(&file)?;
    nothing_happened(&mut guest, directory.path())
}

#[test]
fn a_qemu_that_dies_in_the_middle_leaves_no_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    for options in slow_and_live_options() {
        a_qemu_that_dies(&boot(&qemu)?, options.after(After::Resume))?;
    }
    Ok(())
}

fn a_qemu_that_dies(guest: &Guest, options: SaveOptions) -> TestResult {
    let directory = tempfile::tempdir()?;
    let pid = i32::try_from(guest.pid()?)?;
    let pid = rustix::process::Pid::from_raw(pid).ok_or("a process")?;
    let kill = |_: &AtomicBool| {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("our own child");
    };
    let error = save_with_meddling(guest, &directory.path().join("vm.vmf"), &options, kill);
    // If all pages were written before the kill, the file is complete and only the VM is lost.
    let error = error?;
    if !matches!(error, SaveError::Release { .. }) {
        assert_eq!(fs::read_dir(directory.path())?.count(), 0, "{error}");
    }
    cases(1, Case::QemuEnd);
    Ok(())
}

#[test]
fn every_changed_byte_is_found() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(16)).seed(42).boot_to(&qemu, 1)?;
    let saved = guest.save(&SaveOptions::default())?;
    drop(guest);
    let path = &saved.file;
    let file = File::options().read(true).write(true).open(path)?;
    let len = file.metadata()?.len();
    let structure = Snapshot::open(path, 0)?;
    let end = structure.structure().device_state.stream_end;
    // Every part: the head, pages, padding, the device state, hashes, JSON, footer.
    let everywhere = (0..len).step_by(usize::try_from(len / 150)?);
    let places = (0..64).map(|i| i * 7).chain(everywhere).chain((end - 40..end).step_by(5));
    let places = places.chain((len - 64..len).step_by(3)).chain((len - 900..len - 64).step_by(97));
    drop(structure);
    let mut found = 0;
    for offset in places {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset)?;
        file.write_all_at(&[byte[0] ^ 0x10], offset)?;
        match Snapshot::open(path, 0) {
            Err(SnapshotError::Format { .. } | SnapshotError::LostEnd { .. }) => {}
            Err(error) => return Err(format!("offset {offset:#x}: {error}").into()),
            Ok(snapshot) => {
                let options = CheckOptions::default();
                let report = vmfile::check::check(&snapshot, &options, &Control::none())?;
                assert_ne!(report.findings, [], "offset {offset:#x}");
            }
        }
        file.write_all_at(&byte, offset)?;
        found += 1;
    }
    cases(found, Case::Flip);
    check_is_clean(path)
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(16)).seed(43).boot_to(&qemu, 1)?;
    let saved = guest.save(&SaveOptions::default())?;
    drop(guest);
    let path = &saved.file;
    let len = fs::metadata(path)?.len();
    let end = Snapshot::open(path, 0)?.structure().device_state.stream_end;
    let file = File::options().write(true).open(path)?;
    let mut lengths: Vec<u64> = (0..200).map(|i| i * (len / 200)).collect();
    lengths.extend(len - 70..len);
    lengths.extend(end - 70..end + 70);
    lengths.sort_unstable();
    let mut cuts = 0;
    // From the longest to the shortest: each cut makes the file shorter.
    for &length in lengths.iter().rev() {
        file.set_len(length)?;
        let error = Snapshot::open(path, 0).expect_err("a cut file");
        let refused = matches!(error, SnapshotError::Format { .. } | SnapshotError::LostEnd { .. });
        assert!(refused, "{length} of {len} bytes: {error}");
        cuts += 1;
    }
    cases(cuts, Case::Truncation);
    Ok(())
}
