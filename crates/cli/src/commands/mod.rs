//! One file for each verb: it turns arguments into options, and a report into text.

pub(crate) mod bench;
pub(crate) mod check;
pub(crate) mod convert;
pub(crate) mod info;
pub(crate) mod list;
pub(crate) mod receive;
pub(crate) mod restore;
pub(crate) mod save;
pub(crate) mod send;

use std::path::PathBuf;

use vmfile::Snapshot;

use crate::args::FileName;
use crate::failure::Failure;

/// Opens the file that the user named.
fn open(name: &str) -> Result<Snapshot, Failure> {
    let name = FileName::parse(name).map_err(Failure::usage)?;
    Snapshot::open(&name.path, name.offset).map_err(|error| Failure::from(&error))
}

/// Opens the file that the user named, and no file below it.
fn open_alone(name: &str) -> Result<Snapshot, Failure> {
    let name = FileName::parse(name).map_err(Failure::usage)?;
    Snapshot::open_alone(&name.path, name.offset).map_err(|error| Failure::from(&error))
}

/// Gives up the rights to write files and to run programs: a file may be made to take over what reads it.
fn confine() -> Result<(), Failure> {
    let confined = crate::confine::to_reading();
    confined
        .map(drop)
        .map_err(|error| Failure::system("take rights away from this process", &error))
}

/// Reads `unix:PATH`, or a path.
pub(crate) fn socket_path(address: &str) -> Result<PathBuf, Failure> {
    let path = address.strip_prefix("unix:").unwrap_or(address);
    if path.is_empty() || address.contains(':') && !address.starts_with("unix:") {
        let message = format!("{address:?} is no address of a Unix socket");
        return Err(Failure::usage(message).hint("expected unix:PATH"));
    }
    Ok(PathBuf::from(path))
}
