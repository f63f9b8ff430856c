//! The base of a new file: a file whose pages the new one keeps where they have not changed.

use std::io;
use std::os::fd::AsFd as _;

use vmfile_engine::{DataFile, limit_cow_extents, share_extents};
use vmfile_format::PageBitmap;
use vmfile_format::limits::CHAIN_LEN_MAX;
use vmfile_format::manifest::BaseMeta;
use vmfile_format::mapped_ram::PlacedBlock;

use crate::snapshot::{Snapshot, SnapshotError};

/// A file of which a new one keeps the pages that have not changed.
#[derive(Debug)]
pub struct Base {
    snapshot: Snapshot,
    /// Where a thin file looks for it.
    path: String,
    kept: KeptPages,
    /// The pages with data of each block of the base.
    bitmaps: Vec<PageBitmap>,
    /// Those of them that a new file may keep.
    usable: Vec<PageBitmap>,
}

/// How a new file has the pages of its base.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeptPages {
    /// The file system shares them: the new file is whole and needs no other.
    Shared,
    /// They are only in the base: the new file is thin.
    Thin {
        /// Why they are not shared.
        reason: String,
    },
}

/// Why a file cannot be a base.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaseError {
    /// QEMU wrote it, or an older version of vmfile.
    #[error("{path} cannot be a base: {reason}", path = path.display())]
    NotPossible {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// There are as many files below it as there may be.
    #[error(
        "{path} cannot be a base of a thin file: there are {CHAIN_LEN_MAX} files below, as many as \
         there may be",
        path = path.display()
    )]
    ChainTooLong {
        /// The file.
        path: std::path::PathBuf,
    },
    /// It cannot be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl Base {
    /// Takes `snapshot` as the base of `file`, a new file that is still empty. Its pages are shared
    /// where the file system does that, unless `is_thin` asks for a thin file.
    ///
    /// # Errors
    ///
    /// Returns [`BaseError`] if it cannot be a base.
    pub fn new(snapshot: Snapshot, file: &DataFile, is_thin: bool) -> Result<Base, BaseError> {
        let no = |reason| BaseError::NotPossible { path: snapshot.path().to_path_buf(), reason };
        let Some(manifest) = snapshot.manifest() else {
            return Err(no("QEMU wrote it, and its pages have no hashes"));
        };
        if manifest.meta.page_hash_seed == 0 {
            return Err(no(
                "its page hashes have no key, so that a guest could make two pages with one \
                           hash; `vmfile convert` makes a file that has one",
            ));
        }
        // Without symbolic links, which may lead to another file later.
        let path = snapshot.path().canonicalize().ok().filter(|path| snapshot.is_at(path));
        let Some(path) = path else {
            return Err(no("another file has its name by now, or none has"));
        };
        let Ok(path) = path.into_os_string().into_string() else {
            return Err(no("its path is not UTF-8, and a thin file keeps it as text"));
        };
        let kept = match sharing(&snapshot, file, is_thin) {
            Ok(()) => KeptPages::Shared,
            Err(reason) => KeptPages::Thin { reason },
        };
        if kept != KeptPages::Shared && snapshot.files_below() >= CHAIN_LEN_MAX {
            return Err(BaseError::ChainTooLong { path: snapshot.path().to_path_buf() });
        }
        let bitmap = |placed: &PlacedBlock| snapshot.bitmap(placed);
        let bitmaps = snapshot.structure().blocks.iter().map(bitmap);
        let bitmaps = bitmaps.collect::<Result<Vec<_>, _>>()?;
        let usable = bitmaps.clone();
        Ok(Base { snapshot, path, kept, bitmaps, usable })
    }

    /// Lets a new file keep only `pages`, a bitmap for each of some blocks, and none of other blocks.
    #[must_use]
    pub fn with_only(mut self, pages: &[(&PlacedBlock, &PageBitmap)]) -> Base {
        for (placed, usable) in self.snapshot.structure().blocks.iter().zip(&mut self.usable) {
            let found = pages.iter().find(|(found, _)| found.block == placed.block);
            *usable = match found {
                Some((_, pages)) => (*pages).clone(),
                None => PageBitmap::new(placed.block.page_count()),
            };
        }
        self
    }

    /// Returns the file.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Returns what a thin file keeps of it: its identity, and where to look for it.
    pub(crate) fn meta(&self) -> BaseMeta {
        let id = self.snapshot.id().expect("a base has a manifest");
        BaseMeta { id, path: self.path.clone() }
    }

    /// Returns how the new file has its pages.
    #[must_use]
    pub fn kept(&self) -> &KeptPages {
        &self.kept
    }

    /// Returns which pages of block `number` of the base have data.
    pub(crate) fn bitmap(&self, number: usize) -> &PageBitmap {
        &self.bitmaps[number]
    }

    /// Returns which pages of block `number` a new file may keep.
    pub(crate) fn usable(&self, number: usize) -> &PageBitmap {
        &self.usable[number]
    }

    /// Shares the pages of block `number` with `file`, where the block is `placed`.
    pub(crate) fn share(
        &self,
        number: usize,
        file: &DataFile,
        placed: &PlacedBlock,
    ) -> io::Result<()> {
        let ours = &self.snapshot.structure().blocks[number];
        let range = ours.pages_offset..ours.pages_end();
        share_extents(self.snapshot.file().as_fd(), range, file.as_fd(), placed.pages_offset)
    }
}

/// Tries whether pages of `base` can be shared with `file`; `Err` says why not.
fn sharing(base: &Snapshot, file: &DataFile, is_thin: bool) -> Result<(), String> {
    if is_thin {
        return Err("a thin file was asked for".to_owned());
    }
    if base.base().is_some() {
        return Err("the base is thin".to_owned());
    }
    let Some(placed) = base.structure().blocks.first() else {
        return Err("the base has no RAM".to_owned());
    };
    // As long as the blocks of any file system on a host with 4 KiB pages.
    let range = placed.pages_offset..placed.pages_offset + 4096.min(placed.block.used_length());
    let shared = share_extents(base.file().as_fd(), range, file.as_fd(), 0);
    let emptied = file.buffered().set_len(0);
    let no = |error| format!("the file system does not share pages: {error}");
    shared.and(emptied).map_err(no)?;
    // Without it, and with another file system than XFS, the file only takes more room for a while.
    let _ = limit_cow_extents(file.buffered().as_fd(), 4096);
    Ok(())
}
