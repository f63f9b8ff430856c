//! Runs the example of the library that needs a VM.

use vmfile_testing::{Guest, Qemu, Ram, Release, TestResult, requires};

#[path = "../../crates/vmfile/examples/save_and_restore.rs"]
#[expect(dead_code, reason = "its `main` reads the command line")]
mod save_and_restore;

#[test]
fn a_vm_is_saved_and_restored_by_the_example() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let guest = Guest::boot_sector(Ram::private(64)).seed(131).boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let restored = save_and_restore::run(&guest.qmp_path(), &file);
    let mut restored = restored.map_err(|error| error.to_string())?;
    // No pass is missing, and none is there twice.
    guest.counts_on_in(&mut restored, 3)
}
