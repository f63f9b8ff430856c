//! The project's performance targets, and whether a report meets them.

use std::fmt::Write as _;

use super::figures::Figures;

/// A target, and the result.
pub(super) struct Target {
    pub(super) what: String,
    pub(super) wanted: String,
    pub(super) measured: String,
    pub(super) verdict: Verdict,
}

/// Whether a target is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Met,
    Missed,
    NotMeasured,
}

/// Why a target may be missed, by the beginning of its name.
const WHY_MISSED: [(&str, &str); 18] = [
    ("save, shared RAM: / fio", SPREAD),
    ("save, private RAM: / fio", SPREAD),
    ("restore, load: / fio", SPREAD),
    ("check: speed / fio", SPREAD),
    ("save, shared RAM: --live / paused", LIVE),
    ("save, private RAM: --live / paused", LIVE),
    ("save, shared RAM: --live by", LIVE),
    ("save, private RAM: --live by", LIVE),
    ("save, stream: QEMU's best", ONE_THREAD),
    ("base, shared RAM: 1 % changed", SCATTERED),
    ("base, private RAM: 1 % changed", SCATTERED),
    ("base, shared RAM: a clone's checkpoint", ROOM),
    ("base, private RAM: a clone's checkpoint", ROOM),
    ("base, shared RAM: restore by map", FIRST),
    ("base, private RAM: restore by map", FIRST),
    ("RAM size: restore", BITMAP),
    ("save, shared RAM: ", DISK_DECIDES),
    ("save, private RAM: ", DISK_DECIDES),
];
const SPREAD: &str = "fio itself differs by more between rounds: see its min and max";
const LIVE: &str =
    "QEMU looks at all memory and protects it first: on a quick disk that is much of it";
const ONE_THREAD: &str = "one thread of QEMU sends the stream, and this disk is quicker than it";
const SCATTERED: &str = "the changed pages lie apart, and each is a write of its own of 4 KiB";
const ROOM: &str = "the host clears the memory for the copy first, 110 MiB at 0.5 GB/s";
const FIRST: &str = "the host clears the memory for the changed pages first, 20 MiB at 0.5 GB/s; a \
                     restore that finds memory which was in use just before takes 30 ms";
const BITMAP: &str = "the bitmap of 256 GiB, 8 MiB, is read and compared, and QEMU makes its own";
const DISK_DECIDES: &str =
    "both wait for the disk, and it leaves no such distance above fio's time";

impl Target {
    /// Returns the known cause, if the target was missed.
    pub(super) fn why_missed(&self) -> &'static str {
        if self.verdict != Verdict::Missed {
            return "";
        }
        let known = WHY_MISSED.iter().find(|(name, _)| self.what.starts_with(name));
        known.map_or("not known yet", |(_, why)| why)
    }
}

/// The targets judged so far.
#[derive(Default)]
struct Judged(Vec<Target>);

impl Judged {
    /// Adds a target that is met by `value` up to `limit`.
    fn at_most(&mut self, what: &str, value: Option<f64>, limit: f64, unit: &str) {
        let is_met = value.is_some_and(|value| value <= limit);
        self.add(what, format!("<= {limit} {unit}"), value, unit, is_met);
    }

    /// Adds a target that is met by `value` from `limit` on.
    fn at_least(&mut self, what: &str, value: Option<f64>, limit: f64, unit: &str) {
        let is_met = value.is_some_and(|value| value >= limit);
        self.add(what, format!(">= {limit} {unit}"), value, unit, is_met);
    }

    fn add(&mut self, what: &str, wanted: String, value: Option<f64>, unit: &str, is_met: bool) {
        let value = value.filter(|value| value.is_finite());
        let measured =
            value.map_or("not measured".to_owned(), |value| format!("{value:.2} {unit}"));
        let verdict = match value {
            None => Verdict::NotMeasured,
            Some(_) if is_met => Verdict::Met,
            Some(_) => Verdict::Missed,
        };
        self.0.push(Target { what: what.to_owned(), wanted, measured, verdict });
    }
}

/// Judges all targets.
pub(super) fn judge(figures: &Figures<'_>) -> Vec<Target> {
    let mut judged = Judged::default();
    saves(*figures, &mut judged);
    reads(*figures, &mut judged);
    checkpoints(*figures, &mut judged);
    growth(*figures, &mut judged);
    judged.0
}

fn saves(figures: Figures<'_>, judged: &mut Judged) {
    let way = |backing: &str, name: &str| figures.way(backing, "saves", name);
    for (backing, of_disk, of_best) in [("shared", 1.05, 1.6), ("private", 1.1, 1.4)] {
        let ours = way(backing, "vmfile save");
        let beside = |name: &str| Some(way(backing, name)?.ratio(ours?));
        let disk = way(backing, "fio write limit");
        let what = |what: &str| format!("save, {backing} RAM: {what}");
        let ratio = ours.zip(disk).map(|(ours, disk)| ours.ratio(disk));
        judged.at_most(&what("/ fio write"), ratio, of_disk, "x");
        let live = way(backing, "vmfile save --live");
        let ratio = live.zip(ours).map(|(live, ours)| live.ratio(ours));
        judged.at_most(&what("--live / paused"), ratio, 1.15, "x");
        let sent = live.zip(way(backing, "vmfile save --live --route stream"));
        let ratio = sent.map(|(live, sent)| sent.ratio(live));
        judged.at_least(&what("--live by QEMU's stream / --live"), ratio, 4.0, "x");
        let best = figures.best_of_qemu(backing);
        let ratio = best.zip(ours).map(|(best, ours)| best.ratio(ours));
        judged.at_least(&what("QEMU's best / ours"), ratio, of_best, "x");
        if backing == "shared" {
            judged.at_least(&what("`exec:cat` / ours"), beside("QEMU exec:cat >"), 3.5, "x");
            let virsh = "virsh save --bypass-cache";
            judged.at_least(&what(&format!("`{virsh}` / ours")), beside(virsh), 2.2, "x");
            let cached = ours.map(|ours| ours.largest_mib("cached_bytes"));
            judged.at_most("page cache: left by a direct save", cached, 16.0, "MiB");
            let peak = ours.map(|ours| ours.largest_mib("peak_memory_bytes"));
            judged.at_most("our memory: peak of a save", peak, 64.0, "MiB");
        } else {
            let stream = way(backing, "vmfile save --route stream");
            let ratio = best.zip(stream).map(|(best, stream)| best.ratio(stream));
            judged.at_least("save, stream: QEMU's best / ours", ratio, 1.0, "x");
            let exec =
                way(backing, "QEMU exec:cat >").zip(way(backing, "QEMU exec:vmfile receive"));
            let ratio = exec.map(|(cat, receive)| cat.ratio(receive));
            judged.at_least("`exec:cat` / `exec:vmfile receive`", ratio, 2.0, "x");
        }
    }
}

fn reads(figures: Figures<'_>, judged: &mut Judged) {
    let restore = |name: &str| figures.way("shared", "restores", name);
    let read = |name: &str| figures.way("shared", "reads", name);
    let map = restore("vmfile restore --mode map, cold");
    let seconds = map.map(|map| map.resume_seconds() * 1e3);
    judged.at_most("restore, map: guest runs after QEMU's start, cold", seconds, 20.0, "ms");
    let disk = restore("fio read limit, cold");
    let load = restore("vmfile restore --mode load, cold").zip(disk);
    let ratio = load.map(|(load, disk)| load.resume_ratio(disk));
    judged.at_most("restore, load: / fio read, cold", ratio, 1.1, "x");
    let check = read("vmfile check, cold").zip(disk);
    let ratio = check.map(|(check, disk)| disk.ratio(check));
    judged.at_least("check: speed / fio read's, cold", ratio, 0.9, "x");
    let warm = read("vmfile check, warm").zip(figures.data_bytes("shared"));
    let rate = warm.map(|(check, bytes)| bytes / 1e9 / check.median());
    judged.at_least("check: speed, cached", rate, 6.0, "GB/s");
    let info = read("vmfile info, cold").map(|info| info.median() * 1e3);
    judged.at_most("info: cold", info, 10.0, "ms");
}

fn checkpoints(figures: Figures<'_>, judged: &mut Judged) {
    for backing in ["shared", "private"] {
        let way = |name: &str| figures.way(backing, "checkpoints", name);
        let what = |what: &str| format!("base, {backing} RAM: {what}");
        let all = way("vmfile save");
        let based = way("vmfile save --base, 1 % changed").zip(all);
        let ratio = based.map(|(based, all)| based.ratio(all));
        judged.at_most(&what("1 % changed / all"), ratio, 0.15, "x");
        let restore = way("vmfile restore --mode map, with a base, warm");
        let resumed = restore.map(|restore| restore.resume_seconds() * 1e3);
        judged.at_most(&what("restore by map, guest runs"), resumed, 40.0, "ms");
        let clone = way("vmfile save --live --base auto, a clone that wrote 64 MiB");
        judged.at_most(&what("a clone's checkpoint"), clone.map(|clone| clone.median()), 0.25, "s");
        let pause = clone.map(|clone| clone.pause_seconds() * 1e3);
        judged.at_most(&what("a clone's checkpoint, pause"), pause, 15.0, "ms");
    }
}

fn growth(figures: Figures<'_>, judged: &mut Judged) {
    let empty = |line: &str, gib: f64| figures.at("RAM with 1 GiB of data", line, gib);
    for (verb, line) in
        [("save", "vmfile save"), ("check", "check, cold"), ("restore", "restore --mode map, cold")]
    {
        let ratio = empty(line, 256.0).zip(empty(line, 2.0)).map(|(large, small)| large / small);
        judged.at_most(&format!("RAM size: {verb}, 256 GiB / 2 GiB"), ratio, 1.3, "x");
    }
    let info = empty("info, cold", 256.0).map(|seconds| seconds * 1e3);
    judged.at_most("info: 256 GiB of RAM, cold", info, 10.0, "ms");
    for backing in ["private", "shared"] {
        let line = format!("vmfile save, {backing} RAM");
        let seconds = figures.at("untouched RAM", &line, 16.0);
        judged.at_most(&format!("zero memory: 16 GiB, {backing}"), seconds, 0.3, "s");
    }
    const CLONES: &str = "clones of one file, 1 GiB of RAM";
    let seconds = figures.at(CLONES, "all restored by map", 32.0);
    judged.at_most("restore, map: 32 clones, all running, cold", seconds, 4.0, "s");
    let memory = figures.at(&format!("{CLONES}: memory"), "of each", 32.0);
    judged.at_most("restore, map: memory (PSS) of each of 32 clones", memory, 64.0, "MiB");
    for mebibytes in [1024_u32, 4096, 8192] {
        for save in ["first save", "second save"] {
            let pause = figures.at("RAM, save --live", &format!("pause, {save}"), mebibytes.into());
            let what = format!("pause, --live: {mebibytes} MiB of RAM, {save}");
            judged.at_most(&what, pause.map(|seconds| seconds * 1e3), 10.0, "ms");
        }
    }
}

/// Returns how many targets are met, and those that are not.
pub(super) fn summary(targets: &[Target]) -> String {
    let count = |verdict| targets.iter().filter(|target| target.verdict == verdict).count();
    let [met, missed, unknown] = [Verdict::Met, Verdict::Missed, Verdict::NotMeasured].map(count);
    let mut text = format!("{met} targets met, {missed} missed, {unknown} not measured");
    for target in targets.iter().filter(|target| target.verdict == Verdict::Missed) {
        let Target { what, wanted, measured, .. } = target;
        let _ = write!(text, "\n  missed: {what}: {measured}, wanted {wanted}");
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_target_without_a_figure_is_not_met() {
        let targets = judge(&Figures(&json!({})));
        assert!(!targets.is_empty());
        assert!(targets.iter().all(|target| target.verdict == Verdict::NotMeasured));
        assert!(summary(&targets).starts_with("0 targets met, 0 missed, "));
    }

    #[test]
    fn a_limit_itself_is_met() {
        let mut judged = Judged::default();
        judged.at_most("size", Some(1.5), 1.5, "x");
        judged.at_least("speed", Some(1.4), 1.5, "x");
        let verdicts: Vec<Verdict> = judged.0.iter().map(|target| target.verdict).collect();
        assert_eq!(verdicts, [Verdict::Met, Verdict::Missed]);
        assert_eq!(judged.0[1].why_missed(), "not known yet");
    }
}
