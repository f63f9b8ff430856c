//! One paused guest, saved by everybody: what `vmfile bench` measures.

use std::ffi::OsStr;

use serde_json::Value;
use vmfile_testing::{Guest, GuestConfig, Ram, TestResult};

use crate::report::Report;
use crate::series::Series;
use crate::{Bench, Saved};

/// Pages of 256 with random words; 26 more are all alike, so that none of the filled ones is zero.
const DATA_SHARE: u32 = 230;

/// What the RAM of the guests that everybody saves holds, in percent.
const DATA_PERCENT: &str = "65";
const REPEATED_PERCENT: &str = "8";

/// Most memory of its own that a save may take.
const MEMORY_MIB_MAX: f64 = 64.0;

/// Most that a direct save may leave in the page cache.
const CACHED_MIB_MAX: f64 = 16.0;

/// Saves guests in all ways, and leaves one of its own kind as a file.
pub(crate) fn measure(bench: &Bench, report: &mut Report) -> TestResult<Saved> {
    let Bench { tools, scale, .. } = bench;
    let (size, rounds) = (format!("{}M", scale.ram_mib / 2), scale.rounds.to_string());
    let words = ["bench", "--saves-only", "--ram", "shared,private", "--size", &size, "--runs"];
    let more = [&rounds, "--data", DATA_PERCENT, "--repeated", REPEATED_PERCENT, "--dir"];
    let words: Vec<&OsStr> = words.iter().chain(&more).map(OsStr::new).collect();
    let measured = tools.run(&[&words[..], &[tools.directory().as_os_str()]].concat())?;
    let scenes = measured.report["scenes"].as_array().ok_or("no scenes")?;
    for scene in scenes {
        let ways: Vec<Way> = scene["saves"].as_array().ok_or("no ways")?.iter().map(way).collect();
        let guest = scene["guest"]["name"].as_str().ok_or("no name")?;
        let data_bytes = scene["guest"]["data_bytes"].as_u64().ok_or("no data")?;
        let disk = ways.iter().find(|way| way.family == "disk").ok_or("no fio")?.series.clone();
        report.begin_table(guest, data_bytes);
        for way in &ways {
            report.save_row(&way.series, &disk);
        }
        match scene["guest"]["backing"].as_str() {
            Some("shared") => judge_shared(&ways, &disk, report)?,
            _ => judge_private(&ways, &disk, report)?,
        }
    }
    for note in measured.report["not_measured"].as_array().into_iter().flatten() {
        let text = |name| note[name].as_str().unwrap_or_default();
        report.not_measured(text("what"), text("why"));
    }
    save_one(bench)
}

/// A way, as `vmfile bench` reports it.
struct Way {
    name: String,
    family: String,
    series: Series,
    /// Most that its runs left in the page cache, and had of memory, in MiB.
    cached_mib: f64,
    peak_mib: f64,
}

fn way(value: &Value) -> Way {
    let text = |name| value[name].as_str().unwrap_or_default().to_owned();
    let mut series = Series::new(text("name"));
    let (mut cached_mib, mut peak_mib) = (0.0, 0.0);
    for run in value["runs"].as_array().into_iter().flatten() {
        series.push(run["seconds"].as_f64().unwrap_or(f64::NAN));
        let mib = |name| run[name].as_f64().unwrap_or(0.0) / f64::from(1 << 20);
        cached_mib = f64::max(cached_mib, mib("cached_bytes"));
        peak_mib = f64::max(peak_mib, mib("peak_memory_bytes"));
    }
    Way { name: text("name"), family: text("family"), series, cached_mib, peak_mib }
}

fn find<'a>(ways: &'a [Way], name: &str) -> TestResult<&'a Way> {
    ways.iter().find(|way| way.name == name).ok_or_else(|| format!("no {name}").into())
}

fn best_of_qemu(ways: &[Way]) -> TestResult<&Way> {
    let qemu = ways.iter().filter(|way| way.family == "qemu");
    let best = qemu.min_by(|a, b| a.series.median().total_cmp(&b.series.median()));
    best.ok_or_else(|| "QEMU saved nothing".into())
}

fn judge_shared(ways: &[Way], disk: &Series, report: &mut Report) -> TestResult {
    let ours = find(ways, "vmfile save")?;
    let ratio =
        |name| Ok::<_, vmfile_testing::TestError>(find(ways, name)?.series.ratio(&ours.series));
    report.at_most("save, shared RAM: / fio write", ours.series.ratio(disk), 1.05, "x");
    let best = best_of_qemu(ways)?;
    let what = "save, shared RAM: QEMU's best / ours";
    report.at_least(what, best.series.ratio(&ours.series), 1.6, "x");
    report.at_least("save, shared RAM: `exec:cat` / ours", ratio("QEMU exec:cat >")?, 3.5, "x");
    let what = "save, shared RAM: `virsh save --bypass-cache` / ours";
    match ratio("virsh save --bypass-cache") {
        Ok(ratio) => report.at_least(what, ratio, 2.2, "x"),
        Err(_) => report.not_measured(what, "no libvirt"),
    }
    report.at_most("page cache: left by a direct save", ours.cached_mib, CACHED_MIB_MAX, "MiB");
    report.at_most("our memory: peak of a save", ours.peak_mib, MEMORY_MIB_MAX, "MiB");
    report.note(format!("QEMU's best is, with shared RAM: {}.", best.name));
    Ok(())
}

fn judge_private(ways: &[Way], disk: &Series, report: &mut Report) -> TestResult {
    let ours = find(ways, "vmfile save")?;
    let best = best_of_qemu(ways)?;
    report.at_most("save, private RAM: / fio write", ours.series.ratio(disk), 1.1, "x");
    let what = "save, private RAM: QEMU's best / ours";
    report.at_least(what, best.series.ratio(&ours.series), 1.4, "x");
    let stream = &find(ways, "vmfile save --route stream")?.series;
    report.at_least("save, stream: QEMU's best / ours", best.series.ratio(stream), 1.0, "x");
    let receive = &find(ways, "QEMU exec:vmfile receive")?.series;
    let exec = find(ways, "QEMU exec:cat >")?.series.ratio(receive);
    report.at_least("`exec:cat` / `exec:vmfile receive`", exec, 2.0, "x");
    report.note(format!("With private RAM: {}.", best.name));
    Ok(())
}

/// Saves a Linux guest as it runs, so that it comes back running.
fn save_one(bench: &Bench) -> TestResult<Saved> {
    let Bench { tools, scale, .. } = bench;
    let config =
        Guest::linux(Ram::memfd(scale.ram_mib)).fill_mib(scale.fill_mib).data_share(DATA_SHARE);
    let mut guest = boot(bench, &config)?;
    guest.resume()?;
    let file = tools.file("saved.vmf");
    tools.make_way(&file)?;
    let socket = guest.qmp_path();
    let run = tools.run(&[OsStr::new("save"), socket.as_os_str(), file.as_os_str()])?;
    Ok(Saved { config, file, bytes: run.count("bytes_written")? })
}

/// Boots a guest, waits until its memory is filled and judged, and stops it.
pub(crate) fn boot(bench: &Bench, config: &GuestConfig) -> TestResult<Guest> {
    let mut guest = config.boot(&bench.qemu)?;
    guest.wait_for_count(1)?;
    guest.stop()?;
    Ok(guest)
}

/// Returns KiB as MiB.
pub(crate) fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
