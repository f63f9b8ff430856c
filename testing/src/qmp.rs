//! A monitor of the tests' own.
//!
//! It does as little as possible and shares no code with `vmfile-qemu`: an oracle that shares code
//! with what it judges shares its mistakes.

use std::io::{BufRead as _, BufReader, IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::{TestError, TestResult};

/// How long QEMU may take to answer one command.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to QEMU's machine protocol.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Waits until QEMU accepts connections at `path`, and leaves QMP's negotiation mode.
    ///
    /// # Errors
    ///
    /// When no connection is made within `timeout`, or QEMU does not answer.
    pub fn connect(path: &Path, timeout: Duration) -> TestResult<Monitor> {
        let deadline = Instant::now() + timeout;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(format!("connect to {}: {error}", path.display()).into());
                }
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut monitor = Monitor { stream: BufReader::new(stream), events: Vec::new() };
        // An event may come before the greeting. If it was taken for the greeting, every answer was that
        // of the command before.
        while monitor.read_message()?.get("QMP").is_none() {}
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Executes a command and returns what QEMU returns.
    ///
    /// # Errors
    ///
    /// With QEMU's message when it refuses.
    pub fn execute(&mut self, command: &str, arguments: Value) -> TestResult<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        let stream = self.stream.get_mut();
        stream.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut message = self.read_message()?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(error) = message.get("error") {
                return Err(format!("{command}: {}", error["desc"]).into());
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Gives QEMU a descriptor, which it keeps under `name`.
    ///
    /// # Errors
    ///
    /// The kernel's error, or QEMU's message when it refuses.
    pub fn give_descriptor(&mut self, name: &str, fd: BorrowedFd<'_>) -> TestResult {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err("no room for a descriptor".into());
        }
        // QEMU keeps what comes with white space before the command as well.
        let space = [IoSlice::new(b" ")];
        sendmsg(self.stream.get_ref(), &space, &mut control, SendFlags::NOSIGNAL)?;
        self.execute("getfd", json!({ "fdname": name })).map(drop)
    }

    /// Returns the events that have come so far with the answers to commands.
    #[must_use]
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    fn read_message(&mut self) -> TestResult<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(TestError::from("QEMU closed its monitor"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
