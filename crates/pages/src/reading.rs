//! How the pages of a file are read: past the page cache, or from it; and whether they are
//! verified.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use serde::{Serialize, Serializer};
use vmfile_engine::{DataFile, DirectIo, DirectIoInUse, resident_bytes};

use crate::snapshot::Snapshot;

/// Opens the file for reading its pages, and says whether that uses direct I/O. If direct I/O is
/// only preferred, it is not used while the page cache holds more than half of the bytes that the file
/// takes on the disk.
///
/// # Errors
///
/// Returns the kernel's error, and [`io::ErrorKind::Unsupported`] if direct I/O is required and
/// not possible.
pub fn open_for_reading(
    snapshot: &Snapshot,
    direct_io: DirectIo,
) -> io::Result<(DataFile, DirectIoInUse)> {
    let file = snapshot.file();
    let mut is_cached = false;
    if direct_io == DirectIo::Preferred {
        let resident = resident_bytes(file.as_fd(), 0..snapshot.file_len())?;
        let allocated = file.metadata()?.blocks() * 512;
        is_cached = resident.saturating_mul(2) > allocated;
    }
    let wanted = if is_cached { DirectIo::Off } else { direct_io };
    let file = DataFile::new(file.try_clone()?, wanted)?;
    let in_use = if is_cached {
        DirectIoInUse::No { reason: "most of the file is in the page cache".to_owned() }
    } else {
        file.direct().clone()
    };
    Ok((file, in_use))
}

/// Whether pages that are read are compared with their hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verified {
    /// They are, and everything else is compared with its checksum.
    Yes,
    /// QEMU wrote the file, which has no hashes.
    NoHashes,
    /// They are mapped and not read; everything else was compared with its checksum.
    NotPages,
    /// They came by a stream, which has no hashes.
    Stream,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verified::Yes => "yes",
            Verified::NoHashes => "no: QEMU wrote the file, and its pages have no hashes",
            Verified::NotPages => "all but the pages: they are mapped, not read",
            Verified::Stream => "no: a stream has no hashes",
        })
    }
}

impl Serialize for Verified {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        as_text(self, serializer)
    }
}

/// Serializes a value of a report as the text that `Display` shows.
///
/// # Errors
///
/// Returns the serializer's error.
pub fn as_text<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl Verified {
    /// Returns whether pages that are read from `snapshot` can be compared with hashes.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Verified {
        if snapshot.manifest().is_some() { Verified::Yes } else { Verified::NoHashes }
    }
}
