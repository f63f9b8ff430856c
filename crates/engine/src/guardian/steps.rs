//! Carries out a will in a process that must not allocate.
//!
//! Nothing here allocates, locks or panics: it runs in the child of a process with several threads.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::kept::Kept;
use super::will::{
    ASK, AWAIT, AWAIT_NONE, AWAIT_STILL, CONNECTION, DISMISSED, LISTENER, ONLY_IF, REMOVE,
    REMOVE_IF_LAST, Reader, UNLESS_NAMED, WILL_LEN_MAX,
};

/// How many bytes of a line are searched at once.
const ANSWER_LEN: usize = 64 << 10;

/// How many bytes of a longer line are searched again with what follows: no word is longer.
const WORD_LEN_MAX: usize = 256;

/// How many words one step has at most.
const WORDS_MAX: usize = 16;

/// How long to wait before the same line is sent again.
const INTERVAL: Duration = Duration::from_millis(10);

/// Breaks off a line that the other process has begun: a JSON parser takes the control character as
/// an error, and begins anew after it.
const BREAK: &[u8] = b"\x01\n";

/// The memory in which a will is kept and carried out; allocated before there is a child.
pub(super) struct Workspace {
    will: Box<[u8]>,
    /// Bytes of `will` that the newest will has.
    will_len: usize,
    answer: Box<[u8]>,
    kept: Kept,
}

/// What an answer held.
#[derive(Clone, Copy, Default)]
struct Seen {
    answer: bool,
    word: bool,
    /// A checksum of the part that begins with the first word and ends at the next `}`.
    part: u64,
}

/// A line to send, the bytes that its answer contains, and how long to wait for it.
struct Query<'a> {
    line: &'a [u8],
    answer: &'a [u8],
    deadline: Option<Instant>,
}

impl Workspace {
    pub(super) fn new() -> Workspace {
        let will = vec![0; WILL_LEN_MAX].into_boxed_slice();
        let answer = vec![0; ANSWER_LEN].into_boxed_slice();
        Workspace { will, will_len: 0, answer, kept: Kept::new() }
    }

    /// Takes each new will, until the other process closes its end or dismisses the guardian;
    /// returns whether it was dismissed.
    pub(super) fn wait_for_the_end(&mut self, pipe: BorrowedFd<'_>) -> bool {
        loop {
            // The first byte says what the message is: only a will may overwrite the one that is
            // there.
            let mut start = [0; 1];
            match recv(pipe, &mut start[..], RecvFlags::PEEK) {
                Ok((0, _)) => return false,
                Ok(_) => match start {
                    [DISMISSED] => return true,
                    [kind @ (CONNECTION | LISTENER)] => self.kept.take(pipe, kind),
                    _ => {
                        if let Ok((len, _)) = recv(pipe, &mut *self.will, RecvFlags::empty()) {
                            self.will_len = len;
                        }
                    }
                },
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(_) => return false,
            }
        }
    }

    /// Carries out the will over `socket`.
    pub(super) fn carry_out(&mut self, socket: BorrowedFd<'_>) {
        let Workspace { will, will_len, answer, kept } = self;
        let mut reader = Reader(will.get(1..*will_len).unwrap_or_default());
        let mut peer = Peer { socket, has_spoken: false, answer, kept };
        let mut progress = Progress { last: false, is_over: false };
        while let Some(inner) = carry_out_one(&mut reader, &mut peer, &mut progress) {
            let mut inner = Reader(inner);
            while carry_out_one(&mut inner, &mut peer, &mut progress).is_some() {}
        }
    }
}

/// What the steps so far have found out.
struct Progress {
    /// Whether the last wait for a word ended well.
    last: bool,
    /// Whether a condition did not hold: no more lines are sent, and only files are removed.
    is_over: bool,
}

/// Carries out the next step, and returns its inner steps, mostly none, which the caller carries
/// out before the next one. Returns `None` if there is no further step.
fn carry_out_one<'a>(
    reader: &mut Reader<'a>,
    peer: &mut Peer<'_>,
    progress: &mut Progress,
) -> Option<&'a [u8]> {
    match reader.byte()? {
        ASK => {
            let query = read_query(reader)?;
            if !progress.is_over {
                peer.ask(&query, &[]);
            }
        }
        kind @ (AWAIT | AWAIT_NONE | ONLY_IF) => {
            let query = read_query(reader)?;
            let mut words: [&[u8]; WORDS_MAX] = [&[]; WORDS_MAX];
            let words = read_words(reader, &mut words)?;
            if progress.is_over {
                progress.last = false;
            } else if kind == ONLY_IF {
                let seen = peer.ask(&query, words).unwrap_or_default();
                progress.is_over = !(seen.answer && seen.word);
            } else {
                progress.last = peer.ask_until(&query, words, kind == AWAIT);
            }
        }
        AWAIT_STILL => {
            let query = read_query(reader)?;
            let (from, quiet) = (reader.bytes()?, reader.milliseconds()?);
            if !progress.is_over {
                peer.ask_until_still(&query, from, quiet);
            }
        }
        UNLESS_NAMED => {
            let (path, file) = (reader.bytes()?, (reader.number()?, reader.number()?));
            let steps = reader.bytes()?;
            return Some(if leads_to(path, file) { &[] } else { steps });
        }
        REMOVE => remove(reader.bytes()?),
        REMOVE_IF_LAST => {
            let path = reader.bytes()?;
            if progress.last {
                remove(path);
            }
        }
        _ => return None,
    }
    Some(&[])
}

/// Reads words into `room`, and returns those that found room.
fn read_words<'a, 'r>(
    reader: &mut Reader<'a>,
    room: &'r mut [&'a [u8]; WORDS_MAX],
) -> Option<&'r [&'a [u8]]> {
    let count = reader.number()?;
    for index in 0..count {
        let word = reader.bytes()?;
        let place = usize::try_from(index).ok().and_then(|index| room.get_mut(index));
        if let Some(place) = place {
            *place = word;
        }
    }
    let count = usize::try_from(count).ok()?;
    Some(room.get(..count.min(WORDS_MAX)).unwrap_or_default())
}

fn read_query<'a>(reader: &mut Reader<'a>) -> Option<Query<'a>> {
    let limit = reader.milliseconds()?;
    let (line, answer) = (reader.bytes()?, reader.bytes()?);
    Some(Query { line, answer, deadline: Instant::now().checked_add(limit) })
}

/// The socket that lines are sent to, and the connections that are kept open meanwhile.
struct Peer<'a> {
    socket: BorrowedFd<'a>,
    /// Whether a line that the other process may have begun was broken off.
    has_spoken: bool,
    answer: &'a mut [u8],
    kept: &'a mut Kept,
}

impl Peer<'_> {
    /// Sends the line until its answer contains one of `words`, or, unless `is_wanted`, none of
    /// them; returns whether that happened in time.
    fn ask_until(&mut self, query: &Query<'_>, words: &[&[u8]], is_wanted: bool) -> bool {
        loop {
            let Some(seen) = self.ask(query, words) else { return false };
            if seen.answer && seen.word == is_wanted {
                return true;
            }
            if left(query.deadline).is_none() {
                return false;
            }
            self.rest(INTERVAL);
        }
    }

    /// Sends the line until the part of its answer that begins with `from` has been the same for
    /// `quiet`; `None` if that did not happen in time.
    fn ask_until_still(&mut self, query: &Query<'_>, from: &[u8], quiet: Duration) -> Option<()> {
        let mut part = self.ask(query, &[from])?.part;
        let mut since = Instant::now();
        while since.elapsed() < quiet {
            left(query.deadline)?;
            self.rest(INTERVAL);
            let before = part;
            part = self.ask(query, &[from])?.part;
            if part != before {
                since = Instant::now();
            }
        }
        Some(())
    }

    /// Sends the line and reads up to its answer; `None` if the socket has ended.
    fn ask(&mut self, query: &Query<'_>, words: &[&[u8]]) -> Option<Seen> {
        if !self.has_spoken {
            put(self.socket, BREAK, None);
            self.has_spoken = true;
        }
        put(self.socket, query.line, query.deadline)?;
        let mut len = 0;
        let mut seen = Seen::default();
        loop {
            while let Some(end) = self.answer.get(..len)?.iter().position(|&byte| byte == b'\n') {
                seen.look(self.answer.get(..end)?, query.answer, words);
                self.answer.copy_within(end + 1..len, 0);
                len -= end + 1;
                if seen.answer {
                    // What came after the answer is an event, or the answer to an earlier command.
                    return Some(seen);
                }
                seen = Seen::default();
            }
            if len == self.answer.len() {
                // A long line: search what has come of it, and keep only its end.
                seen.look(self.answer, query.answer, words);
                let kept = len.checked_sub(WORD_LEN_MAX)?;
                self.answer.copy_within(kept..len, 0);
                len = WORD_LEN_MAX;
            }
            if !self.wait_for_words(query.deadline) {
                return Some(Seen::default());
            }
            match recv(self.socket, self.answer.get_mut(len..)?, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return None,
                Ok((received, _)) => len += received,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(_) => return None,
            }
        }
    }

    /// Waits until there is something to read, and returns whether there is before `deadline`.
    fn wait_for_words(&mut self, deadline: Option<Instant>) -> bool {
        loop {
            let step = match left(deadline) {
                Some(left) => left.min(self.kept.interval()),
                None => return false,
            };
            if wait(self.socket, PollFlags::IN, Instant::now().checked_add(step)) {
                return true;
            }
            self.kept.serve();
        }
    }

    fn rest(&mut self, duration: Duration) {
        let deadline = Instant::now().checked_add(duration);
        while let Some(left) = left(deadline) {
            rest(left.min(self.kept.interval()));
            self.kept.serve();
        }
    }
}

impl Seen {
    fn look(&mut self, line: &[u8], answer: &[u8], words: &[&[u8]]) {
        self.answer |= holds(line, answer);
        self.word |= words.iter().any(|word| holds(line, word));
        self.part ^= words.first().map_or(0, |from| checksum(line, from));
    }
}

fn holds(line: &[u8], word: &[u8]) -> bool {
    !word.is_empty() && line.windows(word.len()).any(|window| window == word)
}

/// Returns a checksum (FNV-1a) of the part of `line` from `from` to the next `}`; 0 if there is
/// none.
fn checksum(line: &[u8], from: &[u8]) -> u64 {
    let start = line.windows(from.len().max(1)).position(|window| window == from);
    let Some(part) = start.and_then(|start| line.get(start..)) else { return 0 };
    let bytes = part.iter().take_while(|&&byte| byte != b'}');
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Sends all of `bytes`; `None` if the socket has ended, or takes none before `deadline`.
fn put(socket: BorrowedFd<'_>, bytes: &[u8], deadline: Option<Instant>) -> Option<()> {
    let deadline = deadline.or_else(|| Instant::now().checked_add(Duration::from_secs(1)));
    let mut bytes = bytes;
    while !bytes.is_empty() {
        match send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) => bytes = bytes.get(sent..)?,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if wait(socket, PollFlags::OUT, deadline) => {}
            Err(_) => return None,
        }
    }
    Some(())
}

/// Waits until the socket is ready, and returns whether it is before `deadline`.
fn wait(socket: BorrowedFd<'_>, flags: PollFlags, deadline: Option<Instant>) -> bool {
    loop {
        let Some(left) = left(deadline) else { return false };
        let Ok(left) = Timespec::try_from(left) else { return false };
        match poll(&mut [PollFd::from_borrowed_fd(socket, flags)], Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Returns how much time is left; `None` if none is.
fn left(deadline: Option<Instant>) -> Option<Duration> {
    let left = deadline?.saturating_duration_since(Instant::now());
    (!left.is_zero()).then_some(left)
}

fn rest(duration: Duration) {
    let deadline = Instant::now().checked_add(duration);
    while let Some(left) = left(deadline) {
        let Ok(left) = Timespec::try_from(left) else { return };
        // A signal ends the call early, and the loop goes on; another error ends the rest.
        if poll(&mut [], Some(&left)).is_err_and(|errno| errno != Errno::INTR) {
            return;
        }
    }
}

/// Returns whether `path`, which ends in a zero byte, leads to the file with this device and inode.
fn leads_to(path: &[u8], (device, inode): (u64, u64)) -> bool {
    let Ok(path) = CStr::from_bytes_with_nul(path) else { return false };
    statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|found| (found.st_dev, found.st_ino) == (device, inode))
}

/// Removes the file or the empty directory at `path`, which ends in a zero byte.
fn remove(path: &[u8]) {
    let Ok(path) = CStr::from_bytes_with_nul(path) else { return };
    let removed = match unlinkat(CWD, path, AtFlags::empty()) {
        Err(Errno::ISDIR) => unlinkat(CWD, path, AtFlags::REMOVEDIR),
        removed => removed,
    };
    // A file that does not exist needs no removal, and another error cannot be reported.
    removed.unwrap_or_default();
}
