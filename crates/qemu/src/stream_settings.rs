//! QEMU's migration settings: what a save needs, and how they are put back.

use std::collections::BTreeMap;
use std::num::NonZeroU8;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::qmp::unexpected;
use crate::vm::{Vm, VmError};

/// A bandwidth in bytes per second at which QEMU gives its threads only a few pages every tenth of
/// a second. QEMU (10.0) treats less than ten bytes per second as no limit.
pub(crate) const TRICKLE: u64 = 4096;

/// The parameter that limits the bandwidth of a migration.
const BANDWIDTH: &str = "max-bandwidth";

/// Parameters that affect what is sent and how fast. Not every QEMU has all of them.
const PARAMETERS: [&str; 7] = [
    "tls-creds",
    BANDWIDTH,
    "downtime-limit",
    "multifd-channels",
    "multifd-compression",
    "zero-page-detection",
    "direct-io",
];

/// Capabilities with which several threads of QEMU write pages at fixed offsets.
const FILE_CAPABILITIES: [&str; 2] = ["mapped-ram", "multifd"];

/// Capabilities that do not change the stream: with `events`, QEMU sends more events.
const HARMLESS: [&str; 1] = ["events"];

/// QEMU's migration capabilities and parameters, by QEMU's names.
///
/// Those that were read from a VM can be restored later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamSettings {
    capabilities: BTreeMap<String, bool>,
    parameters: Map<String, Value>,
}

impl StreamSettings {
    /// Returns these settings with every capability off that changes the stream, without TLS, which
    /// neither a socket pair nor a file supports, and without a bandwidth limit: QEMU (10.0)
    /// applies the default of 128 MiB/s to a stopped VM too.
    #[must_use]
    pub fn plain(&self) -> StreamSettings {
        let mut plain = self.clone();
        for (name, state) in &mut plain.capabilities {
            *state = *state && HARMLESS.contains(&name.as_str());
        }
        plain.set(BANDWIDTH, 0.into());
        if plain.parameters.get("tls-creds").is_some_and(Value::is_string) {
            plain.set("tls-creds", "".into());
        }
        plain
    }

    /// Returns plain settings with which the guest runs while QEMU sends it, and is stopped for
    /// about `pause_max` at the end: QEMU then waits for [`Vm::switch_over`] before the last part.
    #[must_use]
    pub fn pre_copy(&self, pause_max: Duration) -> StreamSettings {
        let mut settings = self.plain();
        settings.capabilities.insert("pause-before-switchover".to_owned(), true);
        let milliseconds = u64::try_from(pause_max.as_millis()).unwrap_or(u64::MAX);
        settings.parameters.insert("downtime-limit".to_owned(), milliseconds.into());
        settings
    }

    /// Returns plain settings with which QEMU sends the guest's state of one moment while the guest
    /// runs on; `None` if this QEMU cannot (before 6.0).
    #[must_use]
    pub fn background_snapshot(&self) -> Option<StreamSettings> {
        let mut settings = self.plain();
        *settings.capabilities.get_mut("background-snapshot")? = true;
        Some(settings)
    }

    /// Returns plain settings with which QEMU sends pages uncompressed over `channels` connections
    /// beside the stream. QEMU 9.0 and later also report zero pages on these connections, whatever
    /// the machine type's default is.
    #[must_use]
    pub fn multifd(&self, channels: NonZeroU8) -> StreamSettings {
        let mut settings = self.plain();
        settings.capabilities.insert("multifd".to_owned(), true);
        settings.set("multifd-channels", channels.get().into());
        settings.set("multifd-compression", "none".into());
        settings.set("zero-page-detection", "multifd".into());
        settings
    }

    /// Returns plain settings with which `channels` threads of QEMU write a mapped-ram file, by
    /// direct I/O if `direct_io` is set.
    ///
    /// QEMU 10.0 uses `direct-io` only if both capabilities are on, and compresses no page of such
    /// a file. The guest must be stopped. With a downtime limit of 0, QEMU leaves no RAM for the
    /// last phase, which ignores the bandwidth limit; [`Vm::cancel_file`] needs that limit to work.
    #[must_use]
    pub fn mapped_ram(&self, channels: NonZeroU8, direct_io: bool) -> StreamSettings {
        let mut file = self.plain();
        for name in FILE_CAPABILITIES {
            file.capabilities.insert(name.to_owned(), true);
        }
        file.set("multifd-channels", channels.get().into());
        file.set("multifd-compression", "none".into());
        file.set("zero-page-detection", "multifd".into());
        file.set("direct-io", direct_io.into());
        file.set("downtime-limit", 0.into());
        file
    }

    /// Returns these settings with the bandwidth limit under which [`Vm::cancel_file`] waits.
    fn trickle(&self) -> StreamSettings {
        let mut trickle = self.clone();
        trickle.set(BANDWIDTH, TRICKLE.into());
        trickle
    }

    /// Whether this QEMU can write by direct I/O.
    #[must_use]
    pub fn has_direct_io(&self) -> bool {
        self.parameters.contains_key("direct-io")
    }

    /// Sets a parameter, if this QEMU has it.
    fn set(&mut self, name: &str, value: Value) {
        if let Some(parameter) = self.parameters.get_mut(name) {
            *parameter = value;
        }
    }
}

/// What a save may change in QEMU's migration settings, so that it can be put back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsChange {
    /// The capabilities that the save may change, as they were before it.
    capabilities: BTreeMap<String, bool>,
    /// The parameters that the save may change.
    parameters: BTreeMap<String, ParameterChange>,
}

/// A parameter that a save may change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ParameterChange {
    /// Its value before the save.
    before: Value,
    /// The values to which the save may set it.
    ours: Vec<Value>,
}

impl SettingsChange {
    /// Compares QEMU's settings before the save with all settings that the save may set.
    #[must_use]
    pub fn new(before: &StreamSettings, ours: &[StreamSettings]) -> SettingsChange {
        // The save, its guardian and the next vmfile set this limit before they cancel a migration.
        let trickle = before.trickle();
        let ours = || ours.iter().chain([&trickle]);
        let is_changed = |(name, state): &(&String, &bool)| {
            ours().any(|ours| ours.capabilities.get(*name).is_some_and(|ours| ours != *state))
        };
        let capabilities = before.capabilities.iter().filter(is_changed);
        let capabilities = capabilities.map(|(name, state)| (name.clone(), *state)).collect();
        let change = |(name, before): (&String, &Value)| {
            let ours = ours().filter_map(|ours| ours.parameters.get(name));
            let ours: Vec<Value> = ours.filter(|ours| *ours != before).cloned().collect();
            let is_changed = !ours.is_empty();
            is_changed.then(|| (name.clone(), ParameterChange { before: before.clone(), ours }))
        };
        let parameters = before.parameters.iter().filter_map(change).collect();
        SettingsChange { capabilities, parameters }
    }

    /// Returns `current` with all that the save has changed as it was before. What is neither as before
    /// nor as the save set it was changed by another client.
    fn undone(&self, current: &StreamSettings) -> StreamSettings {
        let mut undone = current.clone();
        for (name, state) in &mut undone.capabilities {
            *state = *self.capabilities.get(name).unwrap_or(state);
        }
        for (name, value) in &mut undone.parameters {
            let change = self.parameters.get(name);
            if let Some(change) = change.filter(|change| change.ours.contains(value)) {
                value.clone_from(&change.before);
            }
        }
        undone
    }

    /// Returns the commands that put back all that the save may have changed, for a process that does not
    /// know QEMU's current settings.
    pub(crate) fn commands(&self) -> Vec<(&'static str, Value)> {
        let capability =
            |(name, state): (&String, &bool)| json!({ "capability": name, "state": state });
        let capabilities: Vec<Value> = self.capabilities.iter().map(capability).collect();
        let parameter =
            |(name, change): (&String, &ParameterChange)| (name.clone(), change.before.clone());
        let parameters: Map<String, Value> = self.parameters.iter().map(parameter).collect();
        // Capabilities first: while mapped-ram is on, QEMU refuses parameters that conflict with
        // it.
        let mut commands = Vec::new();
        if !capabilities.is_empty() {
            commands.push(("migrate-set-capabilities", json!({ "capabilities": capabilities })));
        }
        if !parameters.is_empty() {
            commands.push(("migrate-set-parameters", Value::Object(parameters)));
        }
        commands
    }
}

/// Returns the command that sets the limit on the bandwidth of a migration.
pub(crate) fn set_bandwidth(limit: &Value) -> (&'static str, Value) {
    ("migrate-set-parameters", json!({ BANDWIDTH: limit }))
}

impl Vm {
    /// Returns the current capabilities and parameters that affect a stream.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn stream_settings(&mut self) -> Result<StreamSettings, VmError> {
        let command = "query-migrate-capabilities";
        let answer = self.execute(command, Value::Null)?;
        let list = answer.as_array().ok_or_else(|| unexpected(command, "list"))?;
        let capability = |item: &Value| {
            let name = item.get("capability")?.as_str()?.to_owned();
            Some((name, item.get("state")?.as_bool()?))
        };
        let capabilities = list.iter().filter_map(capability).collect();
        let mut parameters = self.execute("query-migrate-parameters", Value::Null)?;
        let mut kept = Map::new();
        for name in PARAMETERS {
            if let Some(value) = parameters.get_mut(name) {
                kept.insert(name.to_owned(), value.take());
            }
        }
        Ok(StreamSettings { capabilities, parameters: kept })
    }

    /// Changes capabilities and parameters to `wanted`, where `current` differs.
    ///
    /// # Errors
    ///
    /// QEMU refuses while a migration is under way.
    pub fn change_stream_settings(
        &mut self,
        current: &StreamSettings,
        wanted: &StreamSettings,
    ) -> Result<(), VmError> {
        // While mapped-ram is on, QEMU refuses every change of parameters if one of them conflicts
        // with it.
        if wanted.capabilities.get(FILE_CAPABILITIES[0]) == Some(&true) {
            self.change_parameters(current, wanted)?;
            self.change_capabilities(current, wanted)
        } else {
            self.change_capabilities(current, wanted)?;
            self.change_parameters(current, wanted)
        }
    }

    /// Makes those changes that lead from `before` to `wanted`, whatever another client has changed since: all
    /// capabilities, because they must go together, and the parameters that differ.
    ///
    /// # Errors
    ///
    /// As for [`Vm::change_stream_settings`].
    pub fn apply_stream_settings(
        &mut self,
        before: &StreamSettings,
        wanted: &StreamSettings,
    ) -> Result<(), VmError> {
        let current = self.stream_settings()?;
        let mut wanted = wanted.clone();
        for (name, value) in &mut wanted.parameters {
            let is_kept = before.parameters.get(name) == Some(value);
            if let Some(current) = current.parameters.get(name).filter(|_| is_kept) {
                value.clone_from(current);
            }
        }
        self.change_stream_settings(&current, &wanted)
    }

    /// Puts back what a save has changed. What another client has changed since stays as that client wants
    /// it.
    ///
    /// # Errors
    ///
    /// As for [`Vm::change_stream_settings`].
    pub fn put_back_stream_settings(&mut self, change: &SettingsChange) -> Result<(), VmError> {
        let current = self.stream_settings()?;
        self.change_stream_settings(&current, &change.undone(&current))
    }

    /// Returns the limit on the bandwidth of a migration.
    pub(crate) fn bandwidth(&mut self) -> Result<Value, VmError> {
        let command = "query-migrate-parameters";
        let answer = self.execute(command, Value::Null)?;
        Ok(answer.get(BANDWIDTH).cloned().ok_or_else(|| unexpected(command, BANDWIDTH))?)
    }

    /// Sets the limit on the bandwidth of a migration.
    pub(crate) fn set_bandwidth(&mut self, limit: &Value) -> Result<(), VmError> {
        let (command, arguments) = set_bandwidth(limit);
        Ok(self.execute(command, arguments).map(drop)?)
    }

    fn change_capabilities(
        &mut self,
        current: &StreamSettings,
        wanted: &StreamSettings,
    ) -> Result<(), VmError> {
        let differs =
            |(name, state): &(&String, &bool)| current.capabilities.get(*name) != Some(*state);
        let changed: Vec<Value> = wanted
            .capabilities
            .iter()
            .filter(differs)
            .map(|(name, state)| json!({ "capability": name, "state": state }))
            .collect();
        if !changed.is_empty() {
            self.execute("migrate-set-capabilities", json!({ "capabilities": changed }))?;
        }
        Ok(())
    }

    fn change_parameters(
        &mut self,
        current: &StreamSettings,
        wanted: &StreamSettings,
    ) -> Result<(), VmError> {
        let changed: Map<String, Value> = wanted
            .parameters
            .iter()
            .filter(|(name, value)| current.parameters.get(*name) != Some(*value))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !changed.is_empty() {
            self.execute("migrate-set-parameters", Value::Object(changed))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_settings_have_no_capability_and_no_limit() {
        let capabilities = [("multifd", true), ("events", true), ("xbzrle", false)];
        let capabilities = capabilities.map(|(name, state)| (name.to_owned(), state)).into();
        let parameters = json!({ "max-bandwidth": 134_217_728, "downtime-limit": 300 });
        let Value::Object(parameters) = parameters else { panic!("an object") };
        let plain = StreamSettings { capabilities, parameters }.plain();
        assert!(!plain.capabilities["multifd"]);
        assert!(plain.capabilities["events"]);
        assert_eq!(plain.parameters["max-bandwidth"], 0);
        assert_eq!(plain.parameters["downtime-limit"], 300);
    }

    #[test]
    fn settings_of_a_file_name_no_parameter_that_qemu_does_not_have() {
        let capabilities = [("multifd", false), ("mapped-ram", false), ("xbzrle", true)];
        let capabilities = capabilities.map(|(name, state)| (name.to_owned(), state)).into();
        let parameters = json!({ "multifd-channels": 8, "multifd-compression": "zlib" });
        let Value::Object(parameters) = parameters else { panic!("an object") };
        let before = StreamSettings { capabilities, parameters };
        let file = before.mapped_ram(NonZeroU8::new(3).unwrap(), true);
        let on: Vec<&str> = file
            .capabilities
            .iter()
            .filter(|(_, on)| **on)
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(on, ["mapped-ram", "multifd"]);
        let expected = json!({ "multifd-channels": 3, "multifd-compression": "none" });
        assert_eq!(Value::Object(file.parameters), expected);
    }
}
