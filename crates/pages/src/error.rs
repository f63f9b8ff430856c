//! Why pages could not be moved.

use std::io;

use vmfile_engine::PublishError;
use vmfile_format::FormatError;

use crate::base::BaseError;
use crate::snapshot::SnapshotError;

/// Why pages could not be moved between RAM and a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagesError {
    /// The caller stopped the verb.
    #[error("stopped")]
    Stopped,
    /// The file could not be read, or is not what was written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The new file cannot be made, put on the disk, or given its name.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// A file cannot be the base of the new one.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The new file does not read back as it was written: the kernel or the disk lost something.
    #[error("the new file does not read back as it was written")]
    NotAsWritten(#[source] SnapshotError),
    /// The new file does not read back as it was written: it has no manifest.
    #[error("the new file does not read back as it was written: it has no manifest")]
    NoManifest,
    /// The file cannot be laid out.
    #[error("the layout of the file")]
    Layout(#[source] FormatError),
    /// The file would be longer than the kernel allows.
    #[error("the file would end past 2^63 bytes")]
    TooLong,
    /// The kernel could not read the file, find its holes, or start threads for it.
    #[error("read {what}")]
    ReadFile {
        /// What was to be read.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to write the file.
    #[error("write {what}")]
    WriteFile {
        /// What was to be written.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// RAM could not be read.
    #[error("read {len} bytes of guest RAM at {block_offset:#x} of RAM block {block:?}")]
    ReadRam {
        /// The block.
        block: String,
        /// Offset in the block, in bytes.
        block_offset: u64,
        /// How much, in bytes.
        len: u64,
        /// What the source said.
        source: io::Error,
    },
    /// RAM could not be written.
    #[error("write {len} bytes of guest RAM at {block_offset:#x} of RAM block {block:?}")]
    WriteRam {
        /// The block.
        block: String,
        /// Offset in the block, in bytes.
        block_offset: u64,
        /// How much, in bytes.
        len: usize,
        /// What the sink said.
        source: io::Error,
    },
}

impl PagesError {
    /// Returns a function that turns the kernel's error while reading `what` into a [`PagesError`].
    pub fn reading(what: &'static str) -> impl Fn(io::Error) -> PagesError {
        move |source| PagesError::ReadFile { what, source }
    }

    /// Returns a function that turns the kernel's error while writing `what` into a [`PagesError`].
    pub fn writing(what: &'static str) -> impl Fn(io::Error) -> PagesError {
        move |source| PagesError::WriteFile { what, source }
    }

    /// Whether the caller stopped the verb.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self, PagesError::Stopped)
    }
}
