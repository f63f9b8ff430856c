//! The end of what a QEMU writes to its standard error.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::command_line::REDACTED;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// How many bytes of QEMU's standard error are kept at most: the last ones.
///
/// A refused device state makes a dozen lines; a QEMU that logs without end must not fill this
/// process's memory.
const STDERR_LEN_MAX: usize = 16 << 10;

/// How long the last bytes may take to arrive once QEMU has ended.
///
/// They are in the pipe by then; but the pipe does not end while a child of QEMU holds it open.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(500);

/// The end of a QEMU's standard error: a thread reads while QEMU writes, so that QEMU never waits.
#[derive(Clone, Default)]
pub(super) struct StderrTail(Arc<Mutex<Tail>>);

#[derive(Default)]
struct Tail {
    bytes: Vec<u8>,
    /// Texts that are not shown.
    secrets: Vec<String>,
    /// Does not block; `None` once all was read.
    pipe: Option<File>,
}

impl StderrTail {
    /// Keeps the end of what comes by `pipe`; `secrets` are replaced in it.
    pub(super) fn keep(pipe: OwnedFd, secrets: Vec<String>) -> io::Result<StderrTail> {
        // QEMU repeats an option that it refuses, as it was written: with doubled commas.
        let written = secrets.iter().map(|secret| secret.replace(',', ",,"));
        let mut secrets: Vec<String> = written.chain(secrets.iter().cloned()).collect();
        // One may be a part of another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        fcntl_setfl(&pipe, fcntl_getfl(&pipe)? | OFlags::NONBLOCK)?;
        let watched = pipe.try_clone()?;
        let tail = Tail { bytes: Vec::new(), secrets, pipe: Some(File::from(pipe)) };
        let kept = StderrTail(Arc::new(Mutex::new(tail)));
        let reader = kept.clone();
        thread::Builder::new().spawn(move || {
            while !reader.lock().read() {
                // If poll fails, the next read finds out what is wrong.
                let _ = poll(&mut [PollFd::new(&watched, PollFlags::IN)], None);
            }
        })?;
        Ok(kept)
    }

    /// Returns all that QEMU has written so far, from the start of a line.
    pub(super) fn text(&self) -> String {
        let mut tail = self.lock();
        tail.read();
        tail.cut();
        let text = String::from_utf8_lossy(&tail.bytes).into_owned();
        tail.secrets.iter().fold(text, |text, secret| text.replace(secret, REDACTED))
    }

    /// Returns the text once all of it has arrived, or after a short while.
    pub(super) fn last_words(&self) -> String {
        let deadline = Instant::now() + LAST_WORDS_TIMEOUT;
        while !self.lock().read() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        self.text()
    }

    fn lock(&self) -> MutexGuard<'_, Tail> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tail {
    /// Reads what is there; returns whether nothing can come any more.
    fn read(&mut self) -> bool {
        let mut piece = [0_u8; 4096];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut piece) {
                Ok(len) if len > 0 => self.push(piece.get(..len).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => self.pipe = None,
            }
        }
        true
    }

    fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        // QEMU writes byte by byte: each of them must not move all that is kept.
        if self.bytes.len() > 2 * STDERR_LEN_MAX {
            self.cut();
        }
    }

    /// Drops what is too much at the beginning.
    fn cut(&mut self) {
        let excess = self.bytes.len().saturating_sub(STDERR_LEN_MAX);
        if excess > 0 {
            // Whole lines only, where there are lines.
            let rest = self.bytes.get(excess..).unwrap_or_default();
            let line = rest.iter().position(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            self.bytes.drain(..excess + line);
        }
    }
}

impl fmt::Debug for StderrTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StderrTail").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    #[test]
    fn the_end_of_a_long_log_is_kept_from_the_start_of_a_line() {
        let mut tail = Tail::default();
        for number in 0..10_000 {
            tail.push(format!("line {number}\n").as_bytes());
        }
        assert!(tail.bytes.len() <= 2 * STDERR_LEN_MAX);
        tail.cut();
        let text = String::from_utf8(tail.bytes).unwrap();
        assert!(text.len() <= STDERR_LEN_MAX);
        assert!(text.starts_with("line "), "{:?}", text.lines().next());
        assert!(text.ends_with("line 9999\n"));
    }

    #[test]
    fn a_log_without_lines_is_bounded_too() {
        let mut tail = Tail::default();
        tail.push(&[b'x'; STDERR_LEN_MAX * 3]);
        assert_eq!(tail.bytes.len(), STDERR_LEN_MAX);
    }

    /// A message of 100000 bytes took twenty seconds.
    #[test]
    fn a_log_that_comes_byte_by_byte_moves_no_byte_often() {
        let began = Instant::now();
        let mut tail = Tail::default();
        for _ in 0..8_000_000 {
            tail.push(b"x");
        }
        tail.cut();
        assert_eq!(tail.bytes.len(), STDERR_LEN_MAX);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }

    #[test]
    fn what_was_written_is_there_at_once() {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let tail = StderrTail::keep(read, vec!["hunter2".to_owned()]).unwrap();
        let mut write = File::from(write);
        writeln!(write, "-object secret,data=hunter2: refused").unwrap();
        assert_eq!(tail.text(), "-object secret,data=<redacted>: refused\n");
        for number in 0..1000 {
            writeln!(write, "{number}").unwrap();
            assert!(tail.text().ends_with(&format!("{number}\n")));
        }
        drop(write);
        assert!(tail.last_words().ends_with("999\n"));
    }
}
