//! The ports of USB devices, which QEMU chooses and tells a human only.

use serde_json::{Value, json};

use super::parts::known;
use super::questions::human_command;
use crate::vm::{Vm, VmError};

/// A USB device as `info qtree` shows it.
#[derive(Debug, PartialEq, Eq)]
struct Shown<'a> {
    kind: &'a str,
    /// Empty for a device without one.
    id: &'a str,
    port: &'a str,
}

/// Returns the port of the USB device at a QOM path; `None` where QEMU does not tell it.
pub(super) fn port(vm: &mut Vm, path: &str) -> Result<Option<String>, VmError> {
    let bus = vm.bus_path(path)?;
    let devices = on_bus(vm, &bus)?;
    let text = human_command(vm, "info qtree")?;
    let shown = shown_on(&text, bus.rsplit('/').next().unwrap_or_default()).unwrap_or_default();
    // Only the order tells devices without an id apart, so that every device must be there.
    let is_same = |((kind, path), shown): (&(String, String), &Shown<'_>)| {
        let id = path.strip_prefix("/machine/peripheral/").unwrap_or_default();
        (kind.as_str(), id) == (shown.kind, shown.id)
    };
    if devices.len() != shown.len() || !devices.iter().zip(&shown).all(is_same) {
        return Ok(None);
    }
    let number = devices.iter().position(|(_, device)| device == path);
    let port = number.and_then(|number| shown.get(number)).map(|shown| shown.port.to_owned());
    Ok(port.filter(|port| !port.is_empty()))
}

/// Returns types and QOM paths of the devices on a bus, the newest first: so QEMU lists them.
fn on_bus(vm: &mut Vm, bus: &str) -> Result<Vec<(String, String)>, VmError> {
    let answer = known(vm.execute("qom-list", json!({"path": bus})))?.unwrap_or_default();
    let mut children: Vec<(u64, String, String)> = Vec::new();
    for item in answer.as_array().into_iter().flatten() {
        let text = |key: &str| item.get(key).and_then(Value::as_str).unwrap_or_default();
        let number = text("name").strip_prefix("child[").and_then(|name| name.strip_suffix(']'));
        let kind = text("type").strip_prefix("link<").and_then(|kind| kind.strip_suffix('>'));
        let (Some(Ok(number)), Some(kind)) = (number.map(str::parse), kind) else { continue };
        let device = vm.property(bus, text("name"))?.unwrap_or_default();
        children.push((number, kind.to_owned(), device.as_str().unwrap_or_default().to_owned()));
    }
    children.sort_by_key(|(number, ..)| std::cmp::Reverse(*number));
    Ok(children.into_iter().map(|(_, kind, path)| (kind, path)).collect())
}

/// Returns the devices on the USB bus of this name in the output of `info qtree` (7.2 to 11.1), in
/// its order; `None` if not just one bus has the name.
fn shown_on<'a>(text: &'a str, bus: &str) -> Option<Vec<Shown<'a>>> {
    let lines: Vec<(usize, &str)> =
        text.lines().map(|line| (line.len() - line.trim_start().len(), line.trim())).collect();
    let is_bus = |pair: &[(usize, &str)]| match pair {
        [(_, first), (_, second)] => {
            first.strip_prefix("bus: ") == Some(bus) && *second == "type usb-bus"
        }
        _ => false,
    };
    let mut starts = lines.windows(2).enumerate().filter(|(_, pair)| is_bus(pair));
    let (Some((start, _)), None) = (starts.next(), starts.next()) else { return None };
    let (depth, _) = lines.get(start)?;
    let below = lines.get(start + 1..)?.iter().take_while(|(indent, _)| indent > depth);
    let mut devices = Vec::new();
    for (indent, line) in below {
        if *indent == depth + 2
            && let Some((kind, id)) =
                line.strip_prefix("dev: ").and_then(|dev| dev.split_once(", id \""))
        {
            devices.push(Shown { kind, id: id.strip_suffix('"')?, port: "" });
        } else if *indent == depth + 4
            && line.starts_with("addr ")
            && let Some((_, rest)) = line.split_once(", port ")
        {
            devices.last_mut()?.port = rest.split_once(',')?.0;
        }
    }
    Some(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From QEMU 10.0.2, shortened: a hub, a disk and a tablet without an id.
    const TEXT: &str = "bus: main-system-bus\r
  type System\r
  dev: i440FX-pcihost, id \"\"\r
    bus: pci.0\r
      type PCI\r
      dev: qemu-xhci, id \"x\"\r
        addr = 02.0\r
        bus: x.0\r
          type usb-bus\r
          dev: usb-tablet, id \"\"\r
            port = \"\"\r
            addr 0.0, port 4.1, speed 12, name QEMU USB Tablet, attached\r
          dev: usb-storage, id \"stick\"\r
            port = \"\"\r
            addr 0.0, port 1, speed 5000, name QEMU USB MSD, attached\r
            bus: stick.0\r
              type SCSI\r
              dev: scsi-hd, id \"\"\r
                channel = 0 (0x0)\r
          dev: usb-hub, id \"\"\r
            port = \"\"\r
            addr 0.0, port 4, speed 12, name QEMU USB Hub, attached\r
      dev: PIIX3, id \"\"\r
";

    #[test]
    fn the_ports_on_a_usb_bus_are_read() {
        let shown = |kind, id, port| Shown { kind, id, port };
        let expected = vec![
            shown("usb-tablet", "", "4.1"),
            shown("usb-storage", "stick", "1"),
            shown("usb-hub", "", "4"),
        ];
        assert_eq!(shown_on(TEXT, "x.0"), Some(expected));
    }

    #[test]
    fn another_bus_and_one_of_two_of_the_same_name_are_not_taken() {
        assert_eq!(shown_on(TEXT, "stick.0"), None);
        assert_eq!(shown_on(&TEXT.repeat(2), "x.0"), None);
    }
}
