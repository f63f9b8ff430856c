//! Disk images for tests.

use std::path::Path;
use std::process::Command;

use crate::TestResult;

/// Makes an empty image of `size_mib` with `qemu-img create` and these options.
///
/// # Errors
///
/// What `qemu-img` says.
pub fn make_image(path: &Path, options: &[&str], size_mib: u64) -> TestResult {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q"]).args(options).arg(path).arg(format!("{size_mib}M"));
    let output = command.output().map_err(|error| format!("qemu-img: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("qemu-img: {}", String::from_utf8_lossy(&output.stderr)).into())
}
