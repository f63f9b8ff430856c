//! Byte ranges in order: merged, aligned, without overlap.

use std::ops::Range;

/// Returns `ranges` in order, widened to multiples of `alignment`, cut at `end`, merged where they
/// meet.
pub(crate) fn merge(mut ranges: Vec<Range<u64>>, alignment: u64, end: u64) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        let start = range.start - range.start % alignment;
        let stop = range.end.next_multiple_of(alignment).min(end);
        match merged.last_mut() {
            _ if range.is_empty() || start >= stop => {}
            Some(last) if start <= last.end => last.end = last.end.max(stop),
            _ => merged.push(start..stop),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_widened_merged_and_cut() {
        let merged = merge(vec![9000..9001, 0..1, 4096..4097, 20480..90000, 5..5], 4096, 24576);
        assert_eq!(merged, [0..12288, 20480..24576]);
    }

    #[test]
    fn what_lies_past_the_end_is_dropped() {
        assert_eq!(merge(vec![0..1, 8192..9000], 4096, 8192), merge(vec![0..1, 1..2], 4096, 8192));
    }
}
