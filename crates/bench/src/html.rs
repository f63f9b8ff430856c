//! The report as an HTML page: plots, then all tables.
//!
//! The page is one file that loads nothing from elsewhere: the plots are inline SVG, the style is
//! inline, and there is no script.

mod bars;
mod growth;
mod lines;
mod scale;
mod tables;

use std::fmt::Write;

use self::lines::LinePlot;
use crate::grid;
use crate::report::{BenchReport, Family, GuestResults};

const STYLE: &str = include_str!("html/page.css");

/// The marks of the points of a line, centered on 0, in the color of the line.
const MARKS: &str = r#"<svg width="0" height="0" class="marks" aria-hidden="true"><defs>
<circle id="mark-circle" r="4"/>
<rect id="mark-square" x="-3.7" y="-3.7" width="7.4" height="7.4"/>
<path id="mark-diamond" d="M0-5.2L5.2 0 0 5.2-5.2 0Z"/>
<path id="mark-up" d="M0-5L4.8 3.6H-4.8Z"/>
<path id="mark-down" d="M0 5L4.8-3.6H-4.8Z"/>
<circle id="mark-ring" r="3.6" class="ring"/>
</defs></svg>
"#;

const HOW: [&str; 6] = [
    "Every comparison is made in rounds: A B C, A B C, never A A B B. A disk that others share \
     changes its speed within seconds, and so it changes for all ways alike.",
    "The first round warms up and is not counted.",
    "Every program makes its file durable within the time that is measured: fsync is inside.",
    "A ratio (x disk, x vmfile) is the median of the rounds' ratios, not the ratio of two medians: \
     what the disk did to both in a round cancels out.",
    "The disk's limit is fio, writing or reading as many bytes as the ways beside it.",
    "Only ratios carry over to another machine.",
];

/// Returns the whole report as an HTML page.
#[must_use]
pub fn html(report: &BenchReport) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>vmfile: measurements of {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         {MARKS}",
        escape(&grid::date(report.host.began_unix_seconds))
    );
    header(&mut page, report);
    page.push_str("<main>\n");
    if !report.guests.is_empty() {
        section(&mut page, "At a glance", &glance(report));
    }
    for (index, results) in report.guests.iter().enumerate() {
        section(&mut page, &results.guest.name, &guest_plots(index, results));
    }
    let over_ram = growth::over_ram(&report.guests);
    if !over_ram.is_empty() {
        let text = "Medians; the strokes reach from the fastest to the slowest run.";
        section(&mut page, "Time against RAM", &line_plots(text, &over_ram));
    }
    if !report.sweeps.is_empty() {
        let sweeps: Vec<_> =
            (0..).zip(&report.sweeps).map(|(i, s)| growth::of_sweep(i, s)).collect();
        let text = "Medians; the bands reach from the least to the most that a run took.";
        section(&mut page, "How cost grows", &line_plots(text, &sweeps));
    }
    all_tables(&mut page, report);
    if report.not_measured.is_empty() {
        section(&mut page, "Not measured", "<p>All that was asked for was measured.</p>\n");
    } else {
        let missing = report.not_measured.iter();
        let pairs = missing.map(|missing| (missing.what.as_str(), missing.why.as_str()));
        section(&mut page, "Not measured", &tables::pairs(pairs));
    }
    section(&mut page, "How it was measured", &how());
    let host = grid::host(report);
    let pairs = host.iter().map(|(name, value)| (*name, value.as_str()));
    section(&mut page, "Where it was measured", &tables::pairs(pairs));
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

/// Escapes characters that have a meaning in HTML.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            letter => escaped.push(letter),
        }
    }
    escaped
}

/// Returns the CSS class that has a family's color.
fn css_class(family: Family) -> &'static str {
    match family {
        Family::Disk => "disk",
        Family::Vmfile => "vmfile",
        Family::Qemu => "qemu",
        Family::Libvirt => "libvirt",
    }
}

fn header(page: &mut String, report: &BenchReport) {
    let host = &report.host;
    let acceleration = if host.kvm { "KVM" } else { "emulation" };
    let facts = [
        host.cpu.clone(),
        format!("{} of memory", grid::bytes(host.memory_bytes)),
        host.kernel.clone(),
        host.file_system.clone(),
        format!("QEMU {}, {acceleration}", host.qemu),
        grid::date(host.began_unix_seconds),
    ];
    page.push_str(
        "<header>\n<h1>Saving and restoring VMs</h1>\n\
         <p>vmfile beside QEMU's own ways, libvirt and the disk's limit, measured on one \
         host.</p>\n<ul class=\"facts\">",
    );
    for fact in facts {
        let _ = write!(page, "<li>{}</li>", escape(&fact));
    }
    page.push_str("</ul>\n</header>\n");
}

fn section(page: &mut String, title: &str, content: &str) {
    let _ = write!(page, "<section>\n<h2>{}</h2>\n{content}</section>\n", escape(title));
}

fn figure(title: &str, content: &str) -> String {
    format!("<figure>\n<figcaption>{}</figcaption>\n{content}</figure>\n", escape(title))
}

fn glance(report: &BenchReport) -> String {
    let text = "<p>Medians of the fastest way of each. Less is better.</p>\n";
    text.to_owned() + &tables::at_a_glance(report)
}

fn guest_plots(index: usize, results: &GuestResults) -> String {
    let mut html = format!("<p>{}.</p>\n", escape(&grid::data_of(&results.guest)));
    let ways = || results.saves.iter().chain(&results.restores);
    html.push_str("<ul class=\"legend\">\n");
    for (family, name) in [
        (Family::Disk, "the disk"),
        (Family::Vmfile, "vmfile"),
        (Family::Qemu, "QEMU"),
        (Family::Libvirt, "libvirt"),
    ] {
        if ways().any(|way| way.family == family) {
            let class = css_class(family);
            let _ = writeln!(html, "<li class=\"{class}\"><i></i>{name}</li>");
        }
    }
    html.push_str(
        "<li>bar: median</li>\n<li>whisker: fastest to slowest run</li>\n<li>dot: one run</li>\n\
         <li>x: times the disk's limit</li>\n</ul>\n<div class=\"plots\">\n",
    );
    for (what, verb, ways) in
        [("Saves", "save", &results.saves), ("Restores", "restore", &results.restores)]
    {
        if !ways.is_empty() {
            let title = format!("{what}: {}", results.guest.name);
            let plot = bars::draw(&format!("{verb}-{index}"), &title, ways);
            html.push_str(&figure(what, &plot));
        }
    }
    html.push_str("</div>\n");
    html
}

fn line_plots(text: &str, plots: &[LinePlot]) -> String {
    let figures = plots.iter().map(|plot| figure(&plot.title, &lines::draw(plot)));
    format!("<p>{text}</p>\n<div class=\"plots\">\n{}</div>\n", figures.collect::<String>())
}

fn all_tables(page: &mut String, report: &BenchReport) {
    let guests = report.guests.iter().map(tables::of_guest);
    let sweeps = report
        .sweeps
        .iter()
        .map(|sweep| tables::table(&grid::sweep_title(sweep), &grid::sweep(sweep)));
    let tables: String = guests.chain(sweeps).collect();
    if !tables.is_empty() {
        section(page, "All numbers", &tables);
    }
}

fn how() -> String {
    let items = HOW.iter().map(|item| format!("<li>{}</li>\n", escape(item)));
    format!("<ul class=\"how\">\n{}</ul>\n", items.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escape("<a href=\"x\">'&'"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;");
    }
}
