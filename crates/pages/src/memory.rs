//! RAM as the crate sees it: blocks of bytes that pages are taken from or brought into.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use vmfile_engine::is_zero;

use crate::plan::{WINDOW_LEN, pieces};

/// RAM that pages are taken from, in blocks that are counted from 0.
///
/// The memory must not change while pages are taken. A page that changes still gets the right hash,
/// because the copy made by [`PageSource::read`] is what is hashed and written; but the pages of a
/// file are then not all of the same moment.
///
/// Ranges are bytes of a block. Several threads call these functions at the same time, for
/// different ranges.
pub trait PageSource: Sync {
    /// Returns the first byte of `range` that may be other than zero; all before it is zero.
    ///
    /// By default that is the first byte of the range. A source that can tell without reading the
    /// bytes, e.g. from the kernel's page tables, saves that work.
    ///
    /// # Errors
    ///
    /// Returns an error if the memory cannot be asked; the save ends with it.
    fn first_data(&self, _block: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        Ok((!range.is_empty()).then_some(range.start))
    }

    /// Copies `range`, [`WINDOW_LEN`] bytes at most, into `into`, which has its length, and returns
    /// `true`. If all of the range is zero, it may return `false` and copy nothing.
    ///
    /// # Errors
    ///
    /// Returns an error if the memory cannot be read; the save ends with it.
    fn read(&self, block: usize, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool>;

    /// Returns the file of which a block is a private mapping, if it is one. A save with that file as
    /// the base then calls [`PageSource::read_written`], and takes all other pages for those of the file.
    ///
    /// # Errors
    ///
    /// Returns an error if the memory cannot be asked; the save ends with it.
    fn beneath(&self, _block: usize) -> io::Result<Option<Beneath>> {
        Ok(None)
    }

    /// As [`PageSource::read`], but copies only the pages that were written since the file beneath was
    /// mapped, each to its place in `into`. Returns their ranges, whole pages of 4096 bytes in ascending
    /// order.
    ///
    /// # Errors
    ///
    /// As [`PageSource::read`].
    fn read_written(
        &self,
        block: usize,
        range: &Range<u64>,
        into: &mut [u8],
    ) -> io::Result<Vec<Range<u64>>> {
        let has_data = self.read(block, range, into)?;
        if !has_data {
            into.fill(0);
        }
        Ok(vec![range.clone()])
    }
}

/// The file of which a block of RAM is a private mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beneath {
    /// The number of its file system.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Where in it the block begins, in bytes.
    pub offset: u64,
}

/// RAM that pages are loaded into. The loader first asks where it already holds bytes, and
/// overwrites them with zeros where the file has a zero page.
pub trait PageSink: PageSource {
    /// Returns the parts of `range`, [`WINDOW_LEN`] bytes at most, that may be other than zero.
    ///
    /// By default that is the whole range. A sink that is known to be zero saves the loader the
    /// writing of zeros.
    ///
    /// # Errors
    ///
    /// Returns an error if the memory cannot be asked; the load ends with it.
    fn data(&self, _block: usize, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        Ok(vec![range.clone()])
    }

    /// Copies `parts` of `bytes` into the block: the first byte of `bytes` belongs to the block's
    /// byte
    /// `start`. All of them lie between two multiples of [`WINDOW_LEN`].
    ///
    /// # Errors
    ///
    /// Returns an error if the memory cannot be written; the load ends with it.
    fn write(
        &self,
        block: usize,
        start: u64,
        parts: &[Range<usize>],
        bytes: &[u8],
    ) -> io::Result<()>;
}

/// Memory of the caller's own that is saved: a slice for each block.
#[derive(Clone, Debug)]
pub struct OwnMemory<'a> {
    blocks: Vec<&'a [u8]>,
}

impl<'a> OwnMemory<'a> {
    /// Takes a slice for each block, in the order of the file.
    #[must_use]
    pub fn new(blocks: Vec<&'a [u8]>) -> OwnMemory<'a> {
        OwnMemory { blocks }
    }
}

impl PageSource for OwnMemory<'_> {
    fn read(&self, block: usize, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool> {
        into.copy_from_slice(&self.blocks[block][in_block(range.start)..in_block(range.end)]);
        Ok(true)
    }
}

/// Memory of the caller's own that a file is loaded into: a slice for each block.
#[derive(Debug)]
pub struct OwnMemoryMut<'a> {
    /// The windows of each block: no two threads have the same one.
    blocks: Vec<Vec<Mutex<&'a mut [u8]>>>,
}

impl<'a> OwnMemoryMut<'a> {
    /// Takes a slice for each block, in the order of the file. They may hold anything.
    #[must_use]
    pub fn new(blocks: Vec<&'a mut [u8]>) -> OwnMemoryMut<'a> {
        let windows = |block: &'a mut [u8]| block.chunks_mut(WINDOW).map(Mutex::new).collect();
        OwnMemoryMut { blocks: blocks.into_iter().map(windows).collect() }
    }

    /// Runs `work` on the bytes from `start` to the end of its window.
    fn window<T>(&self, block: usize, start: u64, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let window = &self.blocks[block][in_block(start / WINDOW_LEN)];
        let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut window[in_block(start % WINDOW_LEN)..])
    }
}

impl PageSource for OwnMemoryMut<'_> {
    fn first_data(&self, block: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        let is_data = |piece: &Range<u64>| {
            let len = in_block(piece.end - piece.start);
            self.window(block, piece.start, |bytes| !is_zero(&bytes[..len]))
        };
        Ok(pieces(range.clone(), PAGE_LEN).find(is_data).map(|piece| piece.start))
    }

    fn read(&self, block: usize, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool> {
        self.window(block, range.start, |bytes| into.copy_from_slice(&bytes[..into.len()]));
        Ok(true)
    }
}

impl PageSink for OwnMemoryMut<'_> {
    fn data(&self, block: usize, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let first = self.first_data(block, range)?;
        Ok(first.map(|first| first..range.end).into_iter().collect())
    }

    fn write(
        &self,
        block: usize,
        start: u64,
        parts: &[Range<usize>],
        bytes: &[u8],
    ) -> io::Result<()> {
        self.window(block, start, |window| {
            for part in parts {
                window[part.clone()].copy_from_slice(&bytes[part.clone()]);
            }
        });
        Ok(())
    }
}

/// How much of the caller's memory is tested for zeros at once, in bytes.
const PAGE_LEN: u64 = 4096;

const WINDOW: usize = 2 << 20;
const _: () = assert!(WINDOW as u64 == WINDOW_LEN);

/// An offset in memory of this process.
fn in_block(offset: u64) -> usize {
    usize::try_from(offset).expect("memory of this process has offsets of its width")
}
