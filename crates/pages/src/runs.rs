//! The pages of one buffer: which are zero, the hash of each other one, and the runs in which they
//! are written.

use std::ops::Range;

use vmfile_engine::{HashKey, is_zero, page_hash};
use vmfile_format::manifest::encode_hash;

use crate::page_hashes::{Hash, NO_HASH};
use crate::plan::BRIDGE_LEN;

/// The pages of a buffer that were looked at, in ascending order. A buffer has room for a number of
/// pages, its slots, which are counted from 0.
///
/// Pages with data that follow one another in the buffer and in their block make a run, which is
/// written at once. Where a short gap of zero pages between two of them may be written as well,
/// they are one run: see decision 14.
#[derive(Debug)]
pub(crate) struct PageRuns {
    page_len: usize,
    key: HashKey,
    runs: Vec<Run>,
    /// The hash of every slot; zeros for a zero page and for a slot that no page is in.
    hashes: Vec<Hash>,
    gaps: Vec<Range<usize>>,
}

/// What a page was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Looked {
    /// All its bytes are zero.
    Zero,
    /// It is the page of the base: it has a hash, and is in no run.
    Same,
    /// It has data, and is in a run.
    Data,
}

/// Pages that are written at once, from one with data to one with data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The slots of the buffer.
    pub(crate) slots: Range<usize>,
    /// The index in the block of the first page.
    pub(crate) first: u64,
}

impl PageRuns {
    /// Prepares for a buffer of `slots` pages of `page_len` bytes, whose hashes have `key`.
    pub(crate) fn new(page_len: usize, slots: usize, key: HashKey) -> PageRuns {
        let (hashes, gaps) = (vec![NO_HASH; slots], Vec::new());
        PageRuns { page_len, key, runs: Vec::new(), hashes, gaps }
    }

    /// Tests and hashes page `page` of a block, which is `bytes` in `slot`.
    ///
    /// `is_same` says whether the base has a page with this hash there. `bridges` says whether a gap,
    /// which is given as pages of the block, may be written: all of them are zero, and stay zero.
    pub(crate) fn look(
        &mut self,
        (slot, page): (usize, u64),
        bytes: &[u8],
        is_same: impl FnOnce(Hash) -> bool,
        bridges: impl FnOnce(Range<u64>) -> bool,
    ) -> Looked {
        if is_zero(bytes) {
            return Looked::Zero;
        }
        self.hashes[slot] = encode_hash(page_hash(bytes, self.key));
        if is_same(self.hashes[slot]) {
            return Looked::Same;
        }
        if let Some(run) = self.runs.last_mut() {
            let end = run.first + run.slots.len() as u64;
            let gap = run.slots.end..slot;
            let is_same = end + gap.len() as u64 == page;
            if is_same && gap.len() * self.page_len <= BRIDGE && bridges(end..page) {
                run.slots.end = slot + 1;
                self.gaps.extend((!gap.is_empty()).then_some(gap));
                return Looked::Data;
            }
        }
        self.runs.push(Run { slots: slot..slot + 1, first: page });
        Looked::Data
    }

    /// Notes that the page in `slot` is the page of the base that has this hash: zeros for a zero page.
    pub(crate) fn keep(&mut self, slot: usize, hash: Hash) -> Looked {
        self.hashes[slot] = hash;
        if hash == NO_HASH { Looked::Zero } else { Looked::Same }
    }

    /// Returns the runs.
    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Returns the slots between pages that are written as well. The caller makes sure that they
    /// are zero.
    pub(crate) fn gaps(&self) -> &[Range<usize>] {
        &self.gaps
    }

    /// Returns the hashes of `slots`.
    pub(crate) fn hashes(&self, slots: Range<usize>) -> &[u8] {
        self.hashes[slots].as_flattened()
    }

    /// Returns the bytes of `slots` in the buffer.
    pub(crate) fn bytes(&self, slots: &Range<usize>) -> Range<usize> {
        slots.start * self.page_len..slots.end * self.page_len
    }
}

const BRIDGE: usize = 32 << 10;
const _: () = assert!(BRIDGE as u64 == BRIDGE_LEN);

#[cfg(test)]
mod tests {
    use super::*;

    const SLOTS: usize = 64;

    fn runs_of(pages: &[(usize, u64)], bridges: bool) -> PageRuns {
        let mut runs = PageRuns::new(4096, SLOTS, HashKey::NONE);
        for &(slot, page) in pages {
            assert_eq!(runs.look((slot, page), &[7; 4096], |_| false, |_| bridges), Looked::Data);
        }
        runs
    }

    fn slots_of(runs: &PageRuns) -> Vec<Range<usize>> {
        runs.runs().iter().map(|run| run.slots.clone()).collect()
    }

    /// With every other page zero, each page was a write of its own: the save ran at a sixth of the
    /// disk's speed, with the guest paused.
    #[test]
    fn short_gaps_are_written_and_long_ones_are_not() {
        let longest = BRIDGE / 4096;
        let after = 2 + longest;
        let runs = runs_of(
            &[(1, 101), (after, 100 + after as u64), (after + 10, 110 + after as u64)],
            true,
        );
        assert_eq!(slots_of(&runs), [1..after + 1, after + 10..after + 11]);
        assert_eq!(runs.gaps(), std::slice::from_ref(&(2..after)));
        assert_eq!(runs.runs()[1].first, 110 + after as u64);
        assert_eq!(runs.hashes(2..3), NO_HASH);
        assert_ne!(runs.hashes(1..2), NO_HASH);
    }

    #[test]
    fn a_gap_that_may_not_be_written_and_pages_that_lie_apart_end_a_run() {
        assert_eq!(slots_of(&runs_of(&[(1, 101), (3, 103)], false)), [1..2, 3..4]);
        // The pages of a packet stand close in the buffer, wherever they belong.
        assert_eq!(slots_of(&runs_of(&[(0, 5), (1, 6), (2, 9)], true)), [0..2, 2..3]);
    }

    #[test]
    fn a_page_of_zeros_is_in_no_run() {
        let mut runs = PageRuns::new(4096, SLOTS, HashKey::NONE);
        let looked = runs.look((0, 0), &[0; 4096], |_| true, |_| true);
        assert_eq!(looked, Looked::Zero);
        assert!(runs.runs().is_empty() && runs.hashes(0..SLOTS).iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_page_of_the_base_is_hashed_and_in_no_run() {
        let mut runs = PageRuns::new(4096, SLOTS, HashKey::new(5));
        let hash = encode_hash(page_hash(&[7; 4096], HashKey::new(5)));
        let looked = runs.look((3, 3), &[7; 4096], |found| found == hash, |_| true);
        assert_eq!(looked, Looked::Same);
        assert!(runs.runs().is_empty());
        assert_eq!(runs.hashes(3..4), hash);
    }
}
