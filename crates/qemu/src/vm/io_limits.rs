//! I/O limits of drives: QEMU keeps them outside the guest's state, and a monitor changes them
//! while the VM runs.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::drives::named;
use super::{Drive, Vm, VmError};

/// The limits that `block_set_io_throttle` demands (QEMU 7.2 to 11.1): bytes and requests per
/// second, all, read and written.
const LIMITS: [&str; 6] = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];

/// What `block_set_io_throttle` takes besides: how far and how long bursts go beyond the limits.
const BURSTS: [&str; 13] = [
    "bps_max",
    "bps_rd_max",
    "bps_wr_max",
    "iops_max",
    "iops_rd_max",
    "iops_wr_max",
    "bps_max_length",
    "bps_rd_max_length",
    "bps_wr_max_length",
    "iops_max_length",
    "iops_rd_max_length",
    "iops_wr_max_length",
    "iops_size",
];

/// I/O limits of a drive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IoLimits {
    /// QEMU's names of the limits (`iops`, `bps_rd`, ...) with their values, as
    /// `block_set_io_throttle` takes them; nothing if there are none.
    pub values: BTreeMap<String, u64>,
    /// The group of drives that share them; `None` if there are none.
    pub group: Option<String>,
}

impl IoLimits {
    /// Returns limits with these values, by QEMU's names, for this group of drives.
    #[must_use]
    pub fn new(values: BTreeMap<String, u64>, group: Option<String>) -> IoLimits {
        IoLimits { values, group }
    }

    /// Reads the limits of a medium: without any, QEMU lists each of [`LIMITS`] as 0.
    pub(super) fn of_medium(inserted: &Value) -> IoLimits {
        let number = |key: &str| inserted.get(key).and_then(Value::as_u64);
        let is_limited = LIMITS.iter().any(|key| number(key).is_some_and(|value| value > 0));
        if !is_limited {
            return IoLimits::default();
        }
        let keys = LIMITS.iter().chain(&BURSTS);
        let values = keys.filter_map(|key| Some(((*key).to_owned(), number(key)?))).collect();
        IoLimits { values, group: named(inserted, "group") }
    }
}

impl Vm {
    /// Gives a drive I/O limits instead of those that it has. Values under unknown names are left
    /// out: they may come from a file.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute). QEMU refuses a drive without a medium.
    pub fn limit_drive(&mut self, drive: &Drive, limits: &IoLimits) -> Result<(), VmError> {
        let mut arguments: Map<String, Value> =
            LIMITS.iter().map(|key| ((*key).to_owned(), json!(0))).collect();
        let known = |key: &str| LIMITS.contains(&key) || BURSTS.contains(&key);
        let values = limits.values.iter().filter(|(key, _)| known(key));
        arguments.extend(values.map(|(key, value)| (key.clone(), json!(value))));
        arguments.extend(limits.group.iter().map(|group| ("group".to_owned(), json!(group))));
        let name = if drive.id.is_empty() { "id" } else { "device" };
        arguments.insert(name.to_owned(), json!(drive.name()));
        Ok(self.execute("block_set_io_throttle", Value::Object(arguments)).map(drop)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_that_qemu_takes_back() {
        // From QEMU 10.0.2.
        let mut inserted = json!({"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 100, "iops_rd": 0,
            "iops_wr": 0, "iops_max": 200, "iops_max_length": 5, "group": "ide0-hd0"});
        let found = IoLimits::of_medium(&inserted);
        assert_eq!(found.group.as_deref(), Some("ide0-hd0"));
        assert_eq!(found.values.len(), 8);
        assert_eq!(found.values.get("iops_max_length"), Some(&5));
        inserted["iops"] = json!(0);
        assert_eq!(IoLimits::of_medium(&inserted), IoLimits::default());
    }
}
