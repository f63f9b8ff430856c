//! A saved VM as a file: opened once, its structure checked, its pages not yet read.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::iter;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use vmfile_engine::{HashKey, RunningHash, begin_reading};
use vmfile_format::limits::{CHAIN_LEN_MAX, FILE_LEN_MAX};
use vmfile_format::manifest::features::THIN;
use vmfile_format::manifest::{
    BaseMeta, ExtentMeta, FOOTER_LEN, Footer, Meta, SnapshotId, decode_base_pages,
};
use vmfile_format::mapped_ram::{MARK, MappedRamFile, PlacedBlock};
use vmfile_format::{FormatError, PageBitmap, RamBlock, ReadError};

use crate::plan::{WINDOW_LEN, pieces};

/// A file that holds a saved VM: a vmfile, or a mapped-ram file that QEMU wrote.
///
/// A value of this type has a structure that was checked from end to end; its pages were not read.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    file: File,
    len: u64,
    structure: MappedRamFile,
    manifest: Option<Manifest>,
    /// The file that has the pages that this one lacks. `None` if this one is not thin, or was opened
    /// alone.
    base: Option<Box<Snapshot>>,
}

/// Which program wrote a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FileFormat {
    /// vmfile, with a manifest: every page has a hash.
    Vmfile,
    /// QEMU, with its capability mapped-ram.
    MappedRam,
}

impl fmt::Display for FileFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileFormat::Vmfile => "vmfile",
            FileFormat::MappedRam => "mapped-ram",
        })
    }
}

/// What vmfile appended to the file.
#[derive(Debug)]
pub struct Manifest {
    /// The footer, which says where the metadata lie.
    pub footer: Footer,
    /// The metadata.
    pub meta: Meta,
}

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
    /// The lowest file of a chain does not have a block of which a thin file says that it has pages.
    #[error("{path} has no pages of RAM block {block:?}, which files above it need", path = path.display())]
    BaseLacksPages {
        /// The lowest file.
        path: PathBuf,
        /// The RAM block.
        block: String,
    },
}

impl Snapshot {
    /// Opens the file at `path`, whose stream begins at `start`: QEMU's `offset=`, 0 for a vmfile. If it
    /// is thin, opens the files below it as well.
    ///
    /// Reads the structure and the manifest's metadata, no page and no page hash.
    ///
    /// A base is found by its id: where it was when the thin file was made, or else under the same name
    /// beside the thin file.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError`] if the file cannot be read, is no saved VM, or is cut or damaged
    /// in any part that says where something lies, or if a file below it is missing.
    pub fn open(path: &Path, start: u64) -> Result<Snapshot, SnapshotError> {
        let mut snapshot = Snapshot::open_alone(path, start)?;
        snapshot.open_below(CHAIN_LEN_MAX)?;
        Ok(snapshot)
    }

    /// Opens the file at `path` as [`Snapshot::open`] does, and no other file. Pages that a base has
    /// cannot be read from it.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::open`].
    pub fn open_alone(path: &Path, start: u64) -> Result<Snapshot, SnapshotError> {
        let open = |source| SnapshotError::Open { path: path.to_path_buf(), source };
        // Checked before the file is opened: opening a pipe would wait for its other end.
        if !path.metadata().map_err(open)?.is_file() {
            return Err(SnapshotError::NotAFile { path: path.to_path_buf() });
        }
        let file = File::open(path).map_err(open)?;
        Snapshot::from_file(path, file, start)
    }

    /// Does the same with a file that is open for reading, and is called `path` in errors.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::open`].
    pub fn from_file(path: &Path, file: File, start: u64) -> Result<Snapshot, SnapshotError> {
        let open = |source| SnapshotError::Open { path: path.to_path_buf(), source };
        let len = file.metadata().map_err(open)?.len().min(FILE_LEN_MAX);
        // The manifest comes first: a file of a newer version of vmfile may look damaged, and only
        // its manifest names the reason.
        let manifest = read_manifest(path, &file, len)?;
        if let Some(manifest) = &manifest {
            ask_for_parts(&file, &manifest.meta.extents);
        }
        let structure = read_structure(path, &file, len, start)?;
        check_manifest(path, &file, len, &structure, manifest.as_ref())?;
        Ok(Snapshot { path: path.to_path_buf(), file, len, structure, manifest, base: None })
    }

    /// Opens the files below this one, at most `files_max`.
    fn open_below(&mut self, files_max: usize) -> Result<(), SnapshotError> {
        let Some(base) = self.manifest.as_ref().and_then(|manifest| manifest.meta.base.clone())
        else {
            return Ok(());
        };
        let Some(files_max) = files_max.checked_sub(1) else {
            return Err(SnapshotError::ChainTooLong { path: self.path.clone() });
        };
        let mut found = self.find_base(&base)?;
        found.open_below(files_max)?;
        self.base = Some(Box::new(found));
        Ok(())
    }

    /// Returns the files below this one as far as they are found, from the base downwards, and why the
    /// next one was not. It opens them one at a time, also if this file was opened alone.
    #[must_use]
    pub fn look_below(&self) -> (Vec<PathBuf>, Option<SnapshotError>) {
        let mut found = Vec::new();
        let mut next = self.manifest.as_ref().and_then(|manifest| manifest.meta.base.clone());
        let mut last = None;
        while let Some(base) = next {
            if found.len() == CHAIN_LEN_MAX {
                return (found, Some(SnapshotError::ChainTooLong { path: self.path.clone() }));
            }
            match last.as_ref().unwrap_or(self).find_base(&base) {
                Ok(snapshot) => {
                    found.push(snapshot.path.clone());
                    next = snapshot.manifest.as_ref().and_then(|found| found.meta.base.clone());
                    last = Some(snapshot);
                }
                Err(error) => return (found, Some(error)),
            }
        }
        (found, None)
    }

    fn find_base(&self, base: &BaseMeta) -> Result<Snapshot, SnapshotError> {
        let recorded = PathBuf::from(&base.path);
        let beside = recorded.file_name().map(|name| self.path.with_file_name(name));
        let beside = beside.filter(|path| *path != recorded);
        let mut found = Vec::new();
        for path in iter::once(recorded).chain(beside) {
            match Snapshot::open_alone(&path, 0) {
                Ok(snapshot) if snapshot.id() == Some(base.id) => return Ok(snapshot),
                Ok(snapshot) => found.push(match snapshot.id() {
                    Some(id) => format!("{} has the id {id}", path.display()),
                    None => format!("{} has none: QEMU wrote it", path.display()),
                }),
                Err(SnapshotError::Open { source, .. }) => {
                    found.push(format!("{}: {source}", path.display()));
                }
                Err(error) => found.push(error.to_string()),
            }
        }
        let (path, id, found) = (self.path.clone(), base.id, found.join("; "));
        Err(SnapshotError::BaseMissing { path, id, found })
    }

    /// Returns the file that has the pages that this one lacks; `None` if this one is not thin, or was
    /// opened alone.
    #[must_use]
    pub fn base(&self) -> Option<&Snapshot> {
        self.base.as_deref()
    }

    /// Whether this is the file at `path`, by whatever name.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let ours = self.file.metadata().map(identity).ok();
        ours.is_some() && ours == fs::metadata(path).map(identity).ok()
    }

    /// Returns how many files are below this one.
    #[must_use]
    pub fn files_below(&self) -> usize {
        self.chain().count() - 1
    }

    /// Returns this file and those below it, downwards.
    pub fn chain(&self) -> impl Iterator<Item = &Snapshot> {
        iter::successors(Some(self), |file| file.base())
    }

    /// Returns the number of the block that is `block` in this file, if it has the same name, length and
    /// page size there.
    #[must_use]
    pub fn block_number(&self, block: &RamBlock) -> Option<usize> {
        self.structure.blocks.iter().position(|placed| placed.block == *block)
    }

    /// Returns the file's identity; `None` if QEMU wrote it.
    #[must_use]
    pub fn id(&self) -> Option<SnapshotId> {
        self.manifest.as_ref().map(|manifest| manifest.footer.id())
    }

    /// Returns the key of the page hashes.
    #[must_use]
    pub fn key(&self) -> HashKey {
        let seed = self.manifest.as_ref().map(|manifest| manifest.meta.page_hash_seed);
        seed.map_or(HashKey::NONE, HashKey::new)
    }

    /// Reads which pages of each block the base has; `None` if the file is not thin.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn base_pages(&self) -> Result<Option<Vec<PageBitmap>>, SnapshotError> {
        let table = self.manifest.as_ref().and_then(|manifest| manifest.meta.base_pages());
        let Some(table) = table else { return Ok(None) };
        let bytes = self.read(table.offset, table.bytes)?;
        let blocks: Vec<_> =
            self.structure.blocks.iter().map(|placed| placed.block.page_count()).collect();
        Ok(Some(decode_base_pages(&bytes, &blocks).expect("`Meta::check` compared the length")))
    }

    /// Reads which pages of `block` are in the file.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn bitmap(&self, block: &PlacedBlock) -> Result<PageBitmap, SnapshotError> {
        let bytes = self.read(block.bitmap_offset, block.bitmap_len())?;
        let bitmap = PageBitmap::decode(&bytes, block.block.page_count());
        Ok(bitmap.expect("as many bytes as the bitmap has"))
    }

    /// Reads the device sections from the first to EOF.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn device_state(&self) -> Result<Vec<u8>, SnapshotError> {
        let state = &self.structure.device_state;
        self.read(state.start, state.end - state.start)
    }

    /// Compares every part of the file and of those below it that has a checksum, which is everything
    /// but pages, their hashes and zeros, with that checksum. A file that QEMU wrote has none.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::DamagedPart`] for the first part that is not what was written, and
    /// [`SnapshotError::Read`] if the kernel refuses.
    pub fn verify_parts(&self) -> Result<(), SnapshotError> {
        let parts = |manifest: &'_ Manifest| {
            let meta = &manifest.meta;
            meta.extents.iter().chain(meta.base_pages()).cloned().collect::<Vec<_>>()
        };
        for extent in self.manifest.iter().flat_map(parts) {
            let found = self.checksum(&extent)?;
            if !extent.has_hash(found) {
                return Err(SnapshotError::DamagedPart {
                    path: self.path.clone(),
                    what: extent.what.clone(),
                    offset: extent.offset,
                    found: format!("{found:032x}"),
                    expected: extent.xxh3_128.clone(),
                });
            }
        }
        self.base().map_or(Ok(()), Snapshot::verify_parts)
    }

    /// Returns the checksum of the bytes that lie in `extent`, which are read in pieces: the bitmap
    /// of a large block takes megabytes.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn checksum(&self, extent: &ExtentMeta) -> Result<u128, SnapshotError> {
        /// A length in bytes that fits into a processor's cache.
        const PIECE_LEN: u64 = 256 << 10;
        let mut hasher = RunningHash::new();
        let mut buffer = vec![0; in_memory(extent.bytes.min(PIECE_LEN))];
        for piece in pieces(extent.offset..extent.offset + extent.bytes, PIECE_LEN) {
            let bytes = &mut buffer[..in_memory(piece.end - piece.start)];
            read_into(&self.path, &self.file, piece.start, bytes)?;
            hasher.write(bytes);
        }
        Ok(hasher.finish())
    }

    /// Returns which program wrote the file.
    #[must_use]
    pub fn format(&self) -> FileFormat {
        if self.manifest.is_some() { FileFormat::Vmfile } else { FileFormat::MappedRam }
    }

    /// Returns the file's path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the file's length when it was opened, in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// Returns what QEMU reads of the file, without the pages.
    #[must_use]
    pub fn structure(&self) -> &MappedRamFile {
        &self.structure
    }

    /// Returns what vmfile appended, or `None` if QEMU wrote the file.
    #[must_use]
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// Reads `len` bytes at `offset`; both come from a structure that was checked.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, SnapshotError> {
        read_at(&self.path, &self.file, offset, in_memory(len))
    }

    /// Reads `bytes` at `offset`, which comes from a structure that was checked.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn read_into(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SnapshotError> {
        read_into(&self.path, &self.file, offset, bytes)
    }
}

impl SnapshotError {
    /// Converts an error in the bytes of the file at `path`.
    fn format(path: &Path, source: FormatError) -> SnapshotError {
        let path = path.to_path_buf();
        if source.is_of_newer_version() {
            SnapshotError::Newer { path, source }
        } else {
            SnapshotError::Format { path, source }
        }
    }
}

fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("the structure's limits fit into memory")
}

fn read_at(path: &Path, file: &File, offset: u64, len: usize) -> Result<Vec<u8>, SnapshotError> {
    let mut bytes = vec![0; len];
    read_into(path, file, offset, &mut bytes)?;
    Ok(bytes)
}

fn read_into(path: &Path, file: &File, offset: u64, bytes: &mut [u8]) -> Result<(), SnapshotError> {
    let (path, len) = (path.to_path_buf(), bytes.len());
    let read = file.read_exact_at(bytes, offset);
    read.map_err(|source| SnapshotError::Read { path, offset, len, source })
}

fn read_structure(
    path: &Path,
    file: &File,
    len: u64,
    start: u64,
) -> Result<MappedRamFile, SnapshotError> {
    let read = |offset, len| read_at(path, file, offset, len);
    MappedRamFile::read(start, len, read).map_err(|error| match error {
        ReadError::Format(source) => SnapshotError::format(path, source),
        ReadError::Source(error) => error,
    })
}

fn read_manifest(path: &Path, file: &File, len: u64) -> Result<Option<Manifest>, SnapshotError> {
    let format = |source| SnapshotError::format(path, source);
    let footer_offset = len.saturating_sub(FOOTER_LEN);
    let footer_len = usize::try_from(len - footer_offset).expect("at most FOOTER_LEN");
    let footer = read_at(path, file, footer_offset, footer_len)?;
    let Some(footer) = Footer::decode(&footer, len).map_err(format)? else { return Ok(None) };
    let metadata_len = usize::try_from(footer.metadata_len).expect("at most MANIFEST_LEN_MAX");
    let bytes = read_at(path, file, footer.metadata_offset, metadata_len)?;
    let meta = Meta::decode(&bytes, &footer).map_err(format)?;
    Ok(Some(Manifest { footer, meta }))
}

/// Makes the kernel read all small parts at once: they lie all over the file, and one after the
/// other they would take milliseconds.
fn ask_for_parts(file: &File, parts: &[ExtentMeta]) {
    for part in parts.iter().filter(|part| part.bytes <= WINDOW_LEN) {
        // An error does not matter here: the part is read later, and that read reports it.
        let _ = begin_reading(file.as_fd(), part.offset..part.offset.saturating_add(part.bytes));
    }
}

/// Compares the manifest with the structure. Without a manifest, returns an error if vmfile wrote
/// the file.
fn check_manifest(
    path: &Path,
    file: &File,
    len: u64,
    structure: &MappedRamFile,
    manifest: Option<&Manifest>,
) -> Result<(), SnapshotError> {
    match manifest {
        Some(Manifest { footer, meta }) => {
            meta.check(structure, footer).map_err(|source| SnapshotError::format(path, source))
        }
        // Without its end, a thin file would be a file of zeros.
        None if structure.has_feature(THIN) || is_ours(path, file, structure)? => {
            let offset = len.saturating_sub(FOOTER_LEN);
            Err(SnapshotError::LostEnd { path: path.to_path_buf(), offset })
        }
        None => Ok(()),
    }
}

/// Returns whether vmfile wrote the file: then a footer must be there.
fn is_ours(path: &Path, file: &File, structure: &MappedRamFile) -> Result<bool, SnapshotError> {
    let Some(offset) = structure.blocks.first().and_then(PlacedBlock::mark_offset) else {
        return Ok(false);
    };
    Ok(read_at(path, file, offset, MARK.len())? == MARK)
}
