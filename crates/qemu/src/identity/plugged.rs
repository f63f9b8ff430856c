//! The options that make a device which was plugged in while the VM ran, from QEMU's own answers.

use serde_json::{Map, Value, json};

use super::difference::Remedy;
use super::networks::netdev;
use super::parts::{Device, MemoryDevice, Parts};
use super::questions::{OptionsOrReason, back_end};
use super::usb;
use crate::command_line::{CommandLine, value_in_json};
use crate::qmp::unexpected;
use crate::vm::{OVERLAY_PREFIX, Vm, VmError};

/// Types whose state is in the migration stream, and whose back ends, if they have any, QEMU
/// describes. Variants such as `virtio-blk-pci-non-transitional` count as their type.
const KINDS: [&str; 30] = [
    "virtio-blk-pci",
    "virtio-net-pci",
    "virtio-scsi-pci",
    "virtio-rng-pci",
    "virtio-balloon-pci",
    "virtio-serial-pci",
    "virtio-keyboard-pci",
    "virtio-mouse-pci",
    "virtio-tablet-pci",
    "virtserialport",
    "virtconsole",
    "scsi-hd",
    "scsi-cd",
    "usb-storage",
    "usb-tablet",
    "usb-kbd",
    "usb-mouse",
    "usb-hub",
    "usb-serial",
    "qemu-xhci",
    "nec-usb-xhci",
    "usb-ehci",
    "ich9-usb-ehci1",
    "pcie-root-port",
    "pci-bridge",
    "e1000",
    "e1000e",
    "rtl8139",
    "pc-dimm",
    "ahci",
];

/// Properties that follow from others, or that this module sets by itself.
const DERIVED: [&str; 9] =
    ["romsize", "busnr", "addr", "memdev", "drive", "netdev", "sriov-pf", "size", "guest-stats"];

/// Formats of images that can be opened without further options.
const FORMATS: [&str; 6] = ["raw", "qcow2", "qed", "vmdk", "vdi", "vhdx"];

impl Vm {
    /// Returns the QOM path of the bus that a device is on; empty where it is on none.
    pub(super) fn bus_path(&mut self, device: &str) -> Result<String, VmError> {
        let bus = self.property(device, "parent_bus")?;
        Ok(bus.and_then(|bus| Some(bus.as_str()?.to_owned())).unwrap_or_default())
    }
}

/// Returns how to change the command line, so that it makes `device`, which was plugged in later.
pub(super) fn recreate(
    vm: &mut Vm,
    parts: &Parts,
    device: &Device,
    bus: &str,
    line: &CommandLine,
) -> Result<Remedy, VmError> {
    if !KINDS.iter().any(|kind| is_kind(&device.kind, kind)) {
        let reason = format!("QEMU does not tell what else a {} needs", device.kind);
        return Ok(Remedy::Missing(reason));
    }
    let mut object = match properties(vm, device)? {
        Ok(object) => object,
        Err(reason) => return Ok(Remedy::Missing(reason)),
    };
    if let Some(bus) = bus.rsplit('/').next().filter(|bus| !bus.is_empty()) {
        object.insert("bus".to_owned(), json!(bus));
    }
    let memory = memory_device(parts, &device.path);
    if device.kind == "pc-dimm" && memory.is_none() {
        return Ok(Remedy::Missing(
            "QEMU does not tell the memory of a DIMM without an id".to_owned(),
        ));
    }
    for (key, value) in place(vm, &device.path, memory.is_some())? {
        let value = value_in_json(&key, &value);
        object.insert(key, value);
    }
    let mut add = Vec::new();
    if let Some(memory) = memory {
        object.insert("memdev".to_owned(), json!(memory.memdev));
        object.remove("bus");
        match memory_backend(vm, memory, line)? {
            Ok(options) => add.extend(options),
            Err(reason) => return Ok(Remedy::Missing(reason)),
        }
    }
    for back_end in [drive, netdev, objects, chardev] {
        match back_end(vm, device, &mut object, line)? {
            Ok(options) => add.extend(options),
            Err(reason) => return Ok(Remedy::Missing(reason)),
        }
    }
    add.push(("-device".to_owned(), Value::Object(object).to_string()));
    Ok(Remedy::add(add))
}

fn is_kind(found: &str, kind: &str) -> bool {
    let rest = found.strip_prefix(kind);
    rest.is_some_and(|rest| matches!(rest, "" | "-transitional" | "-non-transitional"))
}

/// Returns the memory device at a QOM path, if it is one.
pub(super) fn memory_device<'a>(parts: &'a Parts, path: &str) -> Option<&'a MemoryDevice> {
    let id = path.rsplit('/').next();
    parts.memory_devices.iter().find(|device| device.id == path || Some(&*device.id) == id)
}

/// Returns the properties of a device that differ from those that its type has by itself.
fn properties(vm: &mut Vm, device: &Device) -> Result<Result<Map<String, Value>, String>, VmError> {
    let mut object = Map::new();
    object.insert("driver".to_owned(), json!(device.kind));
    if let Some(id) = &device.id {
        object.insert("id".to_owned(), json!(id));
    }
    let list = vm.execute("device-list-properties", json!({"typename": device.kind}))?;
    let list = list.as_array().ok_or_else(|| unexpected("device-list-properties", "list"))?;
    let is_nic = list.iter().any(|item| item.get("name") == Some(&json!("netdev")));
    for item in list {
        let text = |key: &str| item.get(key).and_then(Value::as_str).unwrap_or_default();
        let (name, kind) = (text("name"), text("type"));
        let is_object = kind.starts_with("child<") || kind.starts_with("link<");
        if DERIVED.contains(&name) || is_object {
            continue;
        }
        let Some(value) = vm.property(&device.path, name)? else { continue };
        if name == "romfile" && value.as_str().is_some_and(|file| is_own_rom(file, is_nic)) {
            continue;
        }
        match (item.get("default-value"), &value) {
            (Some(default), value) if value == default => {}
            (_, Value::Array(values)) if values.is_empty() => {}
            (None, Value::String(text)) if text.is_empty() && name != "romfile" => {}
            // If QEMU tells no default, such a value is taken as not set.
            (None, Value::Bool(_) | Value::Null) => {}
            (None, Value::Number(number))
                if number.as_u64().is_none_or(|set| set == 0 && name != "bootindex") => {}
            (_, Value::Array(_) | Value::Object(_)) => {
                return Ok(Err(format!("its property {name} is more than one value")));
            }
            _ => drop(object.insert(name.to_owned(), value)),
        }
    }
    Ok(Ok(object))
}

/// Tells whether a device has this ROM by itself; QEMU (7.2 to 11.1) does not tell which one a type
/// has. A network card has one; if it was given the empty name, it has none.
fn is_own_rom(file: &str, is_nic: bool) -> bool {
    if is_nic {
        file.starts_with("efi-") && file.ends_with(".rom") && !file.contains('/')
    } else {
        file.is_empty()
    }
}

/// Returns the properties that say where on its bus a device is, as `-device` takes them.
pub(super) fn place(
    vm: &mut Vm,
    path: &str,
    is_memory: bool,
) -> Result<Vec<(String, String)>, VmError> {
    let mut place = Vec::new();
    for key in ["addr", "slot", "channel", "scsi-id", "lun", "nr"] {
        let Some(number) = vm.property(path, key)?.and_then(|value| value.as_u64()) else {
            continue;
        };
        match key {
            "addr" if is_memory => place.push((key.to_owned(), number.to_string())),
            "addr" => place.push((key.to_owned(), format!("{:02x}.{:x}", number >> 3, number & 7))),
            "slot" if !is_memory => {}
            _ => place.push((key.to_owned(), number.to_string())),
        }
    }
    if vm.property(path, "port")?.is_some_and(|port| port.is_string()) {
        place.extend(usb::port(vm, path)?.map(|port| ("port".to_owned(), port)));
    }
    Ok(place)
}

/// Returns the options that make the memory behind a DIMM.
fn memory_backend(
    vm: &mut Vm,
    memory: &MemoryDevice,
    line: &CommandLine,
) -> Result<OptionsOrReason, VmError> {
    if line.defines(&memory.memdev) {
        return Ok(Ok(Vec::new()));
    }
    let path = format!("/objects/{}", memory.memdev);
    let kind = vm.property(&path, "type")?.unwrap_or_default();
    let kind = kind.as_str().unwrap_or_default();
    if !["memory-backend-ram", "memory-backend-memfd"].contains(&kind) {
        return Ok(Err(format!("its memory {} is of type {kind}", memory.memdev)));
    }
    let mut object = json!({"qom-type": kind, "id": memory.memdev, "size": memory.size});
    for key in ["share", "hugetlb", "hugetlbsize", "merge", "dump", "reserve", "prealloc"] {
        let is_own = kind == "memory-backend-memfd" || !key.starts_with("huge");
        match vm.property(&path, key)? {
            Some(value) if is_own && value != json!(0) => object[key] = value,
            _ => {}
        }
    }
    Ok(Ok(vec![("-object".to_owned(), object.to_string())]))
}

/// Names the drive of a disk in `object`; returns the options that make it.
fn drive(
    vm: &mut Vm,
    device: &Device,
    object: &mut Map<String, Value>,
    line: &CommandLine,
) -> Result<OptionsOrReason, VmError> {
    let name = match back_end(vm, device, "drive")? {
        Some(name) => name,
        // This device gives its drive to a disk that it makes (7.2 to 11.1).
        None if is_kind(&device.kind, "usb-storage") => String::new(),
        None => return Ok(Ok(Vec::new())),
    };
    let answer = vm.execute("query-block", Value::Null)?;
    let drives = answer.as_array().ok_or_else(|| unexpected("query-block", "list"))?;
    let text = |value: &Value, key: &str| {
        value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let is_this = |drive: &&Value| {
        let qdev = text(drive, "qdev");
        !name.is_empty() && text(drive, "device") == name
            || Some(&qdev) == device.id.as_ref()
            || qdev == device.path
            || qdev.starts_with(&format!("{}/", device.path))
    };
    let found = drives.iter().find(is_this).and_then(|drive| Some((drive, drive.get("inserted")?)));
    let Some((drive, inserted)) = found else {
        return Ok(Err(format!("its drive {name} has no medium")));
    };
    let own_names = [name, text(drive, "device"), text(inserted, "node-name")];
    let name = own_names.into_iter().find(|name| !name.is_empty()).unwrap_or_default();
    // A name that QEMU or a save of vmfile has generated cannot be used in an option.
    let is_given = !name.starts_with('#') && !name.starts_with(OVERLAY_PREFIX);
    let id = device.id.clone().unwrap_or_else(|| "unnamed".to_owned());
    let name = if is_given { name } else { format!("drive-{id}") };
    object.insert("drive".to_owned(), json!(name));
    if line.defines(&name) {
        return Ok(Ok(Vec::new()));
    }
    let format = text(inserted, "drv");
    let image = inserted.get("image").cloned().unwrap_or_default();
    let file = text(&image, "filename");
    if !FORMATS.contains(&format.as_str()) || file.is_empty() || file.contains(':') {
        return Ok(Err(format!("its drive {name} is of format {format:?}, or is no file")));
    }
    let on = |key: &str| inserted.get("cache").and_then(|cache| cache.get(key)?.as_bool());
    let cache = json!({"direct": on("direct").unwrap_or(false),
        "no-flush": on("no-flush").unwrap_or(false)});
    let read_only = inserted.get("ro").and_then(Value::as_bool).unwrap_or(false);
    let node = json!({"driver": format, "node-name": name, "read-only": read_only, "cache": cache,
        "detect-zeroes": text(inserted, "detect_zeroes"),
        "file": {"driver": "file", "filename": file}});
    Ok(Ok(vec![("-blockdev".to_owned(), node.to_string())]))
}

/// Names the objects that a device uses in `object`, a source of random numbers or a thread;
/// returns the options that make them.
fn objects(
    vm: &mut Vm,
    device: &Device,
    object: &mut Map<String, Value>,
    line: &CommandLine,
) -> Result<OptionsOrReason, VmError> {
    let mut add = Vec::new();
    for key in ["rng", "iothread"] {
        let path = vm.property(&device.path, key)?;
        let path = path.and_then(|path| Some(path.as_str()?.to_owned())).unwrap_or_default();
        let Some(id) = path.strip_prefix("/objects/") else { continue };
        object.insert(key.to_owned(), json!(id));
        if line.defines(id) {
            continue;
        }
        let kind = vm.property(&path, "type")?.unwrap_or_default();
        let mut made = json!({"qom-type": kind, "id": id});
        match kind.as_str() {
            Some("rng-builtin" | "iothread") => {}
            Some("rng-random") => {
                made["filename"] = vm.property(&path, "filename")?.unwrap_or_default();
            }
            _ => return Ok(Err(format!("QEMU does not tell the options of its object {id}"))),
        }
        add.push(("-object".to_owned(), made.to_string()));
    }
    Ok(Ok(add))
}

/// Names the character device of a port in `object`; only the command line can make it.
fn chardev(
    vm: &mut Vm,
    device: &Device,
    object: &mut Map<String, Value>,
    line: &CommandLine,
) -> Result<OptionsOrReason, VmError> {
    let Some(name) = back_end(vm, device, "chardev")? else { return Ok(Ok(Vec::new())) };
    if !line.defines(&name) {
        return Ok(Err(format!("QEMU does not tell the options of its chardev {name}")));
    }
    object.insert("chardev".to_owned(), json!(name));
    Ok(Ok(Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_of_a_type_are_that_type_and_others_are_not() {
        assert!(is_kind("virtio-blk-pci-non-transitional", "virtio-blk-pci"));
        assert!(!is_kind("virtio-blk-pci-x", "virtio-blk-pci"));
    }

    #[test]
    fn a_rom_that_was_given_is_told_from_the_one_of_the_type() {
        assert!(is_own_rom("efi-e1000.rom", true));
        assert!(is_own_rom("", false));
        for (file, is_nic) in [("", true), ("/roms/efi-e1000.rom", true), ("my.rom", false)] {
            assert!(!is_own_rom(file, is_nic), "{file}");
        }
    }
}
