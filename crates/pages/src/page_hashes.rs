//! The recorded hashes of a file's pages. A file that QEMU wrote has none.

use vmfile_engine::{HashKey, page_hash};
use vmfile_format::manifest::{HASH_LEN, encode_hash};
use vmfile_format::{PageBitmap, PageIndex};

use crate::plan::UNIT_LEN;
use crate::snapshot::{Snapshot, SnapshotError};

/// The recorded hash of a page; zeros for a zero page.
pub type Hash = [u8; 16];

/// The hash of a page that has none: a zero page.
pub const NO_HASH: Hash = [0; 16];
const _: () = assert!(NO_HASH.len() as u64 == HASH_LEN);

/// The recorded hashes of a file's pages, read a unit of 16 MiB at a time.
///
/// Each worker has its own, and should take all pages of a unit one after another: each part of the
/// hash tables is then read only once.
#[derive(Debug)]
pub struct PageHashes<'a> {
    snapshot: &'a Snapshot,
    /// The block and the number of the unit whose hashes are in `bytes`.
    unit: Option<(usize, u64)>,
    bytes: Vec<u8>,
}

impl<'a> PageHashes<'a> {
    /// Returns the hashes of `snapshot`, of which none has been read yet.
    pub fn new(snapshot: &'a Snapshot) -> PageHashes<'a> {
        PageHashes { snapshot, unit: None, bytes: Vec::new() }
    }

    /// Returns the hash of a page of a block whose pages with data are those of `bitmap`; zeros for a zero
    /// page.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub(crate) fn in_file(
        &mut self,
        block: usize,
        bitmap: &PageBitmap,
        page: PageIndex,
    ) -> Result<Hash, SnapshotError> {
        if bitmap.contains(page) {
            Ok(self.recorded(block, page)?.unwrap_or_default())
        } else {
            Ok(NO_HASH)
        }
    }

    /// Returns the hash that the file records of a page; `None` in a file that QEMU wrote.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn recorded(
        &mut self,
        block: usize,
        page: PageIndex,
    ) -> Result<Option<Hash>, SnapshotError> {
        let Some(manifest) = self.snapshot.manifest() else { return Ok(None) };
        let ram_block = &self.snapshot.structure().blocks[block].block;
        let pages_in_unit = UNIT_LEN / ram_block.page_size().bytes();
        let unit = page.0 / pages_in_unit;
        if self.unit != Some((block, unit)) {
            let first = unit * pages_in_unit;
            let pages = pages_in_unit.min(ram_block.page_count().0 - first);
            let offset = manifest.meta.blocks[block].hashes_offset + first * HASH_LEN;
            self.bytes = self.snapshot.read(offset, pages * HASH_LEN)?;
            self.unit = Some((block, unit));
        }
        let index = usize::try_from((page.0 % pages_in_unit) * HASH_LEN).expect("64 KiB");
        Ok(Some(Hash::try_from(&self.bytes[index..index + 16]).expect("16 bytes")))
    }
}

/// Says that a page, or its hash, is not what was written.
pub fn damaged_page(snapshot: &Snapshot, block: usize, page: PageIndex) -> SnapshotError {
    let placed = &snapshot.structure().blocks[block];
    SnapshotError::DamagedPage {
        path: snapshot.path().to_path_buf(),
        block: placed.block.name().to_owned(),
        page: page.0,
        offset: placed.page_offset(page).unwrap_or(u64::MAX),
    }
}

/// Whether `bytes` are the page whose hash was recorded.
pub fn is_page(bytes: &[u8], recorded: Hash, key: HashKey) -> bool {
    encode_hash(page_hash(bytes, key)) == recorded
}
