//! The disk under test: each pass writes one block and reads back those of the passes before it.

use std::io;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{pread, pwrite};

use crate::pattern::{PAGE_WORDS, mix};

const BLOCK_SIZE: usize = 4096;

/// The number of blocks; pass N writes block N modulo this.
const BLOCK_COUNT: u64 = 64;

/// The number of earlier passes whose blocks each pass reads back.
const READ_BACK: u64 = 8;

/// A disk opened for direct I/O.
#[derive(Debug)]
pub(crate) struct Disk {
    file: rustix::fd::OwnedFd,
    /// Whether to check that the disk is not from a later moment than the memory.
    moment: bool,
    /// Twice as long as a block, so that one block lies at an aligned address, as direct I/O
    /// requires.
    buffer: Vec<u8>,
}

impl Disk {
    pub(crate) fn open(path: &str, moment: bool) -> io::Result<Disk> {
        let file = open(path, OFlags::RDWR | OFlags::DIRECT | OFlags::DSYNC, Mode::empty())?;
        Ok(Disk { file, moment, buffer: vec![0; 2 * BLOCK_SIZE] })
    }

    /// Reads what the last passes wrote and writes the block of this pass; returns `ok` or what is
    /// wrong.
    pub(crate) fn check_and_write(&mut self, pass: u64) -> io::Result<String> {
        let start = self.buffer.as_ptr().align_offset(BLOCK_SIZE);
        let block = &mut self.buffer[start..start + BLOCK_SIZE];
        for earlier in pass.saturating_sub(READ_BACK).max(1)..pass {
            pread(&self.file, &mut *block, file_offset(earlier))?;
            if block != contents(earlier) {
                return Ok(format!("CORRUPT: block of pass {earlier}"));
            }
        }
        if self.moment {
            pread(&self.file, &mut *block, file_offset(pass))?;
            if block == contents(pass) {
                return Ok(format!("CORRUPT: block of pass {pass} is there before the pass"));
            }
        }
        block.copy_from_slice(&contents(pass));
        pwrite(&self.file, &*block, file_offset(pass))?;
        Ok("ok".to_owned())
    }
}

fn file_offset(pass: u64) -> u64 {
    (pass % BLOCK_COUNT) * 4096
}

fn contents(pass: u64) -> Vec<u8> {
    (0_u64..).take(PAGE_WORDS).flat_map(|word| mix(pass ^ mix(word)).to_le_bytes()).collect()
}
