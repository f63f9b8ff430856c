//! Progress of long work: a bar, JSON lines, or one line for each SIGUSR1.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmfile::Progress;

use crate::args::ProgressMode;
use crate::output::size;

/// The time between JSON lines.
const LINES_EVERY: Duration = Duration::from_millis(200);

/// Shows progress.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    verb: &'static str,
    started: Instant,
    bar: Option<ProgressBar>,
    /// The last JSON line: when, and how many bytes were done.
    lines: Option<Mutex<Option<(Instant, u64)>>>,
    asked: &'a AtomicBool,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(verb: &'static str, mode: ProgressMode, asked: &'a AtomicBool) -> Meter<'a> {
        let bar = match mode {
            ProgressMode::Bar => true,
            ProgressMode::Auto => io::stderr().is_terminal(),
            ProgressMode::Json | ProgressMode::Off => false,
        };
        let lines = (mode == ProgressMode::Json).then(|| Mutex::new(None));
        let bar = bar.then(|| {
            let template = "{prefix} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
            let style = ProgressStyle::with_template(template).expect("a constant template");
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            bar.set_style(style.progress_chars("=> "));
            bar.set_prefix(verb);
            bar
        });
        Meter { verb, started: Instant::now(), bar, lines, asked }
    }

    /// Shows progress that the library reports; several threads call this.
    pub(crate) fn show(&self, progress: Progress) {
        if let Some(bar) = &self.bar {
            bar.set_length(progress.total_bytes);
            bar.set_position(bar.position().max(progress.done_bytes));
        }
        let asked = self.asked.swap(false, Ordering::Relaxed);
        if let Some(last) = &self.lines {
            self.json_line(progress, asked, &mut last.lock().expect("no thread panics holding it"));
        } else if asked {
            let elapsed = self.started.elapsed().as_secs_f64();
            self.line(&format_args!(
                "vmfile {}: {} of {}, {}",
                self.verb,
                size::bytes(progress.done_bytes),
                size::bytes(progress.total_bytes),
                size::rate(progress.done_bytes, elapsed),
            ));
        }
    }

    fn json_line(&self, progress: Progress, asked: bool, last: &mut Option<(Instant, u64)>) {
        let is_last = progress.done_bytes == progress.total_bytes;
        let (is_due, done_before) = match last {
            Some((at, done)) => (at.elapsed() >= LINES_EVERY, *done),
            None => (true, 0),
        };
        // Several threads report, not always in order.
        if progress.done_bytes < done_before || !(is_due || is_last || asked) {
            return;
        }
        *last = Some((Instant::now(), progress.done_bytes));
        self.line(&serde_json::json!({
            "type": "progress",
            "verb": self.verb,
            "done_bytes": progress.done_bytes,
            "total_bytes": progress.total_bytes,
            "elapsed_seconds": self.started.elapsed().as_secs_f64(),
        }));
    }

    fn line(&self, line: &dyn std::fmt::Display) {
        // If the reader has gone, the work goes on.
        let _ = writeln!(io::stderr().lock(), "{line}");
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
