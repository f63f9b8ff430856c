//! A will: steps to carry out over a socket, as bytes that need no allocation to be read.

use std::ffi::CString;
use std::time::Duration;

/// The longest will, in bytes: a kernel takes a packet of 200 KiB whole (`net.core.wmem_default`).
pub(crate) const WILL_LEN_MAX: usize = 128 << 10;

/// The message that ends a guardian; no will begins with it.
pub(crate) const DISMISSED: u8 = 0;

/// First byte of a will.
pub(crate) const WILL: u8 = 1;

/// The message that brings a connection to be kept open.
pub(crate) const CONNECTION: u8 = 2;

/// The message that brings a socket whose connections are to be accepted.
pub(crate) const LISTENER: u8 = 3;

/// The bytes that the steps of a will begin with.
pub(crate) const ASK: u8 = 1;
pub(crate) const AWAIT: u8 = 2;
pub(crate) const AWAIT_NONE: u8 = 3;
pub(crate) const AWAIT_STILL: u8 = 4;
pub(crate) const REMOVE: u8 = 5;
pub(crate) const REMOVE_IF_LAST: u8 = 6;
pub(crate) const ONLY_IF: u8 = 7;
pub(crate) const UNLESS_NAMED: u8 = 8;

/// One step of a will. It sends a line over the socket; the answer is the first line that contains
/// the bytes `answer`. Lines without them are skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Sends a line and waits for its answer.
    Ask {
        /// The line, with its line end.
        line: Vec<u8>,
        /// Bytes that its answer contains.
        answer: Vec<u8>,
        /// How long the answer may take.
        limit: Duration,
    },
    /// Sends a line again and again until its answer also contains one of `words`.
    Await {
        /// The line, with its line end.
        line: Vec<u8>,
        /// Bytes that its answer contains.
        answer: Vec<u8>,
        /// Byte strings, of which the answer is to contain one.
        words: Vec<Vec<u8>>,
        /// How long it may take.
        limit: Duration,
    },
    /// Sends a line again and again until its answer contains none of `words`.
    AwaitNone {
        /// The line, with its line end.
        line: Vec<u8>,
        /// Bytes that its answer contains.
        answer: Vec<u8>,
        /// Byte strings, of which the answer is to contain none.
        words: Vec<Vec<u8>>,
        /// How long it may take.
        limit: Duration,
    },
    /// Sends a line once. Unless its answer contains one of `words`, no later step is carried out
    /// but [`Step::Remove`].
    OnlyIf {
        /// The line, with its line end.
        line: Vec<u8>,
        /// Bytes that its answer contains.
        answer: Vec<u8>,
        /// Byte strings, of which the answer must contain one.
        words: Vec<Vec<u8>>,
        /// How long the answer may take.
        limit: Duration,
    },
    /// Sends a line again and again until the part of its answer from the bytes `from` to the next
    /// `}` has been the same for as long as `quiet`.
    AwaitStill {
        /// The line, with its line end.
        line: Vec<u8>,
        /// Bytes that its answer contains.
        answer: Vec<u8>,
        /// Where the part begins that is to stay the same. Answers without it count as the same.
        from: Vec<u8>,
        /// How long it is to stay the same.
        quiet: Duration,
        /// How long it may take.
        limit: Duration,
    },
    /// Carries out `steps` unless `path` leads to the file with this device and inode.
    UnlessNamed {
        /// The path.
        path: CString,
        /// The device of the file's file system.
        device: u64,
        /// The file's inode there.
        inode: u64,
        /// The steps if the file does not have this name. None of them is `UnlessNamed`.
        steps: Vec<Step>,
    },
    /// Removes a file, or an empty directory.
    Remove(CString),
    /// Removes a file if the last [`Step::Await`] or [`Step::AwaitNone`] saw what it waited for.
    RemoveIfLast(CString),
}

/// Steps that are carried out one after the other; after one that fails, the next is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Will {
    bytes: Vec<u8>,
}

impl Will {
    /// Makes a will of `steps`.
    #[must_use]
    pub fn new(steps: &[Step]) -> Will {
        let mut bytes = vec![WILL];
        for step in steps {
            step.encode(&mut bytes);
        }
        Will { bytes }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Step {
    fn encode(&self, into: &mut Vec<u8>) {
        match self {
            Step::Ask { line, answer, limit } => {
                into.push(ASK);
                put_query(into, line, answer, *limit);
            }
            Step::Await { line, answer, words, limit } => {
                into.push(AWAIT);
                put_query(into, line, answer, *limit);
                put_words(into, words);
            }
            Step::AwaitNone { line, answer, words, limit } => {
                into.push(AWAIT_NONE);
                put_query(into, line, answer, *limit);
                put_words(into, words);
            }
            Step::OnlyIf { line, answer, words, limit } => {
                into.push(ONLY_IF);
                put_query(into, line, answer, *limit);
                put_words(into, words);
            }
            Step::AwaitStill { line, answer, from, quiet, limit } => {
                into.push(AWAIT_STILL);
                put_query(into, line, answer, *limit);
                put(into, from);
                put_duration(into, *quiet);
            }
            Step::UnlessNamed { path, device, inode, steps } => {
                into.push(UNLESS_NAMED);
                put(into, path.as_bytes_with_nul());
                put_number(into, *device);
                put_number(into, *inode);
                let mut inner = Vec::new();
                steps.iter().for_each(|step| step.encode(&mut inner));
                put(into, &inner);
            }
            Step::Remove(path) => {
                into.push(REMOVE);
                put(into, path.as_bytes_with_nul());
            }
            Step::RemoveIfLast(path) => {
                into.push(REMOVE_IF_LAST);
                put(into, path.as_bytes_with_nul());
            }
        }
    }
}

fn put_query(into: &mut Vec<u8>, line: &[u8], answer: &[u8], limit: Duration) {
    put_duration(into, limit);
    put(into, line);
    put(into, answer);
}

fn put_words(into: &mut Vec<u8>, words: &[Vec<u8>]) {
    put_number(into, words.len() as u64);
    words.iter().for_each(|word| put(into, word));
}

fn put(into: &mut Vec<u8>, bytes: &[u8]) {
    put_number(into, bytes.len() as u64);
    into.extend_from_slice(bytes);
}

fn put_duration(into: &mut Vec<u8>, duration: Duration) {
    put_number(into, u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
}

fn put_number(into: &mut Vec<u8>, number: u64) {
    into.extend(number.to_le_bytes());
}

/// Reads the parts of a will; each function returns `None` at the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    pub(crate) fn number(&mut self) -> Option<u64> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*number))
    }

    pub(crate) fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.number()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(crate) fn milliseconds(&mut self) -> Option<Duration> {
        self.number().map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_will_is_read_back_as_it_was_written() {
        let step = Step::Await {
            line: b"ask\n".to_vec(),
            answer: b"id-1".to_vec(),
            words: vec![b"done".to_vec(), b"none".to_vec()],
            limit: Duration::from_millis(1500),
        };
        let will = Will::new(&[step, Step::Remove(c"/tmp/x".to_owned())]);
        let mut reader = Reader(will.bytes());
        assert_eq!(reader.byte(), Some(WILL));
        assert_eq!(reader.byte(), Some(AWAIT));
        assert_eq!(reader.milliseconds(), Some(Duration::from_millis(1500)));
        assert_eq!(reader.bytes(), Some(&b"ask\n"[..]));
        assert_eq!(reader.bytes(), Some(&b"id-1"[..]));
        assert_eq!(reader.number(), Some(2));
        assert_eq!(reader.bytes(), Some(&b"done"[..]));
        assert_eq!(reader.bytes(), Some(&b"none"[..]));
        assert_eq!(reader.byte(), Some(REMOVE));
        assert_eq!(reader.bytes(), Some(&b"/tmp/x\0"[..]));
        assert_eq!(reader.byte(), None);
    }

    #[test]
    fn a_will_that_was_cut_ends_early_and_does_not_panic() {
        let step = Step::Ask {
            line: b"ask\n".to_vec(),
            answer: b"1".to_vec(),
            limit: Duration::from_secs(1),
        };
        let will = Will::new(&[step]);
        for len in 0..will.bytes().len() {
            let mut reader = Reader(&will.bytes()[..len]);
            while reader.byte().is_some() && reader.bytes().is_some() {}
        }
    }
}
