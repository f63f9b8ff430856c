//! `cargo xtask test`: everything that must pass, step by step.
//!
//! The first step that fails ends the run. The last line of a run that passed is `N passed, N
//! failed`, with `, N skipped` if tests or steps could not run; these are listed with their reasons
//! before it.

mod api;
mod fuzz;
mod loops;
pub(crate) mod outcome;
mod programs;
pub(crate) mod reader;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::mem;
use std::process::Command;
use std::time::Instant;

use self::outcome::Outcome;
use self::programs::{Kind, TestPrograms};
use crate::command::{run as run_command, say};
use crate::reliability::{add_to_record, names};
use crate::workspace::Workspace;
use crate::{setup, tidy};

type StepResult = Result<(), Box<dyn Error>>;

/// One step: its name on the command line, what it shows, and the function that runs it.
struct Step {
    name: &'static str,
    shows: &'static str,
    run: fn(&Workspace, &mut Outcome) -> StepResult,
}

const STEPS: [Step; 11] = [
    Step {
        name: "setup",
        shows: "what the tests need is here",
        run: |workspace, _| setup::run(workspace),
    },
    Step { name: "fmt", shows: "rustfmt would change nothing", run: fmt },
    Step { name: "tidy", shows: "walls, words and links hold", run: |w, _| tidy::run(w) },
    Step { name: "clippy", shows: "no warning", run: clippy },
    Step { name: "doc", shows: "the documentation builds without a warning", run: doc },
    Step {
        name: "unit",
        shows: "every test that needs no VM",
        run: |workspace, outcome| test_programs(workspace, Kind::Other, outcome),
    },
    Step { name: "api", shows: "the public API of the library is the recorded one", run: api::run },
    Step { name: "doctest", shows: "the examples in the documentation", run: doctest },
    Step {
        name: "loops",
        shows: "the hot loops take as many instructions as they did",
        run: loops::run,
    },
    Step { name: "fuzz", shows: "no decoder breaks its contract", run: fuzz::run },
    Step { name: "vm", shows: "guests find their RAM as they left it", run: vm },
];

/// Returns the names of all steps.
pub(crate) fn step_names() -> String {
    STEPS.map(|step| step.name).join(" ")
}

/// Runs the steps named, or all.
pub(crate) fn run(workspace: &Workspace, names: &[String]) -> StepResult {
    if let Some(unknown) = names.iter().find(|name| STEPS.iter().all(|step| step.name != **name)) {
        return Err(format!("no step {unknown}; there are: {}", step_names()).into());
    }
    let mut outcome = Outcome::default();
    let start = Instant::now();
    let result = run_steps(workspace, names, &mut outcome);
    // What has failed is recorded as well.
    let command = ["cargo xtask test"].into_iter().chain(names.iter().map(String::as_str));
    let command = command.collect::<Vec<_>>().join(" ");
    add_to_record(workspace, &command, mem::take(&mut outcome.tests), names.is_empty())?;
    result?;
    say(&format!("all steps: {:.1} s", start.elapsed().as_secs_f64()));
    println!("{outcome}");
    Ok(())
}

fn run_steps(workspace: &Workspace, names: &[String], outcome: &mut Outcome) -> StepResult {
    for step in &STEPS {
        if !names.is_empty() && !names.iter().any(|name| name == step.name) {
            continue;
        }
        say(&format!("{}: {}", step.name, step.shows));
        let step_start = Instant::now();
        let result = (step.run)(workspace, outcome);
        say(&format!("{}: {:.1} s", step.name, step_start.elapsed().as_secs_f64()));
        if let Err(error) = result {
            outcome.print_cases_and_skipped();
            return Err(format!("step {} failed: {error}", step.name).into());
        }
    }
    outcome.print_cases_and_skipped();
    Ok(())
}

fn fmt(workspace: &Workspace, _: &mut Outcome) -> StepResult {
    run_command(cargo(workspace).args(["fmt", "--all", "--check"]))
}

fn clippy(workspace: &Workspace, _: &mut Outcome) -> StepResult {
    let arguments = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    run_command(cargo(workspace).args(arguments))
}

fn doc(workspace: &Workspace, _: &mut Outcome) -> StepResult {
    // The program and the library have the same name, and rustdoc has one directory for each name.
    let arguments = ["doc", "--quiet", "--workspace", "--no-deps", "--lib"];
    run_command(cargo(workspace).args(arguments).env("RUSTDOCFLAGS", "-D warnings"))
}

fn doctest(workspace: &Workspace, outcome: &mut Outcome) -> StepResult {
    outcome.run("doctests", cargo(workspace).args(["test", "--quiet", "--workspace", "--doc"]))
}

fn vm(workspace: &Workspace, outcome: &mut Outcome) -> StepResult {
    // Makes the guests from the current sources, also if this step is run alone.
    setup::run(workspace)?;
    test_programs(workspace, Kind::Vm, outcome)
}

/// Runs all test programs of one kind, and fails after the last if one has failed, or if docs/reliability.md
/// names a test that they do not have.
fn test_programs(workspace: &Workspace, kind: Kind, outcome: &mut Outcome) -> StepResult {
    let mut failed = Vec::new();
    let programs = TestPrograms::build(workspace)?;
    for program in programs.of_kind(kind) {
        if let Err(error) = outcome.run(&program.name, &mut program.command()) {
            failed.push(error.to_string());
        }
    }
    let page = fs::read_to_string(workspace.root().join(names::PAGE))?;
    let mut programs: BTreeMap<String, bool> = programs.names(kind).collect();
    programs.extend(fuzz::TARGETS.map(|target| (fuzz::program(target), false)));
    failed.extend(names::not_there(&page, &programs, &outcome.tests));
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ").into()) }
}

fn cargo(workspace: &Workspace) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(workspace.root());
    command
}
