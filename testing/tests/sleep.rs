//! A guest that sleeps (ACPI S3) is saved and comes back asleep, and wakes where it fell asleep.

use std::thread;
use std::time::Duration;

use serde_json::json;
use vmfile::error::SaveError;
use vmfile::receive::ReceiveOptions;
use vmfile::restore::{Mode, RestoreOptions};
use vmfile::save::{After, Live, LiveMethod, Route, SaveOptions};
use vmfile::{RestoreError, Snapshot};
use vmfile_testing::migration::{qemu_reads, qemu_writes, received};
use vmfile_testing::verbs::{check_is_clean, restore_into, save_with};
use vmfile_testing::{
    Case, Guest, GuestConfig, Machine, Qemu, Ram, Release, Saved, TestResult, cases, requires,
};

/// The guest falls asleep after this pass.
const PASS: u32 = 2;

fn sleeper(seed: u32) -> GuestConfig {
    Guest::linux(Ram::private(256)).seed(seed).sleeps_after(PASS)
}

/// Boots the guest, and waits until it sleeps.
fn asleep(config: &GuestConfig, qemu: &Qemu) -> TestResult<Guest> {
    let mut guest = config.boot_to(qemu, PASS)?;
    guest.wait_for_status("suspended")?;
    Ok(guest)
}

/// Wakes the guest, which goes on with the pass that follows.
fn wakes(guest: &mut Guest) -> TestResult {
    assert_eq!(guest.status()?, "suspended");
    guest.qmp("system_wakeup", json!({}))?;
    guest.wait_for_count(PASS + 1)?;
    guest.judge_counts()?;
    let first = guest.counts().first().map(|count| count.number);
    assert!(first == Some(1) || first == Some(PASS + 1), "{first:?}");
    assert_eq!(guest.status()?, "running");
    Ok(())
}

/// Restores a guest that sleeps, and wakes it.
fn comes_back<R>(saved: &Saved<R>, qemu: &Qemu, mode: Mode) -> TestResult {
    wakes(&mut saved.restore(qemu, mode)?)?;
    cases(1, Case::Restore);
    Ok(())
}

fn run_state<R>(saved: &Saved<R>) -> TestResult<String> {
    let info = vmfile::info::info(&Snapshot::open(&saved.file, 0)?)?;
    Ok(info.vm.ok_or("a VM")?.run_state)
}

/// Saves a guest that sleeps by each route, restores it in each mode, and wakes it.
fn round_trips(qemu: &Qemu, config: &GuestConfig) -> TestResult {
    let mut guest = asleep(config, qemu)?;
    let options = SaveOptions::default().after(After::Resume);
    let ways = [
        (options.clone(), Mode::Map),
        (options.clone().route(Route::Stream), Mode::Stream),
        (options.clone().live(Some(Live::default())), Mode::Load),
        (options.route(Route::Stream).live(Some(Live::default())), Mode::Map),
    ];
    for (options, mode) in ways {
        let saved = guest.save(&options)?;
        assert_eq!(guest.status()?, "suspended", "{options:?}");
        assert_eq!(run_state(&saved)?, "suspended", "{options:?}");
        check_is_clean(&saved.file)?;
        comes_back(&saved, qemu, mode)?;
    }
    // QEMU would end after a migration.
    refused(&mut guest, &SaveOptions::default().route(Route::Native))?;
    wakes(&mut guest)
}

/// Expects that a guest that sleeps is not saved in a way, and sleeps on.
fn refused(guest: &mut Guest, options: &SaveOptions) -> TestResult {
    let error = guest.save_fails(options)?;
    assert!(matches!(error, SaveError::Sleeps { .. }), "{error}");
    assert_eq!(guest.status()?, "suspended");
    Ok(())
}

#[test]
fn a_guest_that_sleeps_comes_back_asleep() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    round_trips(&qemu, &sleeper(601))
}

#[test]
fn a_guest_of_the_newest_that_sleeps_comes_back_asleep() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    round_trips(&qemu, &sleeper(602).machine(Machine::Q35))
}

/// QEMU says `paused` of such a guest, and `cont` lets it sleep on.
#[test]
fn a_guest_that_was_paused_in_its_sleep_comes_back_paused() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = asleep(&sleeper(603), &qemu)?;
    guest.stop()?;
    let options = SaveOptions::default().after(After::Resume);
    for (route, mode) in [(Route::Direct, Mode::Map), (Route::Stream, Mode::Stream)] {
        let saved = guest.save(&options.clone().route(route))?;
        assert_eq!(run_state(&saved)?, "paused");
        let mut guest = saved.restore(&qemu, mode)?;
        assert_eq!(guest.status()?, "paused");
        guest.resume()?;
        wakes(&mut guest)?;
    }
    let error = guest.save_fails(&SaveOptions::default().route(Route::Native))?;
    assert!(matches!(error, SaveError::Sleeps { .. }), "{error}");
    guest.resume()?;
    wakes(&mut guest)
}

/// The stream of a guest that QEMU sends while it sleeps names another run state than that of a guest
/// that was stopped before.
#[test]
fn a_guest_that_qemu_sends_in_its_sleep_comes_back_asleep() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = sleeper(604);
    let mut guest = asleep(&config, &qemu)?;
    let saved = received(&mut guest, &ReceiveOptions::default())?;
    comes_back(&saved, &qemu, Mode::Map)?;
    comes_back(&saved, &qemu, Mode::Stream)?;
    // QEMU has it back as well.
    wakes(&mut qemu_reads(&qemu, &config, &saved.file)?)?;

    let config = sleeper(605);
    let mut guest = asleep(&config, &qemu)?;
    let saved = Saved::by(&mut guest, |guest, file| {
        qemu_writes(guest, &format!("file:{}", file.display()))
    })?;
    for paused in [false, true] {
        let mut waiting = config.incoming(&qemu, "defer")?;
        let options = RestoreOptions::default().paused(paused);
        restore_into(&waiting, &Snapshot::open(&saved.file, 0)?, &options)?;
        if paused {
            assert_eq!(waiting.status()?, "paused");
            waiting.resume()?;
        }
        wakes(&mut waiting)?;
    }
    Ok(())
}

/// Saves by pre-copy a guest that falls asleep at several moments of it: it is saved, or the save says that
/// it fell asleep. In either case QEMU lives, and the guest wakes.
fn falls_asleep_in_pre_copy(qemu: &Qemu, config: &GuestConfig) -> TestResult {
    let options = SaveOptions::default().route(Route::Stream).live(Some(Live::default()));
    let options = options.after(After::Resume);
    let mut refused = 0;
    for later in [0, 100, 200] {
        let mut guest = config.boot_to(qemu, PASS - 1)?;
        thread::sleep(Duration::from_millis(later));
        let directory = tempfile::tempdir()?;
        let saved = save_with(&guest, &directory.path().join("vm.vmf"), &options);
        guest.wait_for_status("suspended")?;
        match saved.map_err(|error| error.downcast::<SaveError>()) {
            Ok(report) => assert!(matches!(report.live_method, Some(LiveMethod::PreCopy { .. }))),
            Err(Ok(error)) if is_of_sleep(&error) => refused += 1,
            Err(other) => return Err(format!("{other:?}").into()),
        }
        wakes(&mut guest)?;
    }
    assert!(refused > 0);
    Ok(())
}

/// Tells whether a save was refused because the guest sleeps. It may have slept before the first look already,
/// which QEMU 7.2 shows as a state that cannot be saved.
fn is_of_sleep(error: &SaveError) -> bool {
    match error {
        SaveError::Sleeps { .. } => true,
        SaveError::RunState { found } | SaveError::StoppedMeanwhile { found } => {
            found == "suspended"
        }
        _ => false,
    }
}

#[test]
fn a_guest_that_falls_asleep_in_pre_copy_wakes() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = Guest::linux(Ram::file(256, directory.path())).seed(607).sleeps_after(PASS);
    falls_asleep_in_pre_copy(&qemu, &config)
}

#[test]
fn a_guest_of_the_oldest_that_falls_asleep_in_pre_copy_wakes() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    falls_asleep_in_pre_copy(&qemu, &sleeper(608).machine_version("7.2"))
}

/// QEMU 7.2 does not stop a guest that sleeps, and one that it takes does not wake as it should.
#[test]
fn the_oldest_refuses_a_guest_that_sleeps() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let newer = requires!(Qemu::of(Release::Distribution));
    let config = sleeper(606).machine_version("7.2");
    let mut guest = asleep(&config, &oldest)?;
    let error = guest.save_fails(&SaveOptions::default())?;
    assert!(matches!(error, SaveError::RunState { .. }), "{error}");
    wakes(&mut guest)?;
    drop(guest);

    let saved = asleep(&config, &newer)?.save(&SaveOptions::default())?;
    let error = saved.restore(&oldest, Mode::Auto).unwrap_err().downcast::<RestoreError>()?;
    assert!(matches!(*error, RestoreError::Sleeps { .. }), "{error}");
    comes_back(&saved, &newer, Mode::Auto)
}
