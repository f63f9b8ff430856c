//! Outgoing migration of a running VM: as a stream, or as a file that QEMU writes.

use std::collections::BTreeMap;
use std::num::NonZeroU8;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::pass_fd::{self, FILE_FDSET};
use crate::qmp::unexpected;
use crate::vm::{RunState, Vm, VmError};

/// The name under which QEMU keeps the stream's descriptor until it writes to it.
pub(crate) const STREAM_NAME: &str = "vmfile-outgoing";

/// How often the state of the migration is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// A bandwidth in bytes per second at which QEMU gives its threads only a few pages every tenth of
/// a second. QEMU (10.0) treats less than ten bytes per second as no limit.
const TRICKLE: u64 = 4096;

/// QEMU's threads count as idle when QEMU has given them no pages for this long. It is less than
/// the time between two portions of a trickle, and long enough for a thread on a busy host to have
/// marked its pages. A fixed wait of 200 ms, which may end just after a portion, killed 2 VMs in
/// 400.
pub(crate) const QUIET: Duration = Duration::from_millis(50);

/// Returns the command after which QEMU gives its threads hardly any pages.
pub(crate) fn trickle() -> (&'static str, Value) {
    ("migrate-set-parameters", json!({ "max-bandwidth": TRICKLE }))
}

/// Parameters that affect what is sent and how fast. Not every QEMU has all of them.
const PARAMETERS: [&str; 7] = [
    "tls-creds",
    "max-bandwidth",
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
        plain.set("max-bandwidth", 0.into());
        if plain.parameters.get("tls-creds").is_some_and(Value::is_string) {
            plain.set("tls-creds", "".into());
        }
        plain
    }

    /// Returns plain settings with which the guest runs while QEMU sends it, and is stopped for
    /// about `pause_max` at the end.
    ///
    /// With `hold`, QEMU stops the guest before the last part and waits for [`Vm::switch_over`].
    #[must_use]
    pub fn pre_copy(&self, pause_max: Duration, hold: bool) -> StreamSettings {
        let mut settings = self.plain();
        if hold {
            settings.capabilities.insert("pause-before-switchover".to_owned(), true);
        }
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

    pub(crate) fn capabilities(&self) -> &BTreeMap<String, bool> {
        &self.capabilities
    }

    pub(crate) fn parameters(&self) -> &Map<String, Value> {
        &self.parameters
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

/// Descriptors of one file that QEMU keeps, so that it can write the file.
///
/// [`Vm::drop_file`] makes QEMU close them.
#[derive(Debug)]
#[must_use = "QEMU keeps the descriptors until it is told to drop them"]
pub struct KeptFile {
    _private: (),
}

/// How much of its RAM a VM has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentRam {
    /// Bytes of RAM that QEMU has not looked at yet.
    pub remaining_bytes: u64,
    /// Bytes of RAM.
    pub total_bytes: u64,
    /// Pages sent, zero pages among them.
    pub pages: u64,
}

/// The state of an outgoing migration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outgoing {
    /// The migration is starting or under way.
    Active,
    /// The VM is stopped and waits for [`Vm::switch_over`]; it still has its disks.
    Held,
    /// QEMU has sent everything; the VM is stopped until it is ended or resumed with `cont`.
    Completed,
    /// The migration failed; QEMU's own words.
    Failed(String),
    /// The migration was cancelled, or none was started.
    Cancelled,
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

    /// Puts back what was changed from `before` to `ours`. What another client has changed since stays
    /// as that client wants it.
    ///
    /// # Errors
    ///
    /// As for [`Vm::change_stream_settings`].
    pub fn put_back_stream_settings(
        &mut self,
        ours: &StreamSettings,
        before: &StreamSettings,
    ) -> Result<(), VmError> {
        let current = self.stream_settings()?;
        let mut wanted = current.clone();
        for (name, state) in &mut wanted.capabilities {
            if ours.capabilities.get(name) == Some(state) {
                *state = *before.capabilities.get(name).unwrap_or(state);
            }
        }
        for (name, value) in &mut wanted.parameters {
            if ours.parameters.get(name) == Some(value) {
                *value = before.parameters.get(name).unwrap_or(value).clone();
            }
        }
        self.change_stream_settings(&current, &wanted)
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

    /// Makes QEMU send the VM into `stream`; returns as soon as it has begun.
    ///
    /// The descriptor is closed here once QEMU has it, so that QEMU's end is the only one.
    ///
    /// # Errors
    ///
    /// Whatever QEMU says: the VM is not in a state to be sent, or something blocks it.
    pub fn send_stream(&mut self, stream: OwnedFd) -> Result<(), VmError> {
        pass_fd::getfd(&mut self.qmp, STREAM_NAME, stream.as_fd())?;
        drop(stream);
        let uri = format!("fd:{STREAM_NAME}");
        if let Err(error) = self.execute("migrate", json!({ "uri": uri })) {
            // Return the reason for the refusal, even if QEMU cannot close the descriptor.
            let _ = pass_fd::closefd(&mut self.qmp, STREAM_NAME);
            return Err(error.into());
        }
        Ok(())
    }

    /// Makes QEMU send the VM to a Unix socket; returns as soon as it has begun. QEMU connects to
    /// the socket once for each channel.
    ///
    /// # Errors
    ///
    /// Whatever QEMU says: the VM is not in a state to be sent, or something blocks it.
    pub fn send_to_socket(&mut self, socket: &Path) -> Result<(), VmError> {
        let uri = format!("unix:{}", socket.display());
        Ok(self.execute("migrate", json!({ "uri": uri })).map(drop)?)
    }

    /// Returns how long the guest was stopped, from the events received so far, and discards them;
    /// `None` if no `RESUME` is among them.
    #[must_use]
    pub fn pause_seen(&mut self) -> Option<Duration> {
        let mut stopped = None;
        let mut pause: Option<Duration> = None;
        for event in self.qmp.take_events() {
            match (event.name.as_str(), event.time) {
                ("STOP", time) => stopped = time,
                ("RESUME", Some(time)) => {
                    let len = stopped.take().map(|stopped| time.saturating_sub(stopped));
                    pause = Some(pause.unwrap_or_default() + len.unwrap_or_default());
                }
                _ => {}
            }
        }
        pause
    }

    /// Passes QEMU descriptors of a file that it is to write; the caller may close its own.
    ///
    /// QEMU chooses a descriptor by its flags: a write-only one for the stream, and for pages one
    /// that also has `O_DIRECT` if the parameter `direct-io` is on. Each must come from its own
    /// `open`.
    ///
    /// # Errors
    ///
    /// QEMU's error; QEMU keeps none of the descriptors then.
    pub fn keep_file(&mut self, descriptors: &[OwnedFd]) -> Result<KeptFile, VmError> {
        for fd in descriptors {
            if let Err(error) = pass_fd::add_fd(&mut self.qmp, FILE_FDSET, fd.as_fd()) {
                return match pass_fd::remove_left(&mut self.qmp) {
                    Ok(()) => Err(error.into()),
                    Err(other) => Err(other.into()),
                };
            }
        }
        Ok(KeptFile { _private: () })
    }

    /// Makes QEMU close its descriptors of a file.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn drop_file(&mut self, _file: KeptFile) -> Result<(), VmError> {
        Ok(pass_fd::remove_fd(&mut self.qmp, FILE_FDSET)?)
    }

    /// Makes QEMU write the VM into `file` from its beginning; returns as soon as it has begun.
    ///
    /// # Errors
    ///
    /// Whatever QEMU says: the VM is not in a state to be sent, or something blocks it.
    pub fn send_to_file(&mut self, _file: &KeptFile) -> Result<(), VmError> {
        let uri = format!("file:/dev/fdset/{FILE_FDSET}");
        Ok(self.execute("migrate", json!({ "uri": uri })).map(drop)?)
    }

    /// Returns the state of the outgoing migration.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn outgoing(&mut self) -> Result<Outgoing, VmError> {
        Ok(self.outgoing_ram()?.0)
    }

    /// As [`Vm::outgoing`], with how much RAM was sent, once QEMU knows.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn outgoing_ram(&mut self) -> Result<(Outgoing, Option<SentRam>), VmError> {
        let answer = self.execute("query-migrate", Value::Null)?;
        let ram = |key| answer.get("ram")?.get(key)?.as_u64();
        let sent = ram("remaining").zip(ram("total"));
        let pages = ram("normal").unwrap_or(0).saturating_add(ram("duplicate").unwrap_or(0));
        let sent = sent.map(|(remaining_bytes, total_bytes)| SentRam {
            remaining_bytes,
            total_bytes,
            pages,
        });
        Ok((outgoing(&answer), sent))
    }

    /// Lets a VM that waits before the last part ([`Outgoing::Held`]) send that part.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn switch_over(&mut self) -> Result<(), VmError> {
        let state = json!({ "state": "pre-switchover" });
        Ok(self.execute("migrate-continue", state).map(drop)?)
    }

    /// Waits at most `timeout` until the migration has ended, and returns its state.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn wait_sent(&mut self, timeout: Duration) -> Result<Outgoing, VmError> {
        let deadline = Instant::now() + timeout;
        loop {
            let outgoing = self.outgoing()?;
            let is_over = !matches!(outgoing, Outgoing::Active | Outgoing::Held);
            if is_over {
                return self.settle(deadline).map(|()| outgoing);
            }
            if Instant::now() >= deadline {
                return Ok(outgoing);
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until QEMU has cleaned up after a migration. QEMU reports the end of the migration
    /// some moments before, and refuses `cont` meanwhile ("Migration is not finalized yet", 7.2).
    pub(crate) fn settle(&mut self, deadline: Instant) -> Result<(), VmError> {
        while self.run_state()? == RunState::FinishMigrate && Instant::now() < deadline {
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Cancels an outgoing migration, in whatever phase it is, and waits at most `timeout` in all
    /// until it has ended. After that the VM can be resumed, or sent again.
    ///
    /// If QEMU sends over several connections, the receivers must keep accepting connections and
    /// reading until this returns, and must not close before: see the route `stream`.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn end_sending(&mut self, timeout: Duration) -> Result<Outgoing, VmError> {
        self.unstoppable(timeout, |vm| {
            let deadline = Instant::now() + timeout;
            vm.wait_connected(deadline)?;
            vm.execute("migrate_cancel", Value::Null)?;
            vm.wait_sent(deadline.saturating_duration_since(Instant::now()))
        })
    }

    /// Waits while QEMU connects to the receiver: QEMU 10.0.2 may abort if cancelled meanwhile.
    pub(crate) fn wait_connected(&mut self, deadline: Instant) -> Result<(), VmError> {
        loop {
            let answer = self.execute("query-migrate", Value::Null)?;
            let connects = answer.get("status").and_then(Value::as_str) == Some("setup");
            if !connects || Instant::now() >= deadline {
                return Ok(());
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Cancels like [`Vm::cancel_sending`], for a file that several threads of QEMU write.
    ///
    /// When it cancels, QEMU (10.0.2) frees the bitmaps of a mapped-ram file before it ends those
    /// threads; a thread that has just been given pages then writes through a null pointer, and
    /// QEMU crashes. So this first waits until the threads are idle.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn cancel_file(&mut self, timeout: Duration) -> Result<Outgoing, VmError> {
        let deadline = Instant::now() + timeout;
        let (command, arguments) = trickle();
        self.execute(command, arguments)?;
        let mut seen = None;
        let mut quiet_since = Instant::now();
        loop {
            let answer = self.execute("query-migrate", Value::Null)?;
            let outgoing = outgoing(&answer);
            match outgoing {
                Outgoing::Active => {}
                // All pages are written: the threads are idle, and stay so until QEMU switches
                // over.
                Outgoing::Held => return self.cancel_sending(timeout),
                _ => return self.settle(deadline).map(|()| outgoing),
            }
            let ram = answer.get("ram").cloned();
            if ram != seen {
                (seen, quiet_since) = (ram, Instant::now());
            }
            if quiet_since.elapsed() >= QUIET || Instant::now() >= deadline {
                return self.cancel_sending(timeout);
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Cancels the migration, and waits at most `timeout` until it has ended.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn cancel_sending(&mut self, timeout: Duration) -> Result<Outgoing, VmError> {
        self.execute("migrate_cancel", Value::Null)?;
        self.wait_sent(timeout)
    }
}

/// Reads the state of the migration from the answer to `query-migrate`.
fn outgoing(answer: &Value) -> Outgoing {
    let text = |key| answer.get(key).and_then(Value::as_str);
    match text("status") {
        Some("completed") => Outgoing::Completed,
        Some("failed") => {
            // QEMU 7.2 gives no reason.
            let reason = text("error-desc").unwrap_or("it gave no reason");
            Outgoing::Failed(reason.to_owned())
        }
        Some("cancelled") | None => Outgoing::Cancelled,
        Some("pre-switchover") => Outgoing::Held,
        _ => Outgoing::Active,
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
