//! Where a value lies on an axis, and which values are written there.

/// Values that differ by more than this factor are shown on a logarithmic axis: on a linear one,
/// the small ones would all lie on the axis.
const LINEAR_FACTOR_MAX: f64 = 20.0;

/// More marks than this on a logarithmic axis are thinned out to powers of ten.
const LOG_TICKS_MAX: usize = 9;

/// An axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    is_log: bool,
}

impl Scale {
    /// Returns a linear axis from 0 to `high`.
    pub(super) fn from_zero(high: f64) -> Scale {
        Scale { low: 0.0, high: if high > 0.0 { high } else { 1.0 }, is_log: false }
    }

    /// Returns an axis that ends at the smallest and the largest of `values`, for chosen values.
    pub(super) fn tight(values: &[f64]) -> Scale {
        let (low, high) = ends(values);
        let is_log = low > 0.0 && high / low >= 16.0;
        if high > low { Scale { low, high, is_log } } else { Scale::from_zero(high * 2.0) }
    }

    /// Returns an axis with some room around `values`, for measured values.
    pub(super) fn roomy(values: &[f64]) -> Scale {
        let (low, high) = ends(values);
        if low > 0.0 && high / low > LINEAR_FACTOR_MAX {
            let steps = ladder();
            let below = steps.iter().rev().find(|&&step| step <= low * 0.95);
            let above = steps.iter().find(|&&step| step >= high * 1.05);
            if let (Some(&low), Some(&high)) = (below, above) {
                return Scale { low, high, is_log: true };
            }
        }
        Scale::from_zero(high * 1.08)
    }

    /// Returns whether the axis is logarithmic.
    pub(super) fn is_log(&self) -> bool {
        self.is_log
    }

    /// Returns where `value` lies between the ends of the axis: 0 at the low one, 1 at the high
    /// one.
    pub(super) fn share(&self, value: f64) -> f64 {
        if self.is_log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }

    /// Returns the values that are labeled on the axis.
    pub(super) fn ticks(&self) -> Vec<f64> {
        if !self.is_log {
            let step = step(self.high - self.low);
            let first = (self.low / step).ceil();
            let tick = |index: i32| (first + f64::from(index)) * step;
            return (0..20).map(tick).take_while(|&tick| tick <= self.high * 1.0001).collect();
        }
        let is_inside = |&step: &f64| step >= self.low * 0.999 && step <= self.high * 1.001;
        let all: Vec<f64> = ladder().into_iter().filter(is_inside).collect();
        if all.len() <= LOG_TICKS_MAX {
            return all;
        }
        all.into_iter().filter(|tick| (tick.log10() - tick.log10().round()).abs() < 1e-9).collect()
    }
}

/// Returns the smallest and the largest of `values`; 0 and 1 if there are none.
fn ends(values: &[f64]) -> (f64, f64) {
    if values.is_empty() {
        return (0.0, 1.0);
    }
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (low, high)
}

/// Returns 1, 2 and 5 times the powers of ten, upwards.
fn ladder() -> Vec<f64> {
    let decade = |exponent: i32| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(exponent));
    (-9..12).flat_map(decade).collect()
}

/// Returns the step between marks, so that there are four to seven of them over `length`.
fn step(length: f64) -> f64 {
    ladder().into_iter().find(|&step| length / step <= 6.5).unwrap_or(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_numbers() {
        assert_eq!(Scale::from_zero(9.1).ticks(), [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(Scale::from_zero(1.3).ticks().len(), 7);
        assert_eq!(Scale::tight(&[0.0, 100.0]).ticks(), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
    }

    #[test]
    fn values_far_apart_get_a_logarithmic_axis() {
        assert!(!Scale::roomy(&[1.0, 9.0]).is_log());
        assert!(!Scale::roomy(&[0.0, 9.0]).is_log());
        let scale = Scale::roomy(&[0.06, 9.0]);
        assert!(scale.is_log());
        assert_eq!(scale.ticks(), [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]);
        assert!((scale.share(0.05)).abs() < 1e-9 && (scale.share(10.0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn nothing_and_one_value_have_an_axis() {
        for values in [&[][..], &[0.0], &[5.0]] {
            for scale in [Scale::tight(values), Scale::roomy(values)] {
                assert!(scale.ticks().len() > 2);
                assert!(values.iter().all(|&value| scale.share(value).is_finite()));
            }
        }
    }
}
