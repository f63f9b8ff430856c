//! `cargo xtask bench --compare BASE`: two builds of vmfile, measured pair by pair.
//!
//! BASE is a revision. It is built in a worktree under `target/compare`, which is removed before
//! the measurement; its build directory stays, so that the next comparison builds little.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{build, vmfile_bench};
use crate::command::{output, run as run_command, say};
use crate::setup;
use crate::workspace::Workspace;

/// The options for both builds: those of `cargo xtask bench`, with more rounds.
const OPTIONS: [&str; 8] = ["--size", "1G", "--runs", "10", "--data", "62", "--repeated", "7"];

/// Builds vmfile as it is here and as it was at `base`, and measures both.
pub(crate) fn run(workspace: &Workspace, base: &str) -> Result<(), Box<dyn Error>> {
    let commit = resolve(workspace, base)?;
    setup::one_qemu(workspace)?;
    let directory = workspace.target().join("compare");
    let build_directory = directory.join("target");
    {
        say(&format!("build vmfile of {base}, {commit}, optimized"));
        let worktree = Worktree::add(workspace, directory.join("base"), &commit)?;
        run_command(build(&worktree.path).env("CARGO_TARGET_DIR", &build_directory))?;
    }
    say("build vmfile as it is here, optimized");
    run_command(&mut build(workspace.root()))?;
    let mut measure = vmfile_bench(workspace);
    measure.args(OPTIONS).arg("--against").arg(build_directory.join("release/vmfile"));
    run_command(&mut measure)
}

/// Returns the commit that `base` names, abbreviated.
fn resolve(workspace: &Workspace, base: &str) -> Result<String, Box<dyn Error>> {
    let mut command = git(workspace);
    command.args(["rev-parse", "--verify", "--quiet", "--short", "--end-of-options"]);
    match output(command.arg(format!("{base}^{{commit}}"))) {
        Ok(commit) => Ok(commit.trim().to_owned()),
        Err(_) => Err(format!("{base} is no revision of this repository").into()),
    }
}

fn git(workspace: &Workspace) -> Command {
    let mut command = Command::new("git");
    command.current_dir(workspace.root());
    command
}

/// A checked-out revision. Dropping it removes it.
#[derive(Debug)]
struct Worktree<'a> {
    workspace: &'a Workspace,
    path: PathBuf,
}

impl<'a> Worktree<'a> {
    fn add(
        workspace: &'a Workspace,
        path: PathBuf,
        commit: &str,
    ) -> Result<Worktree<'a>, Box<dyn Error>> {
        if path.exists() {
            // Removes what a stopped run has left.
            remove(workspace, &path)?;
        }
        let mut command = git(workspace);
        command.args(["worktree", "add", "--quiet", "--force", "--detach"]);
        run_command(command.arg(&path).arg(commit))?;
        Ok(Worktree { workspace, path })
    }
}

impl Drop for Worktree<'_> {
    fn drop(&mut self) {
        if let Err(error) = remove(self.workspace, &self.path) {
            say(&format!("{} stays: {error}", self.path.display()));
        }
    }
}

fn remove(workspace: &Workspace, path: &Path) -> Result<(), Box<dyn Error>> {
    run_command(git(workspace).args(["worktree", "remove", "--force"]).arg(path))
}
