//! One verb, one file: words into options, a report into words.

pub(crate) mod check;
pub(crate) mod info;
pub(crate) mod list;
pub(crate) mod receive;
pub(crate) mod restore;
pub(crate) mod save;
pub(crate) mod send;

use vmfile::Snapshot;

use crate::args::FileName;
use crate::failure::Failure;

/// Opens the file that the user named.
fn open(name: &str) -> Result<Snapshot, Failure> {
    let name = FileName::parse(name).map_err(Failure::usage)?;
    Snapshot::open(&name.path, name.offset).map_err(|error| Failure::from(&error))
}
