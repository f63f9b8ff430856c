//! `cargo xtask bench`: vmfile beside the disk's limit and QEMU's own ways, and against its targets, in
//! one run. Saves are measured by `vmfile bench`, as everybody can.
//!
//! Every comparison is made in rounds: A B C, A B C, never A A B B, because a disk that others share
//! changes its mind within seconds. Medians and ratios are over rounds; the first round warms up and
//! is not counted. Whoever writes a file makes it durable within the time that is measured.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program, not a library")]

mod host;
mod live;
mod reading;
mod report;
mod restoring;
mod saving;
mod series;
mod sizes;
mod tools;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use vmfile_testing::{GuestConfig, Qemu, TestResult};

use crate::report::Report;
use crate::tools::Tools;

const USAGE: &str = "\
usage: bench [--quick]

  --quick   three rounds of a smaller guest; docs/benchmarks.md stays as it is
";

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    /// Rounds that count.
    rounds: usize,
    /// RAM of the guest that everybody saves.
    ram_mib: u64,
    /// Of which the guest fills this with pages that are not zero.
    fill_mib: u32,
}

/// What every part works with.
#[derive(Debug)]
pub(crate) struct Bench {
    tools: Tools,
    qemu: Qemu,
    scale: Scale,
}

/// The guest that everybody saved, as a file.
#[derive(Debug)]
pub(crate) struct Saved {
    config: GuestConfig,
    file: PathBuf,
    /// Bytes of pages in it.
    bytes: u64,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let is_quick = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--quick"] => true,
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(is_quick) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(is_quick: bool) -> TestResult {
    let started = Instant::now();
    let qemu = Qemu::at_least("9.1").map_err(|missing| format!("{missing:?}"))?;
    let begin = |part| println!("# {part} ({:.0} s)", started.elapsed().as_secs_f64());
    let bench = Bench { tools: Tools::find()?, qemu, scale: scale(is_quick)? };
    let mut report = Report::new(host::describe(&bench.tools, &bench.qemu)?, bench.scale);
    begin("save: the disk's limit, vmfile, QEMU");
    let saved = saving::measure(&bench, &mut report)?;
    begin("RAM that is not data");
    sizes::measure(&bench, &mut report)?;
    begin("restore by map");
    restoring::measure(&bench, &saved, &mut report)?;
    begin("reading: check, restore by load, info");
    reading::measure(&bench, &saved, &mut report)?;
    begin("a guest that runs meanwhile");
    live::measure(&bench, &mut report)?;
    report.took_seconds = started.elapsed().as_secs_f64();
    println!("\n{}", report.summary());
    if !is_quick {
        println!("wrote {}", report.write()?.display());
    }
    Ok(())
}

/// Chooses sizes that fit: two guests' RAM, a file in the page cache, and room for the rest.
fn scale(is_quick: bool) -> TestResult<Scale> {
    let available_mib = host::memory_kib("MemAvailable")? >> 10;
    let small = Scale { rounds: if is_quick { 3 } else { 5 }, ram_mib: 2048, fill_mib: 1500 };
    match available_mib {
        0..7_000 => Err(format!("needs 7 GiB of free memory, found {available_mib} MiB").into()),
        7_000..14_000 => Ok(small),
        _ if is_quick => Ok(small),
        _ => Ok(Scale { ram_mib: 4096, fill_mib: 3000, ..small }),
    }
}
