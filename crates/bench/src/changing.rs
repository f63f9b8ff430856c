//! Sweeps over guests that change: how much since the base, and how quickly while they are saved.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmfile_qemu::RamBlockInfo;

use crate::bench::Bench;
use crate::contents::change;
use crate::error::BenchError;
use crate::guest::{Machine, Subject};
use crate::progress::Progress;
use crate::report::Sweep;
use crate::sweep::{point, rounds, save_reported, sweep};

/// RAM of the guest, in MiB.
const SIZE_MIB: u64 = 1024;

/// How much of it has changed since the base, in percent.
const CHANGED_PERCENT: [u64; 6] = [0, 1, 5, 20, 50, 100];

/// How quickly it is written to while it is saved, in MiB/s.
const WRITTEN_MIB: [u64; 4] = [0, 64, 256, 1024];

/// How often in a second the writer writes.
const WRITES_PER_SECOND: u32 = 100;

/// How long the writer writes before the save.
const ALONE: Duration = Duration::from_millis(500);

/// Writes to the memory of a guest at a steady rate.
struct Writer<'a> {
    guest: (u32, &'a [RamBlockInfo]),
    mebibytes: u64,
    stop: &'a AtomicBool,
}

impl Writer<'_> {
    /// Writes while `task` runs; returns at which rate, in MiB/s, and what the task returned.
    fn write_during<T>(
        &self,
        task: impl FnOnce() -> Result<T, BenchError>,
    ) -> Result<(f64, T), BenchError> {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let written = scope.spawn(|| self.write_until(&is_over));
            let done = task();
            is_over.store(true, Ordering::Relaxed);
            let panicked = |_| BenchError::program("the writer", "it panicked");
            Ok((written.join().map_err(panicked)??, done?))
        })
    }

    /// Writes until `is_over` is set; returns at which rate.
    fn write_until(&self, is_over: &AtomicBool) -> Result<f64, BenchError> {
        let len = (self.mebibytes << 20) / u64::from(WRITES_PER_SECOND);
        let interval = Duration::from_secs(1) / WRITES_PER_SECOND;
        let (started, mut round) = (Instant::now(), 0);
        while len > 0 && !is_over.load(Ordering::Relaxed) {
            let began = Instant::now();
            change(self.guest, len, round, self.stop)?;
            round += 1;
            thread::sleep(interval.saturating_sub(began.elapsed()));
        }
        Ok((len * round) as f64 / f64::from(1 << 20) / started.elapsed().as_secs_f64())
    }
}

/// Measures both, and adds each to `sweeps` when it is complete.
pub(crate) fn measure(
    bench: &Bench<'_>,
    progress: &Progress<'_>,
    sweeps: &mut Vec<Sweep>,
) -> Result<(), BenchError> {
    sweeps.push(by_changed(bench, progress)?);
    sweeps.extend(by_written(bench, progress)?);
    Ok(())
}

fn by_changed(bench: &Bench<'_>, progress: &Progress<'_>) -> Result<Sweep, BenchError> {
    let machine = Machine::new(&bench.options.qemu, SIZE_MIB << 20);
    let subject = Subject::start(&machine, bench.options.contents, bench.stop)?;
    let base = bench.file("base.vmf");
    save_reported(bench, &subject, &["--after", "pause"])?;
    std::fs::rename(bench.file("sweep.vmf"), &base).map_err(BenchError::system("rename a file"))?;
    let base_word = base.display().to_string();
    let round = AtomicU64::new(0);
    let mut points = Vec::new();
    for percent in CHANGED_PERCENT {
        progress.say(&format!("sweep of changed pages: {percent} %"));
        let values = rounds(bench, |bench| {
            let blocks = subject.connect()?.ram_blocks()?;
            let number = round.fetch_add(1, Ordering::Relaxed);
            let len = (machine.ram_bytes / 100) * percent;
            if len > 0 {
                change((subject.pid(), &blocks), len, number, bench.stop)?;
            }
            let seconds = |more: &[&str]| -> Result<f64, BenchError> {
                Ok(save_reported(bench, &subject, more)?.1.seconds)
            };
            let all = seconds(&["--after", "pause"])?;
            let based = seconds(&["--after", "pause", "--base", &base_word])?;
            subject.connect()?.cont()?;
            let live = seconds(&["--live", "--base", &base_word]);
            subject.connect()?.stop()?;
            Ok(vec![all, based, live?])
        })?;
        points.push(point(percent as f64, &values));
    }
    bench.remove_and_sync(&base)?;
    bench.remove_and_sync(&bench.file("sweep.vmf"))?;
    let lines = ["vmfile save", "vmfile save --base", "vmfile save --live --base"];
    Ok(sweep("pages changed since the base, 1 GiB of RAM", ("%", "s"), &lines, points))
}

/// Measures how long the save takes, and how quickly the writer can write meanwhile.
fn by_written(bench: &Bench<'_>, progress: &Progress<'_>) -> Result<[Sweep; 2], BenchError> {
    let machine = Machine::new(&bench.options.qemu, SIZE_MIB << 20);
    let subject = Subject::start(&machine, bench.options.contents, bench.stop)?;
    let (mut times, mut rates) = (Vec::new(), Vec::new());
    for mebibytes in WRITTEN_MIB {
        progress.say(&format!("sweep of writing, live: {mebibytes} MiB/s"));
        let values = rounds(bench, |bench| {
            subject.connect()?.cont()?;
            let measured = while_written(bench, &subject, mebibytes);
            subject.connect()?.stop()?;
            measured
        })?;
        let (of_save, of_writer) = values.split_at(3);
        times.push(point(mebibytes as f64, of_save));
        rates.push(point(mebibytes as f64, of_writer));
    }
    bench.remove_and_sync(&bench.file("sweep.vmf"))?;
    let name = "writes while it is saved, 1 GiB of RAM, save --live";
    let lines = ["all of it", "pause", "longest wait for a page"];
    let rate_lines = ["before the save", "while it is saved"];
    Ok([
        sweep(name, ("MiB/s", "s"), &lines, times),
        sweep(&format!("{name}: how quick they are"), ("MiB/s", "MiB/s"), &rate_lines, rates),
    ])
}

/// Saves the guest while its memory is written to from here, as quickly as it may be: a write to a
/// page that is protected waits as one of the guest's does. Returns the times, and the rates of the
/// writes before the save and during it.
fn while_written(
    bench: &Bench<'_>,
    subject: &Subject,
    mebibytes: u64,
) -> Result<Vec<f64>, BenchError> {
    let blocks = subject.connect()?.ram_blocks()?;
    let writer = Writer { guest: (subject.pid(), &blocks), mebibytes, stop: bench.stop };
    let (before, ()) = writer.write_during(|| {
        thread::sleep(ALONE);
        Ok(())
    })?;
    let (meanwhile, saved) = writer.write_during(|| save_reported(bench, subject, &["--live"]))?;
    let (report, usage) = saved;
    let seconds = |value: &serde_json::Value| value.as_f64().unwrap_or(0.0);
    let wait = seconds(&report["guest_waits"]["longest_seconds"]);
    Ok(vec![usage.seconds, seconds(&report["pause_seconds"]), wait, before, meanwhile])
}
