//! `cargo xtask memory`: looks for wrong uses of memory. Miri interprets the tests of what makes no
//! system call; valgrind's memcheck runs the engine's tests and the program.

use std::error::Error;
use std::process::Command;
use std::time::Instant;

use crate::apt::find_in_path;
use crate::command::{output, run as run_command, say};
use crate::workspace::Workspace;

/// The tools, and what runs them.
const TOOLS: [(&str, Tool); 2] = [("miri", miri), ("memcheck", memcheck)];

type Tool = fn(&Workspace) -> Result<(), Box<dyn Error>>;

/// The tests that Miri runs. What it does not know is beside the names: `madvise`, `ioctl`, the flags of `linkat`
/// and of `open` for files without a name, `posix_spawn`. The tests with panics lose what was thrown, on purpose.
const INTERPRETED: [Interpreted; 4] = [
    Interpreted { package: "vmfile-format", target: &["--lib"], skipped: &[] },
    Interpreted { package: "vmfile-stream", target: &["--lib"], skipped: &[] },
    Interpreted { package: "vmfile-qemu", target: &["--lib", "command_line::"], skipped: &[] },
    Interpreted {
        package: "vmfile-engine",
        target: &["--lib"],
        skipped: &[
            "a_buffer_of_whole_huge_pages",
            "a_panic_in_one_thread",
            "both_are_done_and_a_panic_is_an_error",
            "a_transfer_that_panics",
            "send_queue::",
            "publish::",
            "share::",
            "waiting::",
            "residency::",
            "pagemap::",
            "probe::",
            "guardian::",
            // More than two minutes.
            "zero::",
        ],
    },
];

/// Tests that Miri runs.
struct Interpreted {
    package: &'static str,
    /// cargo's words for the target.
    target: &'static [&'static str],
    /// Parts of the names of tests that need a call which Miri does not know, or take minutes.
    skipped: &'static [&'static str],
}

/// How many random inputs each property is tried with under Miri, which is some hundred times slower
/// than the processor.
const CASES: &str = "4";

/// How to get Miri.
const GET_MIRI: &str =
    "`rustup toolchain install nightly --profile minimal --component miri,rust-src`";

/// Runs the tools that the user names, or all.
pub(crate) fn run(workspace: &Workspace, rest: &[String]) -> Result<(), Box<dyn Error>> {
    let is_named = |name: &str| rest.is_empty() || rest.iter().any(|word| word == name);
    if let Some(word) = rest.iter().find(|word| TOOLS.iter().all(|(name, _)| name != word)) {
        return Err(format!("no tool {word:?}; usage: cargo xtask memory [miri] [memcheck]").into());
    }
    for (name, tool) in TOOLS.iter().filter(|(name, _)| is_named(name)) {
        let began = Instant::now();
        tool(workspace)?;
        say(&format!("{name}: no findings, {:.1} minutes", began.elapsed().as_secs_f64() / 60.0));
    }
    Ok(())
}

/// Runs the tests of [`INTERPRETED`].
fn miri(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    if output(&mut nightly(workspace, &["miri", "--version"])).is_err() {
        return Err(format!("no Miri: {GET_MIRI} installs it").into());
    }
    for Interpreted { package, target, skipped } in INTERPRETED {
        say(&format!("miri {package} {}", target.join(" ")));
        let mut command = nightly(workspace, &["miri", "test", "--quiet", "-p", package]);
        command.args(target).arg("--");
        command.args(skipped.iter().flat_map(|name| ["--skip", name]));
        run_command(&mut command)?;
    }
    Ok(())
}

/// Makes a command of the nightly compiler's cargo.
fn nightly(workspace: &Workspace, arguments: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    command.current_dir(workspace.root()).args(["run", "nightly", "cargo"]).args(arguments);
    // The tests read files of the repository, and proptest the number of its cases.
    command.env("MIRIFLAGS", "-Zmiri-disable-isolation").env("PROPTEST_CASES", CASES);
    // The variables of the cargo that runs this program would choose its compiler.
    for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTDOC", "RUSTFLAGS"] {
        command.env_remove(variable);
    }
    command.env("CARGO_TARGET_DIR", workspace.target().join("miri"));
    command
}

/// Tests of the engine that cannot run under memcheck, by parts of their names. valgrind 3.19 of Debian 12
/// returns `ENOSYS` for `pidfd_open`, and for `cachestat`, which tells what the page cache holds. It takes the vDSO
/// away, which rustix 1.1 reads to learn the size of a page. The tests with panics lose what was thrown, on purpose: to
/// drop it could panic again.
const NOT_UNDER_MEMCHECK: [&str; 12] = [
    "process_memory::",
    "userfault::what_is_no_userfaultfd_is_not_listed",
    "huge_pages_hide_their_holes",
    "a_direct_write_leaves_only_its_tail_in_the_page_cache",
    "cached_pages_are_counted_and_dropped",
    "residency::",
    "pagemap::",
    "probe::",
    "a_thread_that_waits_for_a_thread_is_told_from_one_that_reads",
    "a_panic_in_one_thread",
    "both_are_done_and_a_panic_is_an_error",
    "a_transfer_that_panics",
];

/// The variable that asks for all verbs; `crates/cli/tests/program/memcheck.rs` reads it.
const ALL: &str = "VMFILE_MEMCHECK";

/// Runs the engine's tests under memcheck, and then a test that does so with the verbs of the program.
fn memcheck(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    if find_in_path("valgrind").is_none() {
        return Err("no valgrind: `cargo xtask setup` installs it".into());
    }
    say("memcheck vmfile-engine");
    let runner = "target.'cfg(all())'.runner = ['valgrind', '--quiet', '--fair-sched=yes', \
                  '--error-exitcode=99', '--leak-check=full', '--show-leak-kinds=definite', \
                  '--errors-for-leak-kinds=definite']";
    let mut engine = Command::new("cargo");
    engine.current_dir(workspace.root());
    engine.args(["test", "--quiet", "-p", "vmfile-engine", "--lib", "--test", "kernel"]);
    engine.args(["--config", runner, "--", "--test-threads=1"]);
    engine.args(NOT_UNDER_MEMCHECK.iter().flat_map(|name| ["--skip", name]));
    run_command(&mut engine)?;
    say("memcheck vmfile");
    let mut program = Command::new("cargo");
    program.current_dir(workspace.root()).env(ALL, "all");
    program.args(["test", "--quiet", "-p", "vmfile-cli", "--test", "program", "--"]);
    run_command(program.args(["--nocapture", "memcheck::"]))
}
