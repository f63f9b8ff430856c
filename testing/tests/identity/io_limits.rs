//! I/O limits of drives, which were changed through the monitor while the VM ran.

use serde_json::{Value, json};
use vmfile::restore::RestoreOptions;
use vmfile::save::SaveOptions;
use vmfile_testing::{Guest, Qemu, Ram, Release, TestResult, requires};

use super::{ask, goes_on, images};

/// The limits of all drives, each with the drive's name.
fn limits(drives: &Value) -> Vec<(String, Value)> {
    let name = |drive: &Value, key: &str| drive[key].as_str().unwrap_or_default().to_owned();
    let of = |drive: &Value| {
        let members = drive["inserted"].as_object().into_iter().flatten();
        let is_limit = |key: &str| {
            ["bps", "iops"].iter().any(|start| key.starts_with(start)) || key == "group"
        };
        members
            .filter(|(key, _)| is_limit(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    let drives = drives.as_array().into_iter().flatten();
    drives.map(|drive| (name(drive, "device") + &name(drive, "qdev"), of(drive))).collect()
}

/// A restored VM ran with the limits of its command line, without a warning.
#[test]
fn limits_that_were_set_while_the_vm_ran_come_back() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir()?;
        images(directory.path(), 3)?;
        let at = |number: u32| directory.path().join(format!("{number}.raw")).display().to_string();
        let node = format!("driver=raw,node-name=n,file.driver=file,file.filename={}", at(0));
        let drive = |number| format!("format=raw,if=virtio,file={}", at(number));
        let (first, second) = (drive(1) + ",throttling.iops-total=7", drive(2));
        let config = Guest::boot_sector(Ram::private(64)).seed(41).fill_mib(32).arguments([
            "-blockdev",
            &node,
            "-device",
            "virtio-blk-pci,drive=n,id=vb",
            "-drive",
            &first,
            "-drive",
            &second,
        ]);
        let mut guest = config.boot_to(&qemu, 1)?;
        let none =
            json!({"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
        for (name, id, more) in [
            ("id", "/machine/peripheral/vb/virtio-backend", json!({"bps": 5000, "group": "g"})),
            ("device", "ide0-hd0", json!({"iops_wr": 30, "iops_wr_max": 90, "group": "g2"})),
            ("device", "virtio0", json!({})),
            (
                "device",
                "virtio1",
                json!({"bps_rd": 1_u64 << 40, "bps_rd_max": 1_u64 << 41, "bps_rd_max_length": 3}),
            ),
        ] {
            let mut arguments = none.clone();
            arguments[name] = json!(id);
            for (key, value) in more.as_object().ok_or("an object")? {
                arguments[key] = value.clone();
            }
            guest.qmp("block_set_io_throttle", arguments)?;
        }
        let before = limits(&guest.qmp("query-block", json!({}))?);
        assert_eq!(before.len(), 4, "{before:?}");
        let saved = guest.save_and_end(&SaveOptions::default())?;

        let mut restored = saved.restore_saved(&RestoreOptions::default())?;
        assert_eq!(restored.report.warnings, [""; 0], "{release:?}");
        let after = limits(&ask(&mut restored, "query-block", json!({}))?);
        assert_eq!(after, before, "{release:?}");
        goes_on(&guest, &mut restored)?;
    }
    Ok(())
}
