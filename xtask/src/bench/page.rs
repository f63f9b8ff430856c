//! docs/benchmarks.md: a report of `vmfile bench --json`, and the targets.

use std::fmt::Write as _;

use serde_json::Value;

use super::figures::list;
use super::targets::{Target, Verdict};

/// Returns the page. `commit` names what was measured.
pub(super) fn page(report: &Value, targets: &[Target], commit: &str) -> String {
    let mut page = HEAD.to_owned();
    machine(&mut page, report, commit);
    let tables = [
        ("Saves", "saves"),
        ("Restores", "restores"),
        ("Reads", "reads"),
        ("Checkpoints", "checkpoints"),
    ];
    for (title, what) in tables {
        let _ = write!(page, "\n## {title}\n");
        for scene in list(report, "scenes") {
            if what == "checkpoints" {
                checkpoints(&mut page, scene);
            } else {
                ways(&mut page, scene, what);
            }
        }
    }
    page += "\n## How cost grows\n\nMedians of 5 rounds, of 3 where the guest runs.\n";
    for sweep in list(report, "sweeps") {
        growth(&mut page, sweep);
    }
    page += "\n## Targets\n\n| what | target | measured | | why |\n|---|---|---|---|---|\n";
    for target in targets {
        let Target { what, wanted, measured, verdict } = target;
        let verdict = match verdict {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::NotMeasured => "",
        };
        let why = target.why_missed();
        let _ = writeln!(page, "| {what} | {wanted} | {measured} | {verdict} | {why} |");
    }
    if !list(report, "not_measured").is_empty() {
        page += "\n## Not measured\n\n| what | why |\n|---|---|\n";
        for note in list(report, "not_measured") {
            let _ = writeln!(page, "| {} | {} |", text(note, "what"), text(note, "why"));
        }
    }
    page + TAIL
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("not installed")
}

fn machine(page: &mut String, report: &Value, commit: &str) {
    let host = &report["host"];
    let number = |name: &str| host[name].as_f64().unwrap_or_default();
    let kvm = if host["kvm"] == true { "KVM" } else { "emulation (no KVM)" };
    let rows = [
        ("CPU", text(host, "cpu").to_owned()),
        ("memory", format!("{:.0} MiB", number("memory_bytes") / f64::from(1 << 20))),
        ("kernel", text(host, "kernel").to_owned()),
        ("file system", text(host, "file_system").to_owned()),
        ("QEMU", format!("{}, {kvm}", text(host, "qemu"))),
        ("fio", text(host, "fio").to_owned()),
        ("libvirt", text(host, "libvirt").to_owned()),
        ("vmfile", format!("{}, commit {commit}", text(host, "vmfile"))),
        ("began", format!("{:.0} s after 1970", number("began_unix_seconds"))),
        ("load before", number("load").to_string()),
    ];
    page.push_str("\n## Machine\n\n| | |\n|---|---|\n");
    for (name, value) in rows {
        let _ = writeln!(page, "| {name} | {value} |");
    }
    let seconds = report["total_seconds"].as_f64().unwrap_or_default();
    let _ = writeln!(page, "| command | `cargo xtask bench`, {seconds:.0} s |");
}

fn ways(page: &mut String, scene: &Value, what: &str) {
    let guest = &scene["guest"];
    let data_mib = guest["data_bytes"].as_u64().unwrap_or_default() >> 20;
    let _ = write!(
        page,
        "\n### {}\n\n{data_mib} MiB of pages that are not zero.\n\n\
         | way | median s | min | max | MiB/s | x fio |\n|---|---|---|---|---|---|\n",
        text(guest, "name")
    );
    for way in list(scene, what) {
        let number = |name: &str| way["seconds"][name].as_f64().unwrap_or(f64::NAN);
        let (median, min, max) = (number("median"), number("min"), number("max"));
        let rate = data_mib as f64 / median;
        let ratio = way["ratio_to_disk"].as_f64();
        let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let name = text(way, "name");
        let _ =
            writeln!(page, "| {name} | {median:.3} | {min:.3} | {max:.3} | {rate:.0} | {ratio} |");
    }
}

/// Writes the table of saves with a base: of most of them a rate says nothing, but a pause does.
fn checkpoints(page: &mut String, scene: &Value) {
    let name = text(&scene["guest"], "name");
    let head = "| way | median s | min | max | pause ms |\n|---|---|---|---|---|\n";
    let _ = write!(page, "\n### {name}\n\n{head}");
    for way in list(scene, "checkpoints") {
        let number = |name: &str| way["seconds"][name].as_f64().unwrap_or(f64::NAN);
        let (median, min, max) = (number("median"), number("min"), number("max"));
        let pauses = list(way, "runs").iter().filter_map(|run| run["pause_seconds"].as_f64());
        let pauses: Vec<f64> = pauses.collect();
        let pause = if pauses.is_empty() {
            "-".to_owned()
        } else {
            format!("{:.1}", super::figures::median(pauses.into_iter()) * 1e3)
        };
        let name = text(way, "name");
        let _ = writeln!(page, "| {name} | {median:.3} | {min:.3} | {max:.3} | {pause} |");
    }
}

fn growth(page: &mut String, sweep: &Value) {
    let lines = list(sweep, "lines").iter().map(|line| line.as_str().unwrap_or_default());
    let lines: Vec<&str> = lines.collect();
    let (name, unit, value_unit) =
        (text(sweep, "name"), text(sweep, "unit"), text(sweep, "value_unit"));
    let rules = "---|".repeat(lines.len() + 1);
    let corner = if unit.is_empty() { "number" } else { unit };
    let _ = write!(
        page,
        "\n### {name}, in {value_unit}\n\n| {corner} | {} |\n|{rules}\n",
        lines.join(" | ")
    );
    let decimals = if value_unit == "s" { 4 } else { 1 };
    for point in list(sweep, "points") {
        let cell = |value: &Value| match value["median"].as_f64() {
            Some(median) => format!("{median:.decimals$}"),
            None => "-".to_owned(),
        };
        let cells: Vec<String> = list(point, "values").iter().map(cell).collect();
        let x = point["x"].as_f64().unwrap_or_default();
        let _ = writeln!(page, "| {x} | {} |", cells.join(" | "));
    }
}

const HEAD: &str = "\
# Benchmarks

Made by `cargo xtask bench`; do not edit. The disk of a virtual machine is shared and changes its
speed within seconds, so everything is measured in rounds, one of each beside the others, and a
ratio is the median of the rounds' ratios. Only ratios carry over to another machine.

All of it is measured by `vmfile bench`, 5 rounds after one that warms up. vmfile is measured as a user runs it,
from the start of the process to its end, when the file is durable. fio writes and reads the same number of
bytes in pieces of 1 MiB, direct, 16 in flight, with one fsync at the end. QEMU's own ways run with
`max-bandwidth` 0 and end with an fsync; the number of its channels is the best of 1, 2, 4 and 8. libvirt has
a guest of its own of the same kind, with shared RAM.
";

const TAIL: &str = "
## What this does not show

- KVM: the guests are emulated. They stand still while they are saved, so this changes nothing
  there; guests that were restored run slower than they would.
- Disks of your own: where the disk is faster, the processor decides, and hashing every page costs.
- Guests whose data lies in small pieces: here most of it lies together.
- Guests that are busy: these stand still or rest. A page that the guest writes again while it is sent has
  one place in a file of vmfile's, and one for each time in QEMU's stream. A clone that writes has the pages that it
  wrote for itself.
";
