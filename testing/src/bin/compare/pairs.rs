//! Pairs of measurements, and what they say about two builds.

use vmfile_bench::series::Summary;

/// The head of the table that [`Pairs::line`] makes.
pub(crate) const HEAD: &str = "\
what                       base s    here s    here / base, median (min .. max)";

/// What one task took, in seconds, one value for each round.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    base: Vec<f64>,
    here: Vec<f64>,
}

impl Pairs {
    pub(crate) fn push(&mut self, (base, here): (f64, f64)) {
        self.base.push(base);
        self.here.push(here);
    }

    /// Returns the task's line of the table.
    ///
    /// There is a difference only where all pairs agree on who was faster: by chance alone, ten do so
    /// once in 512 times.
    pub(crate) fn line(&self, name: &str) -> String {
        let pairs = self.base.iter().zip(&self.here);
        let ratios: Vec<f64> = pairs.map(|(base, here)| here / base).collect();
        let all = [&self.base, &self.here, &ratios].map(|values| Summary::of(values));
        let [Some(base), Some(here), Some(Summary { median: ratio, min, max, .. })] = all else {
            return format!("{name:<24} not measured");
        };
        let (base, here) = (base.median, here.median);
        let verdict = if max < 1.0 {
            "faster"
        } else if min > 1.0 {
            "slower"
        } else {
            "no difference"
        };
        format!(
            "{name:<24} {base:>8.4}  {here:>8.4}    {ratio:.3} ({min:.3} .. {max:.3})  {verdict}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(pairs: &[(f64, f64)]) -> String {
        let mut all = Pairs::default();
        pairs.iter().for_each(|&pair| all.push(pair));
        all.line("save")
    }

    #[test]
    fn a_slow_round_of_both_is_no_difference() {
        assert!(line(&[(1.0, 1.1), (10.0, 9.0), (1.0, 1.0)]).ends_with("no difference"));
    }

    #[test]
    fn pairs_that_agree_are_a_difference() {
        assert!(line(&[(1.0, 0.9), (10.0, 9.0)]).ends_with("faster"));
        assert_eq!(
            line(&[(1.0, 2.0), (2.0, 6.0), (3.0, 6.0)]),
            "save                       2.0000    6.0000    2.000 (2.000 .. 3.000)  slower"
        );
    }

    #[test]
    fn nothing_measured_is_said() {
        assert!(line(&[]).ends_with("not measured"));
    }
}
