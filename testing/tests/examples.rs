//! Runs what README shows with a VM: the library's example, and the demo.

use std::process::Command;

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

/// The demo expected that a restored VM begins a new log.
#[test]
fn the_demo_of_readme_ends_well() -> TestResult {
    requires!(Qemu::at_least("9.0"));
    let output = Command::new(env!("CARGO_BIN_EXE_demo")).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{failed}");
    Ok(())
}
