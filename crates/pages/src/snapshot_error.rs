//! Why a file could not be opened as a saved VM.

use std::io;
use std::path::{Path, PathBuf};

use vmfile_format::FormatError;
use vmfile_format::limits::CHAIN_LEN_MAX;
use vmfile_format::manifest::{FOOTER_LEN, SnapshotId};

/// Why a file could not be opened as a saved VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The operating system refused to open it.
    #[error("open {path}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is a directory, a pipe or a device.
    #[error("{path} is not a regular file", path = path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refused to read it.
    #[error("read {len} bytes at {offset:#x} of {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// File offset, in bytes.
        offset: u64,
        /// How many bytes were to be read.
        len: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its bytes are damaged, or not those of a saved VM.
    #[error("{path} is damaged, or no saved VM", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: FormatError,
    },
    /// A newer version of vmfile wrote it, in a form that this one would misread.
    #[error("{path} needs a newer version of vmfile", path = path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// What is newer.
        source: FormatError,
    },
    /// A page, or its recorded hash, is not what was written.
    #[error(
        "{path} is damaged: page {page} of RAM block {block:?}, at file offset {offset:#x}, \
         and its recorded hash do not agree",
        path = path.display()
    )]
    DamagedPage {
        /// The file.
        path: PathBuf,
        /// The RAM block.
        block: String,
        /// The page's number in its block.
        page: u64,
        /// File offset of the page.
        offset: u64,
    },
    /// A part of the file with a checksum is not what was written.
    #[error(
        "{path} is damaged: its {what} at file offset {offset:#x} has the checksum {found}, \
         expected {expected}",
        path = path.display()
    )]
    DamagedPart {
        /// The file.
        path: PathBuf,
        /// What it is: `head`, `record`, `bitmap`, `device_state`, ...
        what: String,
        /// File offset of the part.
        offset: u64,
        /// The checksum of the bytes that are there: XXH3-128, 32 hexadecimal digits.
        found: String,
        /// The checksum that was recorded.
        expected: String,
    },
    /// vmfile wrote it, and its last bytes are missing or damaged.
    #[error(
        "{path} has lost its end: its last {FOOTER_LEN} bytes, from offset {offset:#x}, are no footer",
        path = path.display()
    )]
    LostEnd {
        /// The file.
        path: PathBuf,
        /// Where the footer should begin.
        offset: u64,
    },
    /// The file is thin, and the file that has the pages that it lacks is not where it was, nor beside
    /// the thin one.
    #[error(
        "{path} is thin: it needs its base, a file with the id {id}, which was not found ({found})",
        path = path.display()
    )]
    BaseMissing {
        /// The thin file.
        path: PathBuf,
        /// The identity of its base.
        id: SnapshotId,
        /// Where it was looked for, and what was there.
        found: String,
    },
    /// There are more files below a thin one than there may be.
    #[error("{path} is the base of {CHAIN_LEN_MAX} files that are one another's, as many as there may be, \
             and is thin itself", path = path.display())]
    ChainTooLong {
        /// The last one that was opened.
        path: PathBuf,
    },
    /// The file is thin and was opened alone, without its base.
    #[error("{path} is thin, and was opened without its base", path = path.display())]
    NoBase {
        /// The file.
        path: PathBuf,
    },
    /// The bitmaps of its RAM do not fit into this host's memory.
    #[error(
        "{path} says that the VM has {ram} bytes of RAM: their bitmaps take {needed} bytes, and the host \
         has {available} bytes of memory left",
        path = path.display()
    )]
    TooMuchRam {
        /// The file.
        path: PathBuf,
        /// How much RAM it says that it has, in bytes.
        ram: u64,
        /// How many bytes the bitmaps take, as often as they are needed.
        needed: u64,
        /// How many bytes of memory the host has left.
        available: u64,
    },
    /// The lowest file of a chain does not have a block of which a thin file says that it has pages.
    #[error("{path} has no pages of RAM block {block:?}, which files above it need", path = path.display())]
    BaseLacksPages {
        /// The lowest file.
        path: PathBuf,
        /// The RAM block.
        block: String,
    },
}

impl SnapshotError {
    /// Converts an error in the bytes of the file at `path`.
    pub(crate) fn format(path: &Path, source: FormatError) -> SnapshotError {
        let path = path.to_path_buf();
        if source.is_of_newer_version() {
            SnapshotError::Newer { path, source }
        } else {
            SnapshotError::Format { path, source }
        }
    }
}
