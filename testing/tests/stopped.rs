//! A guest that stands still for a reason of its own is saved by every route, and comes back so.

use serde_json::json;
use vmfile::Snapshot;
use vmfile::restore::Mode;
use vmfile::save::{After, Live, Route, SaveOptions};
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, requires};

/// Has the guest's processor write a byte to a port, as its kernel would.
fn write_to_port(guest: &mut Guest, port_and_byte: &str) -> TestResult {
    let line = format!("o /b {port_and_byte}");
    guest.qmp("human-monitor-command", json!({ "command-line": line })).map(drop)
}

/// A route, whether it is live, and the modes of the restores that follow.
type Way = (Route, bool, &'static [Mode]);

const WAYS: [Way; 4] = [
    (Route::Stream, false, &[Mode::Stream]),
    (Route::Stream, true, &[]),
    (Route::Direct, false, &[Mode::Map, Mode::Load]),
    (Route::Native, false, &[]),
];

/// QEMU aborted if it sent such a guest as a background snapshot (10.0, 11.1).
fn stays_as_it_is(
    qemu: &Qemu,
    config: &GuestConfig,
    (port, state): (&str, &str),
    ways: &[Way],
) -> TestResult {
    for &(route, live, modes) in ways {
        let mut guest = config.boot_to(qemu, 1)?;
        write_to_port(&mut guest, port)?;
        guest.wait_for_status(state)?;
        let live = live.then(Live::default);
        let options = SaveOptions::default().route(route).live(live).after(After::Resume);
        let saved = guest.save(&options)?;
        let report = &saved.report;
        // QEMU has no other way to send a VM that stands still for another reason than a command.
        let after = if route == Route::Direct { state } else { "postmigrate" };
        assert_eq!(guest.status()?, after, "{route:?}: {report:?}");
        assert!(after == state || report.warnings.iter().any(|it| it.contains("postmigrate")));
        drop(guest);
        let info = vmfile::info::info(&Snapshot::open(&saved.file, 0)?)?;
        assert_eq!(info.vm.ok_or("a VM")?.run_state, state, "{route:?}");
        for &mode in modes {
            let mut guest = saved.restore(qemu, mode)?;
            assert_eq!(guest.status()?, state, "{mode:?}");
            guest.resume()?;
            // The watchdog soon stops it again.
            if state != "watchdog" {
                guest.counts_on(1)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_guest_that_has_panicked_is_saved_by_every_route() -> TestResult {
    for (release, ways) in [(Release::Distribution, &WAYS[..]), (Release::Newest, &WAYS[..2])] {
        let qemu = requires!(Qemu::of(release));
        let arguments = ["-device", "pvpanic", "-action", "panic=pause"];
        let config = Guest::boot_sector(Ram::private(64)).seed(651).arguments(arguments);
        stays_as_it_is(&qemu, &config, ("0x505 1", "guest-panicked"), ways)?;
    }
    Ok(())
}

#[test]
fn a_guest_that_its_watchdog_stopped_is_saved_by_every_route() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let arguments = ["-device", "ib700", "-action", "watchdog=pause"];
    let config = Guest::boot_sector(Ram::private(64)).seed(652).arguments(arguments);
    stays_as_it_is(&qemu, &config, ("0x443 0xe", "watchdog"), &WAYS[..1])
}
