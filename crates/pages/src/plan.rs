//! Cuts blocks into units of work, which workers take one after another; parts without work are
//! left out.
//!
//! A worker looks for the next part with work when it needs a unit. There is no list of such parts:
//! a guest could make it as long as it likes.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A unit of work: what one worker reads, tests, hashes and writes before it takes the next.
///
/// 16 MiB of RAM are 64 KiB of page hashes: large enough to be written at once, small enough that
/// many workers end together.
pub const UNIT_LEN: u64 = 16 << 20;

/// The largest single transfer: a huge page, so that a buffer is one piece of memory for the
/// device. Larger ones gain nothing on any disk that was tried, and smaller ones cost calls.
pub const WINDOW_LEN: u64 = 2 << 20;

/// The longest gap of zero pages between two pages with data that is written as zeros, so that both
/// go out in one write: see decision 14.
pub const BRIDGE_LEN: u64 = 32 << 10;

/// As [`BRIDGE_LEN`], for a gap that has pages of the base. They take room that they would not take
/// otherwise, so the gap is shorter: see decision 23.
pub(crate) const BASE_BRIDGE_LEN: u64 = 16 << 10;

/// A part of one RAM block, between two multiples of the units' length or up to the block's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// The block's number.
    pub block: usize,
    /// Bytes of the block.
    pub range: Range<u64>,
}

/// The units of all blocks in the order of the file; each goes to one worker.
#[derive(Debug)]
pub struct Units {
    block_lens: Vec<u64>,
    unit_len: u64,
    next: Mutex<Next>,
    ended: AtomicBool,
}

/// Where the next unit may begin.
#[derive(Debug, Default)]
struct Next {
    block: usize,
    offset: u64,
    /// Units after this place that were taken already, by [`Units::take_at`].
    taken: BTreeSet<(usize, u64)>,
}

impl Units {
    /// Cuts blocks of these lengths, in bytes, into units of `unit_len`.
    pub fn new(block_lens: impl IntoIterator<Item = u64>, unit_len: u64) -> Units {
        let block_lens = block_lens.into_iter().collect();
        Units { block_lens, unit_len, next: Mutex::default(), ended: AtomicBool::new(false) }
    }

    /// Takes the next unit with work: `first` returns the first byte of a range of a block that
    /// needs work, if there is one. Returns `None` if there is no further unit, or if a worker has
    /// failed.
    ///
    /// # Errors
    ///
    /// Returns the error of `first`.
    pub fn take<E>(
        &self,
        first: impl Fn(usize, Range<u64>) -> Result<Option<u64>, E>,
    ) -> Result<Option<Unit>, E> {
        // A worker that panicked in `first` has left `next` as it was.
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(&len) = self.block_lens.get(next.block) {
            if self.ended.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let (block, offset) = (next.block, next.offset);
            let found = if offset < len { first(block, offset..len)? } else { None };
            match found {
                None => (next.block, next.offset) = (block + 1, 0),
                Some(found) => {
                    let unit = self.unit(block, found, len);
                    next.offset = unit.range.end;
                    if !next.taken.remove(&(block, unit.range.start)) {
                        return Ok(Some(unit));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Takes the unit with byte `offset` of a block out of turn; `None` if it was taken before, or
    /// if a worker has failed.
    pub fn take_at(&self, block: usize, offset: u64) -> Option<Unit> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let unit = self.unit(block, offset, self.block_lens[block]);
        let is_past = (block, unit.range.start) < (next.block, next.offset);
        let is_free = !is_past && !self.ended.load(Ordering::Relaxed);
        (is_free && next.taken.insert((block, unit.range.start))).then_some(unit)
    }

    fn unit(&self, block: usize, offset: u64, len: u64) -> Unit {
        let start = offset - offset % self.unit_len;
        Unit { block, range: start..start.saturating_add(self.unit_len).min(len) }
    }

    /// Runs `part`, the work of one worker. If it fails or panics, no worker gets a further unit.
    pub fn work<T, E>(&self, part: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut end = StopOnFailure { units: self, succeeded: false };
        let result = part();
        end.succeeded = result.is_ok();
        result
    }
}

/// When dropped, also by a panic, stops workers from taking units, unless the work succeeded.
struct StopOnFailure<'a> {
    units: &'a Units,
    succeeded: bool,
}

impl Drop for StopOnFailure<'_> {
    fn drop(&mut self) {
        if !self.succeeded {
            self.units.ended.store(true, Ordering::Relaxed);
        }
    }
}

/// Returns a length or an offset inside a window or a unit as an index.
pub(crate) fn in_window(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a window")
}

/// Cuts `range` at the multiples of `len`.
pub fn pieces(range: Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = (start - start % len).saturating_add(len).min(range.end);
        let piece = start..end;
        start = end;
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_place_is_in_one_unit_and_no_unit_is_without(
            blocks in proptest::collection::vec(
                (1_u64..200, proptest::collection::btree_set(0_u64..200, 0..20)), 0..4),
        ) {
            let units = Units::new(blocks.iter().map(|(len, _)| *len), 16);
            let first = |block: usize, range: Range<u64>| {
                Ok::<_, Infallible>(blocks[block].1.range(range).next().copied())
            };
            let mut found = Vec::new();
            while let Some(Unit { block, range }) = units.take(first).unwrap() {
                prop_assert_eq!(range.start % 16, 0);
                prop_assert!(range.end == blocks[block].0 || range.end % 16 == 0);
                let places: Vec<u64> = blocks[block].1.range(range).copied().collect();
                prop_assert!(!places.is_empty());
                found.extend(places.into_iter().map(|place| (block, place)));
            }
            let places = blocks.iter().enumerate().flat_map(|(block, (len, places))| {
                places.range(..len).map(move |&place| (block, place))
            });
            prop_assert_eq!(found, places.collect::<Vec<_>>());
            println!("cases: 1 mutations");
        }
    }

    #[test]
    fn a_worker_that_fails_or_panics_ends_the_handing_out() {
        let first = |_, range: Range<u64>| Ok::<_, Infallible>(Some(range.start));
        let units = Units::new([64], 16);
        assert!(units.take(first).unwrap().is_some());
        units.work(|| Ok::<_, ()>(())).unwrap();
        assert!(units.take(first).unwrap().is_some());
        units.work(|| Err::<(), _>(())).unwrap_err();
        assert_eq!(units.take(first).unwrap(), None);

        let units = Units::new([64], 16);
        let work = || units.work(|| -> Result<(), ()> { panic!("the test's own panic") });
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_err();
        assert_eq!(units.take(first).unwrap(), None);
    }

    #[test]
    fn a_block_that_is_all_work_ends_with_its_last_unit() {
        let first = |_, range: Range<u64>| Ok::<_, Infallible>(Some(range.start));
        let units = Units::new([40, 0, 16], 16);
        let mut found = Vec::new();
        while let Some(Unit { block, range }) = units.take(first).unwrap() {
            assert!(!range.is_empty(), "an empty unit of block {block}");
            found.push((block, range));
        }
        assert_eq!(found, [(0, 0..16), (0, 16..32), (0, 32..40), (2, 0..16)]);
    }

    #[test]
    fn an_empty_range_has_no_pieces() {
        assert_eq!(pieces(5..5, 4).count(), 0);
        assert_eq!(pieces(3..9, 4).collect::<Vec<_>>(), [3..4, 4..8, 8..9]);
    }
}
