//! Compares a VM with its command line: what it has that the line would not make, and what it
//! lacks.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::difference::{Difference, Remedy};
use super::parts::{Cpu, Device, Parts, device_number};
use super::{drives, networks, plugged};
use crate::command_line::{CommandLine, LineDevice, LineDrive, Pin};
use crate::vm::{DeviceName, Drive, ProcessInfo, Vm, VmError};

/// Units of the CPU topology as `-smp` and the machine's property `smp` name them.
const TOPOLOGY: [&str; 8] =
    ["drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads"];

/// How a VM compares with its command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compared {
    /// What differs from what the line would make.
    pub differences: Vec<Difference>,
    /// What an earlier save of vmfile has changed and a restore handles by itself: a sentence each.
    pub notes: Vec<String>,
}

/// Compares a VM, which has `parts` and `drives`, with what a QEMU started with `line` would have.
///
/// # Errors
///
/// See [`Qmp::execute`](crate::Qmp::execute).
pub fn compare(
    vm: &mut Vm,
    (parts, drives): (&Parts, &[Drive]),
    line: &CommandLine,
    process: &ProcessInfo,
) -> Result<Compared, VmError> {
    let comparison = Comparison::new(vm, parts, line)?;
    let mut found = Vec::new();
    comparison.unplugged(&mut found);
    comparison.unplugged_without_id(&mut found);
    let removed_cpus = comparison.cpus(vm, &mut found)?;
    comparison.built_in(removed_cpus, &mut found);
    comparison.plugged(vm, &mut found)?;
    // Last, because a device that another one replaced is left out too.
    let leaves_out = |remedy: &&mut Remedy| remedy.leaves_out();
    let mut remedies = found.iter_mut().map(|difference| &mut difference.remedy);
    if let Some(Remedy::Change { pins, .. }) = remedies.find(leaves_out) {
        *pins = comparison.pins(vm)?;
    }
    networks::unused(vm, line, &mut found)?;
    let known: Vec<Drive> =
        drives.iter().filter(|drive| !comparison.came_later(drive)).cloned().collect();
    let is_there = |drive: &LineDrive| comparison.has_device_of(drive);
    let (differ, notes) = drives::compare(&known, &line.drives(), process, is_there);
    found.extend(differ);
    for lost in line.what_cannot_be_recreated() {
        let (what, found_there) = lost.split_once(": ").unwrap_or((&lost, ""));
        let reason = "it belongs to the process that runs".to_owned();
        let remedy = Remedy::Missing(reason);
        let expected = "nothing that a new process could use";
        found.push(Difference::new(what.to_owned(), found_there, expected, remedy));
    }
    Ok(Compared { differences: found, notes })
}

impl Remedy {
    fn leaves_out(&self) -> bool {
        matches!(self, Remedy::Change { leave_out, .. } if !leave_out.is_empty())
    }
}

/// The VM's parts, its command line, and the devices that were plugged in later.
struct Comparison<'a> {
    parts: &'a Parts,
    line: &'a CommandLine,
    on_line: Vec<LineDevice>,
    /// QOM paths of the devices that were plugged in later.
    hot_plugged: BTreeSet<String>,
}

impl<'a> Comparison<'a> {
    fn new(
        vm: &mut Vm,
        parts: &'a Parts,
        line: &'a CommandLine,
    ) -> Result<Comparison<'a>, VmError> {
        let mut hot_plugged = BTreeSet::new();
        let cpus = parts.cpus.iter().filter_map(|cpu| cpu.path.as_ref());
        for path in parts.devices.iter().map(|device| &device.path).chain(cpus) {
            if !hot_plugged.contains(path) && vm.is_hot_plugged(path)? {
                hot_plugged.insert(path.clone());
            }
        }
        Ok(Comparison { parts, line, on_line: line.devices(), hot_plugged })
    }

    fn device_of(&self, id: &str) -> Option<&'a Device> {
        self.parts.devices.iter().find(|device| device.id.as_deref() == Some(id))
    }

    /// Tells whether a drive came with a device that was plugged in later.
    fn came_later(&self, drive: &Drive) -> bool {
        let path = drive.qdev.as_deref().and_then(DeviceName::of_qdev).map(|name| path_of(&name));
        path.is_some_and(|path| self.hot_plugged.contains(&path))
    }

    /// Tells whether the device that has a drive on the line is in the VM.
    fn has_device_of(&self, drive: &LineDrive) -> bool {
        let path = drive.device.as_ref().map(path_of);
        path.is_some_and(|path| self.parts.devices.iter().any(|device| device.path == path))
    }

    /// Adds devices that the line names and that are gone.
    fn unplugged(&self, found: &mut Vec<Difference>) {
        for on_line in self.on_line.iter().filter(|device| !device.is_conditional) {
            let (Some(id), Some(number)) = (&on_line.id, on_line.number) else { continue };
            if self.device_of(id).is_none() {
                let what = format!("device {id}");
                let remedy = Remedy::leave_out(vec![number]);
                found.push(Difference::new(what, "unplugged", &on_line.driver, remedy));
            }
        }
    }

    /// Adds devices without an id that are gone: QEMU numbers them and never uses a number again.
    fn unplugged_without_id(&self, found: &mut Vec<Difference>) {
        let on_line: Vec<&LineDevice> =
            self.on_line.iter().filter(|device| device.id.is_none()).collect();
        if on_line.iter().any(|device| device.is_conditional) {
            return;
        }
        let present: Vec<(usize, &Device)> = self
            .parts
            .devices
            .iter()
            .filter(|device| device.id.is_none() && !self.hot_plugged.contains(&device.path))
            .filter_map(|device| {
                let number = device_number(device.path.rsplit('/').next()?)?;
                Some((usize::try_from(number).ok()?, device))
            })
            .collect();
        let from_start = present.iter().map(|(number, _)| number + 1).max().unwrap_or(0);
        // The order of the options tells which one made which device only if it fits all devices
        // that are left.
        let fits = from_start <= on_line.len()
            && present.iter().all(|(number, device)| is_of(on_line.get(*number).copied(), device));
        for number in 0..from_start.max(on_line.len()) {
            if present.iter().any(|(there, _)| *there == number) {
                continue;
            }
            let maker = on_line.get(number).filter(|_| fits);
            let driver = maker.map_or("a device without an id", |device| device.driver.as_str());
            let remedy = match maker.and_then(|device| device.number) {
                Some(option) => Remedy::leave_out(vec![option]),
                None => Remedy::Missing("QEMU does not tell which option made it".to_owned()),
            };
            let what = nameless(number as u64);
            found.push(Difference::new(what, "unplugged", driver, remedy));
        }
    }

    /// Adds CPUs that came or went; returns how many are gone of those that `-smp` makes.
    fn cpus(&self, vm: &mut Vm, found: &mut Vec<Difference>) -> Result<usize, VmError> {
        let parts = self.parts;
        let topology = vm.property("/machine", "smp")?.unwrap_or_default();
        let count = |key: &str| topology.get(key).and_then(Value::as_u64).unwrap_or(0);
        let mut all: Vec<&Cpu> = parts.cpus.iter().chain(&parts.absent_cpus).collect();
        all.sort_by_key(|cpu| cpu.order());
        // The list must have an entry for each CPU; on some architectures its entries are whole
        // cores.
        let initial = usize::try_from(count("cpus")).unwrap_or(0);
        let is_known = all.len() as u64 == count("maxcpus");
        let initial = if is_known { all.get(..initial).unwrap_or_default() } else { &[] };
        let gone: Vec<&&Cpu> = initial.iter().filter(|cpu| cpu.path.is_none()).collect();
        let kept = initial.iter().take_while(|cpu| cpu.path.is_some()).count();
        for (number, cpu) in gone.iter().enumerate() {
            let what = format!("CPU {}", cpu.place_name());
            let mut add = Vec::new();
            if number == 0 {
                add.push(("-smp".to_owned(), smp(kept, &topology)));
                let others = initial.iter().skip(kept).filter(|cpu| cpu.path.is_some());
                add.extend(others.map(|cpu| plugged_cpu(cpu, None)));
            }
            found.push(Difference::new(what, "unplugged", "present", Remedy::add(add)));
        }
        for cpu in &parts.cpus {
            let Some(path) = cpu.path.as_ref().filter(|path| self.hot_plugged.contains(*path))
            else {
                continue;
            };
            let id = parts.devices.iter().find(|device| device.path == *path);
            let remedy = Remedy::add(vec![plugged_cpu(cpu, id.and_then(|d| d.id.as_deref()))]);
            let what = format!("CPU {}", cpu.place_name());
            found.push(Difference::new(what, "plugged in", "absent", remedy));
        }
        Ok(gone.len())
    }

    /// Adds devices other than CPUs that the machine type made and that are gone.
    fn built_in(&self, removed_cpus: usize, found: &mut Vec<Difference>) {
        let gone = self.parts.gone_built_in.len().saturating_sub(removed_cpus);
        if gone > 0 {
            let what = format!("devices of -nic, of drives, or of the machine ({gone})");
            let reason = "QEMU does not tell which option made a device that is gone".to_owned();
            let remedy = Remedy::Missing(reason);
            found.push(Difference::new(what, "unplugged", "present", remedy));
        }
    }

    /// Adds devices that were plugged in later, each bus before the devices on it.
    fn plugged(&self, vm: &mut Vm, found: &mut Vec<Difference>) -> Result<(), VmError> {
        let is_cpu = |device: &Device| {
            self.parts.cpus.iter().any(|cpu| cpu.path.as_ref() == Some(&device.path))
        };
        let mut later: Vec<(&Device, String)> = Vec::new();
        for device in &self.parts.devices {
            if self.hot_plugged.contains(&device.path) && !is_cpu(device) {
                later.push((device, vm.bus_path(&device.path)?));
            }
        }
        while !later.is_empty() {
            let is_free = |(_, bus): &(&Device, String)| {
                !later.iter().any(|(other, _)| bus.starts_with(&format!("{}/", other.path)))
            };
            let next = later.iter().position(is_free).unwrap_or(0);
            let (device, bus) = later.remove(next);
            self.plugged_device(vm, device, &bus, found)?;
        }
        Ok(())
    }

    fn plugged_device(
        &self,
        vm: &mut Vm,
        device: &Device,
        bus: &str,
        found: &mut Vec<Difference>,
    ) -> Result<(), VmError> {
        let on_line = device
            .id
            .as_ref()
            .and_then(|id| self.on_line.iter().find(|on_line| on_line.id.as_ref() == Some(id)));
        if on_line.is_some_and(|on_line| on_line.is_conditional) {
            return Ok(());
        }
        let mut remedy = plugged::recreate(vm, self.parts, device, bus, self.line)?;
        let mut expected = "absent";
        if let Some(on_line) = on_line {
            expected = "plugged in from the start";
            if let (Remedy::Change { leave_out, .. }, Some(number)) = (&mut remedy, on_line.number)
            {
                leave_out.push(number);
            }
        }
        let what = device.id.as_ref().map_or_else(
            || nameless(device.path.rsplit('/').next().and_then(device_number).unwrap_or(0)),
            |id| format!("device {id}"),
        );
        let there = format!("{}, plugged in later", device.kind);
        found.push(Difference::new(what, &there, expected, remedy));
        Ok(())
    }

    /// Returns the places of the devices that stay: without them, QEMU would give the next device
    /// the place of one that is left out.
    fn pins(&self, vm: &mut Vm) -> Result<Vec<Pin>, VmError> {
        let mut pins = Vec::new();
        let mut anonymous = 0;
        for on_line in &self.on_line {
            let path = match &on_line.id {
                Some(id) => self.device_of(id).map(|device| device.path.clone()),
                None => {
                    anonymous += 1;
                    Some(format!("/machine/peripheral-anon/device[{}]", anonymous - 1))
                }
            };
            let (Some(path), Some(device)) = (path, on_line.number) else { continue };
            let is_there = self.parts.devices.iter().any(|device| device.path == path);
            if !is_there || self.hot_plugged.contains(&path) {
                continue;
            }
            let is_memory = plugged::memory_device(self.parts, &path).is_some();
            for (key, value) in plugged::place(vm, &path, is_memory)? {
                if !on_line.keys.contains(&key) {
                    pins.push(Pin { device, key, value });
                }
            }
        }
        Ok(pins)
    }
}

/// Returns the QOM path of a device.
fn path_of(name: &DeviceName) -> String {
    match name {
        DeviceName::Id(id) => format!("/machine/peripheral/{id}"),
        DeviceName::Number(number) => format!("/machine/peripheral-anon/device[{number}]"),
        DeviceName::Flash(chip) => format!("/machine/system.flash{chip}"),
    }
}

/// Names a device without an id by the number that QEMU gave it.
fn nameless(number: u64) -> String {
    format!("device number {number} without an id")
}

/// Tells whether an option can have made a device. A driver may be written as an alias, such as
/// `virtio-blk`.
fn is_of(on_line: Option<&LineDevice>, device: &Device) -> bool {
    on_line.is_some_and(|on_line| {
        let rest = device.kind.strip_prefix(on_line.driver.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    })
}

/// Returns the value of a `-smp` with `present` CPUs, and with the rest as it was.
fn smp(present: usize, topology: &Value) -> String {
    let mut words = vec![format!("cpus={present}")];
    let count = |key: &str| topology.get(key).and_then(Value::as_u64);
    words.extend(count("maxcpus").map(|count| format!("maxcpus={count}")));
    // Machine types refuse units that they do not have, even with a count of 1.
    let units = TOPOLOGY.iter().filter_map(|key| Some((key, count(key)?)));
    words.extend(
        units
            .filter(|(key, count)| *count > 1 || ["sockets", "cores", "threads"].contains(key))
            .map(|(key, count)| format!("{key}={count}")),
    );
    words.join(",")
}

/// Returns the option that makes a CPU.
fn plugged_cpu(cpu: &Cpu, id: Option<&str>) -> (String, String) {
    let mut device = json!({"driver": cpu.kind});
    if let Some(id) = id {
        device["id"] = json!(id);
    }
    for (key, number) in &cpu.place {
        device[key.as_str()] = json!(number);
    }
    ("-device".to_owned(), device.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_fewer_cpus_keeps_its_topology() {
        // From QEMU 10.0.2: -smp 4,sockets=2,maxcpus=8,dies=2.
        let topology = json!({"modules": 1, "cpus": 4, "maxcpus": 8, "books": 1, "threads": 1,
            "cores": 2, "dies": 2, "sockets": 2, "clusters": 1, "drawers": 1});
        assert_eq!(smp(3, &topology), "cpus=3,maxcpus=8,sockets=2,dies=2,cores=2,threads=1");
    }

    #[test]
    fn an_option_is_told_from_another_by_its_driver() {
        let device = |kind: &str| Device { path: String::new(), id: None, kind: kind.to_owned() };
        let line = CommandLine::new(["-device", "virtio-blk,drive=d"]).unwrap();
        let on_line = line.devices();
        assert!(is_of(on_line.first(), &device("virtio-blk-pci")));
        assert!(!is_of(on_line.first(), &device("virtio-rng-pci")));
        assert!(!is_of(None, &device("virtio-rng-pci")));
    }
}
