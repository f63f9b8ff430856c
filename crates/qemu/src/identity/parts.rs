//! The parts of a running VM that can come and go: devices, memory and CPUs.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::qmp::{QmpError, unexpected};
use crate::vm::{Vm, VmError};

/// Where QEMU keeps the devices that have an id, and those of `-device` without one.
const CONTAINERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Where QEMU keeps the devices that the machine type makes by itself.
const BUILT_IN: &str = "/machine/unattached";

/// The parts of a VM that can come and go.
///
/// Two values are equal if the VM has the same parts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parts {
    /// The devices of `-device`, of `device_add`, and of options that stand for `-device`.
    pub devices: Vec<Device>,
    /// The memory devices, which are among the devices too.
    pub memory_devices: Vec<MemoryDevice>,
    /// The CPUs that are present, in the order of their places.
    pub cpus: Vec<Cpu>,
    /// The CPUs that are not present and could be plugged in, in the order of their places.
    pub absent_cpus: Vec<Cpu>,
    /// Numbers of devices that the machine type made and that are gone.
    ///
    /// QEMU (7.2 to 11.1) numbers them as it makes them and never uses a number again.
    pub gone_built_in: BTreeSet<u64>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Device {
    /// Its QOM path.
    pub path: String,
    /// Its id, if it has one.
    pub id: Option<String>,
    /// Its type, e.g. `virtio-blk-pci`.
    pub kind: String,
}

/// A memory device, e.g. a DIMM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryDevice {
    /// Its id, or its QOM path where it has none.
    pub id: String,
    /// Its kind as QEMU names it: `dimm`, `nvdimm`, `virtio-pmem`, ...
    pub kind: String,
    /// The id of its memory backend.
    pub memdev: String,
    /// Its size in bytes.
    pub size: u64,
    /// Where the guest sees it.
    pub address: Option<u64>,
    /// The slot it is in.
    pub slot: Option<i64>,
    /// The NUMA node it belongs to.
    pub node: Option<i64>,
}

/// A CPU, present or not.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cpu {
    /// Its type, e.g. `qemu64-x86_64-cpu`.
    pub kind: String,
    /// Its place: `socket-id`, `core-id`, `thread-id` and so on.
    pub place: BTreeMap<String, i64>,
    /// Its QOM path, if it is present.
    pub path: Option<String>,
}

impl Cpu {
    /// Returns the place in words, from the largest unit to the smallest.
    #[must_use]
    pub fn place_name(&self) -> String {
        let words = PLACE_KEYS.iter().filter_map(|key| {
            let name = key.strip_suffix("-id").unwrap_or(key);
            self.place.get(*key).map(|number| format!("{name} {number}"))
        });
        words.collect::<Vec<_>>().join(" ")
    }

    /// Returns the place as a value that sorts as QEMU numbers CPUs.
    pub(super) fn order(&self) -> Vec<i64> {
        PLACE_KEYS.iter().map(|key| self.place.get(*key).copied().unwrap_or(0)).collect()
    }
}

/// The parts of a CPU's place that say where it is, the largest unit first. `node-id` follows from
/// them.
const PLACE_KEYS: [&str; 8] = [
    "drawer-id",
    "book-id",
    "socket-id",
    "die-id",
    "cluster-id",
    "module-id",
    "core-id",
    "thread-id",
];

impl Vm {
    /// Returns the parts of this VM that can come and go.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn parts(&mut self) -> Result<Parts, VmError> {
        let (devices, gone_built_in) = self.devices()?;
        let memory_devices = self.memory_devices()?;
        let (cpus, absent_cpus) = self.cpus()?;
        Ok(Parts { devices, memory_devices, cpus, absent_cpus, gone_built_in })
    }

    /// Returns the name of a part that came or went since `before`; `None` if none did.
    ///
    /// Memory devices and CPUs are devices too, so that three commands are enough.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn changed_part(&mut self, before: &Parts) -> Result<Option<String>, VmError> {
        let (devices, gone_built_in) = self.devices()?;
        let is_new = |device: &&Device| !before.devices.contains(device);
        let is_gone = |device: &&Device| !devices.contains(device);
        let changed = devices.iter().find(is_new).or_else(|| before.devices.iter().find(is_gone));
        if let Some(device) = changed {
            let name = device.id.as_ref().unwrap_or(&device.path);
            return Ok(Some(format!("device {name} ({})", device.kind)));
        }
        let is_same = gone_built_in == before.gone_built_in;
        Ok((!is_same).then(|| "a CPU or another device of the machine type".to_owned()))
    }

    /// Returns the devices, and the numbers of those of the machine type that are gone.
    fn devices(&mut self) -> Result<(Vec<Device>, BTreeSet<u64>), VmError> {
        let mut devices = Vec::new();
        for container in CONTAINERS {
            let mut children = self.children(container)?;
            // The order of QEMU's answer is that of a hash table.
            children.sort();
            for (name, kind) in children {
                let id = (container == CONTAINERS[0]).then(|| name.clone());
                devices.push(Device { path: format!("{container}/{name}"), id, kind });
            }
        }
        let built_in = self.children(BUILT_IN)?;
        let numbers: BTreeSet<u64> =
            built_in.iter().filter_map(|(name, _)| device_number(name)).collect();
        let last = numbers.last().copied().unwrap_or(0);
        let gone_built_in = (0..last).filter(|number| !numbers.contains(number)).collect();
        Ok((devices, gone_built_in))
    }

    /// Tells whether a device was plugged in after the machine was made.
    pub(super) fn is_hot_plugged(&mut self, path: &str) -> Result<bool, VmError> {
        let answer = self.property(path, "hotplugged")?;
        Ok(answer.and_then(|on| on.as_bool()).unwrap_or(false))
    }

    /// Returns a property of a QOM object; `None` where it has none of that name.
    pub(super) fn property(&mut self, path: &str, name: &str) -> Result<Option<Value>, VmError> {
        known(self.execute("qom-get", json!({"path": path, "property": name})))
    }

    /// Returns names and types of the objects below a QOM path; an empty list if QEMU has no such
    /// path.
    fn children(&mut self, path: &str) -> Result<Vec<(String, String)>, VmError> {
        let Some(answer) = known(self.execute("qom-list", json!({"path": path})))? else {
            return Ok(Vec::new());
        };
        let items = answer.as_array().ok_or_else(|| unexpected("qom-list", "list"))?;
        let child = |item: &Value| {
            let kind = item.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
            Some((item.get("name")?.as_str()?.to_owned(), kind.to_owned()))
        };
        Ok(items.iter().filter_map(child).collect())
    }

    fn memory_devices(&mut self) -> Result<Vec<MemoryDevice>, VmError> {
        let answer = known(self.execute("query-memory-devices", Value::Null))?;
        let Some(answer) = answer else { return Ok(Vec::new()) };
        let items = answer.as_array().ok_or_else(|| unexpected("query-memory-devices", "list"))?;
        let mut devices: Vec<MemoryDevice> = items.iter().filter_map(memory_device).collect();
        devices.sort_by_key(|device| (device.address, device.slot));
        Ok(devices)
    }

    /// Returns the CPUs that are present and those that are not; both lists are empty if the
    /// machine type does not tell.
    fn cpus(&mut self) -> Result<(Vec<Cpu>, Vec<Cpu>), VmError> {
        let answer = known(self.execute("query-hotpluggable-cpus", Value::Null))?;
        let Some(answer) = answer else { return Ok((Vec::new(), Vec::new())) };
        let items =
            answer.as_array().ok_or_else(|| unexpected("query-hotpluggable-cpus", "list"))?;
        let mut cpus: Vec<Cpu> = items.iter().filter_map(cpu).collect();
        cpus.sort_by_key(Cpu::order);
        Ok(cpus.into_iter().partition(|cpu| cpu.path.is_some()))
    }
}

/// Returns `None` for a command that QEMU refused: there is no such thing.
pub(super) fn known(answer: Result<Value, QmpError>) -> Result<Option<Value>, VmError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns the number in a name that QEMU makes for a device without an id: `device[7]`.
pub(super) fn device_number(name: &str) -> Option<u64> {
    name.strip_prefix("device[")?.strip_suffix(']')?.parse().ok()
}

fn memory_device(item: &Value) -> Option<MemoryDevice> {
    let data = item.get("data")?;
    let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default();
    let memdev = text("memdev");
    Some(MemoryDevice {
        id: text("id").to_owned(),
        kind: item.get("type")?.as_str()?.to_owned(),
        memdev: memdev.rsplit('/').next().unwrap_or(memdev).to_owned(),
        size: data.get("size").and_then(Value::as_u64).unwrap_or(0),
        address: ["addr", "memaddr"].iter().find_map(|key| data.get(*key)?.as_u64()),
        slot: data.get("slot").and_then(Value::as_i64),
        node: data.get("node").and_then(Value::as_i64),
    })
}

fn cpu(item: &Value) -> Option<Cpu> {
    let place = item.get("props")?.as_object()?.iter();
    let place = place.filter_map(|(key, number)| Some((key.clone(), number.as_i64()?)));
    Some(Cpu {
        kind: item.get("type")?.as_str()?.to_owned(),
        place: place.collect(),
        path: item.get("qom-path").and_then(Value::as_str).map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_named_by_its_place() {
        // From QEMU 10.0.2: -smp 2,maxcpus=4.
        let item = json!({"props": {"core-id": 3, "thread-id": 0, "node-id": 0, "socket-id": 1},
            "vcpus-count": 1, "type": "qemu64-x86_64-cpu"});
        let cpu = cpu(&item).unwrap();
        assert_eq!(cpu.place_name(), "socket 1 core 3 thread 0");
        assert_eq!(cpu.path, None);
    }

    #[test]
    fn a_dimm_is_read_with_its_place() {
        // From QEMU 10.0.2: device_add pc-dimm.
        let item = json!({"type": "dimm", "data": {"memdev": "/objects/m1", "hotplugged": true,
            "addr": 4_294_967_296_u64, "hotpluggable": true, "size": 134_217_728, "slot": 0,
            "node": 0, "id": "dimm1"}});
        let dimm = memory_device(&item).unwrap();
        assert_eq!((dimm.id.as_str(), dimm.memdev.as_str()), ("dimm1", "m1"));
        assert_eq!((dimm.address, dimm.slot, dimm.node), (Some(1 << 32), Some(0), Some(0)));
    }

    #[test]
    fn numbers_of_devices_are_read_from_their_names() {
        assert_eq!(device_number("device[12]"), Some(12));
        assert_eq!(device_number("sysbus"), None);
    }
}
