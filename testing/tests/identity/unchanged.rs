//! A VM that did not change has no reported changes.

use std::path::Path;

use serde_json::{Value, json};
use vmfile_testing::{Guest, GuestConfig, Machine, Qemu, Ram, Release, TestResult, requires};

use super::{ask, changes, goes_on, image, images, save_and_restore};

/// A machine with some thirty devices of all kinds.
fn full_q35(ram: Ram, image: &Path) -> GuestConfig {
    let mut config = Guest::boot_sector(ram).machine(Machine::Q35).vcpus(2).seed(21).fill_mib(32);
    let file = json!({"driver": "file", "filename": image, "node-name": "f0", "locking": "off"});
    let format = json!({"driver": "raw", "node-name": "d0", "file": "f0", "read-only": true});
    let image = image.display().to_string().replace(',', ",,");
    let kbd = json!({"driver": "usb-kbd", "id": "kbd", "bus": "xhci.0"}).to_string();
    let drive = format!("file={image},format=raw,read-only=on,if=none,id=d1,file.locking=off");
    config = config.arguments(["-blockdev", &file.to_string(), "-blockdev", &format.to_string()]);
    config = config.arguments(["-drive", &drive, "-device", &kbd]);
    for number in 0..6 {
        let port = format!("pcie-root-port,id=rp{number},chassis={number},slot={number}");
        config = config.arguments(["-device", &port]);
    }
    let devices = [
        "qemu-xhci,id=xhci",
        "virtio-blk-pci,drive=d0,bus=rp0",
        "virtio-scsi-pci,id=scsi,bus=rp1",
        "scsi-hd,drive=d1,bus=scsi.0,id=sd",
        "scsi-cd,bus=scsi.0",
        "ide-cd,bus=ide.1",
        "virtio-rng-pci",
        "virtio-balloon-pci,id=balloon",
        "virtio-net-pci,netdev=n0,bus=rp2,id=nic",
        "e1000e,netdev=n1",
        "usb-tablet,bus=xhci.0,id=tablet",
        "usb-mouse",
        "usb-hub,bus=xhci.0,port=4",
        "virtio-serial-pci,id=serial",
        "virtserialport,chardev=c0,name=org.example,id=port",
        "virtconsole,chardev=c1",
        "virtio-keyboard-pci",
        "VGA",
        "i6300esb",
        "pvpanic",
        "vmcoreinfo",
        "ich9-intel-hda",
        "intel-iommu",
        "pcie-pci-bridge,id=bridge,bus=rp3",
        "rtl8139,bus=bridge,addr=3,netdev=n2",
        "isa-debugcon,chardev=c2",
    ];
    for device in devices {
        config = config.arguments(["-device", device]);
    }
    for number in 0..3 {
        let (netdev, chardev) = (format!("user,id=n{number}"), format!("null,id=c{number}"));
        config = config.arguments(["-netdev", &netdev, "-chardev", &chardev]);
    }
    config
}

/// Users who get false alarms switch all alarms off.
#[test]
fn a_vm_as_it_was_started_has_no_changes() -> TestResult {
    let directory = tempfile::tempdir()?;
    let image = image(directory.path())?;
    let drive = image.display().to_string().replace(',', ",,");
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let plain = || Guest::boot_sector(Ram::private(64)).seed(22);
        let mut configs = vec![
            plain(),
            plain().machine(Machine::Q35).vcpus(2),
            plain().virtio(),
            full_q35(Ram::private(64), &image),
            Guest::linux(Ram::private(256)).vcpus(4).dimm(128).numa_nodes(&[128, 128]),
            plain().arguments(["-nic", "user,model=e1000", "-usb", "-usbdevice", "tablet"]),
            plain()
                .arguments(["-smp", "2,maxcpus=4,cores=4", "-device"])
                .arguments(["qemu64-x86_64-cpu,socket-id=0,core-id=3,thread-id=0,id=cpu3"]),
            plain().arguments(["-drive", &format!("file={drive},if=virtio,format=raw")]),
            plain().arguments(["-hdb", &image.display().to_string(), "-vga", "std"]),
            plain().arguments(["-device", "virtio-rng-pci", "-device", r#"{"driver":"e1000"}"#]),
        ];
        if release != Release::Newest {
            configs.push(plain().machine_version("2.8"));
        }
        for config in configs {
            let guest = config.boot_to(&qemu, 1)?;
            assert_eq!(changes(&guest)?, [], "{release:?}: {config:?}");
        }
    }
    Ok(())
}

/// A line as libvirt 11.3 writes it for a q35, without the descriptors that libvirt passes.
fn as_libvirt_writes_it(directory: &Path) -> TestResult<GuestConfig> {
    images(directory, 2)?;
    let image = directory.join("0.raw");
    let storage = json!({"driver": "file", "filename": image, "node-name": "libvirt-1-storage",
        "auto-read-only": true, "discard": "unmap"});
    let format = json!({"node-name": "libvirt-1-format", "read-only": false, "driver": "raw",
        "file": "libvirt-1-storage"});
    let random = json!({"qom-type": "rng-random", "id": "objrng0", "filename": "/dev/urandom"});
    let channel = directory.join("channel").display().to_string();
    let mut config = Guest::boot_sector(Ram::private(64)).machine(Machine::Q35).fill_mib(32);
    for words in [
        "-name guest=hd1,debug-threads=on",
        "-overcommit mem-lock=off",
        "-uuid 3c9d2e6a-6c0e-4d8a-9c3f-0123456789ab",
        "-rtc base=utc",
        "-no-shutdown",
        "-global ICH9-LPC.noreboot=off",
        "-watchdog-action reset",
        "-msg timestamp=on",
        "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        r#"-audiodev {"id":"audio1","driver":"none"}"#,
        r#"-netdev {"type":"user","id":"hostnet0"}"#,
        "-chardev null,id=charserial0",
    ] {
        config = config.arguments(words.split(' '));
    }
    let port = |number: u32| {
        json!({"driver": "pcie-root-port", "port": 7 + number, "chassis": number,
            "id": format!("pci.{number}"), "bus": "pcie.0", "multifunction": number == 1,
            "addr": format!("0x1.0x{:x}", number - 1)})
    };
    let mut devices: Vec<Value> = (1..=8).map(port).collect();
    devices.extend([
        json!({"driver": "qemu-xhci", "p2": 15, "p3": 15, "id": "usb", "bus": "pci.2",
            "addr": "0x0"}),
        json!({"driver": "virtio-serial-pci", "id": "virtio-serial0", "bus": "pci.3",
            "addr": "0x0"}),
        json!({"driver": "virtio-blk-pci", "bus": "pci.4", "addr": "0x0",
            "drive": "libvirt-1-format", "id": "virtio-disk0"}),
        json!({"driver": "virtio-net-pci", "netdev": "hostnet0", "id": "net0",
            "mac": "52:54:00:6b:3c:58", "bus": "pci.1", "addr": "0x0"}),
        json!({"driver": "isa-serial", "chardev": "charserial0", "id": "serial1", "index": 1}),
        json!({"driver": "virtserialport", "bus": "virtio-serial0.0", "nr": 1,
            "chardev": "charchannel0", "id": "channel0", "name": "org.qemu.guest_agent.0"}),
        json!({"driver": "virtio-balloon-pci", "id": "balloon0", "bus": "pci.5", "addr": "0x0"}),
        json!({"driver": "virtio-rng-pci", "rng": "objrng0", "id": "rng0", "bus": "pci.6",
            "addr": "0x0"}),
    ]);
    let channel = format!("socket,id=charchannel0,path={channel},server=on,wait=off");
    config = config.arguments(["-blockdev", &storage.to_string(), "-blockdev"]);
    config = config.arguments([&format.to_string(), "-object", &random.to_string()]);
    config = config.arguments(["-chardev", &channel]);
    for device in devices {
        config = config.arguments(["-device", &device.to_string()]);
    }
    Ok(config)
}

#[test]
fn a_line_as_libvirt_writes_it_is_unchanged_until_a_disk_is_plugged_in() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir()?;
    let mut guest = as_libvirt_writes_it(directory.path())?.boot_to(&qemu, 1)?;
    assert_eq!(changes(&guest)?, []);
    let file = json!({"driver": "file", "filename": directory.path().join("1.raw"),
        "node-name": "libvirt-2-storage", "auto-read-only": true, "discard": "unmap"});
    guest.qmp("blockdev-add", file)?;
    let node = json!({"node-name": "libvirt-2-format", "driver": "raw",
        "file": "libvirt-2-storage"});
    guest.qmp("blockdev-add", node)?;
    let disk = json!({"driver": "virtio-blk-pci", "bus": "pci.7", "addr": "0x0",
        "drive": "libvirt-2-format", "id": "virtio-disk1"});
    guest.qmp("device_add", disk)?;
    guest.wait_for_passes(1)?;
    let mut restored = save_and_restore(&mut guest, &["device virtio-disk1"])?;
    goes_on(&guest, &mut restored)?;
    let drives = ask(&mut restored, "query-block", json!({}))?.to_string();
    assert!(drives.contains("1.raw"), "{drives}");
    Ok(())
}
