//! Line plots: how times grow with one quantity.
//!
//! Horizontal places are shares of the width, like those of the bars; vertical ones are pixels.

use std::fmt::Write;

use super::escape;
use super::scale::Scale;
use crate::grid;
use crate::series::Summary;

/// Where the axis of values begins and ends, in pixels from the top.
const TOP: f64 = 36.0;
const BOTTOM: f64 = 306.0;
const HEIGHT: f64 = 352.0;
/// Where the leftmost and the rightmost point lie, in percent of the area's width.
const LEFT: f64 = 11.0;
const RIGHT: f64 = 95.0;
/// The width of the names right of the points, in pixels.
const NAMES_WIDTH: usize = 150;
/// From one name right of the area to the next.
const NAME_HEIGHT: f64 = 17.0;
/// Shapes of points, as the page defines them.
pub(super) const MARKS: [&str; 6] = ["circle", "square", "diamond", "up", "down", "ring"];
/// Strokes of lines.
const DASHES: [&str; 4] = ["none", "7 3", "2 3", "9 3 2 3"];

/// A plot of lines.
#[derive(Debug)]
pub(super) struct LinePlot {
    /// Unique in the page.
    pub(super) id: String,
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) lines: Vec<Line>,
    pub(super) extent: Extent,
}

/// The labels of an axis.
#[derive(Debug)]
pub(super) struct Axis {
    pub(super) name: String,
    /// `MiB` is shown as sizes along the bottom; otherwise a part of the axis' name.
    pub(super) unit: &'static str,
}

/// One line.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) short: String,
    /// The CSS class that has the color.
    pub(super) color: &'static str,
    /// How many lines of this color come before it; decides the mark and the stroke.
    pub(super) index: usize,
    /// The points, from left to right.
    pub(super) points: Vec<(f64, Summary)>,
}

/// How the distance from the smallest to the largest value is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// As a band around the line.
    Band,
    /// As a stroke at each point; the names of the lines then stand right of the points.
    Strokes,
}

struct Scales {
    x: Scale,
    y: Scale,
}

impl Scales {
    fn x(&self, value: f64) -> f64 {
        LEFT + self.x.share(value) * (RIGHT - LEFT)
    }

    fn y(&self, value: f64) -> f64 {
        BOTTOM - self.y.share(value) * (BOTTOM - TOP)
    }
}

/// Draws the plot, with its legend above it.
pub(super) fn draw(plot: &LinePlot) -> String {
    let points = || plot.lines.iter().flat_map(|line| &line.points);
    let xs: Vec<f64> = points().map(|(x, _)| *x).collect();
    let ys: Vec<f64> = points().flat_map(|(_, y)| [y.min, y.max]).collect();
    let scales = Scales { x: Scale::tight(&xs), y: Scale::roomy(&ys) };
    let names_beside = plot.extent == Extent::Strokes;
    let id = &plot.id;
    let mut html = legend(&plot.lines, names_beside);
    let _ = write!(
        html,
        "<div class=\"beside\">\n<svg class=\"plot\" width=\"100%\" height=\"{HEIGHT}\" \
         role=\"img\" aria-labelledby=\"{id}-title {id}-desc\">\n\
         <title id=\"{id}-title\">{}</title>\n<desc id=\"{id}-desc\">{}</desc>\n",
        escape(&plot.title),
        escape(&description(plot))
    );
    axes(&mut html, plot, &scales, &xs);
    for line in &plot.lines {
        draw_line(&mut html, line, &scales, plot.extent);
    }
    for line in &plot.lines {
        draw_points(&mut html, line, &scales, plot);
    }
    html.push_str("</svg>\n");
    if names_beside {
        names(&mut html, &plot.lines, &scales);
    }
    html.push_str("</div>\n");
    html
}

fn description(plot: &LinePlot) -> String {
    let mut text = String::new();
    for line in &plot.lines {
        let values = line
            .points
            .iter()
            .map(|(x, y)| format!("{} at {}", grid::number(y.median), x_label(*x, plot.x.unit)));
        let values: Vec<_> = values.collect();
        let unit = plot.y.unit;
        let _ = write!(text, "{}, median {unit}: {}. ", line.name, values.join(", "));
    }
    text.trim_end().to_owned()
}

/// Returns the label of a value along the bottom.
fn x_label(value: f64, unit: &str) -> String {
    match unit {
        // A sweep's sizes are whole, and those below 1 MiB do not occur.
        "MiB" if value >= 1024.0 => format!("{} GiB", grid::number(value / 1024.0)),
        "MiB" => format!("{} MiB", grid::number(value)),
        "%" => format!("{} %", grid::number(value)),
        _ => grid::number(value),
    }
}

fn legend(lines: &[Line], names_beside: bool) -> String {
    let class = if names_beside { "legend narrow-only" } else { "legend" };
    let mut html = format!("<ul class=\"{class}\">\n");
    for line in lines {
        let _ = writeln!(
            html,
            "<li class=\"{}\"><svg width=\"34\" height=\"12\" aria-hidden=\"true\">\
             <line class=\"line\" x1=\"0\" x2=\"34\" y1=\"6\" y2=\"6\" stroke-dasharray=\"{}\"/>\
             <use href=\"#mark-{}\" x=\"17\" y=\"6\"/></svg>{}</li>",
            line.color,
            dash(line),
            mark(line),
            escape(&line.name)
        );
    }
    html.push_str("</ul>\n");
    html
}

fn axes(svg: &mut String, plot: &LinePlot, scales: &Scales, xs: &[f64]) {
    for tick in scales.y.ticks() {
        let y = scales.y(tick);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"0\" x2=\"100%\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"tick\" x=\"0\" y=\"{:.1}\">{}</text>",
            y - 4.0,
            grid::number(tick)
        );
    }
    let (label_y, name_y) = (BOTTOM + 18.0, BOTTOM + 40.0);
    for tick in x_ticks(xs, scales) {
        let x = scales.x(tick);
        let _ = writeln!(
            svg,
            "<line class=\"notch\" x1=\"{x:.2}%\" x2=\"{x:.2}%\" y1=\"{BOTTOM}\" y2=\"{}\"/>\
             <text class=\"tick\" x=\"{x:.2}%\" y=\"{label_y}\" text-anchor=\"middle\">{}</text>",
            BOTTOM + 5.0,
            x_label(tick, plot.x.unit)
        );
    }
    let log = |scale: &Scale| if scale.is_log() { " (logarithmic)" } else { "" };
    let unit = grid::unit_in_full(plot.y.unit);
    let _ = writeln!(
        svg,
        "<line class=\"base\" x1=\"0\" x2=\"100%\" y1=\"{BOTTOM}\" y2=\"{BOTTOM}\"/>\
         <text class=\"axis\" x=\"0\" y=\"11\">{}{}</text>\
         <text class=\"axis\" x=\"53%\" y=\"{name_y}\" text-anchor=\"middle\">{}{}</text>",
        escape(&grid::with_unit(&plot.y.name, unit)),
        log(&scales.y),
        escape(&plot.x.name),
        log(&scales.x)
    );
}

/// Returns the places where something was measured, except where they are too close to be labeled.
fn x_ticks(xs: &[f64], scales: &Scales) -> Vec<f64> {
    let mut sorted = xs.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut ticks: Vec<f64> = Vec::new();
    for x in sorted.into_iter().rev() {
        if ticks.last().is_none_or(|last| scales.x(*last) - scales.x(x) >= 16.0) {
            ticks.push(x);
        }
    }
    ticks
}

fn draw_line(svg: &mut String, line: &Line, scales: &Scales, extent: Extent) {
    let along = |value: fn(&Summary) -> f64| {
        line.points
            .iter()
            .map(move |(x, y)| format!("{:.2},{:.1}", scales.x(*x), scales.y(value(y))))
    };
    let join = |points: Vec<String>| points.join(" ");
    // The view box is stretched with the page, but strokes keep their width.
    let _ = writeln!(
        svg,
        "<svg class=\"{}\" width=\"100%\" height=\"{HEIGHT}\" viewBox=\"0 0 100 {HEIGHT}\" \
         preserveAspectRatio=\"none\">",
        line.color
    );
    if extent == Extent::Band {
        let back: Vec<String> = along(|y| y.min).collect::<Vec<_>>().into_iter().rev().collect();
        let outline: Vec<String> = along(|y| y.max).chain(back).collect();
        let _ = writeln!(svg, "<polygon class=\"band\" points=\"{}\"/>", join(outline));
    }
    let _ = writeln!(
        svg,
        "<polyline class=\"line\" stroke-dasharray=\"{}\" points=\"{}\"/></svg>",
        dash(line),
        join(along(|y| y.median).collect())
    );
}

fn draw_points(svg: &mut String, line: &Line, scales: &Scales, plot: &LinePlot) {
    let _ = writeln!(svg, "<g class=\"{}\">", line.color);
    if let (Extent::Strokes, Some((x, y))) = (plot.extent, end(line, scales)) {
        let _ = writeln!(
            svg,
            "<line class=\"leader wide-only\" x1=\"{x:.2}%\" x2=\"100%\" y1=\"{y:.1}\" \
             y2=\"{y:.1}\"/>"
        );
    }
    for (at, value) in &line.points {
        let x = scales.x(*at);
        if plot.extent == Extent::Strokes {
            let (low, high) = (scales.y(value.min), scales.y(value.max));
            let _ = writeln!(
                svg,
                "<line class=\"extent\" x1=\"{x:.2}%\" x2=\"{x:.2}%\" y1=\"{low:.1}\" \
                 y2=\"{high:.1}\"/>"
            );
        }
        let unit = plot.y.unit;
        let tooltip = format!(
            "{}, {}: median {:.3} {unit}, from {:.3} to {:.3} {unit}",
            line.name,
            x_label(*at, plot.x.unit),
            value.median,
            value.min,
            value.max
        );
        let _ = writeln!(
            svg,
            "<use href=\"#mark-{}\" x=\"{x:.2}%\" y=\"{:.1}\"><title>{}</title></use>",
            mark(line),
            scales.y(value.median),
            escape(&tooltip)
        );
    }
    svg.push_str("</g>\n");
}

/// Writes the lines' names right of their last points, without overlaps.
fn names(svg: &mut String, lines: &[Line], scales: &Scales) {
    let mut ends: Vec<(&Line, f64)> =
        lines.iter().filter_map(|line| Some((line, end(line, scales)?.1))).collect();
    ends.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let places = spread(&ends.iter().map(|(_, y)| *y).collect::<Vec<_>>());
    let _ = writeln!(
        svg,
        "<svg class=\"plot wide-only\" width=\"{NAMES_WIDTH}\" height=\"{HEIGHT}\" \
         aria-hidden=\"true\">"
    );
    for ((line, y), place) in ends.iter().zip(places) {
        let _ = writeln!(
            svg,
            "<g class=\"{}\"><line class=\"leader\" x1=\"0\" y1=\"{y:.1}\" x2=\"14\" \
             y2=\"{place:.1}\"/><use href=\"#mark-{}\" x=\"20\" y=\"{place:.1}\"/>\
             <text class=\"name\" x=\"30\" y=\"{:.1}\">{}</text></g>",
            line.color,
            mark(line),
            place + 4.5,
            escape(&line.short)
        );
    }
    svg.push_str("</svg>\n");
}

/// Returns where a line ends, in percent and pixels.
fn end(line: &Line, scales: &Scales) -> Option<(f64, f64)> {
    line.points.last().map(|(x, y)| (scales.x(*x), scales.y(y.median)))
}

/// Moves places apart, from the top down, so that each has room for a name.
fn spread(sorted: &[f64]) -> Vec<f64> {
    let mut places = sorted.to_vec();
    for _ in 0..200 {
        for index in 1..places.len() {
            let overlap = NAME_HEIGHT - (places[index] - places[index - 1]);
            if overlap > 0.0 {
                places[index - 1] -= overlap / 2.0;
                places[index] += overlap / 2.0;
            }
        }
        for place in &mut places {
            *place = place.clamp(TOP - 16.0, HEIGHT - 10.0);
        }
    }
    places
}

fn mark(line: &Line) -> &'static str {
    MARKS[line.index % MARKS.len()]
}

fn dash(line: &Line) -> &'static str {
    DASHES[line.index % DASHES.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_lie_on_each_other() {
        let places = spread(&[100.0, 101.0, 101.5, 280.0, 285.0]);
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] > NAME_HEIGHT - 0.5), "{places:?}");
        assert!(places.iter().all(|place| (0.0..HEIGHT).contains(place)));
    }

    #[test]
    fn sizes_along_the_bottom_have_the_unit_that_suits_them() {
        assert_eq!(x_label(512.0, "MiB"), "512 MiB");
        assert_eq!(x_label(262_144.0, "MiB"), "256 GiB");
        assert_eq!(x_label(75.0, "%"), "75 %");
        assert_eq!(x_label(32.0, ""), "32");
    }
}
