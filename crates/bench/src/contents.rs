//! Fills the RAM of a guest from outside, so that a guest of any size is filled at the speed of
//! memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use vmfile_engine::ProcessMemory;
use vmfile_qemu::RamBlockInfo;

use crate::error::BenchError;
use crate::options::Contents;

/// Pages of one kind lie together, in runs of this length: 256 KiB.
const RUN_LEN: usize = 256 << 10;

const PAGE_LEN: usize = 4096;

/// Firmware uses the first and the last megabytes of low RAM, which ends at 3 GiB at most.
const LOW_END: u64 = 3 << 30;
const FIRMWARE_LEN: u64 = 16 << 20;

/// What a run of pages holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    Repeated,
    Untouched,
}

/// Fills the first `len_max` bytes of the largest block of `blocks`, in the memory of process
/// `pid`.
pub(crate) fn fill(
    (pid, blocks): (u32, &[RamBlockInfo]),
    contents: Contents,
    len_max: u64,
    stop: &AtomicBool,
) -> Result<(), BenchError> {
    let (memory, address, len) = largest((pid, blocks))?;
    write(&memory, (address, len.min(len_max)), contents, stop)
}

/// Returns the memory of process `pid`, and the address and the length of the largest of `blocks` there.
fn largest((pid, blocks): (u32, &[RamBlockInfo])) -> Result<(ProcessMemory, u64, u64), BenchError> {
    let largest = blocks.iter().max_by_key(|block| block.used_length);
    let place = largest.and_then(|block| Some((block.host_address?, block.used_length)));
    let (address, len) = place.ok_or_else(|| {
        BenchError::program("QEMU", "it prints no address of its RAM; 8.0 and later do")
    })?;
    let memory = ProcessMemory::open(pid).map_err(BenchError::system("look into QEMU"))?;
    Ok((memory, address, len))
}

/// Changes as many pages of the largest block as `len` bytes have, spread over all of it; what they hold
/// differs from `round` to round.
pub(crate) fn change(
    (pid, blocks): (u32, &[RamBlockInfo]),
    len: u64,
    round: u64,
    stop: &AtomicBool,
) -> Result<(), BenchError> {
    let (memory, address, block_len) = largest((pid, blocks))?;
    let mut words = Words(0x9e37_79b9_7f4a_7c15 ^ (round + 1));
    let mut page = [0; PAGE_LEN];
    let pages = len / PAGE_LEN as u64;
    let all: u64 = parts(block_len).iter().map(|part| part.end - part.start).sum();
    let step = (all / pages.max(1)).next_multiple_of(PAGE_LEN as u64);
    for offset in parts(block_len).into_iter().flat_map(|part| part.step_by(in_memory(step))) {
        if stop.load(Ordering::Relaxed) {
            return Err(BenchError::Stopped);
        }
        page.chunks_exact_mut(8).for_each(|word| words.write(word));
        let written = memory.write(address + offset, &page);
        written.map_err(BenchError::system("write into the guest's RAM"))?;
    }
    Ok(())
}

fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a length in memory")
}

/// Fills `len` bytes of RAM at `address`.
pub(crate) fn write(
    memory: &ProcessMemory,
    (address, len): (u64, u64),
    contents: Contents,
    stop: &AtomicBool,
) -> Result<(), BenchError> {
    let mut words = Words(0x9e37_79b9_7f4a_7c15);
    let mut run = vec![0_u8; RUN_LEN];
    for part in parts(len) {
        for offset in part.step_by(RUN_LEN) {
            if stop.load(Ordering::Relaxed) {
                return Err(BenchError::Stopped);
            }
            match kind(offset / RUN_LEN as u64, contents) {
                Kind::Untouched => continue,
                Kind::Data => run.chunks_exact_mut(8).for_each(|word| words.write(word)),
                Kind::Repeated => {
                    for page in run.chunks_exact_mut(PAGE_LEN) {
                        let mut word = [0; 8];
                        words.write(&mut word);
                        page.chunks_exact_mut(8).for_each(|at| at.copy_from_slice(&word));
                    }
                }
            }
            let written = memory.write(address + offset, &run);
            written.map_err(BenchError::system("write into the guest's RAM"))?;
        }
    }
    Ok(())
}

/// Returns the parts of RAM that firmware does not use.
fn parts(len: u64) -> Vec<Range<u64>> {
    let low_end = len.min(LOW_END);
    let low = FIRMWARE_LEN..low_end.saturating_sub(FIRMWARE_LEN);
    // On a PC with much RAM, low RAM may end at 2, 3 or 3.5 GiB: leaves out the half GiB from 3 GiB
    // on.
    let high = if len > LOW_END { LOW_END + (512 << 20)..len } else { 0..0 };
    [low, high].into_iter().filter(|part| part.start < part.end).collect()
}

/// Returns the kind of a run. The kinds are spread over RAM, in the same way each time.
fn kind(run: u64, contents: Contents) -> Kind {
    // The bits of a Weyl sequence are spread evenly over short stretches, too.
    let percent = ((run.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) * 100) >> 32;
    let data = u64::from(contents.data_percent);
    match percent {
        percent if percent < data => Kind::Data,
        percent if percent < data + u64::from(contents.repeated_percent) => Kind::Repeated,
        _ => Kind::Untouched,
    }
}

/// Words that look random: xorshift64*.
struct Words(u64);

impl Words {
    fn write(&mut self, into: &mut [u8]) {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        into.copy_from_slice(&self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_their_shares() {
        let contents = Contents { data_percent: 70, repeated_percent: 10 };
        let kinds: Vec<Kind> = (0..4096).map(|run| kind(run, contents)).collect();
        let share = |wanted| kinds.iter().filter(|&&kind| kind == wanted).count() * 100 / 4096;
        assert!((69..=71).contains(&share(Kind::Data)), "{}", share(Kind::Data));
        assert!((9..=11).contains(&share(Kind::Repeated)), "{}", share(Kind::Repeated));
    }

    #[test]
    fn firmware_is_left_alone() {
        assert_eq!(parts(64 << 20).first(), Some(&(16 << 20..48 << 20)));
        assert_eq!(parts(64 << 20).len(), 1);
        assert_eq!(parts(8 << 20), []);
        assert_eq!(parts(4 << 30), [16 << 20..(3 << 30) - (16 << 20), (3584 << 20)..4 << 30]);
    }
}
