//! Finds out the version of a QEMU program on disk.

use std::path::Path;
use std::process::Command;

use crate::launch::{LaunchError, output_of};
use crate::version::QemuVersion;

/// Returns the version that `program --version` prints: "QEMU emulator version 10.0.2 (...)".
///
/// # Errors
///
/// [`LaunchError::Spawn`] if the program does not start, [`LaunchError::NoVersion`] if it prints
/// something else.
pub fn program_version(program: &Path) -> Result<QemuVersion, LaunchError> {
    let output = output_of(Command::new(program).arg("--version"))
        .map_err(|source| LaunchError::Spawn { program: program.to_owned(), source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let no_version = || LaunchError::NoVersion { program: program.to_owned() };
    let (_, rest) = text.split_once("version ").ok_or_else(no_version)?;
    let number = rest.split([' ', '\n', '(']).next().unwrap_or_default();
    number.parse().map_err(|_| no_version())
}
