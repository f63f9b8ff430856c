//! A proxy between vmfile and a monitor, which disturbs a connection from one of its lines on.

use std::io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::{Value, json};
use vmfile_testing::{Guest, TestResult};

/// How long a slow monitor takes for a line, and how many of its lines are slow.
const SLOW: Duration = Duration::from_millis(300);
const SLOW_LINES: u64 = 6;

/// How many bytes of an answer come one by one, and the pause after each.
const SINGLE_BYTES: usize = 64;
const PAUSE: Duration = Duration::from_millis(1);

/// Bytes of a line that is far longer than QEMU's longest.
const HUGE: usize = 64 << 20;

/// How many events a flood has. A busy guest causes some in a second.
const FLOOD: u64 = 20_000;

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The connection ends before the line.
    Cut,
    /// The connection ends after the first line to QEMU that has these words.
    CutAfter(&'static str),
    /// Lines come late.
    Slow,
    /// The first bytes of each answer come one by one.
    Bytewise,
    /// Nothing goes on, in both directions, until the test says so.
    Silent,
    /// Something else comes before a line of QEMU's.
    Before(Nonsense),
    /// Something else comes instead of an answer of QEMU's.
    Instead(Nonsense),
}

/// What QEMU does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nonsense {
    Text,
    NoObject,
    /// An answer to a command that nobody has sent.
    OtherId,
    /// The answer that is due, with a number in it.
    Number,
    Huge,
    Deep,
    NotUtf8,
    Events,
}

impl Nonsense {
    fn say(self, answer: &[u8], mut to: &UnixStream) -> io::Result<()> {
        match self {
            Nonsense::Text => to.write_all(b"vm login: \n"),
            Nonsense::NoObject => to.write_all(b"[{\"return\": {}}]\n"),
            Nonsense::OtherId => to.write_all(b"{\"return\": {}, \"id\": \"other\"}\n"),
            Nonsense::Number => {
                let answer: Value = serde_json::from_slice(answer)?;
                writeln!(to, "{}", json!({ "return": 7, "id": answer["id"] }))
            }
            Nonsense::Huge => {
                to.write_all(b"{\"return\": \"")?;
                let piece = [b'x'; 1 << 16];
                (0..HUGE / piece.len()).try_for_each(|_| to.write_all(&piece))?;
                to.write_all(b"\"}\n")
            }
            Nonsense::Deep => {
                let (open, close) = ("[".repeat(1 << 20), "]".repeat(1 << 20));
                writeln!(to, "{{\"return\": {open}{close}}}")
            }
            Nonsense::NotUtf8 => to.write_all(b"{\"return\": \"\xff\xfe\"}\n"),
            Nonsense::Events => {
                let event = json!({ "event": "RTC_CHANGE", "data": { "offset": 7 },
                    "timestamp": { "seconds": 7, "microseconds": 7 } });
                let event = format!("{event}\n");
                (0..FLOOD).try_for_each(|_| to.write_all(event.as_bytes()))
            }
        }
    }
}

/// What is to happen to one connection, and what has.
#[derive(Debug)]
pub(crate) struct Plan {
    fault: Fault,
    /// The line from which on it happens, of both directions together.
    at: u64,
    lines: AtomicU64,
    is_reached: AtomicBool,
    is_released: AtomicBool,
}

impl Plan {
    fn new(fault: Fault, at: u64) -> Arc<Plan> {
        let (is_reached, is_released) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Plan { fault, at, lines: AtomicU64::new(0), is_reached, is_released })
    }

    /// Returns how many lines have come.
    pub(crate) fn lines(&self) -> u64 {
        self.lines.load(Ordering::Relaxed)
    }

    /// Tells whether the line has come.
    pub(crate) fn is_reached(&self) -> bool {
        self.is_reached.load(Ordering::Relaxed)
    }

    /// Ends the silence.
    pub(crate) fn release(&self) {
        self.is_released.store(true, Ordering::Relaxed);
    }

    /// Counts a line; returns how many came since the fault began, if it has.
    fn next(&self) -> Option<u64> {
        (self.lines.fetch_add(1, Ordering::Relaxed) + 1).checked_sub(self.at)
    }

    /// Lets a line to QEMU pass, or ends the connection.
    fn pass_to_qemu(
        &self,
        line: &[u8],
        fds: &[BorrowedFd<'_>],
        qemu: &UnixStream,
    ) -> io::Result<()> {
        let since = self.next();
        self.hold(since)?;
        send(qemu, line, fds)?;
        match self.fault {
            Fault::CutAfter(words) if String::from_utf8_lossy(line).contains(words) => {
                Err(self.cut())
            }
            _ => Ok(()),
        }
    }

    /// Lets a line to vmfile pass, or something else.
    fn pass_to_vmfile(&self, line: &[u8], mut vmfile: &UnixStream) -> io::Result<()> {
        let since = self.next();
        self.hold(since)?;
        let is_answer = serde_json::from_slice::<Value>(line).is_ok_and(|line| line["id"].is_u64());
        match self.fault {
            Fault::Bytewise if since.is_some() => {
                self.is_reached.store(true, Ordering::Relaxed);
                let (first, rest) = line.split_at(line.len().min(SINGLE_BYTES));
                for byte in first.chunks(1) {
                    vmfile.write_all(byte)?;
                    thread::sleep(PAUSE);
                }
                vmfile.write_all(rest)
            }
            Fault::Before(nonsense) if since.is_some() && self.is_first() => {
                nonsense.say(line, vmfile)?;
                vmfile.write_all(line)
            }
            Fault::Instead(nonsense) if since.is_some() && is_answer && self.is_first() => {
                nonsense.say(line, vmfile)
            }
            _ => vmfile.write_all(line),
        }
    }

    /// What every line of both directions waits for.
    fn hold(&self, since: Option<u64>) -> io::Result<()> {
        let Some(since) = since else { return Ok(()) };
        match self.fault {
            Fault::Cut => return Err(self.cut()),
            Fault::Slow if since < SLOW_LINES => {
                self.is_reached.store(true, Ordering::Relaxed);
                thread::sleep(SLOW);
            }
            Fault::Silent => {
                self.is_reached.store(true, Ordering::Relaxed);
                while !self.is_released.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(2));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn is_first(&self) -> bool {
        !self.is_reached.swap(true, Ordering::Relaxed)
    }

    fn cut(&self) -> io::Error {
        self.is_reached.store(true, Ordering::Relaxed);
        io::ErrorKind::ConnectionAborted.into()
    }
}

/// A socket that leads to the monitor of a guest. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Proxy {
    socket: PathBuf,
    /// The plan of the next connection; later ones are not disturbed.
    next: Arc<Mutex<Option<Arc<Plan>>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens at `socket`. QEMU gets the socket as well, as it would from a manager that made it:
    /// vmfile knows by that whose monitor it is.
    pub(crate) fn start(guest: &mut Guest, socket: &Path) -> TestResult<Proxy> {
        let listener = UnixListener::bind(socket)?;
        guest.give_descriptor("proxy", listener.as_fd())?;
        let next: Arc<Mutex<Option<Arc<Plan>>>> = Arc::default();
        let is_over = Arc::new(AtomicBool::new(false));
        let (plans, ends, monitor) = (Arc::clone(&next), Arc::clone(&is_over), guest.qmp_path());
        let thread = thread::spawn(move || {
            while let Ok((vmfile, _)) = listener.accept() {
                if ends.load(Ordering::Relaxed) {
                    break;
                }
                let plan = plans.lock().expect("no panic").take();
                let plan = plan.unwrap_or_else(|| Plan::new(Fault::None, 0));
                // A monitor that cannot be reached ends the connection.
                if let Ok(qemu) = UnixStream::connect(&monitor) {
                    thread::spawn(move || stand_between(&plan, &vmfile, &qemu));
                }
            }
        });
        Ok(Proxy { socket: socket.to_owned(), next, is_over, thread: Some(thread) })
    }

    /// Disturbs the next connection, from its line `at` on.
    pub(crate) fn disturb_next(&self, fault: Fault, at: u64) -> Arc<Plan> {
        let plan = Plan::new(fault, at);
        *self.next.lock().expect("no panic") = Some(Arc::clone(&plan));
        plan
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // Wakes the thread. If it cannot be woken, it has ended.
        if UnixStream::connect(&self.socket).is_ok() {
            let _ = self.thread.take().map(JoinHandle::join);
        }
    }
}

/// Forwards all lines, and the descriptors that come with them, until a side ends or the plan ends
/// the connection.
fn stand_between(plan: &Plan, vmfile: &UnixStream, qemu: &UnixStream) {
    let end = || {
        let _ = vmfile.shutdown(Shutdown::Both);
        let _ = qemu.shutdown(Shutdown::Both);
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut lines = BufReader::new(qemu);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                if plan.pass_to_vmfile(&line, vmfile).is_err() {
                    break;
                }
                line.clear();
            }
            end();
        });
        let _ = forward_to_qemu(plan, vmfile, qemu);
        end();
    });
}

fn forward_to_qemu(plan: &Plan, vmfile: &UnixStream, qemu: &UnixStream) -> io::Result<()> {
    let (mut bytes, mut fds): (Vec<u8>, Vec<OwnedFd>) = (Vec::new(), Vec::new());
    let mut piece = vec![0; 64 << 10];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(vmfile, &mut [IoSliceMut::new(&mut piece)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.bytes == 0 {
            return Ok(());
        }
        bytes.extend_from_slice(&piece[..received.bytes]);
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = bytes.drain(..=end).collect();
            let with: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
            plan.pass_to_qemu(&line, &with, qemu)?;
            fds.clear();
        }
    }
}

fn send(mut to: &UnixStream, line: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = sendmsg(to, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
    to.write_all(&line[sent..])
}
