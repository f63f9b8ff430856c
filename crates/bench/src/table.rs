//! The report as tables of text, in the form in which QEMU's developers post such measurements: a
//! column for each way, a row for each run, below them the average and the standard deviation.

use std::fmt::Write;
use std::ops::Range;

use crate::grid::{self, Grid};
use crate::report::{BenchReport, GuestResults};

/// The width of the widest table, in characters. A wider one is printed in pieces, each with the
/// labels of the rows.
const WIDTH_MAX: usize = 120;

/// Spaces between two columns.
const GAP: usize = 2;

/// Returns the whole report as text for a terminal.
#[must_use]
pub fn table(report: &BenchReport) -> String {
    let mut text = String::new();
    for (name, value) in grid::host(report) {
        let _ = writeln!(text, "{name:<11} {value}");
    }
    for results in &report.guests {
        write_guest(&mut text, results);
    }
    for sweep in &report.sweeps {
        let _ = writeln!(text, "\n{}\n", grid::sweep_title(sweep));
        write_grid(&mut text, &grid::sweep(sweep));
    }
    if !report.comparisons.is_empty() {
        let _ = writeln!(text, "\nthis build beside the other\n");
        write_grid(&mut text, &grid::comparisons(&report.comparisons));
    }
    if !report.not_measured.is_empty() {
        let _ = writeln!(text, "\nnot measured\n");
        for missing in &report.not_measured {
            let _ = writeln!(text, "{}: {}", missing.what, missing.why);
        }
    }
    text
}

fn write_guest(text: &mut String, results: &GuestResults) {
    let _ = writeln!(text, "\n{}\n{}", results.guest.name, grid::data_of(&results.guest));
    for (what, ways) in results.tables() {
        if !ways.is_empty() {
            let _ = writeln!(text, "\n{what}\n");
            write_grid(text, &grid::ways(ways));
        }
    }
}

fn write_grid(text: &mut String, grid: &Grid) {
    let label_width = grid.rows.iter().map(|row| width(&row.label)).max().unwrap_or(0);
    let label_width = label_width.max(width(&grid.corner));
    let widths: Vec<usize> = grid
        .columns
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let cells = grid.rows.iter().map(|row| width(&row.cells[index]));
            cells.max().unwrap_or(0).max(width(name))
        })
        .collect();
    for (index, piece) in pieces(label_width, &widths).into_iter().enumerate() {
        if index > 0 {
            text.push('\n');
        }
        write_piece(text, grid, label_width, &widths, piece);
    }
}

/// Cuts the columns into pieces that are no wider than [`WIDTH_MAX`], or have one column only.
fn pieces(label_width: usize, widths: &[usize]) -> Vec<Range<usize>> {
    let (mut pieces, mut start, mut used) = (Vec::new(), 0, label_width);
    for (index, width) in widths.iter().enumerate() {
        if index > start && used + GAP + width > WIDTH_MAX {
            pieces.push(start..index);
            (start, used) = (index, label_width);
        }
        used += GAP + width;
    }
    pieces.push(start..widths.len());
    pieces
}

fn write_piece(
    text: &mut String,
    grid: &Grid,
    label_width: usize,
    widths: &[usize],
    piece: Range<usize>,
) {
    let mut write_line = |label: &str, cells: &[String]| {
        let _ = write!(text, "{label:<label_width$}");
        for (cell, width) in cells[piece.clone()].iter().zip(&widths[piece.clone()]) {
            let _ = write!(text, "{:GAP$}{cell:>width$}", "");
        }
        text.push('\n');
    };
    let rules: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
    let rule = "-".repeat(label_width);
    write_line(&grid.corner, &grid.columns);
    let mut group = None;
    for row in &grid.rows {
        if group != Some(row.group) {
            write_line(&rule, &rules);
            group = Some(row.group);
        }
        write_line(&row.label, &row.cells);
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Family, GuestShape, Host, NotMeasured, Run, Sweep, SweepPoint, Way};
    use crate::series::Summary;

    fn way(short: &str, family: Family, seconds: &[f64]) -> Way {
        let run = |&seconds: &f64| Run { seconds, gib_per_second: 3.0 / seconds, ..Run::default() };
        Way {
            name: short.to_owned(),
            short: short.to_owned(),
            family,
            runs: seconds.iter().map(run).collect(),
            seconds: Summary::of(seconds).unwrap(),
            ratio_to_vmfile: None,
            ratio_to_disk: None,
        }
    }

    fn report() -> BenchReport {
        let disk = Way { ratio_to_disk: Some(1.0), ..way("disk", Family::Disk, &[1.0, 1.5, 1.0]) };
        let mut ours = way("vmfile", Family::Vmfile, &[1.25, 1.75]);
        ours.ratio_to_vmfile = Some(1.0);
        for run in &mut ours.runs {
            run.peak_memory_bytes = Some(17 << 20);
        }
        let guest = GuestShape {
            name: "4 GiB, private, 75 % data".to_owned(),
            ram_bytes: 4 << 30,
            backing: "private",
            data_bytes: 3 << 30,
            repeated_bytes: 64 << 20,
        };
        let sweep = Sweep {
            name: "RAM".to_owned(),
            unit: "MiB",
            lines: vec!["save".to_owned(), "restore by map".to_owned()],
            value_unit: "s",
            points: vec![
                SweepPoint { x: 2048.0, values: vec![Summary::of(&[0.5]), None] },
                SweepPoint {
                    x: 262_144.0,
                    values: vec![Summary::of(&[0.6]), Summary::of(&[0.07])],
                },
            ],
        };
        let (what, why) = ("virsh save".to_owned(), "libvirtd is not installed".to_owned());
        BenchReport {
            host: host(),
            guests: vec![GuestResults {
                guest,
                saves: vec![disk, ours],
                ..GuestResults::default()
            }],
            sweeps: vec![sweep],
            comparisons: Vec::new(),
            not_measured: vec![NotMeasured { what, why }],
            total_seconds: 919.4,
        }
    }

    fn host() -> Host {
        Host {
            cpu: "2 x AMD EPYC".to_owned(),
            memory_bytes: 24 << 30,
            kernel: "Linux 6.18.44".to_owned(),
            file_system: "ext4 on vda".to_owned(),
            qemu: "10.0.2".to_owned(),
            kvm: false,
            fio: Some("3.33".to_owned()),
            libvirt: None,
            vmfile: "0.1.0".to_owned(),
            began_unix_seconds: 1_795_629_660,
            load: 0.48,
            command: vec!["vmfile".to_owned(), "bench".to_owned()],
        }
    }

    const EXPECTED: &str = "\
CPU         2 x AMD EPYC
memory      24 GiB
kernel      Linux 6.18.44
file system ext4 on vda
QEMU        10.0.2, emulation (no KVM)
fio         3.33
libvirt     not installed
vmfile      0.1.0
began       2026-11-25 18:01 UTC, load 0.48
took        919 s
command     vmfile bench

4 GiB, private, 75 % data
4 GiB of RAM, 3 GiB of data, 64 MiB of it pages in which one word repeats

saves

seconds           disk  vmfile
---------------  -----  ------
run 1            1.000   1.250
run 2            1.500   1.750
run 3            1.000       -
---------------  -----  ------
AVG              1.167   1.500
stddev           0.289   0.354
median           1.000   1.500
min              1.000   1.250
max              1.500   1.750
---------------  -----  ------
GiB/s             3.00    2.06
peak memory MiB      -    17.0
x disk            1.00       -
x vmfile             -    1.00

RAM: median seconds

RAM, MiB   save  restore by map
--------  -----  --------------
2048      0.500               -
262144    0.600           0.070

not measured

virsh save: libvirtd is not installed
";

    #[test]
    fn a_report_is_printed_as_the_field_prints_it() {
        assert_eq!(table(&report()), EXPECTED);
    }

    #[test]
    fn a_wide_table_is_printed_in_pieces_that_repeat_the_labels() {
        let mut report = report();
        let many = |index: usize| way(&format!("multifd {index:02} dio"), Family::Qemu, &[2.0]);
        report.guests[0].saves = (0..12).map(many).collect();
        let text = table(&report);
        assert!(text.lines().all(|line| line.len() <= WIDTH_MAX), "{text}");
        assert_eq!(text.matches("\nseconds").count(), 2);
        assert_eq!(text.matches("\nmedian ").count(), 2);
        for index in 0..12 {
            assert_eq!(text.matches(&format!("multifd {index:02} dio")).count(), 1);
        }
    }

    #[test]
    fn a_column_that_is_too_wide_stands_alone() {
        assert_eq!(pieces(10, &[200, 5, 5]), [0..1, 1..3]);
        assert!(pieces(10, &[]).iter().all(Range::is_empty));
    }
}
