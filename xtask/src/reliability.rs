//! `cargo xtask reliability`: writes into docs/reliability.md what the tests have shown.
//!
//! The page is not compared with the tests as docs/cli.md is with the program: the numbers differ from run to
//! run, and only a run of all tests, which takes half an hour, has all of them. What can be compared cheaply
//! is: every test that the page names exists (`tidy`) and was run (the steps `unit`, `fuzz` and `vm`).

pub(crate) mod names;
mod page;
pub(crate) mod record;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::process::Command;

use self::record::{Record, Run, Tried};
use crate::command::{output, say};
use crate::qemus;
use crate::workspace::Workspace;

/// Writes the page.
pub(crate) fn run(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    let record = Record::read(workspace)?;
    if record.tests.is_empty() {
        return Err("no test has run yet; `cargo xtask test` runs all".into());
    }
    let path = workspace.root().join(names::PAGE);
    let written = page::page(&fs::read_to_string(&path)?, &record)?;
    fs::write(&path, written)?;
    say(&format!("wrote {}", path.display()));
    Ok(())
}

/// Returns `Linux 6.18.44` of `Linux 6.18.44-1-amd64`: the rest is the host's affair.
fn kernel(said: &str) -> String {
    said.trim().split('-').next().unwrap_or_default().to_owned()
}

/// Adds what tests have shown to the record. With a run of all tests it begins anew, but for longer runs of
/// the same commit.
pub(crate) fn add_to_record(
    workspace: &Workspace,
    command: &str,
    tests: BTreeMap<String, Tried>,
    are_all: bool,
) -> Result<(), Box<dyn Error>> {
    if tests.is_empty() {
        return Ok(());
    }
    let mut record = Record::read(workspace)?;
    let run = Run {
        command: command.to_owned(),
        day: output(Command::new("date").args(["-u", "+%F"]))?.trim().to_owned(),
        commit: workspace.commit(&["crates", "testing"])?,
        kernel: kernel(&output(Command::new("uname").arg("-sr"))?),
        qemu: qemus::versions(workspace).join(", "),
    };
    if are_all {
        record.tests.retain(|_, (_, old)| old.commit == run.commit && old.is_longer());
    }
    record.add(tests, &run);
    record.write(workspace)
}
