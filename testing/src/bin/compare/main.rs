//! `cargo xtask bench --compare BASE`: two builds of vmfile, measured pair by pair.
//!
//! A disk that others share changes its mind within seconds, so both builds do the same thing one
//! right after the other, in turns as to who is first, and what counts is the ratio of each pair. The
//! first round warms up and is not counted. Each build reads the files that it wrote itself in the
//! same round: the format may have changed between them, and no file keeps a lucky place on the disk.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program, not a library")]

mod build;
mod pairs;

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, TestResult};

use crate::build::{Build, Task};
use crate::pairs::Pairs;

const USAGE: &str = "\
usage: compare BASE HERE

  BASE, HERE   two vmfile programs; `cargo xtask bench --compare` builds them
";

/// Rounds that count.
const ROUNDS: usize = 10;

/// RAM of the guests.
const RAM_MIB: u64 = 1024;

/// Of which a guest fills this with pages that are not zero.
const FILL_MIB: u32 = 700;

/// Pages of 256 with random words; 26 more are all alike, so that none of the filled ones is zero.
const DATA_SHARE: u32 = 230;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [base, here] = &arguments[..] else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    match run([base, here]) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run([base, here]: [&str; 2]) -> TestResult {
    let started = Instant::now();
    let qemu = Qemu::at_least("9.1").map_err(|missing| format!("{missing:?}"))?;
    let builds = [Build::copy(base, "base")?, Build::copy(here, "here")?];
    let config = |ram| Guest::linux(ram).fill_mib(FILL_MIB).data_share(DATA_SHARE);
    let guests = Guests {
        shared: boot(&qemu, &config(Ram::memfd(RAM_MIB)))?,
        private: boot(&qemu, &config(Ram::private(RAM_MIB)))?,
        qemu,
    };
    println!(
        "QEMU {}, Linux guests of {RAM_MIB} MiB with {FILL_MIB} MiB of data, {ROUNDS} rounds after a warm-up",
        guests.qemu.version()
    );
    let mut all: Vec<(Task, Pairs)> =
        Task::ALL.into_iter().map(|task| (task, Pairs::default())).collect();
    for round in 0..=ROUNDS {
        for (index, (task, pairs)) in all.iter_mut().enumerate() {
            // By round and task, so that nothing that every other task does falls to one build.
            let here_first = (round + index) % 2 == 1;
            let pair = measure(*task, &builds, &guests, here_first)?;
            if round > 0 {
                pairs.push(pair);
            }
        }
        println!("round {round} of {ROUNDS} ({:.0} s)", started.elapsed().as_secs_f64());
    }
    println!("\n{}", pairs::HEAD);
    for (task, pairs) in &all {
        println!("{}", pairs.line(task.name()));
    }
    Ok(())
}

/// The VMs that are saved: both stand still.
#[derive(Debug)]
pub(crate) struct Guests {
    qemu: Qemu,
    shared: Guest,
    private: Guest,
}

/// Boots a guest, waits until its memory is filled and judged, and stops it.
fn boot(qemu: &Qemu, config: &GuestConfig) -> TestResult<Guest> {
    let mut guest = config.boot(qemu)?;
    guest.wait_for_count(1)?;
    guest.stop()?;
    Ok(guest)
}

/// Lets both builds do one task; returns the seconds of each.
fn measure(
    task: Task,
    [base, here]: &[Build; 2],
    guests: &Guests,
    here_first: bool,
) -> TestResult<(f64, f64)> {
    if here_first {
        let here_seconds = here.seconds(task, guests)?;
        Ok((base.seconds(task, guests)?, here_seconds))
    } else {
        let base_seconds = base.seconds(task, guests)?;
        Ok((base_seconds, here.seconds(task, guests)?))
    }
}
