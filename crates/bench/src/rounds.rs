//! Measures ways of doing the same thing in rounds: A B C, A B C.

use std::path::PathBuf;

use crate::bench::Bench;
use crate::error::BenchError;
use crate::progress::Progress;
use crate::report::{Family, Run, Way};
use crate::series::{Summary, ratio};

/// A way of doing something that is measured, and its names.
pub(crate) trait Measured {
    fn name(&self) -> String;
    fn short(&self) -> String;
    fn family(&self) -> Family;
}

/// A way, its file, and its runs so far.
pub(crate) struct Entry<W> {
    pub(crate) way: W,
    pub(crate) file: PathBuf,
    runs: Vec<Run>,
}

impl<W> Entry<W> {
    pub(crate) fn new(way: W, file: PathBuf) -> Entry<W> {
        Entry { way, file, runs: Vec::new() }
    }
}

/// Measures the ways that are chosen, round by round, and compares them. A way that fails is left out
/// of the later rounds, and the report says why. A stop ends the measurement, and the unfinished round
/// does not count.
pub(crate) fn measure<W: Measured>(
    bench: &mut Bench<'_>,
    mut entries: Vec<Entry<W>>,
    progress: &Progress<'_>,
    once: impl Fn(&Bench<'_>, &Entry<W>) -> Result<Run, BenchError>,
) -> Vec<Way> {
    let rounds = bench.options.rounds.get();
    entries.retain(|entry| bench.measures(&entry.way.name()));
    'rounds: for round in 0..=rounds {
        let mut failed = Vec::new();
        for index in 0..entries.len() {
            let entry = &mut entries[index];
            progress.step(round, rounds, &entry.way.name());
            match once(bench, entry) {
                Ok(run) if round > 0 => entry.runs.push(run),
                Ok(_) => {}
                Err(BenchError::Stopped) => {
                    forget_round(&mut entries[..index], round);
                    break 'rounds;
                }
                Err(error) => failed.push((index, error)),
            }
        }
        for (index, error) in failed.into_iter().rev() {
            let entry = entries.remove(index);
            bench.note(&entry.way.name(), error.in_words());
        }
    }
    compared(entries)
}

/// Removes the runs of a round that was not finished.
fn forget_round<W>(entries: &mut [Entry<W>], round: u32) {
    for entry in entries.iter_mut().filter(|_| round > 0) {
        entry.runs.pop();
    }
}

/// Sums up each way's runs, and compares them with the disk's limit and the best of vmfile's ways.
fn compared<W: Measured>(entries: Vec<Entry<W>>) -> Vec<Way> {
    let seconds = |runs: &[Run]| runs.iter().map(|run| run.seconds).collect::<Vec<f64>>();
    let mut ways: Vec<Way> = Vec::new();
    for Entry { way, runs, .. } in entries {
        let Some(summary) = Summary::of(&seconds(&runs)) else { continue };
        ways.push(Way {
            name: way.name(),
            short: way.short(),
            family: way.family(),
            runs,
            seconds: summary,
            ratio_to_vmfile: None,
            ratio_to_disk: None,
        });
    }
    let best = |family| {
        let of_family = ways.iter().filter(|way| way.family == family);
        let best = of_family.min_by(|a, b| a.seconds.median.total_cmp(&b.seconds.median));
        best.map(|way| seconds(&way.runs))
    };
    let (disk, ours) = (best(Family::Disk), best(Family::Vmfile));
    for way in &mut ways {
        let theirs = seconds(&way.runs);
        way.ratio_to_disk = disk.as_ref().and_then(|disk| ratio(&theirs, disk));
        way.ratio_to_vmfile = ours.as_ref().and_then(|ours| ratio(&theirs, ours));
    }
    ways
}
