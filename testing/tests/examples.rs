//! The example of the library that needs a VM does what it says.

use std::time::{Duration, Instant};

use vmfile_testing::{Guest, Qemu, Ram, Release, TestResult, requires};

#[path = "../../crates/vmfile/examples/save_and_restore.rs"]
#[expect(dead_code, reason = "its `main` reads the command line")]
mod save_and_restore;

#[test]
fn a_vm_is_saved_and_restored_by_the_example() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(131);
    let guest = config.boot(&qemu)?;
    let before = guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let restored = save_and_restore::run(&guest.qmp_path(), &file);
    let mut restored = restored.map_err(|error| error.to_string())?;
    // It writes to the log of the guest that is gone.
    let newest = || guest.counts().last().map_or(0, |count| count.number);
    let deadline = Instant::now() + Duration::from_secs(120);
    while newest() < before.number + 3 {
        assert!(restored.ended()?.is_none(), "it runs");
        assert!(Instant::now() < deadline, "no three passes after {}: {}", before.number, newest());
        std::thread::sleep(Duration::from_millis(10));
    }
    guest.judge_counts()
}
