//! The RAM of a process that stands still while it is copied aside, and runs on while the copy is
//! saved.
//!
//! Only what is not in a file beneath is copied: in a private mapping of a file, as a VM has that
//! was restored by mapping, that is what the process has written since. The kernel knows these pages
//! ([`ProcessMemory::own`](vmfile_engine::ProcessMemory::own)).

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmfile_engine::{AlignedBuffer, Crew};

use crate::memory::{Beneath, PageSource};
use crate::plan::{UNIT_LEN, Units, in_window};
use crate::process_ram::ProcessRam;

/// Threads, and memory for a copy, taken and touched before the process is stopped.
#[derive(Debug)]
pub struct Room {
    crew: Crew,
    /// Each as long as a unit.
    buffers: Vec<AlignedBuffer>,
}

impl Room {
    /// Takes memory for `bytes` bytes, and starts `jobs` threads.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::OutOfMemory`] if there is not so much, or the kernel's error.
    pub fn new(bytes: u64, jobs: usize) -> io::Result<Room> {
        // Each thread may leave a buffer half empty.
        let count = bytes.div_ceil(UNIT_LEN) + jobs as u64 - 1;
        let mut crew = Crew::start(jobs)?;
        let buffers = Mutex::new(Vec::new());
        // Touching memory takes longer than filling it later.
        crew.run(&|number| {
            for _ in (number as u64..count).step_by(jobs) {
                let buffer = AlignedBuffer::zeroed(in_window(UNIT_LEN), 4096);
                lock(&buffers).push(buffer);
            }
        })?;
        let buffers = buffers.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Room { crew, buffers: buffers.into_iter().collect::<io::Result<_>>()? })
    }
}

/// RAM as it was when it was copied.
#[derive(Debug)]
pub struct CopiedRam<'a> {
    ram: &'a ProcessRam,
    buffers: Vec<AlignedBuffer>,
    /// What was copied of each block, in order.
    blocks: Vec<Vec<Copied>>,
    bytes: u64,
}

/// A part of a block, and where its copy lies.
#[derive(Debug)]
struct Copied {
    range: Range<u64>,
    buffer: usize,
    at: usize,
}

/// Returns how many bytes a copy would have now.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn own_len(ram: &ProcessRam) -> io::Result<u64> {
    let mut bytes = 0;
    let units = units(ram);
    while let Some(unit) = units.take(|block, range| ram.first_own(block, &range))? {
        let own = ram.own(unit.block, &unit.range)?;
        bytes += own.iter().map(|own| own.end - own.start).sum::<u64>();
    }
    Ok(bytes)
}

fn units(ram: &ProcessRam) -> Units {
    Units::new(ram.addresses().map(|addresses| addresses.end - addresses.start), UNIT_LEN)
}

impl<'a> CopiedRam<'a> {
    /// Copies what is not in a file beneath, while the process stands still. Returns `None` once
    /// `is_too_long` says so, or if there is more than `room`.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn copy(
        ram: &'a ProcessRam,
        room: Room,
        is_too_long: impl Fn() -> bool + Sync,
    ) -> io::Result<Option<CopiedRam<'a>>> {
        let Room { mut crew, buffers } = room;
        let free = Mutex::new(buffers);
        let units = units(ram);
        let parts: Vec<_> = (0..crew.count()).map(|_| Mutex::new(Ok(None))).collect();
        crew.run(&|number| {
            let mut copier = Copier { ram, free: &free, copy: Part::default(), at: 0 };
            let copied = units.work(|| copier.units(&units, &is_too_long));
            *lock(&parts[number]) = copied.map(|is_whole| is_whole.then_some(copier.copy));
        })?;
        let mut copied = CopiedRam { ram, buffers: Vec::new(), blocks: Vec::new(), bytes: 0 };
        copied.blocks.extend(ram.addresses().map(|_| Vec::new()));
        for part in parts {
            let part = part.into_inner().unwrap_or_else(PoisonError::into_inner)?;
            let Some(part) = part else { return Ok(None) };
            let first = copied.buffers.len();
            copied.buffers.extend(part.buffers);
            for (block, found) in part.copies {
                copied.bytes += found.range.end - found.range.start;
                copied.blocks[block].push(Copied { buffer: first + found.buffer, ..found });
            }
        }
        for block in &mut copied.blocks {
            block.sort_unstable_by_key(|copied| copied.range.start);
        }
        Ok(Some(copied))
    }

    /// Returns how many bytes were copied.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies what was copied of `range` to its place in `into`; returns which ranges that is.
    fn paste(&self, block: usize, range: &Range<u64>, into: &mut [u8]) -> Vec<Range<u64>> {
        let paste = |copied: &Copied| {
            let part = copied.range.start.max(range.start)..copied.range.end.min(range.end);
            let at = copied.at + in_window(part.start - copied.range.start);
            let bytes = &self.buffers[copied.buffer][at..at + in_window(part.end - part.start)];
            into[in_window(part.start - range.start)..in_window(part.end - range.start)]
                .copy_from_slice(bytes);
            part
        };
        self.copies(block, range).iter().map(paste).collect()
    }

    /// Returns the copies that have a byte of `range`.
    fn copies(&self, block: usize, range: &Range<u64>) -> &[Copied] {
        let copies = &self.blocks[block];
        let first = copies.partition_point(|copied| copied.range.end <= range.start);
        let len = copies[first..].partition_point(|copied| copied.range.start < range.end);
        &copies[first..first + len]
    }
}

/// What one thread has copied.
#[derive(Debug, Default)]
struct Part {
    buffers: Vec<AlignedBuffer>,
    /// Each with its block.
    copies: Vec<(usize, Copied)>,
}

/// A thread that copies.
struct Copier<'c> {
    ram: &'c ProcessRam,
    free: &'c Mutex<Vec<AlignedBuffer>>,
    copy: Part,
    /// Where the next byte goes in the last buffer.
    at: usize,
}

impl Copier<'_> {
    /// Copies units until none are left; returns `false` if there was no time or no room for one.
    fn units(&mut self, units: &Units, is_too_long: impl Fn() -> bool) -> io::Result<bool> {
        while let Some(unit) = units.take(|block, range| self.ram.first_own(block, &range))? {
            let own = self.ram.own(unit.block, &unit.range)?;
            if is_too_long() || !self.take(unit.block, own)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Copies ranges of a block; returns whether there was room.
    fn take(&mut self, block: usize, ranges: Vec<Range<u64>>) -> io::Result<bool> {
        let mut rest = ranges;
        while !rest.is_empty() {
            let free = self.copy.buffers.last().map_or(0, |buffer| buffer.len() - self.at);
            if free == 0 {
                let Some(buffer) = lock(self.free).pop() else { return Ok(false) };
                self.copy.buffers.push(buffer);
                self.at = 0;
                continue;
            }
            let number = self.copy.buffers.len() - 1;
            let buffer = &mut self.copy.buffers[number];
            let (now, later) = split(rest, free as u64);
            rest = later;
            let len = in_window(now.iter().map(|range| range.end - range.start).sum());
            self.ram.gather(block, &now, &mut buffer[self.at..self.at + len])?;
            for range in now {
                let len = in_window(range.end - range.start);
                self.copy.copies.push((block, Copied { range, buffer: number, at: self.at }));
                self.at += len;
            }
        }
        Ok(true)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cuts ranges behind their first `len` bytes.
fn split(ranges: Vec<Range<u64>>, len: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let (mut now, mut later) = (Vec::new(), Vec::new());
    let mut left = len;
    for range in ranges {
        let cut = (range.start + left).min(range.end);
        left -= cut - range.start;
        now.extend((range.start < cut).then_some(range.start..cut));
        later.extend((cut < range.end).then_some(cut..range.end));
    }
    (now, later)
}

impl PageSource for CopiedRam<'_> {
    fn first_data(&self, block: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        let copied = self.copies(block, range).first();
        let copied = copied.map(|copied| copied.range.start.max(range.start));
        let before = range.start..copied.unwrap_or(range.end);
        Ok(self.ram.first_beneath(block, &before)?.or(copied))
    }

    fn read(&self, block: usize, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool> {
        if self.first_data(block, range)?.is_none() {
            return Ok(false);
        }
        self.ram.read_beneath(block, range.start, into)?;
        self.paste(block, range, into);
        Ok(true)
    }

    fn beneath(&self, block: usize) -> io::Result<Option<Beneath>> {
        self.ram.beneath(block)
    }

    fn read_written(
        &self,
        block: usize,
        range: &Range<u64>,
        into: &mut [u8],
    ) -> io::Result<Vec<Range<u64>>> {
        Ok(self.paste(block, range, into))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_behind_so_many_bytes() {
        let ranges = || vec![0..10, 20..30, 40..41];
        assert_eq!(split(ranges(), 15), (vec![0..10, 20..25], vec![25..30, 40..41]));
        assert_eq!(split(ranges(), 0), (vec![], ranges()));
        assert_eq!(split(ranges(), 21), (ranges(), vec![]));
        assert_eq!(split(ranges(), 30), (ranges(), vec![]));
    }
}
