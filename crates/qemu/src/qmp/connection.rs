//! The connection: greeting, one command at a time, events aside.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::command::{decode_answer, encode, timeout_for};
use super::error::QmpError;
use super::event::{Event, EventQueue};
use crate::pass_fd;

/// Longest line read from QEMU, in bytes.
///
/// The longest answer we ask for lists the RAM blocks or the disks: kilobytes. QEMU's own schema,
/// the longest answer of all, is 200 KiB. A peer that sends more without a line end is not QEMU.
pub const LINE_LEN_MAX: usize = 4 << 20;

const READ_LEN: usize = 64 << 10;

/// A QMP connection after its greeting, ready for commands.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// Bytes received and not yet taken as lines.
    received: Vec<u8>,
    /// How much of `received` is known to hold no line end.
    scanned: usize,
    events: EventQueue,
    greeting: Value,
    timeout: Duration,
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
    /// [`QmpError::Connect`], [`QmpError::NoGreeting`] when the socket stays silent, and
    /// [`QmpError::NotQmp`] when it says something else.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Qmp, QmpError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        Qmp::from_stream(stream, timeout)
    }

    /// Takes over a connected socket; otherwise as [`Qmp::connect`].
    ///
    /// # Errors
    ///
    /// As for [`Qmp::connect`].
    pub fn from_stream(stream: UnixStream, timeout: Duration) -> Result<Qmp, QmpError> {
        let mut qmp = Qmp {
            stream,
            received: Vec::new(),
            scanned: 0,
            events: EventQueue::default(),
            greeting: Value::Null,
            timeout,
            next_id: 1,
        };
        qmp.greeting = qmp.read_greeting()?;
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
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
        loop {
            if let Some(event) = self.events.take_named(names) {
                return Ok(Some(event));
            }
            match self.read_message("events", deadline)? {
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

    /// Returns how many events were dropped because nobody took them.
    #[must_use]
    pub fn events_dropped(&self) -> u64 {
        self.events.dropped()
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
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let deadline = deadline_after(timeout);
        self.send(command, &encode(command, arguments, id), fd, timeout)?;
        loop {
            let Some(message) = self.read_message(command, deadline)? else {
                return Err(QmpError::Timeout { command: command.to_owned(), after: timeout });
            };
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
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<(), QmpError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                QmpError::Timeout { command: command.to_owned(), after: timeout }
            }
            _ => QmpError::Io { during: command.to_owned(), source },
        };
        self.stream.set_write_timeout(Some(at_least_1_ms(timeout))).map_err(failed)?;
        pass_fd::send(self.stream.as_fd(), line, fd).map_err(failed)
    }

    fn read_greeting(&mut self) -> Result<Value, QmpError> {
        let deadline = deadline_after(self.timeout);
        let not_qmp = |reason| QmpError::NotQmp { reason };
        let message = match self.read_message("greeting", deadline) {
            Ok(Some(message)) => message,
            Ok(None) if self.received.is_empty() => {
                return Err(QmpError::NoGreeting { after: self.timeout });
            }
            Ok(None) => return Err(not_qmp("its first line does not end")),
            Err(QmpError::NotJson { .. }) => return Err(not_qmp("its first line is not JSON")),
            Err(QmpError::LineTooLong { .. }) => {
                return Err(not_qmp("its first line does not end"));
            }
            Err(other) => return Err(other),
        };
        let mut message = message;
        match message.get_mut("QMP") {
            Some(greeting) => Ok(greeting.take()),
            None => Err(not_qmp("its first line is not a QMP greeting")),
        }
    }

    /// Reads one JSON object; `None` when `deadline` passed first.
    fn read_message(&mut self, during: &str, deadline: Instant) -> Result<Option<Value>, QmpError> {
        loop {
            // The deadline also ends a flood of lines, none of which is the one waited for.
            if Instant::now() >= deadline {
                return Ok(None);
            }
            let Some(line) = self.take_line(during)? else {
                self.receive(during, deadline)?;
                continue;
            };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return serde_json::from_slice(&line)
                .map(Some)
                .map_err(|source| QmpError::NotJson { during: during.to_owned(), source });
        }
    }

    /// Takes one line out of the received bytes, if a whole one is there.
    fn take_line(&mut self, during: &str) -> Result<Option<Vec<u8>>, QmpError> {
        let unscanned = self.received.get(self.scanned..).unwrap_or_default();
        let Some(position) = unscanned.iter().position(|&byte| byte == b'\n') else {
            self.scanned = self.received.len();
            if self.scanned > LINE_LEN_MAX {
                let during = during.to_owned();
                return Err(QmpError::LineTooLong { limit: LINE_LEN_MAX, during });
            }
            return Ok(None);
        };
        let rest = self.received.split_off(self.scanned + position + 1);
        self.scanned = 0;
        Ok(Some(std::mem::replace(&mut self.received, rest)))
    }

    /// Receives some bytes, or none when `deadline` passed.
    fn receive(&mut self, during: &str, deadline: Instant) -> Result<(), QmpError> {
        let failed = |source| QmpError::Io { during: during.to_owned(), source };
        let left = deadline.saturating_duration_since(Instant::now());
        self.stream.set_read_timeout(Some(at_least_1_ms(left))).map_err(failed)?;
        let mut piece = vec![0_u8; READ_LEN];
        match self.stream.read(&mut piece) {
            Ok(0) => Err(QmpError::Closed { during: during.to_owned() }),
            Ok(len) => {
                self.received.extend(piece.iter().take(len));
                Ok(())
            }
            Err(error) => match error.kind() {
                // The caller looks at the clock again.
                io::ErrorKind::WouldBlock
                | io::ErrorKind::TimedOut
                | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(failed(error)),
            },
        }
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The socket options take a zero timeout for "forever".
fn at_least_1_ms(duration: Duration) -> Duration {
    duration.max(Duration::from_millis(1))
}

fn deadline_after(timeout: Duration) -> Instant {
    let now = Instant::now();
    // A timeout past the end of the clock means a day.
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(86_400))
}
