//! Outgoing migration of a running VM: as a stream, or as a file that QEMU writes.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::pass_fd::{self, FILE_FDSET};
use crate::stream_settings::TRICKLE;
use crate::vm::{PUT_BACK_TIMEOUT, RunState, Vm, VmError};

/// The name under which QEMU keeps the stream's descriptor until it writes to it.
pub(crate) const STREAM_NAME: &str = "vmfile-outgoing";

/// How often the state of the migration is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// How long QEMU may take to end a migration that was cancelled, before its thread is set free: see
/// [`Vm::wait_cancelled`]. It takes away the write protection of all memory first.
pub(crate) const FREE_AFTER: Duration = Duration::from_secs(5);

/// The same where it is known that the thread waits for the CPUs.
const FREE_OVERTAKEN_AFTER: Duration = Duration::from_millis(200);

/// How often the guest is stopped for that.
const FREE_INTERVAL: Duration = Duration::from_millis(50);

/// QEMU's threads count as idle when QEMU has given them no pages for this long. It is less than
/// the time between two portions of a trickle, and long enough for a thread on a busy host to have
/// marked its pages. A fixed wait of 200 ms, which may end just after a portion, killed 2 VMs in
/// 400.
pub(crate) const QUIET: Duration = Duration::from_millis(50);

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

/// Machine types that send more in parts than RAM: pseries its page table (`spapr/htab`), and s390 its storage
/// attributes (QEMU 2.4 to 11.1).
const MACHINES_WITH_OTHER_PARTS: [&str; 2] = ["pseries", "s390-ccw-virtio"];

impl Vm {
    /// Returns the machine type if its QEMU sends other state in parts, as it does RAM. The last part comes
    /// when the guest stands still, and `background-snapshot` leaves it out.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn machine_with_other_parts(&mut self) -> Result<Option<String>, VmError> {
        let machine = self.machine_type()?;
        let sends = MACHINES_WITH_OTHER_PARTS.iter().any(|prefix| machine.starts_with(prefix));
        Ok(sends.then_some(machine))
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
        self.note_that_it_sends();
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
            vm.wait_cancelled(deadline)
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
    /// QEMU crashes. So this first waits until the threads are idle, with a bandwidth limit that it takes
    /// back.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn cancel_file(&mut self, timeout: Duration) -> Result<Outgoing, VmError> {
        let before = self.bandwidth()?;
        self.set_bandwidth(&TRICKLE.into())?;
        let ended = self.cancel_when_idle(timeout);
        self.set_bandwidth(&before)?;
        ended
    }

    fn cancel_when_idle(&mut self, timeout: Duration) -> Result<Outgoing, VmError> {
        let deadline = Instant::now() + timeout;
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
        let deadline = Instant::now() + timeout;
        self.execute("migrate_cancel", Value::Null)?;
        self.wait_cancelled(deadline)
    }

    /// Waits until a migration that was cancelled has ended, at most until `deadline`, and returns its
    /// state.
    ///
    /// QEMU (7.2 to 11.1) stops the guest in the migration's thread, which waits until all CPUs stand
    /// still. If another client's `cont` comes meanwhile, the CPUs run on, and that thread waits until
    /// a client stops the guest again.
    fn wait_cancelled(&mut self, deadline: Instant) -> Result<Outgoing, VmError> {
        let left = || deadline.saturating_duration_since(Instant::now());
        let first = if self.is_overtaken() { FREE_OVERTAKEN_AFTER } else { FREE_AFTER };
        let mut outgoing = self.wait_sent(first.min(left()))?;
        let mut has_stopped = false;
        let freed = self.set_free(&mut outgoing, &mut has_stopped, deadline);
        if has_stopped {
            self.unstoppable(PUT_BACK_TIMEOUT, Vm::cont)?;
        }
        freed.map(|()| outgoing)
    }

    /// Stops the guest until the migration has ended: more than once, because the other client may go on.
    fn set_free(
        &mut self,
        outgoing: &mut Outgoing,
        has_stopped: &mut bool,
        deadline: Instant,
    ) -> Result<(), VmError> {
        while matches!(outgoing, Outgoing::Active | Outgoing::Held) && Instant::now() < deadline {
            if self.is_running()? {
                // If `stop` fails, QEMU may carry it out all the same.
                *has_stopped |= *self.stop_if_running().as_ref().unwrap_or(&true);
            }
            *outgoing = self.wait_sent(FREE_INTERVAL)?;
        }
        Ok(())
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
