//! `cargo xtask bench`: measures vmfile beside the disk's limit and QEMU's own ways.

use std::error::Error;

use crate::demo::run_optimized;
use crate::setup;
use crate::workspace::Workspace;

/// Installs what is missing, builds the program, and measures it.
pub(crate) fn run(workspace: &Workspace, rest: &[String]) -> Result<(), Box<dyn Error>> {
    setup::for_bench(workspace)?;
    run_optimized(workspace, "bench", rest)
}
