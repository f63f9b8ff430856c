//! A guest that sleeps (ACPI S3) is saved and comes back asleep, and wakes where it fell asleep.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vmfile::{RestoreError, Snapshot};
use vmfile::error::SaveError;
use vmfile::receive::ReceiveOptions;
use vmfile::restore::{Mode, RestoreOptions};
use vmfile::save::{After, Live, Route, SaveOptions};
use vmfile_testing::migration::{qemu_reads, qemu_writes, received};
use vmfile_testing::verbs::{check_is_clean, restore_into};
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
    reaches(&mut guest, "suspended")?;
    Ok(guest)
}

/// Waits for a run state.
fn reaches(guest: &mut Guest, state: &str) -> TestResult {
    let deadline = Instant::now() + Duration::from_secs(60);
    while guest.status()? != state {
        if Instant::now() > deadline {
            return Err(format!("the guest is {}, expected {state}", guest.status()?).into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
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
        (options.clone().route(Route::Stream), Mode::Load),
        (options.clone().route(Route::Native), Mode::Stream),
        (options.clone().live(Some(Live::default())), Mode::Load),
        (options.route(Route::Stream).live(Some(Live::default())), Mode::Map),
    ];
    for (options, mode) in ways {
        let saved = guest.save(&options)?;
        assert_eq!(guest.status()?, "suspended", "{options:?}");
        assert_eq!(run_state(&saved)?, "suspended", "{options:?}");
        check_is_clean(&saved.file)?;
        wakes(&mut saved.restore(qemu, mode)?)?;
    }
    wakes(&mut guest)
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
    let saved = guest.save(&SaveOptions::default())?;
    assert_eq!(run_state(&saved)?, "paused");
    for mode in [Mode::Map, Mode::Stream] {
        let mut guest = saved.restore(&qemu, mode)?;
        assert_eq!(guest.status()?, "paused");
        guest.resume()?;
        wakes(&mut guest)?;
    }
    Ok(())
}

/// The stream of a guest that QEMU sends while it sleeps names another run state than that of a guest
/// that was stopped before.
#[test]
fn a_guest_that_qemu_sends_in_its_sleep_comes_back_asleep() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = sleeper(604);
    let mut guest = asleep(&config, &qemu)?;
    let saved = received(&mut guest, &ReceiveOptions::default())?;
    wakes(&mut saved.restore(&qemu, Mode::Map)?)?;
    wakes(&mut saved.restore(&qemu, Mode::Stream)?)?;
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
    wakes(&mut saved.restore(&newer, Mode::Auto)?)
}
