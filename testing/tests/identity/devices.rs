//! Devices, memory and CPUs that were plugged in or unplugged.

use serde_json::json;
use vmfile::RestoreError;
use vmfile::restore::Mode;
use vmfile::save::SaveOptions;
use vmfile_testing::verbs::restore;
use vmfile_testing::{Guest, Machine, Qemu, Ram, Release, TestResult, requires};

use super::{ask, goes_on, image, save_and_restore, wait_until_gone};

/// Unplugs a PCI device of a `pc` whose guest does not react: writes to the two ports through which
/// the guest's ACPI tables eject a slot (QEMU 7.2 to 11.1).
fn unplug(guest: &mut Guest, path: &str) -> TestResult {
    guest.qmp("device_del", json!({"id": path}))?;
    let address = guest.qmp("qom-get", json!({"path": path, "property": "addr"}))?;
    let slot = address.as_u64().ok_or("no PCI address")? >> 3;
    for command in ["o/4 0xae10 0".to_owned(), format!("o/4 0xae08 {}", 1_u64 << slot)] {
        guest.qmp("human-monitor-command", json!({"command-line": command}))?;
    }
    let (container, name) = path.rsplit_once('/').ok_or("no path")?;
    wait_until_gone(guest, container, name)
}

/// After `device_del`, a save ended the VM without a warning. The saved command line brought the
/// disk back, opened for writing. Without it, the devices behind it moved into its place.
#[test]
fn devices_that_were_unplugged_are_named_and_do_not_come_back() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir()?;
        let image = image(directory.path())?;
        let drive = image.display().to_string().replace(',', ",,");
        let config = Guest::boot_sector(Ram::private(64)).seed(23).fill_mib(32).arguments([
            "-drive",
            &format!("file={drive},format=raw,if=none,id=d1"),
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-balloon-pci,id=balloon",
            "-device",
            "qemu-xhci",
            "-device",
            "virtio-scsi-pci,id=scsi",
            "-device",
            "scsi-hd,drive=d1,id=sd",
            "-device",
            r#"{"driver":"usb-kbd","id":"kbd"}"#,
            "-device",
            "usb-tablet,id=tablet",
            "-device",
            r#"{"driver":"usb-mouse"}"#,
        ]);
        let mut guest = config.boot_to(&qemu, 1)?;
        unplug(&mut guest, "/machine/peripheral/balloon")?;
        unplug(&mut guest, "/machine/peripheral-anon/device[0]")?;
        for id in ["sd", "kbd"] {
            guest.qmp("device_del", json!({"id": id}))?;
            wait_until_gone(&mut guest, "/machine/peripheral", id)?;
        }
        let mouse = "/machine/peripheral-anon/device[2]";
        guest.qmp("device_del", json!({"id": mouse}))?;
        wait_until_gone(&mut guest, "/machine/peripheral-anon", "device[2]")?;
        guest.wait_for_passes(2)?;
        let expected = [
            "device balloon",
            "device sd",
            "device kbd",
            "device number 0 without an id",
            "device number 2 without an id",
        ];
        let mut restored = save_and_restore(&mut guest, &expected)?;
        goes_on(&guest, &mut restored)?;
        let drives = ask(&mut restored, "query-block", json!({}))?;
        assert!(!drives.to_string().contains("a,b.raw"), "{drives}");
        let devices = ask(&mut restored, "qom-list", json!({"path": "/machine/peripheral"}))?;
        let devices = devices.to_string();
        assert!(devices.contains("tablet") && !devices.contains("kbd"), "{devices}");
    }
    Ok(())
}

/// After `device_add`, a save ended the VM without a warning, and the restore failed with a
/// misleading hint.
#[test]
fn devices_that_were_plugged_in_are_named_and_come_back() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir()?;
        let image = image(directory.path())?;
        let ports = (0..7).flat_map(|number| {
            ["-device".to_owned(), format!("pcie-root-port,id=rp{number},chassis={number}")]
        });
        let config =
            Guest::boot_sector(Ram::private(64)).machine(Machine::Q35).seed(24).fill_mib(32);
        let config = config.arguments(ports).arguments(["-device", "qemu-xhci,id=xhci"]);
        let config = config.arguments(["-device", "usb-kbd,id=kbd"]);
        let mut guest = config.boot_to(&qemu, 1)?;
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": "raw", "node-name": "n1", "file": file, "read-only": true});
        guest.qmp("blockdev-add", node.clone())?;
        for name in ["n2", "n3"] {
            let mut another = node.clone();
            another["node-name"] = json!(name);
            guest.qmp("blockdev-add", another)?;
        }
        guest.qmp("netdev_add", json!({"type": "user", "id": "net9"}))?;
        // A netdev that no device uses is in the stream too: a QEMU without it refuses the stream.
        guest.qmp("netdev_add", json!({"type": "user", "id": "lone"}))?;
        guest.qmp("object-add", json!({"qom-type": "rng-builtin", "id": "random"}))?;
        guest.qmp("device_del", json!({"id": "kbd"}))?;
        wait_until_gone(&mut guest, "/machine/peripheral", "kbd")?;
        for device in [
            json!({"driver": "virtio-scsi-pci", "id": "scsi", "bus": "rp0"}),
            json!({"driver": "scsi-hd", "id": "a-disk", "bus": "scsi.0", "drive": "n1"}),
            json!({"driver": "scsi-cd", "id": "cd", "bus": "scsi.0"}),
            json!({"driver": "virtio-blk-pci", "id": "vb", "bus": "rp1", "drive": "n2"}),
            json!({"driver": "virtio-net-pci", "id": "nic", "bus": "rp2", "netdev": "net9",
                "mac": "52:54:00:00:00:77"}),
            json!({"driver": "virtio-rng-pci", "id": "rng", "bus": "rp3", "rng": "random"}),
            json!({"driver": "virtio-balloon-pci", "bus": "rp4"}),
            json!({"driver": "usb-tablet", "id": "tablet"}),
            json!({"driver": "usb-kbd", "id": "kbd"}),
            // `usb-storage` does not report its drive: it came back without one.
            json!({"driver": "usb-storage", "id": "stick", "drive": "n3"}),
        ] {
            guest.qmp("device_add", device)?;
        }
        guest.wait_for_passes(1)?;
        // A bus comes before the devices on it.
        let expected = [
            "device kbd",
            "device nic",
            "device rng",
            "device scsi",
            "device a-disk",
            "device cd",
            "device stick",
            "device tablet",
            "device vb",
            "device number 0 without an id",
            "netdev lone",
        ];
        let mut restored = save_and_restore(&mut guest, &expected)?;
        goes_on(&guest, &mut restored)?;
        let mac = json!({"path": "/machine/peripheral/nic", "property": "mac"});
        assert_eq!(ask(&mut restored, "qom-get", mac)?, "52:54:00:00:00:77");
        let drives = ask(&mut restored, "query-block", json!({}))?.to_string();
        assert_eq!(drives.matches(r#""drv":"raw""#).count(), 4, "{drives}");
    }
    Ok(())
}

#[test]
fn memory_and_cpus_that_were_plugged_in_are_named_and_come_back() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let config = Guest::linux(Ram::private(256)).dimm(128).seed(25);
        let config = config.arguments(["-smp", "2,maxcpus=4,cores=4"]);
        let mut guest = config.boot_to(&qemu, 1)?;
        let memory = json!({"qom-type": "memory-backend-ram", "id": "more", "size": 128 << 20});
        guest.qmp("object-add", memory)?;
        guest.qmp("device_add", json!({"driver": "pc-dimm", "id": "dimm9", "memdev": "more"}))?;
        let cpu = json!({"driver": "qemu64-x86_64-cpu", "id": "cpu9", "socket-id": 0,
            "core-id": 3, "thread-id": 0});
        guest.qmp("device_add", cpu)?;
        guest.wait_for_passes(1)?;
        let expected = ["CPU socket 0 core 3 thread 0", "device dimm9"];
        let mut restored = save_and_restore(&mut guest, &expected)?;
        goes_on(&guest, &mut restored)?;
        let dimms = ask(&mut restored, "query-memory-devices", json!({}))?;
        assert_eq!(dimms.as_array().map(Vec::len), Some(2), "{dimms}");
        let cpus = ask(&mut restored, "query-cpus-fast", json!({}))?;
        assert_eq!(cpus.as_array().map(Vec::len), Some(3), "{cpus}");
    }
    Ok(())
}

#[test]
fn a_device_that_no_option_makes_again_is_named_when_it_is_restored() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(26);
    let config = config.arguments(["-device", "virtio-serial-pci,id=serial"]);
    let mut guest = config.boot_to(&qemu, 1)?;
    let backend = json!({"type": "null", "data": {}});
    guest.qmp("chardev-add", json!({"id": "later", "backend": backend}))?;
    let port = json!({"driver": "virtserialport", "id": "port", "chardev": "later"});
    guest.qmp("device_add", port)?;
    let error = save_and_restore(&mut guest, &["device port"]).expect_err("no such chardev");
    let error = error.downcast::<RestoreError>()?;
    let expected = "the VM cannot be made again: device port: virtserialport, plugged in later \
                    (QEMU does not tell the options of its chardev later)";
    assert_eq!(error.to_string(), expected);
    Ok(())
}

/// QEMU loads a stream that lacks the state of one of its devices: the guest found that device in
/// its initial state.
#[test]
fn a_command_line_with_another_device_is_refused_before_the_guest_runs() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(27);
    let mut guest = config.arguments(["-device", "qemu-xhci"]).boot_to(&qemu, 1)?;
    let saved = guest.save(&SaveOptions::default())?;
    let config = guest.config().clone().arguments(["-device", "usb-tablet,id=tablet"]);
    let error = restore(&qemu, &config, &saved.file, Mode::Map).expect_err("a device more");
    let expected = "the file does not fit the VM: devices of type usb-tablet: 0 in the file, \
                    1, tablet in this VM";
    assert_eq!(error.to_string(), expected);
    Ok(())
}

/// QEMU had inherited a descriptor. The save ended the VM, and no restore could pass that
/// descriptor again.
#[test]
fn what_ends_with_the_process_is_named_before_the_vm_is_ended() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(28);
    let config = config.arguments(["-chardev", "file,id=log,path=/proc/self/fd/2"]);
    let mut guest = config.boot_to(&qemu, 1)?;
    let error = guest.save_fails(&SaveOptions::default())?.to_string();
    assert!(
        error.contains("-chardev log: found it names a descriptor that QEMU was started with"),
        "{error}"
    );
    guest.save(&SaveOptions::default().changed_ok(true)).map(drop)
}
