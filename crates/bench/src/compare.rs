//! Two builds of vmfile, measured pair by pair.
//!
//! A shared disk changes its speed within seconds. So both builds do the same task right after each
//! other, they take turns at being first, and only the ratio of each pair counts. Each build reads
//! the files that it wrote itself in the same round: the format may differ between the builds, and
//! no file keeps a lucky place on the disk.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::bench::Bench;
use crate::error::BenchError;
use crate::guest::{Machine, Subject};
use crate::options::{Backing, BenchOptions};
use crate::page_cache;
use crate::process;
use crate::progress::Progress;
use crate::reading::ReadWay;
use crate::report::{Comparison, Difference};
use crate::restoring::by_vmfile;
use crate::saving::{SaveWay, save};
use crate::series::Summary;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    SavePrivate,
    SaveShared,
    Read(ReadWay),
    Restore(&'static str),
}

impl Task {
    /// The order matters: the later tasks read what the saves of the same round wrote.
    const ALL: [Task; 6] = [
        Task::SavePrivate,
        Task::SaveShared,
        Task::Read(ReadWay::CHECK_COLD),
        Task::Read(ReadWay::CHECK_WARM),
        Task::Restore("load"),
        Task::Restore("map"),
    ];

    fn name(self) -> String {
        use crate::rounds::Measured as _;
        match self {
            Task::SavePrivate => "save, private RAM".to_owned(),
            Task::SaveShared => "save, shared RAM".to_owned(),
            Task::Read(way) => way.short(),
            Task::Restore(mode) => format!("restore by {mode}, cold"),
        }
    }
}

/// The guests that both builds save.
struct Guests {
    private: Subject,
    shared: Subject,
}

/// Measures `options.program` in turns with `base`, on guests of the first size of `options`.
pub(crate) fn compare(
    options: &BenchOptions,
    base: &Path,
    stop: &AtomicBool,
    progress: &Progress<'_>,
) -> Result<Vec<Comparison>, BenchError> {
    let base_options = BenchOptions { program: base.to_path_buf(), ..options.clone() };
    let builds = [Bench::new(&base_options, stop)?, Bench::new(options, stop)?];
    let ram_bytes = options.sizes.first().copied().unwrap_or(1 << 30);
    let machine = |backing| Machine { backing, ..Machine::new(&options.qemu, ram_bytes) };
    let start = |backing| Subject::start(&machine(backing), options.contents, stop);
    let guests = Guests { private: start(Backing::Private)?, shared: start(Backing::Shared)? };
    let mut pairs: Vec<(Task, Vec<[f64; 2]>)> =
        Task::ALL.into_iter().map(|task| (task, Vec::new())).collect();
    let mut measure = || -> Result<(), BenchError> {
        for round in 0..=options.rounds.get() {
            for (index, (task, pairs)) in pairs.iter_mut().enumerate() {
                progress.step(round, options.rounds.get(), &task.name());
                // Alternates by round and by task, so that neither build is always first in a task.
                let first = (round as usize + index) % 2;
                let mut seconds = [0.0; 2];
                for build in [first, 1 - first] {
                    seconds[build] = once(&builds[build], *task, &guests)?;
                }
                if round > 0 {
                    pairs.push(seconds);
                }
            }
        }
        Ok(())
    };
    match measure() {
        // The pairs that were measured count.
        Err(BenchError::Stopped) if pairs.iter().any(|(_, pairs)| !pairs.is_empty()) => {}
        measured => measured?,
    }
    Ok(pairs.into_iter().filter_map(|(task, pairs)| comparison(task.name(), &pairs)).collect())
}

/// Has a build do a task; returns the seconds.
fn once(build: &Bench<'_>, task: Task, guests: &Guests) -> Result<f64, BenchError> {
    let (private, shared) = (build.file("private.vmf"), build.file("shared.vmf"));
    let run = match task {
        Task::SavePrivate => save(build, &guests.private, None, SaveWay::Vmfile, (&private, 0))?,
        Task::SaveShared => save(build, &guests.shared, None, SaveWay::Vmfile, (&shared, 0))?,
        Task::Read(way) => way.read(build, &shared, 0)?,
        Task::Restore(mode) => {
            page_cache::prepare(&shared, true, build.stop)?;
            let machine = guests.shared.machine().expect("it was started here");
            let (run, pid) = by_vmfile(build, machine, &shared, mode)?;
            process::end(pid)?;
            run
        }
    };
    // Without the time that QEMU itself takes to start.
    Ok(run.seconds - run.qemu_start_seconds.unwrap_or(0.0))
}

/// Sums up the pairs of a task; `None` if there are none.
///
/// Reports a difference only if all pairs agree on which build was faster: ten pairs agree by
/// chance once in 512 times.
fn comparison(what: String, pairs: &[[f64; 2]]) -> Option<Comparison> {
    let column = |build: usize| pairs.iter().map(|pair| pair[build]).collect::<Vec<f64>>();
    let ratios: Vec<f64> = pairs.iter().map(|[base, here]| here / base).collect();
    let ratio = Summary::of(&ratios)?;
    let verdict = match ratio {
        _ if ratio.max < 1.0 => Difference::Faster,
        _ if ratio.min > 1.0 => Difference::Slower,
        _ => Difference::None,
    };
    let (base_seconds, seconds) = (Summary::of(&column(0))?, Summary::of(&column(1))?);
    Some(Comparison { what, base_seconds, seconds, ratio, verdict })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(pairs: &[[f64; 2]]) -> Option<Difference> {
        comparison("save".to_owned(), pairs).map(|comparison| comparison.verdict)
    }

    #[test]
    fn a_slow_round_of_both_is_no_difference() {
        assert_eq!(verdict(&[[1.0, 1.1], [10.0, 9.0], [1.0, 1.0]]), Some(Difference::None));
    }

    #[test]
    fn pairs_that_agree_are_a_difference() {
        assert_eq!(verdict(&[[1.0, 0.9], [10.0, 9.0]]), Some(Difference::Faster));
        let slower = comparison("save".to_owned(), &[[1.0, 2.0], [2.0, 6.0], [3.0, 6.0]]).unwrap();
        assert_eq!(slower.verdict, Difference::Slower);
        let medians = (slower.base_seconds.median, slower.seconds.median, slower.ratio.median);
        assert_eq!(medians, (2.0, 6.0, 2.0));
    }

    #[test]
    fn nothing_measured_is_nothing_said() {
        assert_eq!(verdict(&[]), None);
    }
}
