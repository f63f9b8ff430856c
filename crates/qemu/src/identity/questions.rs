//! Asks QEMU about a part that was plugged in.

use serde_json::{Value, json};

use super::parts::{Device, known};
use crate::vm::{Vm, VmError};

/// Options that make a device, or why there are none.
pub(super) type OptionsOrReason = Result<Vec<(String, String)>, String>;

pub(super) fn human_command(vm: &mut Vm, command: &str) -> Result<String, VmError> {
    let answer = known(vm.execute("human-monitor-command", json!({"command-line": command})))?;
    Ok(answer.and_then(|text| Some(text.as_str()?.to_owned())).unwrap_or_default())
}

/// Returns the name of the back end that the property `key` of a device names, if it has one.
pub(super) fn back_end(vm: &mut Vm, device: &Device, key: &str) -> Result<Option<String>, VmError> {
    let name = vm.property(&device.path, key)?;
    let name = name.as_ref().and_then(Value::as_str);
    Ok(name.filter(|name| !name.is_empty()).map(str::to_owned))
}
