//! What QEMU's process had from those who started it, and vmfile's process had not.

use alloc::collections::BTreeMap;
use alloc::string::String;

use serde::{Deserialize, Serialize};

/// What QEMU's process had from those who started it, where that was not what the saving vmfile had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SurroundingsMeta {
    /// Its control group of version 2, such as `/machine.slice/vm.scope`.
    #[serde(default)]
    pub control_group: Option<String>,
    /// Its network namespace, such as `net:[4026532201]`.
    #[serde(default)]
    pub network_namespace: Option<String>,
    /// Its soft limits by the kernel's names of them, such as `Max open files`; `None` is no limit.
    #[serde(default)]
    pub limits: BTreeMap<String, Option<u64>>,
    /// Variables of its environment that change what QEMU does, each with the checksum of its value: 32
    /// lower-case hexadecimal digits.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}
