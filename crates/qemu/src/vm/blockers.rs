//! What makes a VM impossible to save by any route, and what the user can do about it.

use std::fmt;

use serde_json::{Value, json};

use super::{RunState, Vm, VmError};

/// What kind of thing forbids a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockerKind {
    /// QEMU itself forbids every migration, because of a device or an option.
    QemuForbids,
    /// virtio-mem: part of its RAM may be unplugged, and which part is only in the RAM sections.
    VirtioMem,
    /// A device passed through from the host keeps state that only a migration collects.
    Vfio,
    /// The guest's RAM is encrypted; what we could read is of no use.
    EncryptedGuest,
    /// A disk's newest data are in a temporary file, which is lost when QEMU ends.
    TemporaryDisk,
    /// A migration is under way, or the VM has already been handed over by one.
    Migration,
    /// The guest is recorded or replayed.
    Replay,
}

impl BlockerKind {
    /// Returns what the user can do.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        match self {
            BlockerKind::QemuForbids => "remove the named device or option from the VM",
            BlockerKind::VirtioMem | BlockerKind::Vfio => "remove the device from the VM",
            BlockerKind::EncryptedGuest => "no remedy: only the guest's owner can read its RAM",
            BlockerKind::TemporaryDisk => {
                "start the VM without -snapshot, or commit the disk into its image first"
            }
            BlockerKind::Migration => "wait for the migration to end, or cancel it",
            BlockerKind::Replay => "start the VM without record and replay",
        }
    }
}

/// One thing that forbids a save.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Blocker {
    /// What kind of thing.
    pub kind: BlockerKind,
    /// Why, naming the device or option; QEMU's own words where it forbids.
    pub reason: String,
}

impl Blocker {
    fn new(kind: BlockerKind, reason: impl Into<String>) -> Blocker {
        Blocker { kind, reason: reason.into() }
    }

    /// Returns what the user can do.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        self.kind.remedy()
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Where QEMU's object tree has the devices that options and `device_add` made.
pub(super) const DEVICE_CONTAINERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

impl Vm {
    /// Returns everything that forbids a save of this VM by any route, not just the first.
    ///
    /// If this QEMU lacks a query command, it also lacks the feature that the command is about.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn why_not_saved(&mut self) -> Result<Vec<Blocker>, VmError> {
        let mut blockers = Vec::new();
        let migration = self.query_if_known("query-migrate")?.unwrap_or_default();
        blockers.extend(forbidden_by_qemu(&migration));
        blockers.extend(migration_under_way(&migration, &self.run_state()?));
        let memory = self.query_if_known("query-memory-devices")?.unwrap_or_default();
        blockers.extend(virtio_mem(&memory));
        for container in DEVICE_CONTAINERS {
            let devices = self.execute("qom-list", json!({"path": container}))?;
            blockers.extend(vfio(&devices));
        }
        blockers.extend(self.encrypted_guest()?);
        let replay = self.query_if_known("query-replay")?.unwrap_or_default();
        blockers.extend(replayed(&replay));
        for drive in self.drives()?.into_iter().filter(|drive| drive.temporary) {
            let reason = format!("disk {} keeps its changes in a temporary file", drive.name());
            blockers.push(Blocker::new(BlockerKind::TemporaryDisk, reason));
        }
        Ok(blockers)
    }

    fn encrypted_guest(&mut self) -> Result<Option<Blocker>, VmError> {
        let blocker = |reason: String| Some(Blocker::new(BlockerKind::EncryptedGuest, reason));
        if let Some(object) = self.machine_property("confidential-guest-support")? {
            return Ok(blocker(format!("the guest is confidential ({object})")));
        }
        // Before 6.0, SEV was not given by `confidential-guest-support`. Where there is no SEV, the
        // query is missing or refused.
        let sev = self.execute("query-sev", Value::Null).unwrap_or_default();
        let enabled = sev.get("enabled").and_then(Value::as_bool).unwrap_or(false);
        Ok(if enabled { blocker("the guest's RAM is encrypted (SEV)".to_owned()) } else { None })
    }
}

fn forbidden_by_qemu(migration: &Value) -> Vec<Blocker> {
    let reasons = migration.get("blocked-reasons").and_then(Value::as_array);
    let reasons = reasons.into_iter().flatten().filter_map(Value::as_str);
    reasons.map(|reason| Blocker::new(BlockerKind::QemuForbids, reason)).collect()
}

fn migration_under_way(migration: &Value, state: &RunState) -> Option<Blocker> {
    let status = migration.get("status").and_then(Value::as_str).unwrap_or("none");
    if !matches!(status, "none" | "completed" | "failed" | "cancelled") {
        let reason = format!("a migration is in the state {status}");
        return Some(Blocker::new(BlockerKind::Migration, reason));
    }
    let moved = matches!(
        state,
        RunState::InMigrate
            | RunState::PostMigrate
            | RunState::FinishMigrate
            | RunState::SaveVm
            | RunState::RestoreVm
    );
    moved.then(|| Blocker::new(BlockerKind::Migration, format!("the VM is in the state {state}")))
}

fn virtio_mem(memory_devices: &Value) -> Vec<Blocker> {
    let devices = memory_devices.as_array().into_iter().flatten();
    let kind = |device: &Value| device.get("type").and_then(Value::as_str).map(str::to_owned);
    let id = |device: &Value| {
        let id = device.get("data").and_then(|data| data.get("id")).and_then(Value::as_str);
        id.unwrap_or("without an id").to_owned()
    };
    devices
        .filter(|device| kind(device).as_deref() == Some("virtio-mem"))
        .map(|device| {
            let reason = format!("virtio-mem device {}", id(device));
            Blocker::new(BlockerKind::VirtioMem, reason)
        })
        .collect()
}

/// Finds passed-through devices among the children of a QOM container.
///
/// A device that cannot migrate is in `blocked-reasons` too. One that can has sections that only a
/// migration writes.
fn vfio(devices: &Value) -> Vec<Blocker> {
    let passed_through = typed_children(devices).filter(|(_, kind)| kind.starts_with("vfio-"));
    passed_through
        .map(|(name, kind)| {
            let reason = format!("passed-through device {name} ({kind})");
            Blocker::new(BlockerKind::Vfio, reason)
        })
        .collect()
}

/// Returns name and type of the objects in an answer to `qom-list`.
pub(super) fn typed_children(answer: &Value) -> impl Iterator<Item = (&str, &str)> {
    answer.as_array().into_iter().flatten().filter_map(|child| {
        let kind = child.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((child.get("name")?.as_str()?, kind))
    })
}

fn replayed(replay: &Value) -> Option<Blocker> {
    let mode = replay.get("mode").and_then(Value::as_str).unwrap_or("none");
    let reason = || format!("the guest is under record and replay (mode {mode})");
    (mode != "none").then(|| Blocker::new(BlockerKind::Replay, reason()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_s_reasons_are_quoted() {
        // From QEMU 10.0.2 with an ivshmem-plain that is not the master.
        let reason = "Migration is disabled when using feature 'peer mode' in device 'ivshmem'";
        let blockers = forbidden_by_qemu(&json!({"blocked-reasons": [reason]}));
        assert_eq!(blockers, [Blocker::new(BlockerKind::QemuForbids, reason)]);
        assert_eq!(forbidden_by_qemu(&json!({})), []);
    }

    #[test]
    fn a_finished_migration_does_not_forbid_and_a_running_one_does() {
        let status = |status: &str| json!({"status": status});
        assert_eq!(migration_under_way(&status("completed"), &RunState::Running), None);
        assert_eq!(migration_under_way(&json!({}), &RunState::Paused), None);
        assert!(migration_under_way(&status("postcopy-active"), &RunState::Paused).is_some());
        assert!(migration_under_way(&status("completed"), &RunState::PostMigrate).is_some());
    }

    #[test]
    fn only_virtio_mem_among_memory_devices_forbids() {
        // From QEMU 10.0.2, shortened.
        let devices = json!([
            {"type": "dimm", "data": {"id": "dimm0", "size": 16_777_216}},
            {"type": "virtio-mem", "data": {"id": "vm0", "size": 0}},
        ]);
        let blockers = virtio_mem(&devices);
        assert_eq!(blockers.len(), 1);
        assert_eq!(blockers.first().unwrap().to_string(), "virtio-mem device vm0");
    }

    #[test]
    fn a_vfio_device_forbids_and_a_virtio_device_does_not() {
        let devices = json!([
            {"name": "type", "type": "string"},
            {"name": "net0", "type": "child<virtio-net-pci>"},
            {"name": "gpu", "type": "child<vfio-pci>"},
        ]);
        let blockers = vfio(&devices);
        assert_eq!(blockers.len(), 1);
        assert_eq!(blockers.first().unwrap().reason, "passed-through device gpu (vfio-pci)");
    }

    #[test]
    fn record_and_replay_forbids() {
        assert_eq!(replayed(&json!({"icount": 0, "mode": "none"})), None);
        assert!(replayed(&json!({"icount": 420_072, "mode": "record"})).is_some());
    }

    #[test]
    fn every_kind_has_a_remedy() {
        for kind in [BlockerKind::QemuForbids, BlockerKind::EncryptedGuest] {
            assert!(!kind.remedy().is_empty());
        }
    }
}
