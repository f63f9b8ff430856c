//! Devices whose places QEMU chose, while others were plugged in or unplugged, and devices with
//! options whose defaults QEMU does not report.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::restore::RestoreOptions;
use vmfile::save::SaveOptions;
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, requires};

use super::{ask, changes, goes_on, images, names, save_and_restore, wait_until_gone};

const RELEASES: [Release; 3] = [Release::Oldest, Release::Distribution, Release::Newest];

fn guest(seed: u32) -> GuestConfig {
    Guest::boot_sector(Ram::private(64)).seed(seed).fill_mib(32)
}

fn unplug(guest: &mut Guest, id: &str) -> TestResult {
    guest.qmp("device_del", json!({"id": id}))?;
    wait_until_gone(guest, "/machine/peripheral", id)
}

/// The USB devices with their ports, sorted.
fn ports(text: &Value) -> Vec<String> {
    let port = |line: &str| {
        let (_, rest) = line.split_once(", Port ")?;
        let (port, _) = rest.split_once(',')?;
        let (_, product) = rest.split_once("Product ")?;
        Some(format!("{port} {}", product.trim_end()))
    };
    let mut ports: Vec<String> =
        text.as_str().unwrap_or_default().lines().filter_map(port).collect();
    ports.sort();
    ports
}

/// A device that stayed took the place of the one that was replaced, and QEMU refused the stream.
#[test]
fn a_device_that_replaced_another_leaves_the_others_where_they_are() -> TestResult {
    for release in RELEASES {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir()?;
        images(directory.path(), 2)?;
        let node = |number: u32| {
            let path = directory.path().join(format!("{number}.raw"));
            format!(
                "driver=raw,node-name=n{number},file.driver=file,file.filename={}",
                path.display()
            )
        };
        let config = guest(51).arguments([
            "-blockdev",
            &node(0),
            "-blockdev",
            &node(1),
            "-device",
            "virtio-scsi-pci,id=s",
            "-device",
            "scsi-hd,drive=n0,id=h",
            "-device",
            "scsi-hd,drive=n1,id=h2",
            "-device",
            "qemu-xhci,id=x",
            "-device",
            "usb-tablet,id=t",
            "-device",
            "usb-kbd,id=k",
        ]);
        let mut guest = config.boot_to(&qemu, 1)?;
        unplug(&mut guest, "h")?;
        unplug(&mut guest, "t")?;
        guest.qmp("device_add", json!({"driver": "usb-mouse", "id": "t"}))?;
        // QEMU releases the drive a little later than it reports the device as gone.
        let disk = json!({"driver": "scsi-hd", "id": "h", "drive": "n0", "scsi-id": 5});
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(error) = guest.qmp("device_add", disk.clone()) {
            assert!(Instant::now() < deadline, "{error}");
            thread::sleep(Duration::from_millis(10));
        }
        guest.wait_for_passes(1)?;
        let usb = json!({"command-line": "info usb"});
        let before = ports(&guest.qmp("human-monitor-command", usb.clone())?);
        let mut restored = save_and_restore(&mut guest, &["device h", "device t"])?;
        goes_on(&guest, &mut restored)?;
        let after = ports(&ask(&mut restored, "human-monitor-command", usb)?);
        assert_eq!(after, before, "{release:?}");
        for (id, key, value) in [("h", "scsi-id", 5), ("h2", "scsi-id", 1), ("h2", "lun", 0)] {
            let place = json!({"path": format!("/machine/peripheral/{id}"), "property": key});
            assert_eq!(ask(&mut restored, "qom-get", place)?, value, "{release:?}: {key} of {id}");
        }
    }
    Ok(())
}

/// The port of a device was looked up by its id, so a device without an id moved.
#[test]
fn usb_devices_without_an_id_stay_at_their_ports() -> TestResult {
    for release in RELEASES {
        let qemu = requires!(Qemu::of(release));
        let config = guest(52).arguments([
            "-device",
            "qemu-xhci,id=x",
            "-device",
            "usb-tablet,id=t",
            "-device",
            "usb-kbd",
            "-device",
            "usb-mouse",
            "-device",
            "usb-hub,port=4",
        ]);
        let mut guest = config.boot_to(&qemu, 1)?;
        // QEMU puts the last of these behind the hub.
        for _ in 0..2 {
            guest.qmp("device_add", json!({"driver": "usb-kbd"}))?;
        }
        unplug(&mut guest, "t")?;
        guest.wait_for_passes(1)?;
        let usb = json!({"command-line": "info usb"});
        let before = ports(&guest.qmp("human-monitor-command", usb.clone())?);
        assert_eq!(before.len(), 5, "{before:?}");
        let expected =
            ["device t", "device number 3 without an id", "device number 4 without an id"];
        let mut restored = save_and_restore(&mut guest, &expected)?;
        goes_on(&guest, &mut restored)?;
        let after = ports(&ask(&mut restored, "human-monitor-command", usb)?);
        assert_eq!(after, before, "{release:?}");
    }
    Ok(())
}

/// A network card without a ROM came back with the ROM of its type, and the file did not fit; and
/// an experimental property was lost.
#[test]
fn roms_and_experimental_properties_come_back() -> TestResult {
    for release in RELEASES {
        let qemu = requires!(Qemu::of(release));
        let mut guest = guest(53).boot_to(&qemu, 1)?;
        for device in [
            json!({"driver": "e1000", "id": "bare", "romfile": ""}),
            json!({"driver": "e1000", "id": "full"}),
            json!({"driver": "virtio-rng-pci", "id": "rng", "x-ats-page-aligned": false}),
        ] {
            guest.qmp("device_add", device)?;
        }
        guest.wait_for_passes(1)?;
        let named = changes(&guest)?;
        assert_eq!(names(&named), ["device bare", "device full", "device rng"]);
        let [bare, full, rng] = named.as_slice() else { return Err("three".into()) };
        assert!(bare.to_string().contains(r#""romfile":"""#), "{bare}");
        assert!(!full.to_string().contains("rom"), "{full}");
        assert!(!rng.to_string().contains("rom"), "{rng}");
        let saved = guest.save_and_end(&SaveOptions::default().changed_ok(true))?;
        let mut restored = saved.restore_saved(&RestoreOptions::default())?;
        goes_on(&guest, &mut restored)?;
        for (id, key, value) in [
            ("bare", "romfile", json!("")),
            ("full", "romfile", json!("efi-e1000.rom")),
            ("rng", "x-ats-page-aligned", json!(false)),
        ] {
            let property = json!({"path": format!("/machine/peripheral/{id}"), "property": key});
            assert_eq!(ask(&mut restored, "qom-get", property)?, value, "{release:?}: {key}");
        }
    }
    Ok(())
}
