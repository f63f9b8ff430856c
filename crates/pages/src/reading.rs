//! How the pages of a file are read: past the page cache, or from it; and whether they are verified.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use vmfile_engine::{DataFile, DirectIo, resident_bytes};

use crate::snapshot::Snapshot;

/// Opens the file for reading its pages, past the page cache unless that holds most of it; says
/// which, in the words of a report.
///
/// # Errors
///
/// Returns the kernel's error, and [`io::ErrorKind::Unsupported`] if direct I/O is required and
/// not possible.
pub fn open_for_reading(
    snapshot: &Snapshot,
    direct_io: DirectIo,
) -> io::Result<(DataFile, String)> {
    let file = snapshot.file();
    let mut cached = None;
    if direct_io == DirectIo::Preferred {
        let resident = resident_bytes(file.as_fd(), 0..snapshot.file_len())?;
        let allocated = file.metadata()?.blocks() * 512;
        if resident.saturating_mul(2) > allocated {
            cached = Some("no: most of the file is in the page cache".to_owned());
        }
    }
    let wanted = if cached.is_some() { DirectIo::Off } else { direct_io };
    let file = DataFile::new(file.try_clone()?, wanted)?;
    let said = cached.unwrap_or_else(|| file.direct().to_string());
    Ok((file, said))
}

/// Says whether pages that are read are compared with their hashes, in the words of a report.
pub fn verified(snapshot: &Snapshot) -> &'static str {
    match snapshot.manifest() {
        Some(_) => "yes",
        None => "no: QEMU wrote the file, and its pages have no hashes",
    }
}
