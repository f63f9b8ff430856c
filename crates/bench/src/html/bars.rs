//! Horizontal bars: how long each way took, the fastest on top.
//!
//! Lengths are shares of the width, so that a plot becomes narrow with its page, but its letters
//! keep their size.

use std::fmt::Write;

use super::scale::Scale;
use super::{css_class, escape};
use crate::grid;
use crate::report::{Family, Way};

const ROW_HEIGHT: usize = 38;
/// From the top of a row to the middle of its bar.
const BAR_MIDDLE: usize = 25;
/// From the top of a row to the baseline of its name.
const NAME_BASE: usize = 13;
const BAR_HEIGHT: usize = 12;
/// The space above the first row, for the label of the disk's line.
const HEAD_HEIGHT: usize = 20;
/// The space below the last row, for the axis.
const FOOT_HEIGHT: usize = 44;
/// The axis' share of the width, in percent.
const AXIS_WIDTH: f64 = 98.0;

/// Draws the bars of `ways` under `title`; `id` must be unique in the page.
pub(super) fn draw(id: &str, title: &str, ways: &[Way]) -> String {
    let mut sorted: Vec<&Way> = ways.iter().collect();
    sorted.sort_by(|a, b| a.seconds.median.total_cmp(&b.seconds.median));
    let longest = ways.iter().map(|way| way.seconds.max).fold(0.0, f64::max);
    let scale = Scale::from_zero(longest * 1.01);
    let height = HEAD_HEIGHT + sorted.len() * ROW_HEIGHT + FOOT_HEIGHT;
    let mut svg = format!(
        "<svg class=\"plot\" width=\"100%\" height=\"{height}\" role=\"img\" \
         aria-labelledby=\"{id}-title {id}-desc\">\n\
         <title id=\"{id}-title\">{}</title>\n<desc id=\"{id}-desc\">{}</desc>\n",
        escape(title),
        escape(&description(&sorted))
    );
    let bottom = height - FOOT_HEIGHT;
    axis(&mut svg, &scale, bottom);
    let rows = || (HEAD_HEIGHT..).step_by(ROW_HEIGHT).zip(&sorted);
    for (top, way) in rows() {
        bar(&mut svg, &scale, way, top + BAR_MIDDLE);
    }
    // Draws the line above the bars and below the text.
    if let Some(disk) = ways.iter().find(|way| way.family == Family::Disk) {
        limit(&mut svg, x(&scale, disk.seconds.median), bottom);
    }
    for (top, way) in rows() {
        name(&mut svg, &scale, way, top + NAME_BASE);
    }
    svg.push_str("</svg>\n");
    svg
}

fn x(scale: &Scale, seconds: f64) -> f64 {
    scale.share(seconds) * AXIS_WIDTH
}

fn description(ways: &[&Way]) -> String {
    let medians = ways.iter().map(|way| format!("{} {:.3} s", way.name, way.seconds.median));
    format!("Medians, the fastest first: {}.", medians.collect::<Vec<_>>().join("; "))
}

fn axis(svg: &mut String, scale: &Scale, bottom: usize) {
    for tick in scale.ticks() {
        let x = x(scale, tick);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{x:.2}%\" x2=\"{x:.2}%\" y1=\"{HEAD_HEIGHT}\" \
             y2=\"{bottom}\"/><text class=\"tick\" x=\"{x:.2}%\" y=\"{}\" \
             text-anchor=\"middle\">{}</text>",
            bottom + 16,
            grid::number(tick)
        );
    }
    let y = bottom + 36;
    let _ = writeln!(
        svg,
        "<text class=\"axis\" x=\"50%\" y=\"{y}\" text-anchor=\"middle\">seconds</text>"
    );
}

fn bar(svg: &mut String, scale: &Scale, way: &Way, middle: usize) {
    let seconds = &way.seconds;
    let (start, end) = (x(scale, 0.0), x(scale, seconds.median));
    let _ = writeln!(
        svg,
        "<g class=\"{}\"><title>{}</title>\n\
         <rect class=\"bar\" x=\"{start:.2}%\" y=\"{}\" width=\"{:.2}%\" height=\"{BAR_HEIGHT}\"/>",
        css_class(way.family),
        escape(&tooltip(way)),
        middle - BAR_HEIGHT / 2,
        end - start
    );
    whisker(svg, x(scale, seconds.min), x(scale, seconds.max), middle);
    for run in &way.runs {
        let x = x(scale, run.seconds);
        let _ = writeln!(svg, "<circle class=\"run\" cx=\"{x:.2}%\" cy=\"{middle}\" r=\"2.5\"/>");
    }
    svg.push_str("</g>\n");
}

fn name(svg: &mut String, scale: &Scale, way: &Way, y: usize) {
    let x = x(scale, 0.0);
    let ratio = way.ratio_to_disk.filter(|_| way.family != Family::Disk);
    let ratio = ratio.map(|ratio| {
        format!("<tspan class=\"ratio\">{} x</tspan><tspan dx=\"10\"> </tspan>", grid::ratio(ratio))
    });
    let _ = writeln!(
        svg,
        "<g class=\"{}\"><text class=\"name long\" x=\"{x:.2}%\" y=\"{y}\">{}</text>\
         <text class=\"name short\" x=\"{x:.2}%\" y=\"{y}\">{}</text>\
         <text class=\"value\" x=\"100%\" y=\"{y}\" text-anchor=\"end\">{}{:.3} s</text></g>",
        css_class(way.family),
        escape(&way.name),
        escape(&way.short),
        ratio.unwrap_or_default(),
        way.seconds.median
    );
}

fn whisker(svg: &mut String, low: f64, high: f64, middle: usize) {
    let (top, bottom) = (middle - 4, middle + 4);
    let _ = writeln!(
        svg,
        "<line class=\"whisker\" x1=\"{low:.2}%\" x2=\"{high:.2}%\" y1=\"{middle}\" \
         y2=\"{middle}\"/>\
         <line class=\"whisker\" x1=\"{low:.2}%\" x2=\"{low:.2}%\" y1=\"{top}\" y2=\"{bottom}\"/>\
         <line class=\"whisker\" x1=\"{high:.2}%\" x2=\"{high:.2}%\" y1=\"{top}\" y2=\"{bottom}\"/>"
    );
}

/// Draws the line of the disk's limit: a way that writes durably can be left of it only by luck.
fn limit(svg: &mut String, x: f64, bottom: usize) {
    // The label stands on the side that has more room.
    let (anchor, shift) = if x > 60.0 { ("end", -6) } else { ("start", 6) };
    let _ = writeln!(
        svg,
        "<g class=\"limit\"><line x1=\"{x:.2}%\" x2=\"{x:.2}%\" y1=\"4\" y2=\"{bottom}\"/>\
         <text x=\"{x:.2}%\" y=\"13\" dx=\"{shift}\" text-anchor=\"{anchor}\">the disk's \
         limit</text></g>"
    );
}

fn tooltip(way: &Way) -> String {
    let seconds = &way.seconds;
    let mut text = format!(
        "{}: median {:.3} s, from {:.3} to {:.3} s",
        way.name, seconds.median, seconds.min, seconds.max
    );
    for (ratio, what) in [(way.ratio_to_disk, "the disk's"), (way.ratio_to_vmfile, "vmfile's")] {
        if let Some(ratio) = ratio {
            let _ = write!(text, ", {} times {what}", grid::ratio(ratio));
        }
    }
    text
}
