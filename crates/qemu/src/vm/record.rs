//! The record of a save, kept inside QEMU: which process saves the VM, and what must be undone.
//!
//! It is the data of a `secret` object of the VM, though nothing in it is secret. QEMU refuses a
//! second object of that name, so only one save of a VM can run at a time, whatever monitor it
//! uses. Every client of QEMU can read the record, and it ends with QEMU. No part of the machine
//! depends on such an object, and no migration stream contains it (tried on 7.2, 10.0 and 11.1).

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Overlay, Vm, VmError};
use crate::proc;
use crate::qmp::QmpError;
use crate::stream_settings::SettingsChange;

/// The id of the object. QEMU takes letters, digits and `-._`.
pub(crate) const RECORD_ID: &str = "vmfile-save";

/// A save at work: its process, and what it changes in QEMU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SaveRecord {
    /// The process that saves.
    pub holder: Holder,
    /// The process id of this save's guardian. Each save has a guardian of its own.
    pub guardian: u32,
    /// The file that is being written.
    pub destination: PathBuf,
    /// Whether the guest ran when the save began, and so is to be resumed.
    pub was_running: bool,
    /// What the save may change in QEMU's migration settings; `None` if it sends nothing.
    pub settings: Option<SettingsChange>,
    /// The overlays that the save puts on top of disks.
    pub overlays: Vec<Overlay>,
}

impl SaveRecord {
    /// Returns whether both are records of one save.
    pub(crate) fn is_of(&self, other: &SaveRecord) -> bool {
        (&self.holder, self.guardian) == (&other.holder, other.guardian)
    }

    /// Returns text that QEMU's answer to [`inquiry`] contains if it has the record of this save.
    /// The fields that an update may change are not in it.
    pub(crate) fn mark(&self) -> String {
        let holder = serde_json::to_string(&self.holder).expect("plain data has a JSON form");
        let start = format!("\"holder\":{holder},\"guardian\":{},", self.guardian);
        // The record is a JSON string inside QEMU's answer, so its quotes are escaped there.
        start.replace('"', "\\\"")
    }
}

/// A process, with what distinguishes it from others of the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process id in its own PID namespace.
    pub pid: u32,
    /// Its start time in the kernel's ticks since boot (field 22 of `/proc/PID/stat`).
    pub started_at_ticks: u64,
    /// The boot and the PID namespace in which these numbers are valid.
    pub namespace: String,
}

impl Holder {
    /// Describes this process.
    ///
    /// # Errors
    ///
    /// [`VmError::System`] when `/proc` cannot be read.
    pub fn this_process() -> Result<Holder, VmError> {
        let pid = std::process::id();
        let unreadable = |source| VmError::system("read /proc/self/stat", source);
        let started_at_ticks = proc::started_at_ticks(pid).map_err(unreadable)?;
        Ok(Holder { pid, started_at_ticks, namespace: proc::namespace().map_err(unreadable)? })
    }

    /// Returns whether the process still runs; `None` if this process cannot see it, because it
    /// runs in another process namespace or on another host.
    #[must_use]
    pub fn is_alive(&self) -> Option<bool> {
        if proc::namespace().ok()? != self.namespace {
            return None;
        }
        Some(proc::started_at_ticks(self.pid).is_ok_and(|ticks| ticks == self.started_at_ticks))
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)?;
        match self.is_alive() {
            None => write!(f, " of another process namespace or host"),
            Some(_) => Ok(()),
        }
    }
}

impl Vm {
    /// Puts `record` into QEMU, so that no other save of this VM can begin.
    ///
    /// # Errors
    ///
    /// [`VmError::Held`] when QEMU already has a record, of a save that runs or of one that was
    /// killed.
    pub fn hold(&mut self, record: &SaveRecord) -> Result<(), VmError> {
        let data = serde_json::to_string(record).expect("plain data has a JSON form");
        let object = json!({ "qom-type": "secret", "id": RECORD_ID, "data": data });
        match self.execute("object-add", object) {
            Ok(_) => Ok(()),
            Err(error @ QmpError::Refused { .. }) => match self.record()? {
                Some(found) => Err(VmError::Held { by: found.holder }),
                None => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Replaces the record that this save has left in QEMU.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn update_record(&mut self, record: &SaveRecord) -> Result<(), VmError> {
        let data = serde_json::to_string(record).expect("plain data has a JSON form");
        let arguments = json!({ "path": record_path(), "property": "data", "value": data });
        Ok(self.execute("qom-set", arguments).map(drop)?)
    }

    /// Returns the record that a save has left in QEMU, if one has.
    ///
    /// # Errors
    ///
    /// [`VmError::UnknownRecord`] when it is not one that this version understands.
    pub fn record(&mut self) -> Result<Option<SaveRecord>, VmError> {
        let Some(data) = self.qom_get(&record_path(), "data")? else { return Ok(None) };
        let text = data.as_str().unwrap_or_default();
        serde_json::from_str(text).map(Some).map_err(|source| VmError::UnknownRecord { source })
    }

    /// Removes the record of a save, after everything was undone.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn remove_record(&mut self) -> Result<(), VmError> {
        match self.execute("object-del", json!({ "id": RECORD_ID })) {
            // Another client has removed it ("object 'vmfile-save' not found", QEMU 7.2 to 11.1).
            Err(error) if error.is_refused() && error.to_string().contains("not found") => Ok(()),
            removed => Ok(removed.map(drop)?),
        }
    }
}

fn record_path() -> String {
    format!("/objects/{RECORD_ID}")
}

/// Returns the command that reads the record.
pub(crate) fn inquiry() -> (&'static str, Value) {
    ("qom-get", json!({ "path": record_path(), "property": "data" }))
}

/// Returns the command that removes the record.
pub(crate) fn removal() -> (&'static str, Value) {
    ("object-del", json!({ "id": RECORD_ID }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_one_that_had_its_number_is_not() {
        let holder = Holder::this_process().unwrap();
        assert_eq!(holder.is_alive(), Some(true));
        let earlier = Holder { started_at_ticks: holder.started_at_ticks - 1, ..holder.clone() };
        assert_eq!(earlier.is_alive(), Some(false));
        let elsewhere = Holder { namespace: "pid:[1] of another boot".to_owned(), ..holder };
        assert_eq!(elsewhere.is_alive(), None);
        assert!(elsewhere.to_string().ends_with("of another process namespace or host"));
    }

    #[test]
    fn a_record_is_found_by_its_mark_in_an_answer_and_another_one_is_not() {
        let record = SaveRecord {
            holder: Holder::this_process().unwrap(),
            guardian: 4_000_000,
            destination: PathBuf::from("/a \"file\""),
            was_running: true,
            settings: None,
            overlays: Vec::new(),
        };
        let other = SaveRecord { guardian: 4_000_001, ..record.clone() };
        let updated = SaveRecord { was_running: false, ..record.clone() };
        let answer = |record: &SaveRecord| {
            json!({ "return": serde_json::to_string(record).unwrap() }).to_string()
        };
        assert!(answer(&record).contains(&record.mark()));
        assert!(answer(&updated).contains(&record.mark()));
        assert!(!answer(&other).contains(&record.mark()));
        // The guardian looks for words of at most 256 bytes.
        assert!(record.mark().len() <= 256, "{}", record.mark());
    }
}
