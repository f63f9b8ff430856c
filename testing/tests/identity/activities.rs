//! Block jobs and exports, which would end with QEMU.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::error::SaveError;
use vmfile::restore::RestoreOptions;
use vmfile::save::{After, SaveOptions};
use vmfile_testing::{Guest, Qemu, Ram, Release, TestResult, requires};

use super::{goes_on, images};

/// Starts to mirror a disk, and waits until the mirror is ready; it then follows the disk.
fn mirror(guest: &mut Guest, target: &Path) -> TestResult {
    let arguments = json!({"device": "virtio0", "job-id": "copy", "sync": "full", "format": "raw",
        "mode": "existing", "target": target});
    guest.qmp("drive-mirror", arguments)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while guest.qmp("query-block-jobs", json!({}))?[0]["ready"] != Value::Bool(true) {
        assert!(Instant::now() < deadline, "the mirror is not ready");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn export(guest: &mut Guest, socket: &Path) -> TestResult {
    let address = json!({"type": "unix", "data": {"path": socket}});
    guest.qmp("nbd-server-start", json!({"addr": address}))?;
    let arguments = json!({"type": "nbd", "id": "e0", "node-name": "n", "name": "n"});
    guest.qmp("block-export-add", arguments)?;
    Ok(())
}

/// Expects that a save which would end the VM is refused and names `expected`.
fn is_refused(guest: &mut Guest, expected: &str) -> TestResult {
    let error = guest.save_fails(&SaveOptions::default())?;
    let SaveError::Activities { activities } = &error else { return Err(error.into()) };
    assert_eq!(activities, &[expected]);
    assert_eq!(guest.status()?, "running");
    Ok(())
}

/// The mirror ended with the VM, its target was an incomplete copy, and the report only mentioned a
/// flush.
#[test]
fn a_vm_with_a_block_job_or_an_export_is_not_ended() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir()?;
        images(directory.path(), 3)?;
        let at = |number: u32| directory.path().join(format!("{number}.raw"));
        let drive = format!("file={},format=raw,if=virtio", at(0).display());
        let node =
            format!("driver=raw,node-name=n,file.driver=file,file.filename={}", at(2).display());
        let config = Guest::boot_sector(Ram::private(64)).seed(42).fill_mib(32).arguments([
            "-drive",
            &drive,
            "-blockdev",
            &node,
        ]);
        let mut guest = config.boot_to(&qemu, 1)?;

        export(&mut guest, &directory.path().join("nbd"))?;
        is_refused(&mut guest, "export \"e0\" of node \"n\" (nbd)")?;
        guest.qmp("block-export-del", json!({"id": "e0", "mode": "hard"}))?;

        mirror(&mut guest, &at(1))?;
        is_refused(&mut guest, "block job \"copy\" (mirror)")?;

        // A VM that goes on keeps its job.
        guest.save(&SaveOptions::default().after(After::Resume))?;
        let jobs = guest.qmp("query-block-jobs", json!({}))?;
        assert_eq!(jobs[0]["device"], "copy", "{jobs}");

        let saved = guest.save_and_end(&SaveOptions::default().changed_ok(true))?;
        let warnings = &saved.report.warnings;
        let warning = "block job \"copy\" (mirror) ends with the VM";
        assert_eq!(warnings.iter().filter(|found| *found == warning).count(), 1, "{warnings:?}");
        goes_on(&guest, &mut saved.restore_saved(&RestoreOptions::default())?)?;
    }
    Ok(())
}
