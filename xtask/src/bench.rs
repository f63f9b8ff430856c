//! `cargo xtask bench`: measures vmfile beside the disk's limit and QEMU's own ways, or beside itself.

use std::error::Error;

use crate::demo::run_optimized;
use crate::workspace::Workspace;
use crate::{compare, setup};

/// Installs what is missing, builds the program, and measures it.
pub(crate) fn run(workspace: &Workspace, rest: &[String]) -> Result<(), Box<dyn Error>> {
    match rest {
        [option, base] if option == "--compare" => compare::run(workspace, base),
        [option, ..] if option == "--compare" => Err("--compare takes one revision".into()),
        _ => {
            setup::for_bench(workspace)?;
            run_optimized(workspace, "bench", rest)
        }
    }
}
