//! Measurements of one thing, round by round, and how two things compare.

use serde::Serialize;

/// The statistics of a series of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The mean.
    pub mean: f64,
    /// The standard deviation of a sample; 0 for a single one.
    pub stddev: f64,
    /// The median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Sums up `values`; `None` if there are none.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Summary> {
        if values.is_empty() {
            return None;
        }
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
        Some(Summary {
            mean,
            stddev: if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 },
            median: median(values),
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

/// Returns the median of the ratios of `ours` to `theirs` in the same round, so that a slow disk in
/// a round affects both and cancels out. `None` if there is no round of both.
#[must_use]
pub fn ratio(ours: &[f64], theirs: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
    (!ratios.is_empty()).then(|| median(&ratios))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 0 {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_summed_up() {
        let summary = Summary::of(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap();
        assert!((summary.mean - 5.0).abs() < 1e-12);
        assert!((summary.stddev - 2.138_089_935).abs() < 1e-9);
        assert!((summary.median - 4.5).abs() < 1e-12);
        assert_eq!((summary.min, summary.max), (2.0, 9.0));
        assert_eq!(Summary::of(&[]), None);
        assert!(Summary::of(&[3.0]).unwrap().stddev.abs() < 1e-12);
    }

    #[test]
    fn the_median_of_an_even_count_lies_between_two() {
        assert!((median(&[1.0, 2.0, 4.0, 9.0]) - 3.0).abs() < 1e-12);
        assert!((median(&[1.0, 2.0, 9.0]) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn a_slow_round_does_not_change_the_ratio() {
        let ratio = ratio(&[2.0, 20.0, 2.0], &[1.0, 10.0, 1.0]).unwrap();
        assert!((ratio - 2.0).abs() < 1e-12);
    }
}
