//! Chores of this workspace: `cargo xtask VERB`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program, not a library")]

mod apt;
mod bench;
#[path = "../../testing/src/case.rs"]
#[expect(unreachable_pub, reason = "the tests use it as well")]
mod case;
mod chaos;
mod command;
mod demo;
mod guest;
mod memory;
mod qemus;
mod reliability;
mod setup;
mod test;
mod tidy;
mod workspace;

use std::env;
use std::error::Error;
use std::process::ExitCode;

use crate::workspace::Workspace;

const HELP: &str = "\
usage: cargo xtask VERB

  setup            install QEMU and what else the tests need; fetch other QEMUs; make the guests
  test [STEP ...]  run everything that must pass, or only the steps named
  demo             save a guest that counts, restore it, and see it count on
  bench [--quick]  measure vmfile beside the disk's limit and QEMU's own ways
  bench --compare BASE
                   measure vmfile as it is here beside the revision BASE, pair by pair
  chaos vmfile|qemu|calls|power|rounds [MOMENTS [SEED]]
                   end one of them at random moments of saves and restores, 300 if not said
  memory [miri] [memcheck]
                   look for wrong uses of memory, by Miri and by valgrind
  reliability      write into docs/reliability.md what the tests have shown since the last whole run
  tidy             check what no compiler checks: walls, words, links
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let Some((verb, rest)) = arguments.split_first() else {
        print!("{HELP}\nsteps of test: {}\n", test::step_names());
        return ExitCode::SUCCESS;
    };
    match run(verb, rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {verb}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: &str, rest: &[String]) -> Result<(), Box<dyn Error>> {
    let workspace = Workspace::find();
    match verb {
        "setup" => setup::run(&workspace),
        "test" => test::run(&workspace, rest),
        "demo" => demo::run(&workspace),
        "chaos" => chaos::run(&workspace, rest),
        "memory" => memory::run(&workspace, rest),
        "bench" => bench::run(&workspace, rest),
        "reliability" => reliability::run(&workspace),
        "tidy" => tidy::run(&workspace),
        "help" | "-h" | "--help" => {
            print!("{HELP}\nsteps of test: {}\n", test::step_names());
            Ok(())
        }
        _ => Err("no such verb; `cargo xtask` lists them".into()),
    }
}
