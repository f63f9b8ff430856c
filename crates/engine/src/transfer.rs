//! One read or write: an extent of a file and a piece of memory.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use crate::buffer::{PooledBuffer, SharedBuffer};

/// The memory of a [`Transfer`], owned by the storage while the kernel uses it.
#[derive(Debug)]
pub enum Memory {
    /// A piece of a shared read-only buffer: a source for writes.
    Shared(SharedBuffer, Range<usize>),
    /// A piece of a buffer of its own: a source for writes or a target for reads.
    Owned(PooledBuffer, Range<usize>),
}

impl Memory {
    /// Returns the length of the piece, in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Memory::Shared(_, range) | Memory::Owned(_, range) => range.len(),
        }
    }

    /// Says whether the piece has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Says whether the kernel may write into this memory.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        matches!(self, Memory::Owned(..))
    }

    /// Returns where the piece starts.
    ///
    /// The address holds for as long as `self` lives, wherever `self` itself is moved to.
    ///
    /// # Panics
    ///
    /// Panics if the range does not lie in its buffer.
    pub(crate) fn start(&self) -> NonNull<u8> {
        match self {
            Memory::Shared(buffer, range) => inside(buffer.start(), buffer.len(), range),
            Memory::Owned(buffer, range) => inside(buffer.start(), buffer.len(), range),
        }
    }
}

fn inside(start: NonNull<u8>, len: usize, range: &Range<usize>) -> NonNull<u8> {
    assert!(
        range.start <= range.end && range.end <= len,
        "bytes {range:?} of a buffer of {len} bytes"
    );
    let address = start.as_ptr().wrapping_add(range.start);
    NonNull::new(address).expect("no buffer ends at the end of the address space")
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file into memory.
    Read,
    /// From memory into the file.
    Write,
}

/// One read or write that a storage must do, as long as its memory is.
#[derive(Debug)]
pub struct Transfer {
    /// Which way.
    pub direction: Direction,
    /// Where in the file, in bytes.
    pub file_offset: u64,
    /// Where in memory, and how much.
    pub memory: Memory,
    /// A number by which the caller recognizes the transfer.
    pub tag: u64,
}

impl Transfer {
    /// Panics if the caller has made a mistake; returns where the memory starts.
    pub(crate) fn check(&self) -> NonNull<u8> {
        assert!(
            self.direction == Direction::Write || self.memory.is_writable(),
            "a read goes into memory that may be written"
        );
        let end = self.file_offset.checked_add(self.memory.len() as u64);
        assert!(end.is_some_and(|end| i64::try_from(end).is_ok()), "a file ends below 2^63");
        self.memory.start()
    }
}

/// A transfer that is over, with its memory handed back.
#[derive(Debug)]
pub struct Completion {
    /// The transfer as it was submitted.
    pub transfer: Transfer,
    /// Whether *all* bytes went over; short transfers were continued before this.
    ///
    /// A read that met the end of the file is [`io::ErrorKind::UnexpectedEof`]; the bytes before
    /// it are in the memory. Other errors are the kernel's, and how many bytes went over before
    /// them is unknown.
    pub result: io::Result<()>,
}

/// The longest piece that is given to the kernel at once, in bytes.
///
/// Linux transfers at most `0x7fff_f000` bytes in one call, and a length in a ring entry has 32
/// bits; this is the power of two below.
pub(crate) const PIECE_LEN_MAX: usize = 1 << 30;

/// How far a transfer has come: the arithmetic that both back ends share.
#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) transfer: Transfer,
    start: NonNull<u8>,
    done: usize,
}

impl Progress {
    pub(crate) fn new(transfer: Transfer) -> Progress {
        let start = transfer.check();
        Progress { transfer, start, done: 0 }
    }

    /// Returns where the next byte lies in memory.
    pub(crate) fn address(&self) -> *mut u8 {
        self.start.as_ptr().wrapping_add(self.done)
    }

    /// Returns where the next byte lies in the file.
    pub(crate) fn file_offset(&self) -> u64 {
        self.transfer.file_offset + self.done as u64
    }

    /// Returns how many bytes are left.
    pub(crate) fn remaining(&self) -> usize {
        self.transfer.memory.len() - self.done
    }

    /// Counts `len` bytes that the kernel has moved; returns an error if it moved none.
    pub(crate) fn advance(&mut self, len: usize) -> io::Result<()> {
        assert!(len <= self.remaining(), "the kernel moved more than it was asked to");
        if len == 0 && self.remaining() > 0 {
            return Err(match self.transfer.direction {
                Direction::Read => io::ErrorKind::UnexpectedEof.into(),
                // POSIX allows it, no Linux file system does it; going on would loop.
                Direction::Write => io::ErrorKind::WriteZero.into(),
            });
        }
        self.done += len;
        Ok(())
    }

    pub(crate) fn complete(self, result: io::Result<()>) -> Completion {
        Completion { transfer: self.transfer, result }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;

    fn transfer(direction: Direction, memory: Memory) -> Transfer {
        Transfer { direction, file_offset: 100, memory, tag: 0 }
    }

    #[test]
    fn progress_moves_through_file_and_memory_together() {
        let pool = BufferPool::new(1, 8192, 4096).unwrap();
        let memory = Memory::Owned(pool.take(), 4096..8192);
        let start = memory.start().as_ptr().addr();
        let mut progress = Progress::new(transfer(Direction::Read, memory));

        progress.advance(1000).unwrap();

        assert_eq!(progress.file_offset(), 1100);
        assert_eq!(progress.address().addr(), start + 1000);
        assert_eq!(progress.remaining(), 3096);
    }

    #[test]
    fn nothing_read_is_the_end_of_the_file() {
        let pool = BufferPool::new(1, 4096, 4096).unwrap();
        let memory = Memory::Owned(pool.take(), 0..10);
        let mut progress = Progress::new(transfer(Direction::Read, memory));
        let error = progress.advance(0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    #[should_panic(expected = "may be written")]
    fn a_read_into_a_shared_buffer_panics() {
        let pool = BufferPool::new(1, 4096, 4096).unwrap();
        let memory = Memory::Shared(pool.take().freeze(), 0..10);
        transfer(Direction::Read, memory).check();
    }

    #[test]
    #[should_panic(expected = "of a buffer of 4096 bytes")]
    fn a_piece_outside_its_buffer_panics() {
        let pool = BufferPool::new(1, 4096, 4096).unwrap();
        let memory = Memory::Owned(pool.take(), 4000..4097);
        transfer(Direction::Write, memory).check();
    }
}
