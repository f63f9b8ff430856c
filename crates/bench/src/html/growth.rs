//! Plots of time against the size of RAM, from guests that are otherwise alike; and plots of the
//! sweeps.

use super::css_class;
use super::lines::{Axis, Extent, Line, LinePlot};
use crate::report::{Family, GuestResults, GuestShape, Sweep, Way};

/// Guests are alike if the shares of their RAM that hold data differ by less than this.
const SHARE_DIFFERENCE_MAX: f64 = 0.05;

/// Colors of the lines of a sweep whose names do not say who does the work. The first is vmfile's,
/// because vmfile is measured.
const COLORS: [&str; 4] = ["vmfile", "purple", "olive", "plain"];

/// Returns the plots of saves and restores against the size of RAM, for each kind of guest with two
/// sizes or more.
pub(super) fn over_ram(guests: &[GuestResults]) -> Vec<LinePlot> {
    let mut plots = Vec::new();
    for kind in kinds(guests) {
        let backing = kind[0].guest.backing;
        let data = share(kind[0].guest.data_bytes, &kind[0].guest) * 100.0;
        for (what, ways) in
            [("Saves", saves as fn(&GuestResults) -> &[Way]), ("Restores", restores)]
        {
            let lines = lines(&kind, ways);
            if lines.is_empty() {
                continue;
            }
            plots.push(LinePlot {
                id: format!("ram-{}", plots.len()),
                title: format!("{what}, {backing} RAM, {data:.0} % data"),
                x: Axis { name: "RAM".to_owned(), unit: "MiB" },
                y: Axis { name: "median".to_owned(), unit: "s" },
                lines,
                extent: Extent::Strokes,
            });
        }
    }
    plots
}

/// Returns the plot of the sweep that has this index.
pub(super) fn of_sweep(index: usize, sweep: &Sweep) -> LinePlot {
    let mut lines: Vec<Line> = Vec::new();
    for (index, name) in sweep.lines.iter().enumerate() {
        let color = color(name, index);
        let values = sweep.points.iter();
        let points =
            values.filter_map(|point| Some((point.x, point.values.get(index).copied().flatten()?)));
        lines.push(Line {
            name: name.clone(),
            short: name.clone(),
            index: lines.iter().filter(|line| line.color == color).count(),
            color,
            points: points.collect(),
        });
    }
    let name = if sweep.unit == "%" {
        format!("{}, {}", sweep.name, sweep.unit)
    } else {
        sweep.name.clone()
    };
    LinePlot {
        id: format!("sweep-{index}"),
        title: format!("{} against {}", measure(sweep), sweep.name),
        x: Axis { name, unit: sweep.unit },
        y: Axis { name: "median".to_owned(), unit: sweep.value_unit },
        lines,
        extent: Extent::Band,
    }
}

/// Returns the color of the family that a line's name names, or else one by its index.
fn color(name: &str, index: usize) -> &'static str {
    let words = [
        ("vmfile", Family::Vmfile),
        ("QEMU", Family::Qemu),
        ("virsh", Family::Libvirt),
        ("libvirt", Family::Libvirt),
        ("fio", Family::Disk),
        ("disk", Family::Disk),
    ];
    let family = words.iter().find(|(word, _)| name.contains(word));
    family.map_or(COLORS[index % COLORS.len()], |(_, family)| css_class(*family))
}

fn measure(sweep: &Sweep) -> &'static str {
    if sweep.value_unit == "s" { "Time" } else { "Memory" }
}

fn saves(results: &GuestResults) -> &[Way] {
    &results.saves
}

fn restores(results: &GuestResults) -> &[Way] {
    &results.restores
}

/// Sorts the guests by kind of guest, and each kind by the size of RAM; a single size is left out.
fn kinds(guests: &[GuestResults]) -> Vec<Vec<&GuestResults>> {
    let mut kinds: Vec<Vec<&GuestResults>> = Vec::new();
    for results in guests {
        match kinds.iter_mut().find(|kind| are_alike(&kind[0].guest, &results.guest)) {
            Some(kind) => kind.push(results),
            None => kinds.push(vec![results]),
        }
    }
    for kind in &mut kinds {
        kind.sort_by_key(|results| results.guest.ram_bytes);
        kind.dedup_by_key(|results| results.guest.ram_bytes);
    }
    kinds.retain(|kind| kind.len() > 1);
    kinds
}

fn are_alike(a: &GuestShape, b: &GuestShape) -> bool {
    let differ = |of: fn(&GuestShape) -> u64| (share(of(a), a) - share(of(b), b)).abs();
    a.backing == b.backing
        && differ(|guest| guest.data_bytes) < SHARE_DIFFERENCE_MAX
        && differ(|guest| guest.repeated_bytes) < SHARE_DIFFERENCE_MAX
}

fn share(bytes: u64, guest: &GuestShape) -> f64 {
    if guest.ram_bytes == 0 { 0.0 } else { bytes as f64 / guest.ram_bytes as f64 }
}

/// Returns a line for each way that was measured with two sizes or more.
fn lines(kind: &[&GuestResults], ways: fn(&GuestResults) -> &[Way]) -> Vec<Line> {
    let mut lines: Vec<(Family, Line)> = Vec::new();
    for results in kind {
        let mebibytes = results.guest.ram_bytes as f64 / f64::from(1 << 20);
        for way in ways(results) {
            let point = (mebibytes, way.seconds);
            if let Some((_, line)) = lines.iter_mut().find(|(_, line)| line.name == way.name) {
                line.points.push(point);
                continue;
            }
            let index = lines.iter().filter(|(family, _)| *family == way.family).count();
            let line = Line {
                name: way.name.clone(),
                short: way.short.clone(),
                color: css_class(way.family),
                index,
                points: vec![point],
            };
            lines.push((way.family, line));
        }
    }
    lines.into_iter().map(|(_, line)| line).filter(|line| line.points.len() > 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(ram_bytes: u64, backing: &'static str, data_bytes: u64) -> GuestResults {
        let name = String::new();
        let guest = GuestShape { name, ram_bytes, backing, data_bytes, repeated_bytes: 0 };
        GuestResults { guest, ..GuestResults::default() }
    }

    #[test]
    fn who_does_the_work_decides_about_the_color() {
        assert_eq!(color("QEMU exec:cat >", 0), "qemu");
        assert_eq!(color("QEMU exec:vmfile receive", 3), "vmfile");
        assert_eq!(color("restore by map", 1), "purple");
    }

    #[test]
    fn only_guests_that_are_alike_are_compared() {
        let guests = [
            results(4 << 30, "private", 3 << 30),
            results(1 << 30, "private", 760 << 20),
            results(1 << 30, "shared", 768 << 20),
            results(2 << 30, "private", 0),
        ];
        let kinds = kinds(&guests);
        assert_eq!(kinds.len(), 1);
        let sizes: Vec<u64> = kinds[0].iter().map(|results| results.guest.ram_bytes).collect();
        assert_eq!(sizes, [1 << 30, 4 << 30]);
    }
}
