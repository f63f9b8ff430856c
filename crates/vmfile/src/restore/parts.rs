//! Devices, memory and CPUs that were plugged or unplugged while the saved VM ran.

use std::collections::BTreeMap;

use vmfile_format::manifest::{ChangeMeta, PartsMeta, VmMeta};
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::{CommandLine, Parts, Pin, Vm};

use crate::restore_error::{Mismatch, RestoreError};

/// Changes the saved command line so that it makes what the VM had when it was saved.
///
/// # Errors
///
/// [`RestoreError::CannotRemake`] names every part that no command-line option can make.
pub(super) fn remake(meta: &VmMeta, line: &mut CommandLine) -> Result<(), RestoreError> {
    let obstacle = |change: &ChangeMeta| {
        let reason = change.obstacle.as_ref()?;
        Some(format!("{}: {} ({reason})", change.what, change.found))
    };
    let what: Vec<String> = meta.changes.iter().filter_map(obstacle).collect();
    if !what.is_empty() {
        return Err(RestoreError::CannotRemake { what });
    }
    let changes = &meta.changes;
    let number = |number: &u64| usize::try_from(*number).unwrap_or(usize::MAX);
    let pins = changes.iter().flat_map(|change| &change.pins);
    let pins: Vec<Pin> = pins
        .map(|pin| Pin {
            device: number(&pin.device),
            key: pin.key.clone(),
            value: pin.value.clone(),
        })
        .collect();
    line.pin_devices(&pins)?;
    // Adds devices before it leaves out others: that must not remove back ends which the new ones
    // use.
    for change in changes {
        line.add(&change.add)?;
    }
    let left_out: Vec<usize> =
        changes.iter().flat_map(|change| &change.leave_out).map(number).collect();
    line.leave_out_devices(&left_out)?;
    Ok(())
}

/// Compares the parts of the VM in the file with those of the QEMU that waits: QEMU (10.0.2)
/// accepts a stream without the state of a device that it has.
pub(super) fn compare_parts(snapshot: &Snapshot, vm: &mut Vm) -> Result<(), RestoreError> {
    let Some(manifest) = snapshot.manifest() else { return Ok(()) };
    let Some(saved) = &manifest.meta.vm.parts else { return Ok(()) };
    let differ = differ(saved, &vm.parts()?);
    if differ.is_empty() { Ok(()) } else { Err(RestoreError::Incompatible { differ }) }
}

fn differ(saved: &PartsMeta, found: &Parts) -> Vec<Mismatch> {
    let mut differ = Vec::new();
    devices(saved, found, &mut differ);
    // Compares memory devices by their places: a command line that the user gives may have other
    // ids.
    let place = |address: Option<u64>, slot: Option<i64>| {
        let address = address.map_or("no address".to_owned(), |at| format!("{at:#x}"));
        let slot = slot.map_or(String::new(), |slot| format!(", slot {slot}"));
        format!("memory device at {address}{slot}")
    };
    let ours = saved.memory_devices.iter();
    let ours = ours.map(|dimm| (place(dimm.address, dimm.slot), format!("{} bytes", dimm.bytes)));
    let theirs = found.memory_devices.iter();
    let theirs =
        theirs.map(|dimm| (place(dimm.address, dimm.slot), format!("{} bytes", dimm.size)));
    unequal(ours.collect(), theirs.collect(), &mut differ);
    cpus(saved, found, &mut differ);
    differ
}

/// Compares devices by their types: the guest does not see ids, and a command line that the user
/// gives may have others.
fn devices(saved: &PartsMeta, found: &Parts, differ: &mut Vec<Mismatch>) {
    let is_cpu = |kind: &str| saved.cpus.iter().any(|cpu| cpu.kind == kind);
    let mut names: BTreeMap<&str, (Vec<&str>, Vec<&str>)> = BTreeMap::new();
    for device in saved.devices.iter().filter(|device| !is_cpu(&device.kind)) {
        let id = device.id.as_deref().unwrap_or("one without an id");
        names.entry(&device.kind).or_default().0.push(id);
    }
    for device in &found.devices {
        if !found.cpus.iter().any(|cpu| cpu.path.as_ref() == Some(&device.path)) {
            let id = device.id.as_deref().unwrap_or("one without an id");
            names.entry(&device.kind).or_default().1.push(id);
        }
    }
    for (kind, (file, vm)) in names {
        if file.len() == vm.len() {
            continue;
        }
        let only = |these: &[&str], those: &[&str]| {
            let only: Vec<&str> = these.iter().filter(|id| !those.contains(id)).copied().collect();
            let named =
                if only.is_empty() { String::new() } else { format!(", {}", only.join(", ")) };
            format!("{}{named}", these.len())
        };
        differ.push(Mismatch {
            what: format!("devices of type {kind}"),
            file: only(&file, &vm),
            vm: only(&vm, &file),
        });
    }
}

/// Compares the places of CPUs by the units that both sides have: QEMU versions name different
/// units.
fn cpus(saved: &PartsMeta, found: &Parts, differ: &mut Vec<Mismatch>) {
    let (Some(ours), Some(theirs)) = (saved.cpus.first(), found.cpus.first()) else { return };
    let common: Vec<&String> =
        ours.place.keys().filter(|key| theirs.place.contains_key(*key)).collect();
    let name = |place: &BTreeMap<String, i64>| {
        let units = common.iter().filter(|key| key.as_str() != "node-id").filter_map(|key| {
            let unit = key.strip_suffix("-id").unwrap_or(key);
            place.get(*key).map(|number| format!("{unit} {number}"))
        });
        (format!("CPU {}", units.collect::<Vec<_>>().join(" ")), "present".to_owned())
    };
    let ours = saved.cpus.iter().map(|cpu| name(&cpu.place)).collect();
    let theirs = found.cpus.iter().map(|cpu| name(&cpu.place)).collect();
    unequal(ours, theirs, differ);
}

/// Adds to `differ` what is on one side only. Each pair is a name and a value.
fn unequal(file: Vec<(String, String)>, vm: Vec<(String, String)>, differ: &mut Vec<Mismatch>) {
    let mut left = vm;
    for (what, there) in file {
        match left.iter().position(|(name, value)| *name == what && *value == there) {
            Some(same) => drop(left.remove(same)),
            None => {
                let other = left.iter().position(|(name, _)| *name == what);
                let vm = other.map_or("none".to_owned(), |other| left.remove(other).1);
                differ.push(Mismatch { what, file: there, vm });
            }
        }
    }
    let more = left.into_iter();
    differ.extend(more.map(|(what, vm)| Mismatch { what, file: "none".to_owned(), vm }));
}
