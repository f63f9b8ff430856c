//! Sweeps: how times grow with one quantity while everything else stays the same.

use std::ffi::OsStr;

use serde_json::Value;
use vmfile_engine::available_memory;

use crate::bench::Bench;
use crate::error::BenchError;
use crate::guest::{Machine, Subject};
use crate::options::{Backing, Contents};
use crate::page_cache;
use crate::process;
use crate::progress::Progress;
use crate::reading::ReadWay;
use crate::report::{Sweep, SweepPoint};
use crate::restoring::by_vmfile;
use crate::series::Summary;

/// Sizes of RAM, in MiB.
const SIZES_MIB: [u64; 7] = [256, 512, 1024, 2048, 4096, 8192, 16384];

/// RAM of the guest if something else grows, in MiB.
const SIZE_MIB: u64 = 1024;

const ZERO_PERCENT: [u8; 5] = [0, 25, 50, 75, 95];
const JOBS: [u32; 5] = [1, 2, 4, 8, 16];
const CLONES: [usize; 6] = [1, 2, 4, 8, 16, 32];

/// Sizes of RAM of guests that touch little of it, in GiB.
const EMPTY_GIB: [u64; 3] = [2, 16, 256];

/// How much of that RAM is filled, in bytes.
const FILLED_LEN: u64 = 1 << 30;

/// Sizes of RAM of guests that run while they are saved, in MiB.
const LIVE_MIB: [u64; 3] = [1024, 4096, 8192];

/// Few, because each round fills a guest anew, and pauses of milliseconds need no more.
const LIVE_ROUNDS: usize = 3;

/// Rounds of each point, after one that warms up.
const ROUNDS: usize = 5;

/// The values measured at a point: one list for each line of the plot.
type Values = Vec<Vec<f64>>;

/// Measures all sweeps, and adds each to `sweeps` when it is complete.
pub(crate) fn measure(
    bench: &mut Bench<'_>,
    progress: &Progress<'_>,
    sweeps: &mut Vec<Sweep>,
) -> Result<(), BenchError> {
    sweeps.push(by_size(bench, progress)?);
    sweeps.push(by_share(bench, progress)?);
    sweeps.push(by_jobs(bench, progress)?);
    sweeps.extend(by_clones(bench, progress)?);
    sweeps.push(by_empty_size(bench, progress)?);
    sweeps.push(by_untouched(bench, progress)?);
    sweeps.push(live(bench, progress)?);
    let why = "they are constants of this build: `cargo xtask bench --compare` compares builds";
    bench.note("sweep of queue depth and request size", why);
    Ok(())
}

fn machine(bench: &Bench<'_>, mebibytes: u64) -> Machine {
    let backing = bench.options.backings.first().copied().unwrap_or(Backing::Private);
    Machine { backing, ..Machine::new(&bench.options.qemu, mebibytes << 20) }
}

fn by_size(bench: &mut Bench<'_>, progress: &Progress<'_>) -> Result<Sweep, BenchError> {
    let mut points = Vec::new();
    for mebibytes in SIZES_MIB {
        // For the guest, the restored guest, and the page cache that they share.
        if (mebibytes << 20) * 5 / 2 > available_memory() {
            bench.note(&format!("sweep of RAM: {mebibytes} MiB"), "not enough free memory");
            continue;
        }
        progress.say(&format!("sweep of RAM: {mebibytes} MiB"));
        let machine = machine(bench, mebibytes);
        let subject = Subject::start(&machine, bench.options.contents, bench.stop)?;
        let mut values: Values = vec![Vec::new(); 3];
        for round in 0..=ROUNDS {
            let mut times = vec![save(bench, &subject, &[])?];
            for mode in ["map", "load"] {
                page_cache::prepare(&bench.file("sweep.vmf"), true, bench.stop)?;
                let (run, pid) = by_vmfile(bench, &machine, &bench.file("sweep.vmf"), mode)?;
                process::end(pid)?;
                times.push(run.seconds);
            }
            keep(&mut values, &times, round);
        }
        points.push(point(mebibytes as f64, &values));
    }
    bench.remove_and_sync(&bench.file("sweep.vmf"))?;
    let lines = ["vmfile save", "restore --mode map, cold", "restore --mode load, cold"];
    Ok(sweep("RAM", ("MiB", "s"), &lines, points))
}

fn by_share(bench: &Bench<'_>, progress: &Progress<'_>) -> Result<Sweep, BenchError> {
    let machine = machine(bench, SIZE_MIB);
    let mut points = Vec::new();
    for percent in ZERO_PERCENT {
        progress.say(&format!("sweep of zero pages: {percent} %"));
        let contents = Contents { data_percent: 100 - percent, repeated_percent: 0 };
        let subject = Subject::start(&machine, contents, bench.stop)?;
        points.push(point(percent.into(), &rounds(bench, |b| Ok(vec![save(b, &subject, &[])?]))?));
    }
    Ok(sweep("share of zero pages, 1 GiB of RAM", ("%", "s"), &["vmfile save"], points))
}

fn by_jobs(bench: &Bench<'_>, progress: &Progress<'_>) -> Result<Sweep, BenchError> {
    let machine = machine(bench, SIZE_MIB);
    let subject = Subject::start(&machine, bench.options.contents, bench.stop)?;
    let file = bench.file("sweep.vmf");
    let mut points = Vec::new();
    for jobs in JOBS {
        progress.say(&format!("sweep of jobs: {jobs}"));
        let text = jobs.to_string();
        let values = rounds(bench, |bench| {
            let saved = save(bench, &subject, &["--jobs", &text])?;
            page_cache::prepare(&file, true, bench.stop)?;
            let words = ["check", "--jobs", &text].map(OsStr::new);
            let (_, usage) = bench.vmfile(&[&words[..], &[file.as_os_str()]].concat())?;
            Ok(vec![saved, usage.seconds])
        })?;
        points.push(point(jobs.into(), &values));
    }
    let lines = ["vmfile save", "vmfile check, cold"];
    Ok(sweep("jobs, 1 GiB of RAM", ("", "s"), &lines, points))
}

/// Measures the time until all clones run, and the memory of each.
fn by_clones(bench: &Bench<'_>, progress: &Progress<'_>) -> Result<Vec<Sweep>, BenchError> {
    let machine = machine(bench, SIZE_MIB);
    let subject = Subject::start(&machine, bench.options.contents, bench.stop)?;
    save(bench, &subject, &[])?;
    drop(subject);
    let (mut times, mut memories) = (Vec::new(), Vec::new());
    for clones in CLONES {
        progress.say(&format!("sweep of clones: {clones}"));
        let values = rounds(bench, |bench| start_clones(bench, &machine, clones))?;
        times.push(point(clones as f64, &values[..1]));
        memories.push(point(clones as f64, &values[1..]));
    }
    bench.remove_and_sync(&bench.file("sweep.vmf"))?;
    Ok(vec![
        sweep("clones of one file, 1 GiB of RAM", ("", "s"), &["all restored by map"], times),
        sweep("clones of one file, 1 GiB of RAM: memory", ("", "MiB"), &["of each"], memories),
    ])
}

/// Restores `clones` VMs at once; returns the seconds until the last one runs, and the MiB of each.
fn start_clones(
    bench: &Bench<'_>,
    machine: &Machine,
    clones: usize,
) -> Result<Vec<f64>, BenchError> {
    let file = bench.file("sweep.vmf");
    page_cache::prepare(&file, true, bench.stop)?;
    let started = std::time::Instant::now();
    let restored: Vec<_> = std::thread::scope(|scope| {
        let start = |_| scope.spawn(|| by_vmfile(bench, machine, &file, "map"));
        let started: Vec<_> = (0..clones).map(start).collect();
        started.into_iter().map(|clone| clone.join().expect("no panic")).collect()
    });
    let seconds = started.elapsed().as_secs_f64();
    let mut memory_bytes = 0;
    let mut failed = None;
    let pids: Vec<u32> = restored
        .into_iter()
        .filter_map(|clone| clone.map_err(|error| failed = Some(error)).ok())
        .map(|(_, pid)| pid)
        .collect();
    for &pid in &pids {
        memory_bytes += process::proportional_bytes(pid).unwrap_or(0);
    }
    // Ends those that run, even if others failed.
    for pid in pids {
        process::end(pid)?;
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(vec![seconds, memory_bytes as f64 / clones as f64 / f64::from(1 << 20)]),
    }
}

/// Measures guests whose RAM grows but holds the same amount of data.
fn by_empty_size(bench: &Bench<'_>, progress: &Progress<'_>) -> Result<Sweep, BenchError> {
    let contents = Contents { data_percent: 100, repeated_percent: 0 };
    let file = bench.file("sweep.vmf");
    let mut points = Vec::new();
    for gib in EMPTY_GIB {
        progress.say(&format!("sweep of RAM with 1 GiB of data: {gib} GiB"));
        let machine =
            Machine { is_reserved: false, ..Machine::new(&bench.options.qemu, gib << 30) };
        let subject = Subject::start_filled(&machine, contents, FILLED_LEN, bench.stop)?;
        let values = rounds(bench, |bench| {
            let mut times = vec![save(bench, &subject, &[])?];
            for way in [ReadWay::CHECK_COLD, ReadWay::INFO_COLD] {
                times.push(way.read(bench, &file, 0)?.seconds);
            }
            page_cache::prepare(&file, true, bench.stop)?;
            let (run, pid) = by_vmfile(bench, &machine, &file, "map")?;
            process::end(pid)?;
            times.push(run.seconds);
            Ok(times)
        })?;
        points.push(point(gib as f64, &values));
    }
    bench.remove_and_sync(&file)?;
    let lines = ["vmfile save", "check, cold", "info, cold", "restore --mode map, cold"];
    Ok(sweep("RAM with 1 GiB of data", ("GiB", "s"), &lines, points))
}

/// Measures guests that never touched their RAM.
fn by_untouched(bench: &Bench<'_>, progress: &Progress<'_>) -> Result<Sweep, BenchError> {
    let contents = Contents { data_percent: 0, repeated_percent: 0 };
    let mut points = Vec::new();
    for gib in EMPTY_GIB {
        progress.say(&format!("sweep of untouched RAM: {gib} GiB"));
        let start = |backing| {
            let machine = Machine::new(&bench.options.qemu, gib << 30);
            let machine = Machine { backing, is_reserved: false, ..machine };
            Subject::start(&machine, contents, bench.stop)
        };
        let guests = [start(Backing::Private)?, start(Backing::Shared)?];
        let values = rounds(bench, |bench| {
            guests.iter().map(|subject| save(bench, subject, &[])).collect()
        })?;
        points.push(point(gib as f64, &values));
    }
    bench.remove_and_sync(&bench.file("sweep.vmf"))?;
    let lines = ["vmfile save, private RAM", "vmfile save, shared RAM"];
    Ok(sweep("untouched RAM", ("GiB", "s"), &lines, points))
}

/// Measures guests that run while they are saved, and saves each one twice: after a save that splits
/// the guest's huge pages, the next one pauses longer.
fn live(bench: &mut Bench<'_>, progress: &Progress<'_>) -> Result<Sweep, BenchError> {
    let mut points = Vec::new();
    for mebibytes in LIVE_MIB {
        if (mebibytes << 20) * 3 / 2 > available_memory() {
            bench.note(&format!("save --live of {mebibytes} MiB"), "not enough free memory");
            continue;
        }
        progress.say(&format!("sweep of RAM, live: {mebibytes} MiB"));
        let machine = Machine::new(&bench.options.qemu, mebibytes << 20);
        let mut values: Values = vec![Vec::new(); 3];
        for _ in 0..LIVE_ROUNDS {
            let subject = Subject::start(&machine, bench.options.contents, bench.stop)?;
            subject.connect()?.cont()?;
            let (report, usage) = save_reported(bench, &subject, &["--live"])?;
            let (again, _) = save_reported(bench, &subject, &["--live"])?;
            let pause = |report: &Value| report["pause_seconds"].as_f64().unwrap_or(f64::NAN);
            let times = [pause(&report), pause(&again), usage.seconds];
            values.iter_mut().zip(times).for_each(|(values, time)| values.push(time));
        }
        points.push(point(mebibytes as f64, &values));
    }
    bench.remove_and_sync(&bench.file("sweep.vmf"))?;
    let lines = ["pause, first save", "pause, second save", "all of it, first save"];
    Ok(sweep("RAM, save --live", ("MiB", "s"), &lines, points))
}

/// Saves to `sweep.vmf` and leaves the guest paused; returns the seconds.
fn save(bench: &Bench<'_>, subject: &Subject, more: &[&str]) -> Result<f64, BenchError> {
    let more = [&["--after", "pause"], more].concat();
    Ok(save_reported(bench, subject, &more)?.1.seconds)
}

/// Saves to `sweep.vmf`; returns the report, and what the program used.
pub(crate) fn save_reported(
    bench: &Bench<'_>,
    subject: &Subject,
    more: &[&str],
) -> Result<(Value, process::Usage), BenchError> {
    let file = bench.file("sweep.vmf");
    bench.remove_and_sync(&file)?;
    let mut words = vec![OsStr::new("save")];
    words.extend(more.iter().map(OsStr::new));
    words.extend([subject.socket().as_os_str(), file.as_os_str()]);
    bench.vmfile(&words)
}

pub(crate) fn rounds(
    bench: &Bench<'_>,
    measure: impl Fn(&Bench<'_>) -> Result<Vec<f64>, BenchError>,
) -> Result<Values, BenchError> {
    let mut values = Values::new();
    for round in 0..=ROUNDS {
        let times = measure(bench)?;
        values.resize(times.len(), Vec::new());
        keep(&mut values, &times, round);
    }
    Ok(values)
}

/// Keeps what was measured, except in the first round, which warms up.
fn keep(values: &mut Values, times: &[f64], round: usize) {
    if round > 0 {
        values.iter_mut().zip(times).for_each(|(values, &time)| values.push(time));
    }
}

pub(crate) fn point(x: f64, values: &[Vec<f64>]) -> SweepPoint {
    SweepPoint { x, values: values.iter().map(|values| Summary::of(values)).collect() }
}

pub(crate) fn sweep(
    name: &str,
    (unit, value_unit): (&'static str, &'static str),
    lines: &[&str],
    points: Vec<SweepPoint>,
) -> Sweep {
    let lines = lines.iter().map(|&line| line.to_owned()).collect();
    Sweep { name: name.to_owned(), unit, lines, value_unit, points }
}
