//! A file in the making: where everything goes, and the parts around RAM.
//!
//! The caller writes the pages. This module writes everything before, between and after them, once
//! the caller knows which pages have data.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use vmfile_engine::{
    DataFile, DirectIo, DirectIoInUse, Durable, HashKey, PublishError, Unpublished, drop_cached,
};
use vmfile_format::limits::FILE_LEN_MAX;
use vmfile_format::manifest::features::{PAGE_HASH_SEED, THIN};
use vmfile_format::manifest::{
    BASE_PAGES, BaseMeta, BlockMeta, CpuSectionMeta, ExtentMeta, Features, Meta, SnapshotId,
    VmMeta, encode_base_pages, place_tables,
};
use vmfile_format::mapped_ram::{MARK, MappedRamLayout, PlacedBlock};
use vmfile_format::page_bitmap::encoded_len;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::device_state::DeviceState;
use vmfile_format::{PageBitmap, RamBlock, RamLayout};

use crate::base::{Base, KeptPages};
use crate::error::PagesError;
use crate::proof::{prove, prove_base};
use crate::received_ram::empty;
use crate::snapshot::{Snapshot, SnapshotError};

/// A file that has no name yet. If it is dropped, nothing is left of it.
#[derive(Debug)]
pub struct Draft {
    unpublished: Unpublished,
    file: DataFile,
    /// Set once pages of a base are kept.
    base: OnceLock<Arc<Base>>,
}

/// A complete file that is on the disk, was read back, and has no name yet. If it is dropped,
/// nothing is left of it.
#[derive(Debug)]
pub struct Proven {
    durable: Durable,
    file: DataFile,
    id: SnapshotId,
}

/// The places of everything in a draft.
#[derive(Debug)]
pub struct FileLayout {
    layout: MappedRamLayout,
    tables: HashTables,
    base: Option<Arc<Base>>,
    /// The number that each block has in the base, if it is the same there.
    in_base: Vec<Option<usize>>,
}

/// The places of what vmfile appends: tables of page hashes, one for each block, and metadata.
#[derive(Debug)]
pub struct HashTables {
    ram: RamLayout,
    /// File offsets of the tables.
    hashes: Vec<u64>,
    /// The key of the hashes.
    key: HashKey,
    /// The file that has the pages that a thin one lacks.
    base: Option<BaseMeta>,
    /// File offset of the table of these pages.
    base_pages: Option<u64>,
    end: u64,
}

/// What follows RAM.
#[derive(Clone, Copy, Debug)]
pub struct StreamTail<'a> {
    /// The parts of sections other than "ram" where there are any, and the device sections to EOF.
    pub sections: &'a [u8],
    /// What follows them in the stream: the VM description, or nothing.
    pub description: &'a [u8],
    /// Where each section is, if QEMU wrote them; used to find the CPUs' registers.
    pub state: Option<&'a DeviceState>,
}

/// The parts of the stream that the manifest lists.
#[derive(Debug, Default)]
pub struct StreamParts {
    /// Those that a checksum covers.
    pub extents: Vec<ExtentMeta>,
    /// Tables behind those of the page hashes.
    pub tables: Vec<ExtentMeta>,
    /// The CPUs' registers.
    pub cpu_sections: Vec<CpuSectionMeta>,
}

/// What the manifest says of a save, besides the places.
#[derive(Debug)]
pub struct SaveFacts {
    /// The route by which RAM was taken.
    pub route: String,
    /// Whether the guest ran while it was saved; `None` if that is not known.
    pub live: Option<bool>,
    /// How long the guest was paused; `None` if that is not known.
    pub pause_seconds: Option<f64>,
    /// When the VM was saved, in seconds since 1970-01-01 UTC; `None`: now.
    pub saved_at_unix_seconds: Option<u64>,
    /// The VM.
    pub vm: VmMeta,
}

impl Draft {
    /// Takes a new file; `direct_io` says whether it is written past the page cache.
    ///
    /// # Errors
    ///
    /// Returns [`PagesError`] if the file cannot be opened once more, or if direct I/O is required
    /// and the file system has none.
    pub fn new(unpublished: Unpublished, direct_io: DirectIo) -> Result<Draft, PagesError> {
        let open = PagesError::writing("the new file");
        let file = unpublished.file().try_clone().map_err(&open)?;
        let file = DataFile::new(file, direct_io).map_err(open)?;
        Ok(Draft { unpublished, file, base: OnceLock::new() })
    }

    /// Returns the file.
    pub fn file(&self) -> &DataFile {
        &self.file
    }

    /// Sets the file's length up to the metadata, because writes that extend a file wait for one
    /// another (ext4, XFS).
    ///
    /// # Errors
    ///
    /// Returns [`PagesError`] if the file system refuses.
    pub fn reserve(&self, tables: &HashTables) -> Result<(), PagesError> {
        let set = self.file.buffered().set_len(tables.end);
        set.map_err(PagesError::writing("the length of the file"))
    }

    /// Takes the base of `places`, if it has one, and shares its pages where they can be shared: those
    /// that have changed are then written over.
    ///
    /// # Errors
    ///
    /// Returns [`PagesError`] if the file system refuses.
    pub fn take_base(&self, places: &FileLayout) -> Result<(), PagesError> {
        let Some(base) = &places.base else { return Ok(()) };
        let base = self.base.get_or_init(|| Arc::clone(base));
        if *base.kept() != KeptPages::Shared {
            return Ok(());
        }
        for (number, placed) in places.blocks().iter().enumerate() {
            if let Some(theirs) = places.in_base(number) {
                let shared = base.share(theirs, &self.file, placed);
                shared.map_err(PagesError::writing("the pages of the base"))?;
            }
        }
        Ok(())
    }

    /// Empties the places of pages that are zero and were shared with the base.
    fn empty_shared(&self, places: &FileLayout, bitmaps: &[PageBitmap]) -> Result<(), PagesError> {
        let Some(base) = places.base().filter(|base| *base.kept() == KeptPages::Shared) else {
            return Ok(());
        };
        for (number, (placed, bitmap)) in places.blocks().iter().zip(bitmaps).enumerate() {
            let Some(theirs) = places.in_base(number) else { continue };
            let page_len = placed.block.page_size().bytes();
            for run in base.bitmap(theirs).without(bitmap).data_runs() {
                let at = |page: u64| placed.pages_offset + page * page_len;
                let emptied = empty(&self.file, at(run.start.0)..at(run.end.0));
                emptied.map_err(PagesError::writing("the places of zero pages"))?;
            }
        }
        Ok(())
    }

    /// Writes everything but RAM and its hashes.
    ///
    /// `bitmaps` says which pages of each block have data. `of_base` says which of them are those of the
    /// base; it is empty if there is none.
    ///
    /// # Errors
    ///
    /// Returns [`PagesError`] if a part cannot be written.
    pub fn finish(
        &self,
        places: &FileLayout,
        (bitmaps, of_base): (&[PageBitmap], &[PageBitmap]),
        tail: StreamTail<'_>,
        facts: SaveFacts,
    ) -> Result<(), PagesError> {
        self.empty_shared(places, bitmaps)?;
        let mut extents = Vec::new();
        let mut put = |what: &'static str, offset: u64, bytes: &[u8]| {
            extents.push(ExtentMeta::of(what, offset, bytes));
            self.put(what, offset, bytes)
        };
        put("head", 0, &places.layout.encode_head())?;
        if let Some(offset) = places.blocks().first().and_then(PlacedBlock::mark_offset) {
            put("mark", offset, MARK)?;
        }
        for (placed, bitmap) in places.blocks().iter().zip(bitmaps) {
            put("record", placed.record_offset, &placed.encode_record())?;
            put("bitmap", placed.bitmap_offset, &bitmap.encode())?;
        }
        let start = places.layout.device_state_offset();
        let find = |state: &DeviceState| CpuSectionMeta::find(state, start + state.parts_len());
        let cpu_sections = tail.state.map(find).unwrap_or_default();
        let (offset, mut sections) = places.layout.encode_end();
        sections.extend_from_slice(tail.sections);
        put("device_state", offset, &sections)?;
        let mut stream_end = offset + sections.len() as u64;
        if !tail.description.is_empty() {
            put("vm_description", stream_end, tail.description)?;
            stream_end += tail.description.len() as u64;
        }
        let mut tables = Vec::new();
        if let Some(offset) = places.tables.base_pages {
            let bytes = encode_base_pages(of_base);
            tables.push(ExtentMeta::of(BASE_PAGES, offset, &bytes));
            self.put(BASE_PAGES, offset, &bytes)?;
        }
        let parts = StreamParts { extents, tables, cpu_sections };
        self.put_manifest(&places.tables, stream_end, bitmaps, parts, facts)
    }

    /// Writes metadata and footer after the tables. QEMU may have written the rest of the file.
    ///
    /// # Errors
    ///
    /// Returns [`PagesError`] if they cannot be written.
    pub fn put_manifest(
        &self,
        tables: &HashTables,
        stream_end: u64,
        bitmaps: &[PageBitmap],
        parts: StreamParts,
        facts: SaveFacts,
    ) -> Result<(), PagesError> {
        let meta = tables.meta(facts, bitmaps, parts);
        self.put("manifest", tables.end, &meta.encode(stream_end, tables.end))
    }

    /// Writes a part of the file that is no page; errors call it `what`.
    ///
    /// # Errors
    ///
    /// Returns [`PagesError`] if it cannot be written.
    pub fn put(&self, what: &'static str, offset: u64, bytes: &[u8]) -> Result<(), PagesError> {
        let put = self.file.buffered().write_all_at(bytes, offset);
        put.map_err(PagesError::writing(what))
    }

    /// Reads the structure of the file, which another program wrote.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::open`].
    pub fn snapshot(&self) -> Result<Snapshot, SnapshotError> {
        let path = self.unpublished.path();
        let open = |source| SnapshotError::Open { path: path.to_path_buf(), source };
        let file = self.unpublished.file().try_clone().map_err(open)?;
        Snapshot::from_file(path, file, 0)
    }

    /// Makes the file durable and reads it back: from the disk, if it was written past the page
    /// cache.
    ///
    /// # Errors
    ///
    /// Returns [`PagesError`] if the file is not what was written; nothing is left of it then.
    pub fn prove(self) -> Result<Proven, PagesError> {
        let durable = self.unpublished.make_durable()?;
        forget_cached(&self.file);
        let (path, file) = (durable.path(), durable.file().try_clone());
        let open = |source| SnapshotError::Open { path: path.to_path_buf(), source };
        let file = file.map_err(open).map_err(PagesError::NotAsWritten)?;
        let snapshot = Snapshot::from_file(path, file, 0).map_err(PagesError::NotAsWritten)?;
        // First, because a page that is shared and damaged was damaged in the base.
        self.base.get().map_or(Ok(()), |base| prove_base(&snapshot, base))?;
        prove(&snapshot)?;
        let id = snapshot.id().ok_or(PagesError::NoManifest)?;
        Ok(Proven { durable, file: self.file, id })
    }
}

impl Proven {
    /// Gives the file its name.
    ///
    /// # Errors
    ///
    /// As [`Durable::publish`].
    pub fn publish(self) -> Result<(), PublishError> {
        forget_cached(&self.file);
        self.durable.publish().map(drop)
    }

    /// Returns the file's identity.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }
}

/// Drops the file from the page cache, if it was written by direct I/O.
fn forget_cached(file: &DataFile) {
    if matches!(file.direct(), DirectIoInUse::Yes { .. }) {
        // Only advice: if the kernel refuses, nothing is lost.
        let _ = drop_cached(file.as_fd(), 0..u64::MAX);
    }
}

impl FileLayout {
    /// Places the blocks of `ram`, after them at most `tail_len` bytes, and the tables of hashes.
    ///
    /// `section_id` is the id of the section "ram"; no device section may have the same.
    ///
    /// # Errors
    ///
    /// Returns [`PagesError`] if the file would be longer than the kernel allows.
    pub fn new(
        source: &Configuration,
        ram: RamLayout,
        section_id: u32,
        tail_len: u64,
    ) -> Result<FileLayout, PagesError> {
        FileLayout::on_base(source, ram, (section_id, tail_len), None)
    }

    /// Does the same for a file that keeps pages of `base`; `section_id` and `tail_len` are given as a
    /// pair.
    ///
    /// # Errors
    ///
    /// As [`FileLayout::new`].
    pub fn on_base(
        source: &Configuration,
        ram: RamLayout,
        (section_id, tail_len): (u32, u64),
        base: Option<Arc<Base>>,
    ) -> Result<FileLayout, PagesError> {
        let is_thin = base.as_ref().is_some_and(|base| *base.kept() != KeptPages::Shared);
        let features: &[&str] = if is_thin { &[THIN] } else { &[] };
        let layout = MappedRamLayout::with_features(source, ram.clone(), section_id, features);
        let layout = layout.map_err(PagesError::Layout)?;
        let stream_end = layout.device_state_offset().saturating_add(tail_len);
        let in_base = |block: &RamBlock| base.as_ref()?.snapshot().block_number(block);
        let in_base = ram.blocks().iter().map(in_base).collect();
        let mut tables = HashTables::new(ram, stream_end)?;
        if let Some(base) = &base {
            tables.key = base.snapshot().key();
        }
        if let Some(base) = base.as_ref().filter(|_| is_thin) {
            tables.add_base(base)?;
        }
        Ok(FileLayout { layout, tables, base, in_base })
    }

    /// Returns the file whose pages are kept.
    #[must_use]
    pub fn base(&self) -> Option<&Base> {
        self.base.as_deref()
    }

    /// Returns the number that block `number` has in the base, if it is the same there.
    pub(crate) fn in_base(&self, number: usize) -> Option<usize> {
        self.in_base[number]
    }

    /// Returns the key of the page hashes.
    #[must_use]
    pub fn key(&self) -> HashKey {
        self.tables.key
    }

    /// Returns the blocks and their places, in the order of the file.
    pub fn blocks(&self) -> &[PlacedBlock] {
        self.layout.blocks()
    }

    /// Returns the places of what follows the stream.
    pub fn tables(&self) -> &HashTables {
        &self.tables
    }

    /// Returns the file offsets of the tables of page hashes, one for each block.
    pub fn hashes(&self) -> &[u64] {
        self.tables.hashes()
    }

    /// Returns how many pages all blocks have.
    pub fn pages_total(&self) -> u64 {
        self.tables.pages_total()
    }
}

impl FileLayout {
    /// Returns how many bytes the pages have whose bits are set in `bitmaps`, one for each block.
    #[must_use]
    pub fn data_bytes(&self, bitmaps: &[PageBitmap]) -> u64 {
        let blocks = self.blocks().iter().zip(bitmaps);
        blocks
            .map(|(placed, bitmap)| bitmap.data_count().0 * placed.block.page_size().bytes())
            .sum()
    }
}

impl HashTables {
    /// Places the tables of the blocks of `ram` behind the stream.
    ///
    /// # Errors
    ///
    /// Returns [`PagesError::TooLong`] if the file would be longer than the kernel allows.
    pub fn new(ram: RamLayout, stream_end: u64) -> Result<HashTables, PagesError> {
        let pages: Vec<_> = ram.blocks().iter().map(RamBlock::page_count).collect();
        let (hashes, end) = place_tables(stream_end, &pages).ok_or(PagesError::TooLong)?;
        let key = HashKey::random().map_err(PagesError::reading("the kernel's random numbers"))?;
        Ok(HashTables { ram, hashes, key, base: None, base_pages: None, end })
    }

    /// Adds the table of the pages that `base` has.
    fn add_base(&mut self, base: &Base) -> Result<(), PagesError> {
        self.base = Some(base.meta());
        self.base_pages = Some(self.end);
        let len = |block: &RamBlock| encoded_len(block.page_count());
        let len = self.ram.blocks().iter().map(len).sum();
        let end = self.end.checked_add(len).filter(|&end| end <= FILE_LEN_MAX);
        self.end = end.ok_or(PagesError::TooLong)?;
        Ok(())
    }

    /// Returns the key of the page hashes.
    #[must_use]
    pub fn key(&self) -> HashKey {
        self.key
    }

    /// Returns the file offsets of the tables, one for each block.
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// Returns how many pages all blocks have.
    pub fn pages_total(&self) -> u64 {
        self.ram.blocks().iter().map(|block| block.page_count().0).sum()
    }

    fn block_metas(&self, bitmaps: &[PageBitmap]) -> Vec<BlockMeta> {
        let blocks = self.ram.blocks().iter().zip(bitmaps).zip(&self.hashes);
        let block = |((block, bitmap), &hashes_offset): ((&RamBlock, &PageBitmap), _)| BlockMeta {
            name: block.name().to_owned(),
            bytes: block.used_length(),
            pages_data: bitmap.data_count().0,
            hashes_offset,
        };
        blocks.map(block).collect()
    }

    fn meta(&self, facts: SaveFacts, bitmaps: &[PageBitmap], parts: StreamParts) -> Meta {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut incompatible = vec![PAGE_HASH_SEED.to_owned()];
        incompatible.extend(self.base.as_ref().map(|_| THIN.to_owned()));
        Meta {
            vmfile_version: env!("CARGO_PKG_VERSION").to_owned(),
            saved_at_unix_seconds: facts.saved_at_unix_seconds.unwrap_or(now.as_secs()),
            route: facts.route,
            live: facts.live,
            pause_seconds: facts.pause_seconds,
            vm: facts.vm,
            blocks: self.block_metas(bitmaps),
            extents: parts.extents,
            features: Features { incompatible, ..Features::default() },
            tables: parts.tables,
            cpu_sections: parts.cpu_sections,
            working_set_known: false,
            page_hash_seed: self.key.seed(),
            base: self.base.clone(),
        }
    }
}
