//! `cargo xtask demo`: saves and restores a guest before your eyes.

use std::env;
use std::error::Error;
use std::process::Command;

use crate::command::{run as run_command, say};
use crate::setup;
use crate::workspace::Workspace;

/// Installs what is missing, builds the program, and runs the demo.
pub(crate) fn run(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    setup::one_qemu(workspace)?;
    say("build vmfile and the demo, optimized");
    let cargo = || {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(workspace.root());
        command
    };
    run_command(cargo().args(["build", "--release", "-p", "vmfile-cli"]))?;
    run_command(cargo().args(["run", "--release", "-p", "vmfile-testing", "--bin", "demo"]))
}
