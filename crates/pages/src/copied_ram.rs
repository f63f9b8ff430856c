//! The RAM of a process that stands still while it is copied aside, and runs on while the copy is
//! saved.
//!
//! Only what is not in a file beneath is copied: in a private mapping of a file, as a VM has that
//! was restored by mapping, that is what the process has written since. The kernel knows these pages
//! ([`ProcessMemory::own`](vmfile_engine::ProcessMemory::own)).

use std::io;
use std::ops::Range;

use vmfile_engine::AlignedBuffer;

use crate::memory::{Beneath, PageSource};
use crate::plan::{UNIT_LEN, Units, in_window};
use crate::process_ram::ProcessRam;

/// Memory for a copy, taken and touched before the process is stopped.
#[derive(Debug)]
pub struct Room {
    /// Each as long as a unit.
    buffers: Vec<AlignedBuffer>,
}

impl Room {
    /// Takes memory for `bytes` bytes.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::OutOfMemory`] if there is not so much.
    pub fn new(bytes: u64) -> io::Result<Room> {
        let buffer = |_| AlignedBuffer::zeroed(in_window(UNIT_LEN), 4096);
        Ok(Room { buffers: (0..bytes.div_ceil(UNIT_LEN)).map(buffer).collect::<io::Result<_>>()? })
    }
}

/// RAM as it was when it was copied.
#[derive(Debug)]
pub struct CopiedRam<'a> {
    ram: &'a ProcessRam,
    room: Room,
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
    each_unit(ram, |block, range| {
        bytes += ram.own(block, &range)?.iter().map(|own| own.end - own.start).sum::<u64>();
        Ok(true)
    })?;
    Ok(bytes)
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
        is_too_long: impl Fn() -> bool,
    ) -> io::Result<Option<CopiedRam<'a>>> {
        let blocks = ram.addresses().map(|_| Vec::new()).collect();
        let mut copied = CopiedRam { ram, room, blocks, bytes: 0 };
        let mut place = Place::default();
        let is_whole = each_unit(ram, |block, range| {
            let own = ram.own(block, &range)?;
            Ok(!is_too_long() && copied.take(block, &own, &mut place)?)
        })?;
        Ok(is_whole.then_some(copied))
    }

    /// Returns how many bytes were copied.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies ranges of a block; returns whether there was room.
    fn take(&mut self, block: usize, ranges: &[Range<u64>], place: &mut Place) -> io::Result<bool> {
        let mut rest = ranges.to_vec();
        while !rest.is_empty() {
            let Some(buffer) = self.room.buffers.get_mut(place.buffer) else { return Ok(false) };
            let (now, later) = split(rest, (buffer.len() - place.at) as u64);
            rest = later;
            let len: u64 = now.iter().map(|range| range.end - range.start).sum();
            let len = in_window(len);
            self.ram.gather(block, &now, &mut buffer[place.at..place.at + len])?;
            for range in now {
                let len = in_window(range.end - range.start);
                self.blocks[block].push(Copied { range, buffer: place.buffer, at: place.at });
                place.at += len;
            }
            self.bytes += len as u64;
            if !rest.is_empty() {
                *place = Place { buffer: place.buffer + 1, at: 0 };
            }
        }
        Ok(true)
    }

    /// Copies what was copied of `range` to its place in `into`; returns which ranges that is.
    fn paste(&self, block: usize, range: &Range<u64>, into: &mut [u8]) -> Vec<Range<u64>> {
        let paste = |copied: &Copied| {
            let part = copied.range.start.max(range.start)..copied.range.end.min(range.end);
            let at = copied.at + in_window(part.start - copied.range.start);
            let bytes =
                &self.room.buffers[copied.buffer][at..at + in_window(part.end - part.start)];
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

/// Where the next byte goes.
#[derive(Debug, Default)]
struct Place {
    buffer: usize,
    at: usize,
}

/// Calls `work` for every unit with something to copy, until it returns `false`; returns whether it
/// never did.
fn each_unit(
    ram: &ProcessRam,
    mut work: impl FnMut(usize, Range<u64>) -> io::Result<bool>,
) -> io::Result<bool> {
    let lens = ram.addresses().map(|addresses| addresses.end - addresses.start);
    let units = Units::new(lens, UNIT_LEN);
    while let Some(unit) = units.take(|block, range| ram.first_own(block, &range))? {
        if !work(unit.block, unit.range)? {
            return Ok(false);
        }
    }
    Ok(true)
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
