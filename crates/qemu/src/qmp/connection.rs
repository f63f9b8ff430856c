//! The connection: greeting, one command at a time, events aside.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde_json::{Map, Value};

use super::command::{decode_answer, encode, timeout_for};
use super::connect::{connect_within, process_of};
use super::error::QmpError;
use super::event::{Event, EventQueue};
use super::holders::Holders;
use super::wait::{LastWait, Limits, Wait, WaitEnd};
use crate::pass_fd;
use crate::proc::is_process_stopped;

/// Longest line read from QEMU, in bytes.
///
/// The longest answer we ask for lists the RAM blocks or the disks: kilobytes. QEMU's own schema,
/// the longest answer of all, is 200 KiB. A peer that sends more without a line end is not QEMU.
pub const LINE_LEN_MAX: usize = 4 << 20;

const READ_LEN: usize = 64 << 10;

/// Most lines that are read in search of the greeting.
const LINES_BEFORE_GREETING_MAX: usize = 64;

/// A QMP connection after its greeting, ready for commands.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// Bytes received and not yet taken as lines.
    received: Vec<u8>,
    /// How much of `received` is known to hold no line end.
    scanned: usize,
    /// Whether what comes up to the next line end belongs to a line that was too long.
    is_within_long_line: bool,
    events: EventQueue,
    greeting: Value,
    timeout: Duration,
    limits: Limits,
    next_id: u64,
}

impl Qmp {
    /// Connects to the QMP socket at `path` and waits at most `timeout` for the greeting.
    ///
    /// `timeout` also becomes the ordinary timeout of every command. Commands that wait for the
    /// guest's disks may take longer.
    ///
    /// # Errors
    ///
    /// [`QmpError::Connect`], [`QmpError::NoRoom`] when others wait already,
    /// [`QmpError::NoGreeting`] when the socket stays silent, and [`QmpError::NotQmp`] when it says
    /// something else.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Qmp, QmpError> {
        Qmp::connect_until(path, timeout, None)
    }

    /// Connects as [`Qmp::connect`] does; `stop` ends this wait and those of every command.
    ///
    /// # Errors
    ///
    /// As for [`Qmp::connect`], and [`QmpError::Stopped`].
    pub fn connect_until(
        path: &Path,
        timeout: Duration,
        stop: Option<Arc<AtomicBool>>,
    ) -> Result<Qmp, QmpError> {
        let limits = Limits::new(stop);
        let mut wait = limits.wait(timeout);
        let stream = connect_within(path, &mut wait)?;
        let mut greeted = Qmp::greet(stream, timeout, limits, wait);
        if let Err(QmpError::NoGreeting { holders, .. }) = &mut greeted {
            *holders = Holders::of(path);
            // This connection is one of those that wait.
            holders.waiting = holders.waiting.saturating_sub(1);
        }
        greeted
    }

    /// Takes over a connected socket, otherwise as [`Qmp::connect_until`]. `process` is QEMU's
    /// process, if the caller knows it.
    ///
    /// # Errors
    ///
    /// As for [`Qmp::connect_until`].
    pub fn from_stream(
        stream: UnixStream,
        timeout: Duration,
        stop: Option<Arc<AtomicBool>>,
        process: Option<u32>,
    ) -> Result<Qmp, QmpError> {
        let mut limits = Limits::new(stop);
        if let Some(pid) = process {
            limits.set_process(pid);
        }
        let wait = limits.wait_for_answer(timeout);
        Qmp::greet(stream, timeout, limits, wait)
    }

    fn greet(
        stream: UnixStream,
        timeout: Duration,
        limits: Limits,
        wait: Wait,
    ) -> Result<Qmp, QmpError> {
        let mut qmp = Qmp {
            stream,
            received: Vec::new(),
            scanned: 0,
            is_within_long_line: false,
            events: EventQueue::default(),
            greeting: Value::Null,
            timeout,
            limits,
            next_id: first_id(),
        };
        if let Some(pid) = process_of(&qmp.stream) {
            qmp.limits.set_process(pid);
        }
        qmp.greeting = qmp.read_greeting(wait)?;
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Makes every wait of this connection end soon after `stop` is set, with
    /// [`QmpError::Stopped`].
    ///
    /// The flag is checked every tenth of a second. If a command has been sent already, the wait
    /// for its answer goes on for 0.3 s, so that the caller learns what the command did, unless
    /// QEMU hangs.
    pub fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.limits.set_stop(stop);
    }

    /// Makes every wait for an answer end when QEMU's process has been stopped for a while, by
    /// SIGSTOP or a debugger, with [`QmpError::ProcessStopped`].
    ///
    /// If QEMU itself made the socket, its process is known without this call.
    pub fn set_process(&mut self, pid: u32) {
        self.limits.set_process(pid);
    }

    /// Runs `work`, whose commands ignore the stop flag and may take `limit` in all. It is for
    /// putting things back.
    ///
    /// When the time is over, the remaining commands are still sent, but hardly waited for.
    ///
    /// QEMU forgets a command that it has not begun when the connection closes (seen with QEMU
    /// 10.0.2: `cont`, sent to a stopped process, is lost when the client ends before that process
    /// goes on). After [`QmpError::Timeout`] the connection has to stay open for the command to
    /// run.
    pub fn unstoppable<T>(&mut self, limit: Duration, work: impl FnOnce(&mut Qmp) -> T) -> T {
        let before = self.ignore_stop(limit);
        let result = work(self);
        self.limits.leave(before);
        result
    }

    /// Begins what [`Qmp::unstoppable`] does; [`Qmp::heed_stop`] ends it.
    pub(crate) fn ignore_stop(&mut self, limit: Duration) -> Option<Instant> {
        self.limits.ignore_stop(limit)
    }

    pub(crate) fn heed_stop(&mut self, before: Option<Instant>) {
        self.limits.leave(before);
    }

    /// Sets the ordinary timeout of the commands that follow.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Runs a command and returns its answer. `arguments` is an object, or `Null` for none.
    ///
    /// # Errors
    ///
    /// [`QmpError::Refused`] with QEMU's words, [`QmpError::Timeout`] when no answer came in time;
    /// a late answer is skipped then, and the connection stays usable.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let timeout = timeout_for(command, self.timeout);
        self.run(command, &arguments, None, timeout)
    }

    /// Runs a command as [`Qmp::execute`] does, and waits at most `timeout` for the answer.
    ///
    /// # Errors
    ///
    /// As for [`Qmp::execute`].
    pub fn execute_within(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        self.run(command, &arguments, None, timeout)
    }

    /// Runs a command and passes `fd` to QEMU with it, as `getfd` and `add-fd` want.
    ///
    /// # Errors
    ///
    /// As for [`Qmp::execute`].
    pub fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        let timeout = timeout_for(command, self.timeout);
        self.run(command, &arguments, Some(fd), timeout)
    }

    /// Returns the events received so far, oldest first, and forgets them.
    ///
    /// Events arrive while a command waits for its answer or [`Qmp::wait_for_event`] runs.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.take_all()
    }

    /// Waits until `deadline` for an event that has one of `names`; `None` when none came.
    ///
    /// # Errors
    ///
    /// [`QmpError::Closed`] and [`QmpError::Io`] when the connection ended.
    pub fn wait_for_event(
        &mut self,
        names: &[&str],
        deadline: Instant,
    ) -> Result<Option<Event>, QmpError> {
        let timeout = deadline.saturating_duration_since(Instant::now());
        let mut wait = self.limits.wait(timeout);
        loop {
            if let Some(event) = self.events.take_named(names) {
                return Ok(Some(event));
            }
            match self.read_message("events", "while waiting for an event", &mut wait)? {
                None => return Ok(None),
                // Anything else answers a command that we no longer wait for.
                Some(message) => {
                    if let Ok(event) = Event::from_message(message) {
                        self.events.push(event);
                    }
                }
            }
        }
    }

    /// Returns how many events were dropped because the caller did not take them.
    #[must_use]
    pub fn events_dropped(&self) -> u64 {
        self.events.dropped()
    }

    /// Returns the number of `STOP` events so far, including those that were dropped or taken.
    pub(crate) fn stops(&self) -> u32 {
        self.events.stops()
    }

    /// Returns the number of `RESUME` events so far, including those that were dropped or taken.
    pub(crate) fn resumes(&self) -> u32 {
        self.events.resumes()
    }

    /// Tells whether the guest has fallen asleep since this connection began, and was not woken.
    pub(crate) fn has_fallen_asleep(&self) -> bool {
        self.events.sleeps()
    }

    /// Returns the greeting's `QMP` object: QEMU's version and abilities.
    #[must_use]
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    fn run(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        if self.limits.is_stopped() {
            return Err(QmpError::Stopped { when: format!("before {command}"), is_sent: false });
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let mut wait = self.limits.wait_for_answer(timeout);
        let when = format!("while waiting for the answer to {command}");
        self.send(command, &encode(command, arguments, id), fd, &mut wait)?;
        loop {
            let message = self.read_message(command, &when, &mut wait);
            self.limits.note(match &message {
                Err(QmpError::ProcessStopped { .. }) => LastWait::ProcessStopped,
                Ok(None) if self.limits.is_putting_back() => LastWait::SilentPutBack,
                _ => LastWait::Answered,
            });
            let message = message.map_err(|error| match error {
                QmpError::Stopped { when, .. } => QmpError::Stopped { when, is_sent: true },
                error => error,
            })?;
            let Some(message) = message else { return Err(timed_out(command, &wait)) };
            match Event::from_message(message) {
                Ok(event) => self.events.push(event),
                Err(message) => {
                    if let Some(answer) = decode_answer(message, command, id) {
                        return answer;
                    }
                }
            }
        }
    }

    fn send(
        &mut self,
        command: &str,
        line: &[u8],
        mut fd: Option<BorrowedFd<'_>>,
        wait: &mut Wait,
    ) -> Result<(), QmpError> {
        let io = |source| failed(command, source);
        let mut rest = line;
        while !rest.is_empty() {
            match pass_fd::send_some(self.stream.as_fd(), rest, fd) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    fd = None;
                    continue;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(io(errno.into())),
            }
            match wait.until_ready(&self.stream, PollFlags::OUT) {
                Ok(()) => {}
                Err(WaitEnd::TimedOut) => return Err(timed_out(command, wait)),
                Err(WaitEnd::Stopped) => {
                    let when = format!("while sending {command}");
                    return Err(QmpError::Stopped { when, is_sent: false });
                }
                Err(WaitEnd::ProcessStopped { pid }) => {
                    return Err(QmpError::ProcessStopped { pid, during: command.to_owned() });
                }
                Err(WaitEnd::Io(source)) => return Err(io(source)),
            }
        }
        Ok(())
    }

    /// Reads the greeting. Before it, QEMU may send messages that were meant for the previous
    /// client (seen with QEMU 10.0.2, when that client was killed while QEMU carried out its
    /// command).
    fn read_greeting(&mut self, mut wait: Wait) -> Result<Value, QmpError> {
        for _ in 0..LINES_BEFORE_GREETING_MAX {
            let mut message = self.read_first(&mut wait)?;
            if let Some(greeting) = message.get_mut("QMP") {
                return Ok(greeting.take());
            }
            if !["return", "error", "event"].iter().any(|key| message.get(key).is_some()) {
                break;
            }
        }
        Err(not_qmp("it does not begin with a QMP greeting"))
    }

    /// Reads one message of a peer that has not greeted yet.
    fn read_first(&mut self, wait: &mut Wait) -> Result<Value, QmpError> {
        match self.read_message("greeting", "while waiting for QEMU's greeting", wait) {
            Ok(Some(message)) => Ok(message),
            Ok(None) if self.received.is_empty() => {
                let is_stopped = self.limits.process().is_some_and(is_process_stopped);
                let (after, holders) = (wait.lasted(), Holders::default());
                Err(QmpError::NoGreeting { after, holders, is_stopped })
            }
            Ok(None) | Err(QmpError::LineTooLong { .. }) => {
                Err(not_qmp("its first line does not end"))
            }
            Err(QmpError::NotJson { .. }) => Err(not_qmp("its first line is not JSON")),
            Err(other) => Err(other),
        }
    }

    /// Reads one JSON object; `None` when the time of `wait` is over first.
    fn read_message(
        &mut self,
        during: &str,
        when: &str,
        wait: &mut Wait,
    ) -> Result<Option<Value>, QmpError> {
        loop {
            // Check the limits for every line, so that a flood of other lines cannot extend the
            // wait.
            let waited = wait.check().and_then(|_| {
                if self.has_line() { Ok(()) } else { wait.until_ready(&self.stream, PollFlags::IN) }
            });
            match waited {
                Ok(()) => {}
                Err(WaitEnd::TimedOut) => return Ok(None),
                Err(WaitEnd::Stopped) => {
                    return Err(QmpError::Stopped { when: when.to_owned(), is_sent: false });
                }
                Err(WaitEnd::ProcessStopped { pid }) => {
                    return Err(QmpError::ProcessStopped { pid, during: during.to_owned() });
                }
                Err(WaitEnd::Io(source)) => {
                    return Err(failed(during, source));
                }
            }
            let Some(line) = self.take_line(during)? else {
                self.receive(during)?;
                continue;
            };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return serde_json::from_slice::<Map<String, Value>>(&line)
                .map(|object| Some(Value::Object(object)))
                .map_err(|source| QmpError::NotJson { during: during.to_owned(), source });
        }
    }

    /// Whether a whole line was received and not taken.
    fn has_line(&self) -> bool {
        self.received.get(self.scanned..).unwrap_or_default().contains(&b'\n')
    }

    /// Takes one line out of the received bytes, if a whole one is there.
    fn take_line(&mut self, during: &str) -> Result<Option<Vec<u8>>, QmpError> {
        let unscanned = self.received.get(self.scanned..).unwrap_or_default();
        let Some(position) = unscanned.iter().position(|&byte| byte == b'\n') else {
            self.scanned = self.received.len();
            if self.scanned > LINE_LEN_MAX {
                // The VM may have to be put back by this connection: the next line counts again.
                (self.received, self.scanned) = (Vec::new(), 0);
                self.is_within_long_line = true;
                let during = during.to_owned();
                return Err(QmpError::LineTooLong { limit: LINE_LEN_MAX, during });
            }
            return Ok(None);
        };
        let rest = self.received.split_off(self.scanned + position + 1);
        self.scanned = 0;
        Ok(Some(std::mem::replace(&mut self.received, rest)))
    }

    /// Receives the bytes that are there.
    fn receive(&mut self, during: &str) -> Result<(), QmpError> {
        let mut piece = vec![0_u8; READ_LEN];
        match recv(&self.stream, &mut piece[..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(QmpError::Closed { during: during.to_owned() }),
            Ok((_, len)) => {
                let mut received = piece.get(..len).unwrap_or_default();
                if self.is_within_long_line {
                    let end = received.iter().position(|&byte| byte == b'\n');
                    received = end.and_then(|end| received.get(end + 1..)).unwrap_or_default();
                    self.is_within_long_line = end.is_none();
                }
                self.received.extend(received);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(errno) => Err(failed(during, errno.into())),
        }
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn not_qmp(reason: &'static str) -> QmpError {
    QmpError::NotQmp { reason }
}

/// Returns the id of a connection's first command. It is random, because the next client may
/// receive a late answer to the previous client's command.
fn first_id() -> u64 {
    // QEMU hands back whole numbers up to 2^63.
    RandomState::new().build_hasher().finish() >> 16
}

/// Makes the error of a failed system call: `Closed` if the peer is gone, else `Io`.
fn failed(during: &str, source: io::Error) -> QmpError {
    let during = during.to_owned();
    let error = QmpError::Io { during, source };
    match error {
        QmpError::Io { ref during, .. } if error.is_closed() => {
            QmpError::Closed { during: during.clone() }
        }
        error => error,
    }
}

fn timed_out(command: &str, wait: &Wait) -> QmpError {
    QmpError::Timeout { command: command.to_owned(), after: wait.lasted() }
}
