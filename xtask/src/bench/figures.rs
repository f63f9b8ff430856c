//! Reads figures from a report of `vmfile bench --json`.

use serde_json::Value;

/// A report.
#[derive(Clone, Copy)]
pub(super) struct Figures<'a>(pub(super) &'a Value);

/// A way, and its runs.
#[derive(Clone, Copy)]
pub(super) struct Way<'a>(&'a Value);

/// Returns the elements of a list; none if there is no such list.
pub(super) fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}

impl<'a> Figures<'a> {
    /// Returns a way of `what` ("saves", "restores", "reads", "checkpoints") of the guest whose RAM is `backing`.
    pub(super) fn way(self, backing: &str, what: &str, name: &str) -> Option<Way<'a>> {
        let ways = list(self.guest(backing)?, what);
        ways.iter().find(|way| way["name"] == name).map(Way)
    }

    /// Returns QEMU's quickest way to save the guest.
    pub(super) fn best_of_qemu(self, backing: &str) -> Option<Way<'a>> {
        let ways = list(self.guest(backing)?, "saves").iter();
        let ways = ways.filter(|way| way["family"] == "qemu").map(Way);
        ways.min_by(|a, b| a.median().total_cmp(&b.median()))
    }

    /// Returns how many bytes of pages the guest has.
    pub(super) fn data_bytes(self, backing: &str) -> Option<f64> {
        self.guest(backing)?["guest"]["data_bytes"].as_f64()
    }

    /// Returns the median of a line of a sweep at `x`.
    pub(super) fn at(self, sweep: &str, line: &str, x: f64) -> Option<f64> {
        let sweep = list(self.0, "sweeps").iter().find(|found| found["name"] == sweep)?;
        let line = list(sweep, "lines").iter().position(|name| name == line)?;
        let point = list(sweep, "points").iter().find(|point| point["x"].as_f64() == Some(x))?;
        point["values"][line]["median"].as_f64()
    }

    fn guest(self, backing: &str) -> Option<&'a Value> {
        list(self.0, "scenes").iter().find(|scene| scene["guest"]["backing"] == backing)
    }
}

impl<'a> Way<'a> {
    pub(super) fn median(self) -> f64 {
        self.0["seconds"]["median"].as_f64().unwrap_or(f64::NAN)
    }

    /// Returns the median of the rounds' ratios to `other`.
    pub(super) fn ratio(self, other: Way<'_>) -> f64 {
        median(self.each("seconds").zip(other.each("seconds")).map(|(a, b)| a / b))
    }

    /// Returns the median of the rounds' ratios to `other`, for the time of a restore after QEMU's
    /// start.
    pub(super) fn resume_ratio(self, other: Way<'_>) -> f64 {
        median(self.each("resume_seconds").zip(other.each("seconds")).map(|(a, b)| a / b))
    }

    /// Returns the median of the seconds of a restore after QEMU's start.
    pub(super) fn resume_seconds(self) -> f64 {
        median(self.each("resume_seconds"))
    }

    /// Returns the median of the guest's pauses, in seconds.
    pub(super) fn pause_seconds(self) -> f64 {
        median(self.each("pause_seconds"))
    }

    /// Returns the largest value of a run, in MiB.
    pub(super) fn largest_mib(self, name: &str) -> f64 {
        self.each(name).fold(0.0, f64::max) / f64::from(1 << 20)
    }

    fn each(self, name: &str) -> impl Iterator<Item = f64> + 'a {
        let name = name.to_owned();
        list(self.0, "runs").iter().map(move |run| run[&name].as_f64().unwrap_or(0.0))
    }
}

/// Returns the middle one of the values.
pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Value {
        let way = |name: &str, family: &str, seconds: &[f64]| {
            let run = |&seconds: &f64| json!({ "seconds": seconds, "resume_seconds": 1.5 });
            let runs: Vec<Value> = seconds.iter().map(run).collect();
            json!({ "name": name, "family": family, "runs": runs, "seconds": { "median": seconds[0] } })
        };
        let saves = [way("a", "qemu", &[2.0, 20.0, 2.0]), way("b", "qemu", &[1.0, 10.0, 1.0])];
        json!({
            "scenes": [{ "guest": { "backing": "shared", "data_bytes": 7 }, "saves": saves }],
            "sweeps": [{ "name": "RAM", "lines": ["save", "check"], "points": [
                { "x": 2.0, "values": [null, { "median": 0.25 }] },
            ]}],
        })
    }

    #[test]
    fn a_slow_round_does_not_change_the_ratio() {
        let report = report();
        let way = |name| Figures(&report).way("shared", "saves", name).unwrap();
        assert!((way("a").ratio(way("b")) - 2.0).abs() < 1e-9);
        assert!((way("a").resume_ratio(way("b")) - 1.5).abs() < 1e-9);
        assert_eq!(Figures(&report).best_of_qemu("shared").unwrap().0["name"], "b");
    }

    #[test]
    fn what_was_not_measured_is_nothing() {
        let report = report();
        let figures = Figures(&report);
        assert_eq!(figures.at("RAM", "check", 2.0), Some(0.25));
        assert_eq!(figures.at("RAM", "save", 2.0), None);
        assert_eq!(figures.at("RAM", "check", 3.0), None);
        assert!(figures.way("private", "saves", "a").is_none());
    }
}
