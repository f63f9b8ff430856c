//! Measurements of one thing, round by round, and how two things compare.

use vmfile_bench::series::{Summary, ratio};

/// What one thing took, in seconds, one value for each round.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    pub(crate) name: String,
    values: Vec<f64>,
}

impl Series {
    pub(crate) fn new(name: impl Into<String>) -> Series {
        Series { name: name.into(), values: Vec::new() }
    }

    pub(crate) fn push(&mut self, value: f64) {
        self.values.push(value);
    }

    pub(crate) fn median(&self) -> f64 {
        self.summary().map_or(f64::NAN, |summary| summary.median)
    }

    pub(crate) fn min(&self) -> f64 {
        self.summary().map_or(f64::NAN, |summary| summary.min)
    }

    pub(crate) fn max(&self) -> f64 {
        self.summary().map_or(f64::NAN, |summary| summary.max)
    }

    /// Returns the median of the ratios to `other` of the same round: what the disk did to both
    /// cancels out.
    pub(crate) fn ratio(&self, other: &Series) -> f64 {
        ratio(&self.values, &other.values).unwrap_or(f64::NAN)
    }

    fn summary(&self) -> Option<Summary> {
        Summary::of(&self.values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        Series { name: String::new(), values: values.to_vec() }
    }

    #[test]
    fn the_median_lies_in_the_middle() {
        assert!((series(&[3.0, 1.0, 2.0]).median() - 2.0).abs() < 1e-9);
        assert!((series(&[4.0, 1.0, 2.0, 3.0]).median() - 2.5).abs() < 1e-9);
    }

    #[test]
    fn a_slow_round_does_not_change_the_ratio() {
        let ratio = series(&[2.0, 20.0, 2.0]).ratio(&series(&[1.0, 10.0, 1.0]));
        assert!((ratio - 2.0).abs() < 1e-9);
    }
}
