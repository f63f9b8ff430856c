//! Which bytes are worth looking at, cut into units of work. Pure: no I/O, no clock.

use std::ops::Range;

/// A unit of work: what one worker reads, tests, hashes and writes before it takes the next.
///
/// 16 MiB of RAM are 64 KiB of page hashes: large enough to be written at once, small enough that
/// many workers end together.
pub(crate) const UNIT_LEN: u64 = 16 << 20;

/// The largest single transfer: a huge page, so that a buffer is one piece of memory for the device.
/// Larger ones gain nothing on any disk that was tried, and smaller ones cost calls.
pub(crate) const WINDOW_LEN: u64 = 2 << 20;

/// A part of one RAM block in which there may be data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    /// The block's number.
    pub(crate) block: usize,
    /// The first byte of the unit in its block: a multiple of [`UNIT_LEN`].
    pub(crate) start: u64,
    /// Byte ranges of the block, in order, inside the unit; at least one.
    pub(crate) ranges: Vec<Range<u64>>,
}

/// Cuts the ranges of each block that may hold data into units, in the order of the file.
///
/// Ranges are in order and do not overlap; what lies outside them is known to be zero.
pub(crate) fn units(blocks: &[Vec<Range<u64>>]) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    for (block, ranges) in blocks.iter().enumerate() {
        for piece in ranges.iter().flat_map(|range| pieces(range.clone(), UNIT_LEN)) {
            let start = piece.start - piece.start % UNIT_LEN;
            match units.last_mut() {
                Some(unit) if unit.block == block && unit.start == start => unit.ranges.push(piece),
                _ => units.push(Unit { block, start, ranges: vec![piece] }),
            }
        }
    }
    units
}

/// Cuts `range` at the multiples of `len`.
pub(crate) fn pieces(range: Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = (start - start % len).saturating_add(len).min(range.end);
        let piece = start..end;
        start = end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Returns the sum of the ranges' lengths, in bytes.
pub(crate) fn total_len(blocks: &[Vec<Range<u64>>]) -> u64 {
    blocks.iter().flatten().map(|range| range.end - range.start).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ordered ranges of whole pages that do not touch.
    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec((1_u64..9000, 1_u64..9000), 0..12).prop_map(|steps| {
            let mut end = 0;
            let mut ranges = Vec::new();
            for (gap, pages) in steps {
                let start = end + gap * 4096;
                end = start + pages * 4096;
                ranges.push(start..end);
            }
            ranges
        })
    }

    proptest! {
        #[test]
        fn units_cover_every_byte_once_and_stay_on_their_grid(
            blocks in proptest::collection::vec(ranges(), 0..4),
        ) {
            let units = units(&blocks);
            let mut found = vec![Vec::new(); blocks.len()];
            for unit in &units {
                prop_assert_eq!(unit.start % UNIT_LEN, 0);
                for range in &unit.ranges {
                    prop_assert!(range.start >= unit.start);
                    prop_assert!(range.end <= unit.start + UNIT_LEN);
                    let block: &mut Vec<Range<u64>> = &mut found[unit.block];
                    match block.last_mut() {
                        Some(last) if last.end == range.start => last.end = range.end,
                        _ => block.push(range.clone()),
                    }
                }
            }
            prop_assert_eq!(&found, &blocks);
            let keys: Vec<_> = units.iter().map(|unit| (unit.block, unit.start)).collect();
            prop_assert!(keys.windows(2).all(|pair| pair[0] < pair[1]), "one unit for each place");
        }
    }

    #[test]
    fn an_empty_range_has_no_pieces() {
        assert_eq!(pieces(5..5, 4).count(), 0);
        assert_eq!(pieces(3..9, 4).collect::<Vec<_>>(), [3..4, 4..8, 8..9]);
    }
}
