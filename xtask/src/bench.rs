//! `cargo xtask bench`: measures vmfile beside the disk's limit and QEMU's own ways, or beside
//! itself.
//!
//! `vmfile bench` measures everything. This adds what belongs to the project: the sizes, the
//! targets, and the page docs/benchmarks.md.

mod compare;
mod figures;
mod page;
mod targets;

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use self::figures::Figures;
use crate::command::{run as run_command, say, shown};
use crate::setup;
use crate::workspace::Workspace;

/// The page that the benchmark writes.
const PAGE: &str = "docs/benchmarks.md";

/// What the RAM of the guests holds, in percent.
const CONTENTS: [&str; 4] = ["--data", "65", "--repeated", "8"];

/// With this much free memory, in MiB, guests have 2 GiB: there are two at once, and a file in the
/// page cache.
const FREE_MIB_FOR_LARGE: u64 = 14_000;

/// Installs what is missing, builds the program, and measures it.
pub(crate) fn run(workspace: &Workspace, rest: &[String]) -> Result<(), Box<dyn Error>> {
    let words: Vec<&str> = rest.iter().map(String::as_str).collect();
    let is_quick = match words[..] {
        ["--compare", base] => return compare::run(workspace, base),
        ["--compare", ..] => return Err("--compare takes one revision".into()),
        [] => false,
        ["--quick"] => true,
        _ => return Err("takes --quick, or --compare and a revision".into()),
    };
    setup::for_bench()?;
    say("build vmfile, optimized");
    run_command(&mut build(workspace.root()))?;
    let report = measure(workspace, is_quick)?;
    let targets = targets::judge(&Figures(&report));
    println!("\n{}", targets::summary(&targets));
    if !is_quick {
        let path = workspace.root().join(PAGE);
        fs::write(&path, page::page(&report, &targets, &workspace.commit(&["crates"])?))?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

/// Returns the command that builds the release program of the workspace in `directory`.
fn build(directory: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(directory);
    command.args(["build", "--quiet", "--release", "-p", "vmfile-cli"]);
    command
}

/// Returns the command `vmfile bench` of the program that [`build`] makes; its files lie in the
/// build directory.
fn vmfile_bench(workspace: &Workspace) -> Command {
    let mut command = Command::new(workspace.target().join("release/vmfile"));
    command.arg("bench").arg("--dir").arg(workspace.target());
    command
}

/// Measures everything; a quick run has fewer rounds, smaller guests and no sweeps.
fn measure(workspace: &Workspace, is_quick: bool) -> Result<Value, Box<dyn Error>> {
    let is_small = is_quick || free_mib()? < FREE_MIB_FOR_LARGE;
    let (size, runs) = (if is_small { "1G" } else { "2G" }, if is_quick { "3" } else { "5" });
    let mut command = vmfile_bench(workspace);
    command.args(["--json", "--ram", "shared,private", "--size", size, "--runs", runs]);
    command.args(CONTENTS);
    if !is_quick {
        command.arg("--sweep");
    }
    say(&shown(&command));
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("vmfile bench: {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn free_mib() -> Result<u64, Box<dyn Error>> {
    let list = fs::read_to_string("/proc/meminfo")?;
    let line = list.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kib.ok_or("the kernel does not say how much memory is free")? >> 10)
}
