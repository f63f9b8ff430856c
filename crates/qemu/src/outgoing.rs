//! A running VM that sends itself: as a stream, or as a file that QEMU writes.

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

/// How often QEMU is asked how far it is.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// A bandwidth at which QEMU hands its threads some pages every tenth of a second, in bytes each
/// second: it takes less than ten for no limit (10.0).
const TRICKLE: u64 = 4096;

/// How long QEMU has handed out nothing when its threads have run dry: less than the time between two
/// portions of a trickle, long enough for a thread of a busy host to have marked its pages. A fixed
/// rest of 200 ms, at whose end a portion may just have been handed out, killed 2 VMs in 400.
pub(crate) const QUIET: Duration = Duration::from_millis(50);

/// Returns the command by which QEMU hands its threads hardly any page from now on.
pub(crate) fn trickle() -> (&'static str, Value) {
    ("migrate-set-parameters", json!({ "max-bandwidth": TRICKLE }))
}

/// Parameters that decide about what is sent and how fast, as far as a QEMU has them.
const PARAMETERS: [&str; 7] = [
    "tls-creds",
    "max-bandwidth",
    "downtime-limit",
    "multifd-channels",
    "multifd-compression",
    "zero-page-detection",
    "direct-io",
];

/// Capabilities by which QEMU writes pages at fixed offsets, several at a time.
const FILE_CAPABILITIES: [&str; 2] = ["mapped-ram", "multifd"];

/// A capability that changes nothing about the stream: QEMU tells more of what it does.
const HARMLESS: [&str; 1] = ["events"];

/// How QEMU is to send: capabilities and parameters, by QEMU's names.
///
/// Read from a VM, it is what the VM had, and can be given back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamSettings {
    capabilities: BTreeMap<String, bool>,
    parameters: Map<String, Value>,
}

impl StreamSettings {
    /// Returns these settings with every capability off that changes the stream, without TLS, which
    /// neither a pair of sockets nor a file has, and without a limit on bandwidth: the default of
    /// 128 MiB/s holds for a VM that is stopped, too (QEMU 10.0).
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

    /// Returns plain settings by which the guest runs while it is sent, and stands still for about
    /// `pause_max` at the end.
    ///
    /// With `hold` it waits at the end, stopped, until [`Vm::switch_over`].
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

    /// Returns plain settings by which the guest is sent as it was at one moment while it runs on;
    /// `None` if this QEMU cannot (before 6.0).
    #[must_use]
    pub fn background_snapshot(&self) -> Option<StreamSettings> {
        let mut settings = self.plain();
        *settings.capabilities.get_mut("background-snapshot")? = true;
        Some(settings)
    }

    /// Returns plain settings by which pages go by `channels` connections beside the stream, as they
    /// are; zero pages are named beside those that they lie between, where QEMU can (9.0), whatever its
    /// machine type has for a default.
    #[must_use]
    pub fn multifd(&self, channels: NonZeroU8) -> StreamSettings {
        let mut settings = self.plain();
        settings.capabilities.insert("multifd".to_owned(), true);
        settings.set("multifd-channels", channels.get().into());
        settings.set("multifd-compression", "none".into());
        settings.set("zero-page-detection", "multifd".into());
        settings
    }

    /// Returns these settings as [`StreamSettings::plain`] does, but for a mapped-ram file that
    /// `channels` threads of QEMU write, past the page cache if `direct_io` says so.
    ///
    /// QEMU 10.0 looks at `direct-io` only where both capabilities are on, and compresses no page of
    /// such a file. The guest is to stand still: QEMU leaves no RAM for the last moment, which
    /// knows no limit on bandwidth, so that [`Vm::cancel_file`] finds one in force.
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

    /// Whether this QEMU can write past the page cache.
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
/// [`Vm::drop_file`] makes it let go of them.
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

/// How far a VM has come with sending itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outgoing {
    /// It sends, or has begun to.
    Active,
    /// The VM is stopped and waits for [`Vm::switch_over`]; its disks are still its own.
    Held,
    /// All was sent; the VM is stopped and waits for its end, or for `cont`.
    Completed,
    /// It was not sent; QEMU's own words.
    Failed(String),
    /// It was told to stop, and has; or it never began.
    Cancelled,
}

impl Vm {
    /// Returns the capabilities and parameters that decide about a stream.
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
        // With mapped RAM on, QEMU takes no parameter while it has ones that do not go with that.
        if wanted.capabilities.get(FILE_CAPABILITIES[0]) == Some(&true) {
            self.change_parameters(current, wanted)?;
            self.change_capabilities(current, wanted)
        } else {
            self.change_capabilities(current, wanted)?;
            self.change_parameters(current, wanted)
        }
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
            // What matters is why it was refused; QEMU drops the descriptor or keeps it.
            let _ = pass_fd::closefd(&mut self.qmp, STREAM_NAME);
            return Err(error.into());
        }
        Ok(())
    }

    /// Makes QEMU send the VM to a Unix socket, which it connects to as often as it has channels to
    /// send by; returns as soon as it has begun.
    ///
    /// # Errors
    ///
    /// Whatever QEMU says: the VM is not in a state to be sent, or something blocks it.
    pub fn send_to_socket(&mut self, socket: &Path) -> Result<(), VmError> {
        let uri = format!("unix:{}", socket.display());
        Ok(self.execute("migrate", json!({ "uri": uri })).map(drop)?)
    }

    /// Returns how long the guest stood still, from QEMU's events so far, which are forgotten.
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

    /// Gives QEMU descriptors of a file that it is to write; the caller may close its own.
    ///
    /// QEMU takes by the flags what it wants: for the stream one that is open for writing only, and
    /// for pages one that has `O_DIRECT` as well where the parameter `direct-io` is on. Each must have
    /// been opened by itself.
    ///
    /// # Errors
    ///
    /// Whatever QEMU says; it keeps none of them then.
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

    /// Makes QEMU let go of a file.
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

    /// Returns how far the VM has come with sending itself.
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

    /// Lets a VM send the rest that waits with all but that sent ([`Outgoing::Held`]).
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn switch_over(&mut self) -> Result<(), VmError> {
        let state = json!({ "state": "pre-switchover" });
        Ok(self.execute("migrate-continue", state).map(drop)?)
    }

    /// Waits at most `timeout` until the VM has sent itself, or not.
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

    /// Waits until QEMU lets go of a VM that it has sent, or not: it says that the migration is over
    /// some moments before, and refuses `cont` meanwhile ("Migration is not finalized yet", 7.2).
    pub(crate) fn settle(&mut self, deadline: Instant) -> Result<(), VmError> {
        while self.run_state()? == RunState::FinishMigrate && Instant::now() < deadline {
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Ends a sending, whatever QEMU is at, and waits at most `timeout` in all until it has: the VM can
    /// be told to go on then, or be sent again.
    ///
    /// Where QEMU sends by several connections, the other ends must take what comes until this
    /// returns, connections as well as bytes, and must not close before: see the route `stream`.
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

    /// Waits while QEMU connects to where it sends: told to stop then, QEMU 10.0.2 may abort.
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

    /// As [`Vm::cancel_sending`], for a VM that several threads of QEMU write to a file.
    ///
    /// Told to stop, QEMU (10.0.2) frees the bitmaps of a mapped-ram file before it ends those
    /// threads; one that has just been handed pages then writes through a null pointer, and the VM
    /// is gone. So its threads are made to run dry first.
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
            if outgoing != Outgoing::Active {
                return self.settle(deadline).map(|()| outgoing);
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

    /// Stops the sending, and waits at most `timeout` until QEMU has; the VM is as it was.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn cancel_sending(&mut self, timeout: Duration) -> Result<Outgoing, VmError> {
        self.execute("migrate_cancel", Value::Null)?;
        self.wait_sent(timeout)
    }
}

/// Reads how far a VM has come from the answer to `query-migrate`.
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
