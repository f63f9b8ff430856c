//! Compares a VM with what its command line would make.

use vmfile_format::manifest::{
    ChangeMeta, CpuMeta, DeviceMeta, MemoryDeviceMeta, PartsMeta, PinMeta, VmMeta,
};
use vmfile_qemu::{CommandLine, Difference, Drive, Parts, Remedy, Vm, identity};

use super::{After, SaveOptions, config_files};
use crate::change::Change;
use crate::error::SaveError;

/// Compares `vm` and its `drives` with what its command line would make, and records in `meta` the
/// parts of the VM and the differences.
///
/// # Errors
///
/// [`SaveError::Changed`] if they differ and the VM is to end, unless the options allow it.
pub(super) fn compare(
    vm: &mut Vm,
    meta: &mut VmMeta,
    drives: &[Drive],
    options: &SaveOptions,
) -> Result<Known, SaveError> {
    let parts = vm.parts()?;
    let mut notes = Vec::new();
    if let Some(words) = meta.command_line.get(1..) {
        // If vmfile cannot parse the command line, the file keeps it as it is, and a restore
        // reports what is wrong with it.
        if let Ok(line) = CommandLine::new(words.iter().cloned()) {
            let process = vm.process()?;
            let compared = identity::compare(vm, (&parts, drives), &line, &process)?;
            let differences = compared.differences.into_iter();
            let differences = differences.chain(config_files::changed(&process));
            meta.changes = differences.map(note).collect();
            notes = compared.notes;
        }
    }
    meta.parts = Some(describe(parts.clone()));
    if options.after == After::Quit && !options.changed_ok && !meta.changes.is_empty() {
        return Err(SaveError::Changed { changes: report(meta) });
    }
    Ok(Known { parts, notes })
}

/// The parts of a VM when its save began.
#[derive(Debug)]
pub(super) struct Known {
    parts: Parts,
    /// Notes for the user, a sentence each.
    pub(super) notes: Vec<String>,
}

impl Known {
    /// Refuses a VM that gained or lost parts since: the manifest would describe another VM.
    pub(super) fn still_holds(&self, vm: &mut Vm) -> Result<(), SaveError> {
        match vm.changed_part(&self.parts)? {
            None => Ok(()),
            Some(what) => Err(SaveError::ChangedMeanwhile { what }),
        }
    }
}

/// Returns the changes in `meta` for a report.
pub(super) fn report(meta: &VmMeta) -> Vec<Change> {
    let change = |change: &ChangeMeta| Change {
        what: change.what.clone(),
        found: change.found.clone(),
        expected: change.expected.clone(),
        leave_out: change.leave_out.clone(),
        add: change.add.clone(),
        obstacle: change.obstacle.clone(),
    };
    meta.changes.iter().map(change).collect()
}

fn note(difference: Difference) -> ChangeMeta {
    let mut change = ChangeMeta {
        what: difference.what,
        found: difference.found,
        expected: difference.expected,
        leave_out: Vec::new(),
        pins: Vec::new(),
        add: Vec::new(),
        obstacle: None,
    };
    match difference.remedy {
        Remedy::Change { leave_out, pins, add } => {
            change.leave_out = leave_out.into_iter().map(|number| number as u64).collect();
            let pin = |pin: vmfile_qemu::Pin| PinMeta {
                device: pin.device as u64,
                key: pin.key,
                value: pin.value,
            };
            change.pins = pins.into_iter().map(pin).collect();
            change.add = add.into_iter().flat_map(|(option, value)| [option, value]).collect();
        }
        Remedy::Missing(reason) => change.obstacle = Some(reason),
    }
    change
}

fn describe(parts: Parts) -> PartsMeta {
    let device = |device: vmfile_qemu::Device| DeviceMeta { id: device.id, kind: device.kind };
    let memory = |device: vmfile_qemu::MemoryDevice| MemoryDeviceMeta {
        id: device.id,
        kind: device.kind,
        bytes: device.size,
        address: device.address,
        slot: device.slot,
        node: device.node,
    };
    let cpu = |cpu: vmfile_qemu::Cpu| CpuMeta { kind: cpu.kind, place: cpu.place };
    PartsMeta {
        devices: parts.devices.into_iter().map(device).collect(),
        memory_devices: parts.memory_devices.into_iter().map(memory).collect(),
        cpus: parts.cpus.into_iter().map(cpu).collect(),
    }
}
