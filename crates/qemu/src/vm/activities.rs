//! What QEMU does beside running the guest, and what ends with QEMU.

use serde_json::Value;

use super::{Vm, VmError};
use crate::qmp::{is_missing_command, unexpected};

impl Vm {
    /// Names what ends together with QEMU although no guest sees it: block jobs, such as a mirror
    /// whose target is not yet a whole copy, and exports, by which others read or write a disk.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn activities(&mut self) -> Result<Vec<String>, VmError> {
        let text = |value: &Value, key: &str| {
            value.get(key).and_then(Value::as_str).unwrap_or("without a name").to_owned()
        };
        let mut found = Vec::new();
        for job in self.list("query-block-jobs")? {
            found.push(format!("block job {:?} ({})", text(&job, "device"), text(&job, "type")));
        }
        for export in self.list("query-block-exports")? {
            let (id, node) = (text(&export, "id"), text(&export, "node-name"));
            let kind = text(&export, "type");
            found.push(format!("export {id:?} of node {node:?} ({kind})"));
        }
        Ok(found)
    }

    /// Asks for a list; a QEMU without the command has an empty one.
    fn list(&mut self, command: &'static str) -> Result<Vec<Value>, VmError> {
        match self.execute(command, Value::Null) {
            Ok(Value::Array(list)) => Ok(list),
            Ok(_) => Err(unexpected(command, "list").into()),
            Err(error) if is_missing_command(&error) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }
}
