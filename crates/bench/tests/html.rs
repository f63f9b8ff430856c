//! The HTML page of measurements: its markup, and how a browser shows it.
//!
//! The page and its screenshot stay in cargo's directory for files of tests, so that a developer
//! can look at them.

mod sample;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmfile_bench::html::html;
use vmfile_testing::{Missing, TestResult, requires};

/// Elements without an end tag.
const VOID: [&str; 2] = ["meta", "br"];

/// The widths of the windows of a phone, a tablet and a desktop, in pixels.
const WIDTHS: [usize; 3] = [340, 768, 1280];

#[test]
fn the_page_asks_nobody_for_anything() {
    let page = html(&sample::report());
    for needle in ["http:", "https:", "src=", "<script", "<link", "url(", "@import"] {
        assert!(!page.contains(needle), "{needle}");
    }
}

#[test]
fn every_element_ends_where_it_must() {
    let page = html(&sample::report());
    let mut open: Vec<&str> = Vec::new();
    for tag in page.split('<').skip(1) {
        let tag = tag.split('>').next().unwrap();
        let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "</{name}> in {open:?}");
        } else if !tag.starts_with('!') && !tag.ends_with('/') && !VOID.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn every_plot_says_in_words_what_it_shows() {
    let page = html(&sample::report());
    let plots: Vec<&str> = page.split("<svg class=\"plot\"").skip(1).collect();
    // Saves and restores of four guests; saves and restores over RAM size, private and shared;
    // sweeps.
    assert_eq!(plots.len(), 4 * 2 + 4 + sample::SWEEPS);
    let mut ids = Vec::new();
    for plot in plots {
        assert!(plot.contains("<desc id=") && plot.contains("role=\"img\""));
        ids.push(plot.split("<title id=\"").nth(1).unwrap().split('"').next().unwrap());
    }
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "ids are unique");
}

#[test]
fn names_cannot_become_markup() {
    let mut report = sample::report();
    report.guests[0].guest.name = "<b>&".to_owned();
    report.not_measured[0].why = "</td><img>".to_owned();
    let page = html(&report);
    assert!(page.contains("<h2>&lt;b&gt;&amp;</h2>"));
    assert!(!page.contains("<b>&") && !page.contains("<img"));
}

#[test]
fn a_report_of_nothing_is_a_page_too() {
    let mut report = sample::report();
    report.guests.clear();
    report.sweeps.clear();
    report.not_measured.clear();
    let page = html(&report);
    assert!(page.contains("All that was asked for was measured") && !page.contains("All numbers"));
}

#[test]
fn a_browser_shows_the_page() -> TestResult {
    let chromium = requires!(chromium());
    let directory = directory("shows")?;
    let (blank, page) = (directory.join("blank.html"), directory.join("page.html"));
    fs::write(&blank, "<!DOCTYPE html><title>blank</title>")?;
    fs::write(&page, html(&sample::report()))?;

    let nothing = screenshot(&chromium, &directory, &blank)?;
    let shown = screenshot(&chromium, &directory, &page)?;

    assert_eq!(shown[..8], *b"\x89PNG\r\n\x1a\n");
    assert!(shown.len() > 4 * nothing.len(), "{} bytes, blank {}", shown.len(), nothing.len());
    Ok(())
}

#[test]
fn nothing_is_wider_than_the_window() -> TestResult {
    let chromium = requires!(chromium());
    let directory = directory("widths")?;
    let page = directory.join("frames.html");
    fs::write(&page, frames(&html(&sample::report())))?;

    let dom = run(&chromium, &directory, &page, &["--dump-dom"])?;

    let dom = String::from_utf8(dom)?;
    for width in WIDTHS {
        assert!(dom.contains(&format!("<li>{width}: nothing too wide</li>")), "{dom:.1500}");
    }
    Ok(())
}

/// Returns a page that shows `page` in frames of all widths, and lists the elements that do not
/// fit. That includes text in plots, which does not make a page wider.
fn frames(page: &str) -> String {
    const SCRIPT: &str =
        "onload = () => { for (const frame of document.querySelectorAll('iframe')) {
        const width = frame.clientWidth, inside = frame.contentDocument, found = [];
        const isTooWide = (element) => {
            const place = element.getBoundingClientRect();
            return !element.closest('.scroll') && place.width > 0
                && (place.right > width || place.left < 0);
        };
        for (const element of inside.body.querySelectorAll('*'))
            if (isTooWide(element)) found.push(element.tagName + ' ' + element.textContent);
        if (inside.documentElement.scrollWidth > width) found.push('the page scrolls');
        const item = document.createElement('li');
        item.textContent = width + ': ' + (found.join('; ') || 'nothing too wide');
        document.querySelector('ul').append(item);
    } }";
    let inside = page.replace('&', "&amp;").replace('"', "&quot;");
    let frame = |width| format!("<iframe width={width} height=900 srcdoc=\"{inside}\"></iframe>");
    let frames: String = WIDTHS.map(frame).concat();
    format!(
        "<!DOCTYPE html><style>iframe {{ border: 0 }}</style><ul></ul>\
         <script>{SCRIPT}</script>{frames}"
    )
}

fn chromium() -> Result<PathBuf, Missing> {
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .map(|directory| directory.join("chromium"))
        .find(|program| program.is_file())
        .ok_or_else(|| Missing::new("needs chromium, to see what a browser makes of the page"))
}

/// Returns an empty directory for one test.
fn directory(name: &str) -> TestResult<PathBuf> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page").join(name);
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

fn screenshot(chromium: &Path, directory: &Path, page: &Path) -> TestResult<Vec<u8>> {
    let picture = page.with_extension("png");
    let to_picture = format!("--screenshot={}", picture.display());
    run(chromium, directory, page, &[&to_picture, "--window-size=1280,2400"])?;
    Ok(fs::read(picture)?)
}

/// Runs the browser once, without a window, a network or a profile of its own; returns its output.
fn run(chromium: &Path, directory: &Path, page: &Path, more: &[&str]) -> TestResult<Vec<u8>> {
    let output = Command::new(chromium)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--hide-scrollbars", "--virtual-time-budget=5000"])
        .arg(format!("--user-data-dir={}", directory.join("profile").display()))
        .args(more)
        .arg(format!("file://{}", page.display()))
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {}: {stderr}", chromium.display(), output.status).into());
    }
    Ok(output.stdout)
}
