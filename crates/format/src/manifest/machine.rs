//! What a VM was made of, where that can differ from what its command line makes.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::stream::device_state::DeviceState;

/// The parts of a VM that can come and go while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartsMeta {
    /// The devices of `-device`, of `device_add`, and of options that stand for `-device`.
    pub devices: Vec<DeviceMeta>,
    /// The memory devices, which are among the devices too.
    pub memory_devices: Vec<MemoryDeviceMeta>,
    /// The CPUs that were present.
    pub cpus: Vec<CpuMeta>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMeta {
    /// Its id, if it has one.
    pub id: Option<String>,
    /// QEMU's name of its type.
    pub kind: String,
}

/// A memory device, such as a DIMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDeviceMeta {
    /// Its id.
    pub id: String,
    /// `dimm`, `nvdimm`, ...
    pub kind: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Where the guest sees it.
    pub address: Option<u64>,
    /// The slot that it is in.
    pub slot: Option<i64>,
    /// The NUMA node that it belongs to.
    pub node: Option<i64>,
}

/// A CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuMeta {
    /// QEMU's name of its type.
    pub kind: String,
    /// Its place: `socket-id`, `core-id`, `thread-id` and so on.
    pub place: BTreeMap<String, i64>,
}

/// A range of the guest's physical addresses with memory behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRangeMeta {
    /// Its first guest-physical address.
    pub guest_address: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// The RAM block that it shows; `None` if that is not in the file, or could be one of several.
    pub block: Option<String>,
    /// Where in the block it begins, in bytes.
    pub offset: u64,
    /// Whether the guest may write there.
    pub writable: bool,
}

/// The device section that holds a CPU's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSectionMeta {
    /// QEMU's number of the CPU: the section's instance.
    pub cpu: u32,
    /// The version of the section's format.
    pub version: u32,
    /// File offset of the section's payload.
    pub offset: u64,
    /// Length of the payload, in bytes.
    pub bytes: u64,
}

impl CpuSectionMeta {
    /// Finds the CPUs among the device sections of `state`, the first of which lies at file offset
    /// `start`.
    ///
    /// QEMU (2.4 to 11.1) calls the section `cpu`; its instance is the number of the CPU.
    #[must_use]
    pub fn find(state: &DeviceState, start: u64) -> Vec<CpuSectionMeta> {
        let cpus = state.sections.iter().filter(|section| section.name == "cpu");
        let found = cpus.map(|section| {
            let (payload, bytes) = section.payload();
            let in_state = section.offset.saturating_sub(state.start);
            let offset = start.saturating_add(in_state).saturating_add(payload);
            CpuSectionMeta { cpu: section.instance, version: section.version, offset, bytes }
        });
        found.collect()
    }
}

/// A part of the VM that was not what its command line makes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeMeta {
    /// The part.
    pub what: String,
    /// What the VM had.
    pub found: String,
    /// What the command line makes.
    pub expected: String,
    /// The `-device` options that a restore leaves out, counted from 0.
    #[serde(default)]
    pub leave_out: Vec<u64>,
    /// Properties that other devices get, so that they stay where they were.
    #[serde(default)]
    pub pins: Vec<PinMeta>,
    /// Options that a restore adds, each with its value behind it.
    #[serde(default)]
    pub add: Vec<String>,
    /// Why the command line cannot be changed so that it makes what the VM had.
    #[serde(default)]
    pub obstacle: Option<String>,
}

/// A property that a device gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinMeta {
    /// Which `-device` it is, counted from 0.
    pub device: u64,
    /// The property.
    pub key: String,
    /// Its value.
    pub value: String,
}
