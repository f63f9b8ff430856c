//! A saved VM as a file: opened once, its structure checked, its pages not yet read.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::iter;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::Serialize;
use vmfile_engine::{DataSeeker, HashKey, RunningHash, available_memory, begin_reading, is_zero};
use vmfile_format::limits::{CHAIN_LEN_MAX, FILE_LEN_MAX, MANIFEST_LEN_MAX};
use vmfile_format::manifest::features::THIN;
use vmfile_format::manifest::{
    BaseMeta, ExtentMeta, FOOTER_LEN, FOOTER_MAGIC, Footer, Meta, SnapshotId, decode_base_pages,
    place_tables,
};
use vmfile_format::mapped_ram::{MARK, MappedRamFile, PlacedBlock};
use vmfile_format::page_bitmap::encoded_len;
use vmfile_format::{PageBitmap, PageCount, RamBlock, ReadError};

use crate::plan::{WINDOW_LEN, in_window, pieces};
pub use crate::snapshot_error::SnapshotError;

/// Bitmaps that fit into memory whatever the host says of it: those of 256 GiB of RAM.
const SMALL_BITMAPS_LEN: u64 = 32 << 20;

/// How far behind the page hashes the end of a padded file is looked for: the metadata, and the table of a
/// thin file with 1 TiB of RAM.
const PADDED_SEARCH_LEN: u64 = MANIFEST_LEN_MAX + (32 << 20);

/// A file that holds a saved VM: a vmfile, or a mapped-ram file that QEMU wrote.
///
/// A value of this type has a structure that was checked from end to end; its pages were not read.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    file: File,
    len: u64,
    /// Its length with the zeros that a copy has added.
    padded_len: u64,
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
        let is_file = |metadata: Metadata| match metadata.is_file() {
            true => Ok(()),
            false => Err(SnapshotError::NotAFile { path: path.to_path_buf() }),
        };
        // To open a device may have effects. A pipe that takes the file's place before it is opened must
        // not wait for its other end.
        is_file(path.metadata().map_err(open)?)?;
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("a flag");
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(open)?;
        is_file(file.metadata().map_err(open)?)?;
        Snapshot::from_file(path, file, start)
    }

    /// Does the same with a file that is open for reading, and is called `path` in errors.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::open`].
    pub fn from_file(path: &Path, file: File, start: u64) -> Result<Snapshot, SnapshotError> {
        let open = |source| SnapshotError::Open { path: path.to_path_buf(), source };
        let padded_len = file.metadata().map_err(open)?.len().min(FILE_LEN_MAX);
        let mut len = padded_len;
        // The manifest comes first: a file of a newer version of vmfile may look damaged, and only
        // its manifest names the reason.
        let mut manifest = read_manifest(path, &file, len)?;
        if let Some(manifest) = &manifest {
            ask_for_parts(&file, &manifest.meta.extents);
        }
        let structure = read_structure(path, &file, len, start)?;
        if manifest.is_none() {
            (manifest, len) = read_padded(path, &file, len, &structure)?;
        }
        check_manifest(path, &file, len, &structure, manifest.as_ref())?;
        let path = path.to_path_buf();
        Ok(Snapshot { path, file, len, padded_len, structure, manifest, base: None })
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

    /// Counts the pages of `block` that are in the file, or in a base of it. It reads no hole of the
    /// bitmap, and holds a small part of it at a time.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn count_data(&self, block: &PlacedBlock) -> Result<u64, SnapshotError> {
        self.count_bits(block.bitmap_offset, block.block.page_count())
    }

    /// Counts the pages that the base has, as [`Snapshot::count_data`] does; `None` if the file is not
    /// thin.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn count_in_base(&self) -> Result<Option<u64>, SnapshotError> {
        let table = self.manifest.as_ref().and_then(|manifest| manifest.meta.base_pages());
        let Some(table) = table else { return Ok(None) };
        let (mut offset, mut count) = (table.offset, 0);
        for placed in &self.structure.blocks {
            count += self.count_bits(offset, placed.block.page_count())?;
            offset += placed.bitmap_len();
        }
        Ok(Some(count))
    }

    fn count_bits(&self, offset: u64, pages: PageCount) -> Result<u64, SnapshotError> {
        /// A length in bytes, of whole words.
        const PIECE_LEN: usize = 1 << 20;
        let len = encoded_len(pages);
        let failed = |source| {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            SnapshotError::Read { path: self.path.clone(), offset, len, source }
        };
        let seeker = DataSeeker::open(self.file.as_fd()).map_err(failed)?;
        let mut count = 0;
        let mut rest = offset..offset + len;
        while let Some(data) = seeker.next(&rest).map_err(failed)? {
            // Whole words of the bitmap.
            let first = (data.start - offset) / 8 * 8;
            let end = (data.end - offset).next_multiple_of(8).min(len);
            rest.start = offset + end;
            for start in (first..end).step_by(PIECE_LEN) {
                let bytes = self.read(offset + start, (end - start).min(PIECE_LEN as u64))?;
                let pages = PageCount((pages.0 - start * 8).min(bytes.len() as u64 * 8));
                let bitmap = PageBitmap::decode(&bytes, pages).expect("whole words");
                count += bitmap.data_count().0;
            }
        }
        Ok(count)
    }

    /// Makes sure that the bitmaps of all blocks fit into memory, `copies` times: a file of a few KiB
    /// may say that it has any number of blocks of 64 TiB.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::TooMuchRam`] if they would take more than half of what the host has left.
    pub(crate) fn check_bitmaps_fit(&self, copies: u64) -> Result<(), SnapshotError> {
        let blocks = &self.structure.blocks;
        let bitmaps = blocks.iter().fold(0_u64, |sum, one| sum.saturating_add(one.bitmap_len()));
        let needed = bitmaps.saturating_mul(copies);
        if needed <= SMALL_BITMAPS_LEN {
            return Ok(());
        }
        let available = available_memory();
        if needed <= available / 2 {
            return Ok(());
        }
        let ram = blocks.iter().fold(0_u64, |sum, one| sum.saturating_add(one.block.used_length()));
        Err(SnapshotError::TooMuchRam { path: self.path.clone(), ram, needed, available })
    }

    /// Reads what is no RAM: the parts of sections other than "ram", and the device sections to EOF.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn device_state(&self) -> Result<Vec<u8>, SnapshotError> {
        let state = &self.structure.device_state;
        let mut bytes = Vec::new();
        for &(offset, len) in state.parts.iter().chain([&(state.start, state.end - state.start)]) {
            bytes.extend(self.read(offset, len)?);
        }
        Ok(bytes)
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

    /// Returns the file's length with the zeros that a copy has added behind its end.
    pub(crate) fn padded_len(&self) -> u64 {
        self.padded_len
    }

    /// Returns the file's length when it was opened, in bytes; zeros that a copy has added behind its end
    /// do not count.
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

/// Finds the manifest of a file that a copy has padded with zeros, to whole blocks or to the length of a
/// disk: `qemu-img convert` does so, and a copy to a block device and back. Returns it with the length
/// that the file had; otherwise nothing, and `len`.
fn read_padded(
    path: &Path,
    file: &File,
    len: u64,
    structure: &MappedRamFile,
) -> Result<(Option<Manifest>, u64), SnapshotError> {
    let is_zero_from = |start: u64| {
        let start = start.max(len.saturating_sub(4096));
        read_at(path, file, start, in_window(len - start)).map(|bytes| is_zero(&bytes))
    };
    let pages: Vec<PageCount> = structure.blocks.iter().map(|one| one.block.page_count()).collect();
    let tables = place_tables(structure.device_state.stream_end, &pages);
    let Some((_, tables_end)) = tables.filter(|(_, end)| *end < len.saturating_sub(FOOTER_LEN))
    else {
        return Ok((None, len));
    };
    if !is_zero_from(len - 1)? {
        return Ok((None, len));
    }
    // The table of the base's pages, and the metadata.
    let end = len.min(tables_end.saturating_add(PADDED_SEARCH_LEN));
    for piece in pieces(tables_end..end, WINDOW_LEN) {
        // A footer may begin in one piece and end in the next.
        let piece_end = piece.end.saturating_add(FOOTER_LEN).min(len);
        let bytes = read_at(path, file, piece.start, in_window(piece_end - piece.start))?;
        let starts = bytes.windows(FOOTER_MAGIC.len()).enumerate();
        for (start, _) in starts.filter(|(_, found)| *found == FOOTER_MAGIC) {
            let own_len = piece.start + start as u64 + FOOTER_LEN;
            // The file was cut within its footer.
            if own_len > len {
                continue;
            }
            match read_manifest(path, file, own_len) {
                Ok(Some(manifest)) if is_zero_from(own_len)? => {
                    return Ok((Some(manifest), own_len));
                }
                // Bytes of a table that look like a footer.
                Ok(_) | Err(SnapshotError::Format { .. } | SnapshotError::Newer { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok((None, len))
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
