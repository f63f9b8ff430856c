//! A VM that is not what its command line would make is told from one that is, by name.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::error::SaveError;
use vmfile::restore::{Destination, RestoreOptions, Restored};
use vmfile::save::{After, Change, SaveOptions};
use vmfile::{Control, RestoreError, Snapshot};
use vmfile_testing::verbs::save_with;
use vmfile_testing::{
    Firmware, Guest, GuestConfig, Machine, Qemu, Ram, Release, TestResult, requires,
};

/// What a save says has changed in a VM that goes on.
fn changes(guest: &Guest) -> TestResult<Vec<Change>> {
    let directory = tempfile::tempdir()?;
    let options = SaveOptions { after: After::Resume, ..SaveOptions::default() };
    Ok(save_with(guest, &directory.path().join("vm.vmf"), &options)?.changes)
}

fn names(changes: &[Change]) -> Vec<&str> {
    changes.iter().map(|change| change.what.as_str()).collect()
}

/// Expects that a save which would end the VM is refused and names `expected`, then saves it all the
/// same and restores it with the saved command line.
fn save_and_restore(guest: &mut Guest, expected: &[&str]) -> TestResult<Restored> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let error = save_with(guest, &file, &SaveOptions::default()).expect_err("it has changed");
    let error = error.downcast::<SaveError>()?;
    let SaveError::Changed { changes } = &*error else { return Err(error) };
    assert_eq!(names(changes), expected, "{error}");
    assert!(!file.exists());
    assert_eq!(guest.status()?, "running");
    save_with(guest, &file, &SaveOptions { changed_ok: true, ..SaveOptions::default() })?;
    guest.wait_for_exit()?;
    Ok(restore_saved(&file)?)
}

fn restore_saved(file: &Path) -> Result<Restored, RestoreError> {
    let snapshot = Snapshot::open(file, 0)?;
    let options = RestoreOptions::default();
    vmfile::restore::restore(&snapshot, Destination::Saved, &options, &Control::none())
}

/// The guest goes on: it writes to the log of the guest that is gone.
fn goes_on(guest: &Guest, restored: &mut Restored) -> TestResult {
    let passes = guest.counts().len();
    let qemu = restored.qemu.as_mut().ok_or("a QEMU was started")?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while guest.counts().len() < passes + 2 {
        assert!(qemu.ended()?.is_none(), "it runs");
        assert!(Instant::now() < deadline, "the guest reports nothing");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(guest.counts().iter().all(|count| count.sum.is_some()), "{:?}", guest.lines());
    Ok(())
}

fn ask(restored: &mut Restored, command: &str, arguments: Value) -> TestResult<Value> {
    let qemu = restored.qemu.as_mut().ok_or("a QEMU was started")?;
    Ok(qemu.vm().execute(command, arguments)?)
}

/// Asks until the guest, or QEMU for it, has let go of a device.
fn wait_until_gone(guest: &mut Guest, path: &str, name: &str) -> TestResult {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let children = guest.qmp("qom-list", json!({"path": path}))?;
        let is_there = children.as_array().into_iter().flatten().any(|child| child["name"] == name);
        if !is_there {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{name} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Unplugs a PCI device of a `pc` whose guest does not answer: writes to the two ports by which the
/// guest's ACPI tables eject what is in a slot (QEMU 7.2 to 11.1).
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

fn image(directory: &Path) -> TestResult<std::path::PathBuf> {
    let image = directory.join("a,b.raw");
    std::fs::File::create_new(&image)?.set_len(1 << 20)?;
    Ok(image)
}

/// A false alarm would be switched off, and with it the alarm.
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
            let guest = config.boot(&qemu)?;
            guest.wait_for_count(1)?;
            assert_eq!(changes(&guest)?, [], "{release:?}: {config:?}");
        }
    }
    Ok(())
}

/// `device_del`, then a save that ended the VM and said nothing: the saved command line brought the
/// disk back, opened for writing. And the devices behind it moved into its place.
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
        let mut guest = config.boot(&qemu)?;
        guest.wait_for_count(1)?;
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

/// `device_add`, then a save that ended the VM and said nothing: the restore refused, with a hint
/// about something else.
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
        let mut guest = config.boot(&qemu)?;
        guest.wait_for_count(1)?;
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": "raw", "node-name": "n1", "file": file, "read-only": true});
        guest.qmp("blockdev-add", node.clone())?;
        let mut second = node;
        second["node-name"] = json!("n2");
        guest.qmp("blockdev-add", second)?;
        guest.qmp("netdev_add", json!({"type": "user", "id": "net9"}))?;
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
        ] {
            guest.qmp("device_add", device)?;
        }
        guest.wait_for_passes(1)?;
        // A bus comes before what is on it.
        let expected = [
            "device kbd",
            "device nic",
            "device rng",
            "device scsi",
            "device a-disk",
            "device cd",
            "device tablet",
            "device vb",
            "device number 0 without an id",
        ];
        let mut restored = save_and_restore(&mut guest, &expected)?;
        goes_on(&guest, &mut restored)?;
        let mac = json!({"path": "/machine/peripheral/nic", "property": "mac"});
        assert_eq!(ask(&mut restored, "qom-get", mac)?, "52:54:00:00:00:77");
        let drives = ask(&mut restored, "query-block", json!({}))?.to_string();
        assert_eq!(drives.matches(r#""drv":"raw""#).count(), 3, "{drives}");
    }
    Ok(())
}

#[test]
fn memory_and_cpus_that_were_plugged_in_are_named_and_come_back() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let config = Guest::linux(Ram::private(256)).dimm(128).seed(25);
        let config = config.arguments(["-smp", "2,maxcpus=4,cores=4"]);
        let mut guest = config.boot(&qemu)?;
        guest.wait_for_count(1)?;
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
    let mut guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
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

/// QEMU takes a stream that says nothing of one of its devices: the guest found a device in its
/// initial state.
#[test]
fn a_command_line_with_another_device_is_refused_before_the_guest_runs() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(27);
    let guest = config.arguments(["-device", "qemu-xhci"]).boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    save_with(&guest, &file, &SaveOptions::default())?;
    let config = guest.config().clone().arguments(["-device", "usb-tablet,id=tablet"]);
    let error = vmfile_testing::verbs::map(&qemu, &config, &file).expect_err("a device more");
    let expected = "the file does not fit the VM: devices of type usb-tablet: 0 in the file, \
                    1, tablet in this VM";
    assert_eq!(error.to_string(), expected);
    Ok(())
}

/// A descriptor that QEMU inherited: the save ended the VM, and no restore brought it back.
#[test]
fn what_ends_with_the_process_is_named_before_the_vm_is_ended() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(28);
    let config = config.arguments(["-chardev", "file,id=log,path=/proc/self/fd/2"]);
    let guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let error = save_with(&guest, &file, &SaveOptions::default()).expect_err("an old descriptor");
    let error = error.to_string();
    assert!(
        error.contains("-chardev log: found it names a descriptor that QEMU was started with"),
        "{error}"
    );
    save_with(&guest, &file, &SaveOptions { changed_ok: true, ..SaveOptions::default() })?;
    Ok(())
}

/// Images `0.raw` to `N.raw`, and `link` to the first.
fn images(directory: &Path, count: u32) -> TestResult {
    for number in 0..count {
        let path = directory.join(format!("{number}.raw"));
        std::fs::File::create_new(path)?.set_len(4 << 20)?;
    }
    Ok(std::os::unix::fs::symlink("0.raw", directory.join("link"))?)
}

/// A guest with a drive in every spelling.
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
    let guest = Guest::boot_sector(Ram::private(64)).seed(29);
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

/// `drive-mirror` to another image, a medium that was changed or ejected: the saved command line
/// named the old image, and the restored guest ran on it.
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
    }
    Ok(())
}

/// An overlay of `save --with-disks` is ours: a restore knows it, and so it is no reason to refuse.
#[test]
fn an_overlay_of_an_earlier_save_is_told_and_is_no_change() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::linux(Ram::private(256)).disk(16);
    let mut guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    for name in ["1.vmf", "2.vmf"] {
        let after = After::Resume;
        let options = SaveOptions { with_disks: true, after, ..SaveOptions::default() };
        let report = save_with(&guest, &directory.path().join(name), &options)?;
        assert_eq!(report.changes, []);
    }
    let report = save_with(&guest, &directory.path().join("3.vmf"), &SaveOptions::default())?;
    guest.wait_for_exit()?;
    let told = report.warnings.iter().any(|told| told.starts_with("drive disk0 is in "));
    assert!(told, "{:?}", report.warnings);
    Ok(())
}
