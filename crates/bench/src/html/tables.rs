//! Tables of the page.

use std::fmt::Write;

use super::escape;
use crate::grid::{self, Grid, Group};
use crate::report::{BenchReport, Family, GuestResults, Way};

/// Columns of the table of the best ways.
const FAMILIES: [(Family, &str); 4] = [
    (Family::Disk, "the disk's limit"),
    (Family::Vmfile, "vmfile"),
    (Family::Qemu, "QEMU's best"),
    (Family::Libvirt, "libvirt's best"),
];

/// Returns the best way of each family for each guest.
pub(super) fn at_a_glance(report: &BenchReport) -> String {
    let mut html =
        String::from("<table class=\"glance\">\n<thead><tr><th scope=\"col\">guest</th>");
    for (_, head) in FAMILIES {
        let _ = write!(html, "<th scope=\"col\">{}</th>", escape(head));
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for results in &report.guests {
        for (verb, ways) in [("save", &results.saves), ("restore", &results.restores)] {
            if ways.is_empty() {
                continue;
            }
            let head = format!("{}: {verb}", results.guest.name);
            let _ = write!(html, "<tr><th scope=\"row\">{}</th>", escape(&head));
            for (family, head) in FAMILIES {
                // In a narrow page, each cell has its heading above it.
                let _ = write!(html, "<td data-head=\"{}\">", escape(head));
                html.push_str(&best(ways, family));
                html.push_str("</td>");
            }
            html.push_str("</tr>\n");
        }
    }
    html.push_str("</tbody></table>\n");
    html
}

fn best(ways: &[Way], family: Family) -> String {
    let best = ways
        .iter()
        .filter(|way| way.family == family)
        .min_by(|a, b| a.seconds.median.total_cmp(&b.seconds.median));
    let Some(way) = best else { return "-".to_owned() };
    let ratio = match family {
        Family::Disk => None,
        Family::Vmfile => way.ratio_to_disk.map(|x| format!("{} x the disk", grid::ratio(x))),
        Family::Qemu | Family::Libvirt => {
            way.ratio_to_vmfile.map(|x| format!("{} x vmfile", grid::ratio(x)))
        }
    };
    let mut html = format!("<b>{:.3} s</b>", way.seconds.median);
    for small in ratio.iter().chain([&way.name]) {
        let _ = write!(html, "<small>{}</small>", escape(small));
    }
    html
}

/// Returns the complete tables of a guest.
pub(super) fn of_guest(results: &GuestResults) -> String {
    let mut html = String::new();
    for (what, ways) in results.tables() {
        if !ways.is_empty() {
            let caption = format!("{}: {what}", results.guest.name);
            html.push_str(&table(&caption, &grid::ways(ways)));
        }
    }
    html
}

/// Returns one table, which scrolls if the page is too narrow for it.
pub(super) fn table(caption: &str, grid: &Grid) -> String {
    let caption = escape(caption);
    let mut html = format!(
        "<div class=\"scroll\" role=\"region\" aria-label=\"{caption}\" tabindex=\"0\">\n\
         <table class=\"numbers\">\n<caption>{caption}</caption>\n\
         <thead><tr><th scope=\"col\">{}</th>",
        escape(&grid.corner)
    );
    for column in &grid.columns {
        let _ = write!(html, "<th scope=\"col\">{}</th>", escape(column));
    }
    html.push_str("</tr></thead>\n");
    for group in [Group::Measured, Group::Summed, Group::Besides] {
        let mut rows = grid.rows.iter().filter(|row| row.group == group).peekable();
        if rows.peek().is_none() {
            continue;
        }
        html.push_str("<tbody>\n");
        for row in rows {
            let class = if row.label == "median" { " class=\"median\"" } else { "" };
            let _ = write!(html, "<tr{class}><th scope=\"row\">{}</th>", escape(&row.label));
            for cell in &row.cells {
                let _ = write!(html, "<td>{}</td>", escape(cell));
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</tbody>\n");
    }
    html.push_str("</table></div>\n");
    html
}

/// Returns names and values below each other.
pub(super) fn pairs<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut html = String::from("<table class=\"pairs\"><tbody>\n");
    for (name, value) in pairs {
        let (name, value) = (escape(name), escape(value));
        let _ = writeln!(html, "<tr><th scope=\"row\">{name}</th><td>{value}</td></tr>");
    }
    html.push_str("</tbody></table>\n");
    html
}
