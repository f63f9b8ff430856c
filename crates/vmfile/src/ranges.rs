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

/// Returns what of `ranges` is not in `taken`; both are in order and without overlap.
pub(crate) fn subtract(ranges: &[Range<u64>], taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut taken = taken.iter().peekable();
    for range in ranges {
        let mut start = range.start;
        while taken.peek().is_some_and(|taken| taken.end <= start) {
            taken.next();
        }
        while let Some(hole) = taken.peek().filter(|hole| hole.start < range.end) {
            if hole.start > start {
                left.push(start..hole.start);
            }
            start = start.max(hole.end);
            if hole.end > range.end {
                break;
            }
            taken.next();
        }
        if start < range.end {
            left.push(start..range.end);
        }
    }
    left
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

    proptest::proptest! {
        #[test]
        fn subtracting_is_what_a_naive_loop_does(
            a in proptest::collection::vec(proptest::bool::ANY, 40),
            b in proptest::collection::vec(proptest::bool::ANY, 40),
        ) {
            let of = |bits: &[bool]| -> Vec<Range<u64>> {
                let set = (0..40).filter(|&i| bits[usize::try_from(i).unwrap()]);
                merge(set.map(|i| i..i + 1).collect(), 1, 40)
            };
            let both: Vec<bool> = a.iter().zip(&b).map(|(&a, &b)| a && !b).collect();
            proptest::prop_assert_eq!(of(&both), merge(subtract(&of(&a), &of(&b)), 1, 40));
        }
    }
}
