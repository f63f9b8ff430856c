//! Drives whose image is not the one that the command line names.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use vmfile::save::{After, SaveOptions};
use vmfile_testing::{
    Firmware, Guest, GuestConfig, Machine, Qemu, Ram, Release, TestResult, requires,
};

use super::{ask, changes, goes_on, images, save_and_restore};

/// A guest with drives in all the ways that a command line can give them.
fn with_every_spelling(directory: &Path) -> TestResult<GuestConfig> {
    images(directory, 13)?;
    let at = |name: &str| directory.join(name).display().to_string();
    let inside = directory.file_name().and_then(|name| name.to_str()).ok_or("no name")?;
    let file = |path: &str| json!({"driver": "file", "filename": path});
    let in_json = json!({"driver": "raw", "file": file(&at("1.raw"))});
    let node = json!({"driver": "raw", "node-name": "n4", "read-only": true, "file": "f4"});
    let mut protocol = file(&format!("{}/../{inside}/4.raw", directory.display()));
    protocol["node-name"] = json!("f4");
    let config = directory.join("qemu.conf");
    let text = format!(
        "[drive \"r\"]\n  file = \"{}\"\n  format = \"raw\"\n  if = \"none\"\n\
         [device \"of-config\"]\n  driver = \"virtio-blk-pci\"\n  drive = \"r\"\n",
        at("9.raw")
    );
    std::fs::File::create_new(&config)?.write_all(text.as_bytes())?;
    let json_file = format!("file=json:{},if=none,id=d1", in_json.to_string().replace(',', ",,"));
    let words = [
        "-drive".to_owned(),
        format!("file={},format=raw,if=none,id=d0", at("link")),
        "-drive".to_owned(),
        json_file,
        "-drive".to_owned(),
        format!("driver=raw,file.driver=file,file.filename={},if=none,id=d2", at("2.raw")),
        "-blockdev".to_owned(),
        format!("driver=raw,node-name=n3,file.driver=file,file.filename={}", at("3.raw")),
        "-blockdev".to_owned(),
        protocol.to_string(),
        "-blockdev".to_owned(),
        node.to_string(),
        "-drive".to_owned(),
        format!("file={},format=raw,if=virtio", at("5.raw")),
        "-drive".to_owned(),
        format!("file={},format=raw,index=1,media=disk", at("6.raw")),
        "-cdrom".to_owned(),
        at("7.raw"),
        "-drive".to_owned(),
        format!("file={},format=raw,if=floppy", at("8.raw")),
        "-readconfig".to_owned(),
        config.display().to_string(),
        "-drive".to_owned(),
        "if=none,id=e0,media=cdrom".to_owned(),
        "-device".to_owned(),
        "virtio-scsi-pci,id=scsi".to_owned(),
    ];
    let devices = ["drive=d0", "drive=d1", "drive=d2,id=x2", "drive=n3", "drive=n4"];
    let devices = devices
        .into_iter()
        .flat_map(|drive| ["-device".to_owned(), format!("virtio-blk-pci,{drive},share-rw=off")]);
    let more = ["-device", "scsi-cd,drive=e0,id=empty", "-device", "scsi-cd"];
    // The rings of the firmware's disk drivers lie above these 32 MiB.
    let guest = Guest::boot_sector(Ram::private(64)).seed(29).fill_mib(32);
    Ok(guest.arguments(words).arguments(devices).arguments(more))
}

#[test]
fn drives_in_every_spelling_are_as_they_were_started() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir()?;
        let guest = with_every_spelling(directory.path())?.boot(&qemu)?;
        assert_eq!(changes(&guest)?, [], "{release:?}");
    }
    let qemu = requires!(Qemu::of(Release::Distribution));
    let ovmf = Guest::linux(Ram::memfd(512)).machine(Machine::Q35).firmware(Firmware::Ovmf);
    let guest = ovmf.disk(16).boot(&qemu)?;
    assert_eq!(changes(&guest)?, []);
    Ok(())
}

/// After `drive-mirror` to another image, or after a medium was changed or ejected, the saved
/// command line still named the old image, and the restored guest ran on it.
#[test]
fn drives_that_were_changed_are_named() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir()?;
        let mut guest = with_every_spelling(directory.path())?.boot(&qemu)?;
        let at = |name: &str| directory.path().join(name).display().to_string();
        for (number, device) in [(10, "d1"), (11, "n3")] {
            let mirror = json!({"device": device, "job-id": "job", "sync": "full", "format": "raw",
                "mode": "existing", "target": at(&format!("{number}.raw"))});
            guest.qmp("drive-mirror", mirror)?;
            let deadline = Instant::now() + Duration::from_secs(30);
            while guest.qmp("block-job-complete", json!({"device": "job"})).is_err() {
                assert!(Instant::now() < deadline, "the mirror is not ready");
                std::thread::sleep(Duration::from_millis(10));
            }
            while !guest.qmp("query-block-jobs", json!({}))?.as_array().is_some_and(Vec::is_empty) {
                assert!(Instant::now() < deadline, "the mirror does not end");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        guest.qmp("eject", json!({"device": "ide1-cd0", "force": true}))?;
        let medium = json!({"id": "empty", "filename": at("12.raw"), "format": "raw",
            "read-only-mode": "read-only", "force": true});
        guest.qmp("blockdev-change-medium", medium)?;
        let found = changes(&guest)?;
        let mut seen: Vec<(&str, &str, &str)> = found
            .iter()
            .map(|change| (change.what.as_str(), change.found.as_str(), change.expected.as_str()))
            .collect();
        seen.sort_unstable();
        let (one, three, seven) = (at("1.raw"), at("3.raw"), at("7.raw"));
        let (ten, eleven, twelve) = (at("10.raw"), at("11.raw"), at("12.raw"));
        let expected = [
            ("drive /machine/peripheral-anon/device[2]/virtio-backend", &*eleven, &*three),
            ("drive d1", &ten, &one),
            ("drive e0", &twelve, "no medium"),
            ("drive ide1-cd0", "no medium", &seven),
        ];
        assert_eq!(seen, expected, "{release:?}");
        guest.wait_for_count(1)?;
        let names: Vec<&str> = found.iter().map(|change| change.what.as_str()).collect();
        let mut restored = save_and_restore(&mut guest, &names)?;
        goes_on(&guest, &mut restored)?;
        let drives = ask(&mut restored, "query-block", json!({}))?.to_string();
        for (name, is_there) in [(&ten, true), (&eleven, true), (&twelve, true), (&seven, false)] {
            assert_eq!(drives.contains(name), is_there, "{name}: {drives}");
        }
    }
    Ok(())
}

/// vmfile itself made the overlay of `save --with-disks`: a restore knows it, so the save is not
/// refused.
#[test]
fn an_overlay_of_an_earlier_save_is_told_and_is_no_change() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::linux(Ram::private(256)).disk(16);
    let mut guest = config.boot_to(&qemu, 1)?;
    for _ in 0..2 {
        let options = SaveOptions::default().with_disks(true).after(After::Resume);
        assert_eq!(guest.save(&options)?.report.changes, []);
    }
    let report = guest.save_and_end(&SaveOptions::default())?.report;
    let told = report.warnings.iter().any(|told| told.starts_with("drive disk0 is in "));
    assert!(told, "{:?}", report.warnings);
    Ok(())
}
