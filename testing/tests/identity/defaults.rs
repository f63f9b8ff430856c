//! Devices that QEMU adds by itself.

use vmfile::restore::RestoreOptions;
use vmfile::save::SaveOptions;
use vmfile_testing::{Guest, GuestConfig, Machine, Qemu, Ram, Release, TestResult, requires};

use super::goes_on;

/// Groups that are not the same as the options of their names: a network, which as an option would
/// switch the default one off, and groups that QEMU ignores, which as options would add a ROM,
/// tables and a file system.
const CONFIG: &str = r#"
[netdev "n0"]
  type = "user"
[device "e"]
  driver = "rtl8139"
  netdev = "n0"
[option-rom]
  romfile = "vgabios.bin"
[acpi]
  data = "/etc/hostname"
[smbios]
  type = "1"
  serial = "x"
[virtfs]
  fsdriver = "local"
  path = "/"
  security_model = "none"
  mount_tag = "t"
"#;

/// The original VM had read its netdev from a file and had QEMU's default network card. The saved
/// line made a VM without that card, so no QEMU could load the state after the VM had ended.
#[test]
fn a_vm_with_default_devices_comes_back_from_its_saved_line() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let directory = tempfile::tempdir()?;
        let file = |name: &str, text: &str| -> TestResult<String> {
            let path = directory.path().join(name);
            std::fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let all = file("all.conf", CONFIG)?;
        let net = file("net.conf", "[net]\n  type = \"nic\"\n  model = \"rtl8139\"\n")?;
        let nic = file("nic.conf", "[nic]\n  type = \"user\"\n  model = \"rtl8139\"\n")?;
        let vga = file("vga.conf", "[device \"v\"]\n  driver = \"VGA\"\n")?;
        let netdev = ["-netdev", "user,id=n0", "-device", "rtl8139,netdev=n0"];
        let plain = || Guest::boot_sector(Ram::private(64)).seed(31).default_devices();
        for config in [
            plain(),
            plain().machine(Machine::Q35).arguments(netdev),
            plain().arguments(["-readconfig", &all]),
            plain().machine(Machine::Q35).arguments(["-readconfig", &all]),
            plain().arguments(["-readconfig", &all, "-nic", "user,model=pcnet"]),
            plain().arguments(["-readconfig", &all, "-nodefaults"]),
            plain().arguments(["-readconfig", &net]),
            plain().arguments(["-readconfig", &nic]),
            plain().arguments(["-readconfig", &vga, "-set", "device.v.vgamem_mb=32"]),
        ] {
            comes_back(&qemu, &config).map_err(|error| format!("{release:?}: {error}"))?;
        }
    }
    Ok(())
}

/// Saves a guest, and restores it from the saved command line alone.
fn comes_back(qemu: &Qemu, config: &GuestConfig) -> TestResult {
    let mut guest = config.boot_to(qemu, 1)?;
    let saved = guest.save_and_end(&SaveOptions::default())?;
    assert_eq!(saved.report.changes, []);
    goes_on(&guest, &mut saved.restore_saved(&RestoreOptions::default())?)
}
