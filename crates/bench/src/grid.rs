//! The rows and columns of a report's tables, for the terminal and for the page alike.

use std::fmt::Write;

use crate::report::{BenchReport, Comparison, Difference, GuestShape, Host, Run, Sweep, Way};
use crate::series::Summary;

/// A table as text in cells, without a layout.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// The heading of the rows' labels.
    pub(crate) corner: String,
    pub(crate) columns: Vec<String>,
    pub(crate) rows: Vec<Row>,
}

/// A row: its label, and a cell for each column.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) label: String,
    pub(crate) group: Group,
    pub(crate) cells: Vec<String>,
}

/// Rows of one group stand together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// What was measured: a row for each run, or for each point of a sweep.
    Measured,
    /// Statistics of the runs' times.
    Summed,
    /// Other measurements, such as memory.
    Besides,
}

/// What is shown where there is no value.
const MISSING: &str = "-";

/// A row that says one thing about each way.
struct Fact {
    label: &'static str,
    group: Group,
    decimals: usize,
    of: fn(&Way) -> Option<f64>,
}

const FACTS: [Fact; 14] = [
    fact("AVG", Group::Summed, 3, |way| Some(way.seconds.mean)),
    fact("stddev", Group::Summed, 3, |way| Some(way.seconds.stddev)),
    fact("median", Group::Summed, 3, |way| Some(way.seconds.median)),
    fact("min", Group::Summed, 3, |way| Some(way.seconds.min)),
    fact("max", Group::Summed, 3, |way| Some(way.seconds.max)),
    fact("GiB/s", Group::Besides, 2, |way| median(way, |run| Some(run.gib_per_second))),
    fact("CPU s", Group::Besides, 2, |way| median(way, |run| run.cpu_seconds)),
    fact("peak memory MiB", Group::Besides, 1, |way| {
        median(way, |run| run.peak_memory_bytes.map(mebibytes))
    }),
    fact("cached MiB", Group::Besides, 1, |way| median(way, |run| run.cached_bytes.map(mebibytes))),
    fact("pause ms", Group::Besides, 1, |way| {
        median(way, |run| run.pause_seconds.map(|seconds| seconds * 1000.0))
    }),
    fact("QEMU's start ms", Group::Besides, 1, |way| {
        median(way, |run| run.qemu_start_seconds.map(|seconds| seconds * 1000.0))
    }),
    fact("guest runs, ms after it", Group::Besides, 1, |way| {
        median(way, |run| run.resume_seconds.map(|seconds| seconds * 1000.0))
    }),
    fact("x disk", Group::Besides, 2, |way| way.ratio_to_disk),
    fact("x vmfile", Group::Besides, 2, |way| way.ratio_to_vmfile),
];

const fn fact(
    label: &'static str,
    group: Group,
    decimals: usize,
    of: fn(&Way) -> Option<f64>,
) -> Fact {
    Fact { label, group, decimals, of }
}

/// Returns the table of several ways: a column for each way, a row for each run, then statistics.
/// Rows without any value are left out.
pub(crate) fn ways(ways: &[Way]) -> Grid {
    let runs = ways.iter().map(|way| way.runs.len()).max().unwrap_or(0);
    let row = |label: String, group, decimals, of: &dyn Fn(&Way) -> Option<f64>| Row {
        label,
        group,
        cells: ways.iter().map(|way| cell(of(way), decimals)).collect(),
    };
    let mut rows: Vec<Row> = (0..runs)
        .map(|index| {
            let of = |way: &Way| way.runs.get(index).map(|run| run.seconds);
            row(format!("run {}", index + 1), Group::Measured, 3, &of)
        })
        .collect();
    rows.extend(
        FACTS
            .iter()
            .map(|fact| row(fact.label.to_owned(), fact.group, fact.decimals, &fact.of))
            .filter(|row| row.cells.iter().any(|cell| cell != MISSING)),
    );
    let columns = ways.iter().map(|way| way.short.clone()).collect();
    Grid { corner: "seconds".to_owned(), columns, rows }
}

/// Returns the table of a sweep's medians: a column for each line, a row for each point.
pub(crate) fn sweep(sweep: &Sweep) -> Grid {
    let decimals = if sweep.value_unit == "s" { 3 } else { 1 };
    let rows = sweep.points.iter().map(|point| Row {
        label: number(point.x),
        group: Group::Measured,
        cells: (0..sweep.lines.len())
            .map(|line| {
                let value = point.values.get(line).copied().flatten();
                cell(value.map(|summary| summary.median), decimals)
            })
            .collect(),
    });
    Grid {
        corner: with_unit(&sweep.name, sweep.unit),
        columns: sweep.lines.clone(),
        rows: rows.collect(),
    }
}

/// Returns the table that compares two builds: a row for each task.
pub(crate) fn comparisons(comparisons: &[Comparison]) -> Grid {
    let columns = ["other s", "this s", "this / other", "min", "max", "verdict"];
    let row = |comparison: &Comparison| {
        let Comparison { base_seconds, seconds, ratio, .. } = comparison;
        let verdict = match comparison.verdict {
            Difference::Faster => "faster",
            Difference::Slower => "slower",
            Difference::None => "no difference",
        };
        let times = [base_seconds.median, seconds.median].map(|time| format!("{time:.4}"));
        let ratios = [ratio.median, ratio.min, ratio.max].map(|ratio| format!("{ratio:.3}"));
        let cells = times.into_iter().chain(ratios).chain([verdict.to_owned()]).collect();
        Row { label: comparison.what.clone(), group: Group::Measured, cells }
    };
    Grid {
        corner: "what".to_owned(),
        columns: columns.map(str::to_owned).into(),
        rows: comparisons.iter().map(row).collect(),
    }
}

/// Returns what a sweep is about, for its heading.
pub(crate) fn sweep_title(sweep: &Sweep) -> String {
    format!("{}: median {}", sweep.name, unit_in_full(sweep.value_unit))
}

/// Returns a unit as headings and axes have it.
pub(crate) fn unit_in_full(unit: &'static str) -> &'static str {
    if unit == "s" { "seconds" } else { unit }
}

/// Returns where and when the report was measured: names and values.
pub(crate) fn host(report: &BenchReport) -> Vec<(&'static str, String)> {
    let Host { fio, libvirt, .. } = &report.host;
    let host = &report.host;
    let or_missing = |version: &Option<String>| match version {
        Some(version) => version.clone(),
        None => "not installed".to_owned(),
    };
    let acceleration = if host.kvm { "KVM" } else { "emulation (no KVM)" };
    vec![
        ("CPU", host.cpu.clone()),
        ("memory", bytes(host.memory_bytes)),
        ("kernel", host.kernel.clone()),
        ("file system", host.file_system.clone()),
        ("QEMU", format!("{}, {acceleration}", host.qemu)),
        ("fio", or_missing(fio)),
        ("libvirt", or_missing(libvirt)),
        ("vmfile", host.vmfile.clone()),
        ("began", format!("{}, load {:.2}", date(host.began_unix_seconds), host.load)),
        ("took", format!("{:.0} s", report.total_seconds)),
        ("command", host.command.join(" ")),
    ]
}

/// Returns how large a guest's RAM is, and how much data is in it.
pub(crate) fn data_of(guest: &GuestShape) -> String {
    let mut text =
        format!("{} of RAM, {} of data", bytes(guest.ram_bytes), bytes(guest.data_bytes));
    if guest.repeated_bytes > 0 {
        let repeated = bytes(guest.repeated_bytes);
        let _ = write!(text, ", {repeated} of it pages in which one word repeats");
    }
    text
}

/// Returns `bytes` in the largest binary unit that leaves at least 1, with at most three digits.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut scaled, mut unit) = (bytes as f64, 0);
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let decimals = match scaled {
        _ if scaled.fract() == 0.0 => 0,
        _ if scaled < 10.0 => 2,
        _ if scaled < 100.0 => 1,
        _ => 0,
    };
    format!("{scaled:.decimals$} {}", UNITS[unit])
}

/// Returns `value` with as many decimals as it needs, three at most.
pub(crate) fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Returns a ratio with about three digits.
pub(crate) fn ratio(ratio: f64) -> String {
    let decimals = if ratio < 10.0 { 2 } else { usize::from(ratio < 100.0) };
    format!("{ratio:.decimals$}")
}

/// Returns a day and a time of day, UTC.
pub(crate) fn date(unix_seconds: u64) -> String {
    let seconds = i64::try_from(unix_seconds).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map_or_else(
        |_| format!("{unix_seconds} s after 1970"),
        |time| time.strftime("%Y-%m-%d %H:%M UTC").to_string(),
    )
}

/// Returns `name`, with its unit if it has one.
pub(crate) fn with_unit(name: &str, unit: &str) -> String {
    if unit.is_empty() { name.to_owned() } else { format!("{name}, {unit}") }
}

/// Returns the median of what `of` finds in a way's runs.
pub(crate) fn median(way: &Way, of: fn(&Run) -> Option<f64>) -> Option<f64> {
    let values: Vec<f64> = way.runs.iter().filter_map(of).collect();
    Summary::of(&values).map(|summary| summary.median)
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn cell(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| MISSING.to_owned(), |value| format!("{value:.decimals$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_at_most_three_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(4 << 30), "4 GiB");
        assert_eq!(bytes(3140 << 20), "3.07 GiB");
        assert_eq!(bytes(24_105 << 20), "23.5 GiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
    }

    #[test]
    fn numbers_have_no_needless_decimals() {
        assert_eq!(number(16.0), "16");
        assert_eq!(number(100.0), "100");
        assert_eq!(number(0.25), "0.25");
        assert_eq!(number(1.0 / 3.0), "0.333");
    }

    #[test]
    fn a_ratio_has_about_three_digits() {
        assert_eq!([0.04, 1.0, 12.34, 163.37].map(ratio), ["0.04", "1.00", "12.3", "163"]);
    }

    #[test]
    fn a_date_is_in_utc() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(1_795_629_660), "2026-11-25 18:01 UTC");
        assert_eq!(date(u64::MAX), format!("{} s after 1970", u64::MAX));
    }
}
