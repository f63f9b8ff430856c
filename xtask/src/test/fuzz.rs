//! A smoke test of the fuzzers: runs each decoder for a few seconds, from its seeds.

use std::error::Error;
use std::fs;
use std::process::Command;

use super::outcome::Outcome;
use crate::case::Case;
use crate::command::{run as run_command, say, shown};
use crate::reliability::record::{Cases, Tried};
use crate::workspace::Workspace;

/// One target for each decoder and parser; `fuzz/README.md` says what each is.
pub(super) const TARGETS: [&str; 8] = [
    "mapped_ram_file",
    "device_state",
    "manifest",
    "page_bitmap",
    "stream",
    "multifd",
    "command_line",
    "qmp",
];

/// How long each fuzzer runs. This is enough to check every seed; longer runs are for nights.
const SECONDS: u32 = 5;

/// Coverage without a nightly compiler or cargo-fuzz, as `fuzz/README.md` explains.
const RUSTFLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1 --cfg fuzzing";

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Returns the name of a fuzzer among the test programs.
pub(super) fn program(target: &str) -> String {
    format!("fuzz {target}")
}

/// Builds the fuzzers and runs each for [`SECONDS`].
pub(super) fn run(workspace: &Workspace, outcome: &mut Outcome) -> Result<(), Box<dyn Error>> {
    let target = workspace.target().join("fuzz");
    let manifest = workspace.root().join("fuzz/Cargo.toml");
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--release", "--target", TRIPLE, "--manifest-path"]);
    run_command(build.arg(manifest).env("RUSTFLAGS", RUSTFLAGS).env("CARGO_TARGET_DIR", &target))?;
    for name in TARGETS {
        let corpus = target.join("corpus").join(name);
        fs::create_dir_all(&corpus)?;
        let mut fuzzer = Command::new(target.join(TRIPLE).join("release").join(name));
        fuzzer.arg(format!("-max_total_time={SECONDS}"));
        fuzzer.args(["-rss_limit_mb=512", "-timeout=10", "-verbosity=0", "-print_final_stats=1"]);
        fuzzer.arg(format!("-artifact_prefix={}/", target.display()));
        fuzzer.arg(&corpus).arg(workspace.root().join("fuzz/seeds").join(name));
        say(&format!("fuzz {name} for {SECONDS} s"));
        let executed = executed(&mut fuzzer)?;
        let mut cases = Cases::default();
        cases.add(executed, Case::FuzzedInput);
        outcome.tests.insert(format!("{} run", program(name)), Tried { cases, ..Tried::default() });
    }
    Ok(())
}

/// Runs a fuzzer and returns how many inputs it tried; shows its output only if it fails.
fn executed(fuzzer: &mut Command) -> Result<u64, Box<dyn Error>> {
    let said = fuzzer.output()?;
    let text = String::from_utf8_lossy(&said.stderr);
    if !said.status.success() {
        return Err(format!("{}: {}\n{text}", shown(fuzzer), said.status).into());
    }
    let line = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    Ok(line.ok_or("libFuzzer does not say how many inputs it tried")?.trim().parse()?)
}
