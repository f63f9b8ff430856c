//! What was measured, as a page of the documentation and as a summary.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use vmfile_testing::TestResult;

use crate::Scale;
use crate::series::Series;

/// The page.
const PAGE: &str = "docs/benchmarks.md";

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    facts: Vec<(&'static str, String)>,
    scale: Scale,
    pub(crate) took_seconds: f64,
    saves: Vec<SaveTable>,
    rows: Vec<Series>,
    targets: Vec<Target>,
    notes: Vec<String>,
}

/// One guest, saved by everybody.
#[derive(Debug)]
struct SaveTable {
    guest: String,
    data_bytes: u64,
    rows: Vec<SaveRow>,
}

/// A writer, and its ratio to the disk's limit.
#[derive(Debug)]
struct SaveRow {
    series: Series,
    ratio: f64,
}

/// A promise, and what became of it.
#[derive(Debug)]
struct Target {
    what: String,
    wanted: String,
    measured: String,
    verdict: &'static str,
}

/// What stands in the way of a target, by the beginning of its name.
const WHY_MISSED: [(&str, &str); 7] = [
    ("save, shared RAM: / fio", SPREAD),
    ("save, private RAM: / fio", SPREAD),
    ("restore, load: / fio", SPREAD),
    ("check: speed / fio", SPREAD),
    ("restore, map: memory", GUEST_WRITES),
    ("save, shared RAM: ", DISK_DECIDES),
    ("save, private RAM: ", DISK_DECIDES),
];
const SPREAD: &str = "fio itself differs by more between rounds: see its min and max";
const GUEST_WRITES: &str = "the guest rewrites its memory from the moment it runs, and the first clone has run for seconds";
const DISK_DECIDES: &str =
    "both wait for the disk, and it leaves no such distance above fio's time";

impl Target {
    /// Returns what is known of the cause, if the target was missed.
    fn why_missed(&self) -> &'static str {
        if self.verdict != "missed" {
            return "";
        }
        let known = WHY_MISSED.iter().find(|(name, _)| self.what.starts_with(name));
        known.map_or("not known yet", |(_, why)| why)
    }
}

impl Report {
    pub(crate) fn new(facts: Vec<(&'static str, String)>, scale: Scale) -> Report {
        Report {
            facts,
            scale,
            took_seconds: 0.0,
            saves: Vec::new(),
            rows: Vec::new(),
            targets: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Begins a table of ways of writing a guest with so many bytes of data.
    pub(crate) fn begin_table(&mut self, guest: &str, data_bytes: u64) {
        println!("{guest}");
        self.saves.push(SaveTable { guest: guest.to_owned(), data_bytes, rows: Vec::new() });
    }

    /// Adds a way to the table that was begun, beside the disk's limit.
    pub(crate) fn save_row(&mut self, series: &Series, disk: &Series) {
        println!("{:<52} {:>8.3} s", series.name, series.median());
        let row = SaveRow { series: series.clone(), ratio: series.ratio(disk) };
        self.saves.last_mut().expect("a table was begun").rows.push(row);
    }

    /// Adds another measurement.
    pub(crate) fn row(&mut self, series: &Series) {
        println!("{:<52} {:>8.4} s", series.name, series.median());
        self.rows.push(series.clone());
    }

    /// Adds a target that is met by `value` up to `limit`.
    pub(crate) fn at_most(&mut self, what: &str, value: f64, limit: f64, unit: &str) {
        self.target(what, format!("<= {limit} {unit}"), value, unit, value <= limit);
    }

    /// Adds a target that is met by `value` from `limit` on.
    pub(crate) fn at_least(&mut self, what: &str, value: f64, limit: f64, unit: &str) {
        self.target(what, format!(">= {limit} {unit}"), value, unit, value >= limit);
    }

    /// Adds a target that this run says nothing about.
    pub(crate) fn not_measured(&mut self, what: &str, reason: &str) {
        println!("{what}: not measured: {reason}");
        self.targets.push(Target {
            what: what.to_owned(),
            wanted: String::new(),
            measured: format!("not measured: {reason}"),
            verdict: "",
        });
    }

    /// Adds a sentence below the tables.
    pub(crate) fn note(&mut self, sentence: String) {
        self.notes.push(sentence);
    }

    fn target(&mut self, what: &str, wanted: String, value: f64, unit: &str, is_met: bool) {
        let measured = format!("{value:.2} {unit}");
        let verdict = if is_met { "met" } else { "missed" };
        println!("{what}: {measured}, wanted {wanted}: {verdict}");
        self.targets.push(Target { what: what.to_owned(), wanted, measured, verdict });
    }

    /// Returns how many targets are met, and those that are missed.
    pub(crate) fn summary(&self) -> String {
        let count = |verdict| self.targets.iter().filter(|t| t.verdict == verdict).count();
        let (met, missed) = (count("met"), count("missed"));
        let mut text = format!("{met} targets met, {missed} missed, {:.0} s", self.took_seconds);
        for target in self.targets.iter().filter(|target| target.verdict == "missed") {
            let Target { what, wanted, measured, .. } = target;
            let _ = write!(text, "\n  missed: {what}: {measured}, wanted {wanted}");
        }
        text
    }

    /// Writes the page and returns its path.
    pub(crate) fn write(&self) -> TestResult<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
        let path = root.join(PAGE);
        fs::write(&path, self.page())?;
        Ok(path)
    }

    fn page(&self) -> String {
        let mut page = String::from(HEAD);
        page += "\n## Machine\n\n| | |\n|---|---|\n";
        for (name, value) in &self.facts {
            let _ = writeln!(page, "| {name} | {value} |");
        }
        let _ = writeln!(page, "| command | `cargo xtask bench`, {:.0} s |", self.took_seconds);
        self.saves_tables(&mut page);
        page += "\n## The rest\n\n| what | median s | min | max |\n|---|---|---|---|\n";
        for series in &self.rows {
            let (median, min, max) = (series.median(), series.min(), series.max());
            let _ = writeln!(page, "| {} | {median:.4} | {min:.4} | {max:.4} |", series.name);
        }
        page += "\n## Targets\n\n| what | target | measured | | why |\n|---|---|---|---|---|\n";
        for target in &self.targets {
            let Target { what, wanted, measured, verdict } = target;
            let why = target.why_missed();
            let _ = writeln!(page, "| {what} | {wanted} | {measured} | {verdict} | {why} |");
        }
        page + TAIL
    }

    fn saves_tables(&self, page: &mut String) {
        let _ = write!(
            page,
            "\n## Saving paused guests\n\n\
             By `vmfile bench`: {} rounds after a warm-up. Every time ends when the file is durable.\n",
            self.scale.rounds
        );
        for SaveTable { guest, data_bytes, rows } in &self.saves {
            let data_mib = data_bytes >> 20;
            let _ = write!(
                page,
                "\n### {guest}\n\n{data_mib} MiB of pages that are not zero.\n\n\
                 | way | median s | min | max | MiB/s | x fio |\n|---|---|---|---|---|---|\n"
            );
            for SaveRow { series, ratio } in rows {
                let (median, min, max) = (series.median(), series.min(), series.max());
                let rate = data_mib as f64 / median;
                let _ = writeln!(
                    page,
                    "| {} | {median:.3} | {min:.3} | {max:.3} | {rate:.0} | {ratio:.2} |",
                    series.name
                );
            }
        }
        for note in &self.notes {
            let _ = write!(page, "\n{note}\n");
        }
    }
}

const HEAD: &str = "\
# Benchmarks

Made by `cargo xtask bench`; do not edit. The disk of a virtual machine is shared and changes its
speed within seconds, so everything is measured in rounds, one of each beside the others, and a
ratio is the median of the rounds' ratios. Only ratios carry over to another machine.

vmfile is measured as a user runs it, from the start of the process to its end. fio writes and reads
the same number of bytes in pieces of 1 MiB, direct, 16 in flight, with one fsync at the end. QEMU's
own ways run with `max-bandwidth` 0 and end with an fsync; the number of its channels is the best of 1, 2,
4 and 8. libvirt has a guest of its own of the same kind, with shared RAM.
";

const TAIL: &str = "
## What this does not show

- KVM: the guests are emulated. They stand still while they are saved, so this changes nothing
  there; guests that were restored run slower than they would.
- Disks of your own: where the disk is faster, the processor decides, and hashing every page costs.
- Guests whose data lies in small pieces: here most of it lies together.
";
