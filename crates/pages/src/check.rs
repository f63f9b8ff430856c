//! `vmfile check`: structure, then every byte.
//!
//! Every byte of a vmfile is accounted for: a page has its hash, everything else that QEMU or
//! vmfile wrote has a checksum, and what is left must be zero. Damage is data: it is collected, and
//! only the inability to look is an error.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::PagesError;
use crate::control::Control;
use crate::findings::Findings;
pub use crate::findings::{Finding, FindingKind};
use crate::jobs::Jobs;
use crate::lane::Workers;
use crate::page_hashes::{Hash, PageHashes, is_page};
use crate::plan::{WINDOW_LEN, pieces};
use crate::reading::{as_text, open_for_reading};
use crate::snapshot::{FileFormat, Manifest, Snapshot, SnapshotError};
use crate::window_reader::{MorePlaces, Window, WindowReader};
use derive_setters::Setters;
use serde::{Serialize, Serializer};
use vmfile_engine::{
    Backend, BackendInUse, DataFile, DataSeeker, DirectIo, DirectIoInUse, is_zero,
};
use vmfile_format::manifest::{FOOTER_LEN, HASH_LEN};
use vmfile_format::{PageBitmap, PageIndex};

/// How a file is checked.
#[derive(Clone, Debug, Setters)]
#[non_exhaustive]
pub struct CheckOptions {
    /// Whether pages are read past the page cache. `Preferred` uses the cache if most of the file
    /// is in it.
    pub direct_io: DirectIo,
    /// What moves the bytes: `io_uring`, or threads.
    pub io: Backend,
    /// How many threads read and hash.
    pub jobs: Jobs,
}

impl Default for CheckOptions {
    fn default() -> CheckOptions {
        CheckOptions { direct_io: DirectIo::Preferred, io: Backend::Auto, jobs: Jobs::default() }
    }
}

/// What a check found.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CheckReport {
    /// `vmfile`, or `mapped-ram` for a file that QEMU wrote, whose pages have no hashes.
    pub format: FileFormat,
    /// What is wrong, in the order of the file; at most 1000 are listed.
    pub findings: Vec<Finding>,
    /// How many there are.
    pub findings_total: u64,
    /// Pages whose bytes were compared with their hash.
    pub pages_checked: u64,
    /// Whether direct I/O was used; if not, why.
    #[serde(serialize_with = "as_text")]
    pub direct_io: DirectIoInUse,
    /// What moved the bytes; `None` if no page was read.
    #[serde(serialize_with = "as_text_or_none")]
    pub io: Option<BackendInUse>,
    /// How long it took, in seconds.
    pub total_seconds: f64,
}

fn as_text_or_none<S: Serializer>(io: &Option<BackendInUse>, to: S) -> Result<S::Ok, S::Error> {
    match io {
        Some(io) => as_text(io, to),
        None => to.serialize_str("none"),
    }
}

/// Checks every byte of `snapshot`, and of the files below it.
///
/// # Errors
///
/// Returns [`PagesError`] if the check itself cannot be done; damage is a finding, not an error.
pub fn check(
    snapshot: &Snapshot,
    options: &CheckOptions,
    control: &Control<'_>,
) -> Result<CheckReport, PagesError> {
    let start = std::time::Instant::now();
    let mut findings = Findings::default();
    let mut report = CheckReport {
        format: snapshot.format(),
        findings: Vec::new(),
        findings_total: 0,
        pages_checked: 0,
        direct_io: DirectIoInUse::No { reason: "no page was read".to_owned() },
        io: None,
        total_seconds: 0.0,
    };
    match snapshot.manifest() {
        None => trailing_bytes(snapshot, &mut findings)?,
        Some(manifest) => {
            check_extents(snapshot, manifest, &mut findings)?;
            check_padding(snapshot, manifest, &mut findings)?;
            let pages = PageCheck::new(snapshot, manifest, options, control, &mut findings)?;
            report.direct_io = pages.direct_io.clone();
            let (pages_checked, backend) = pages.run(&mut findings)?;
            (report.pages_checked, report.io) = (pages_checked, Some(backend));
        }
    }
    findings.list.sort_by_key(|finding| finding.offset);
    if let Some(base) = snapshot.base() {
        let below = check(base, options, control)?;
        report.pages_checked += below.pages_checked;
        findings.append_below(base.path(), below.findings, below.findings_total);
    }
    report.findings_total = findings.total;
    report.findings = findings.list;
    report.total_seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Compares every page of `snapshot` and of the files below it, and every place that must be zero, with
/// its hash; a file that QEMU wrote has none.
///
/// # Errors
///
/// Returns [`SnapshotError::DamagedPage`] in [`PagesError::Snapshot`] for a page that is not what
/// was written, as soon as one is found; otherwise [`PagesError`] if the pages cannot be read.
pub fn verify_pages(
    snapshot: &Snapshot,
    options: &CheckOptions,
    control: &Control<'_>,
) -> Result<(), PagesError> {
    let Some(manifest) = snapshot.manifest() else { return Ok(()) };
    // The findings are discarded: they concern the bitmaps, which the caller verifies by their
    // checksums.
    let pages = PageCheck::new(snapshot, manifest, options, control, &mut Findings::default())?;
    pages.read(|checked, window, read| {
        pages.verify(window, read.map_err(PagesError::reading("the pages"))?, checked)?;
        checked.found.list.first().map_or(Ok(()), |found| Err(damaged(snapshot, found)))
    })?;
    snapshot.base().map_or(Ok(()), |base| verify_pages(base, options, control))
}

/// Makes an error of the finding that a page is wrong.
fn damaged(snapshot: &Snapshot, found: &Finding) -> PagesError {
    let path = snapshot.path().to_path_buf();
    let block = found.block.clone().unwrap_or_default();
    let (page, offset) = (found.page.unwrap_or_default(), found.offset);
    SnapshotError::DamagedPage { path, block, page, offset }.into()
}

/// Looks at what stands behind QEMU's last byte. Zeros are allowed: a copy may have added them.
fn trailing_bytes(snapshot: &Snapshot, findings: &mut Findings) -> Result<(), PagesError> {
    let end = snapshot.structure().device_state.stream_end;
    let mut found = Findings::default();
    check_zeros(snapshot, end..snapshot.padded_len(), &mut found)?;
    if found.total > 0 {
        findings.section(FindingKind::TrailingBytes, "after the stream", end);
    }
    Ok(())
}

fn check_extents(
    snapshot: &Snapshot,
    manifest: &Manifest,
    findings: &mut Findings,
) -> Result<(), PagesError> {
    for extent in manifest.meta.extents.iter().chain(&manifest.meta.tables) {
        if !extent.has_hash(snapshot.checksum(extent)?) {
            findings.section(FindingKind::Checksum, &extent.what, extent.offset);
        }
    }
    Ok(())
}

/// Looks at the bytes that belong to nothing: before pages, after tables, between parts.
fn check_padding(
    snapshot: &Snapshot,
    manifest: &Manifest,
    findings: &mut Findings,
) -> Result<(), PagesError> {
    let mut known: Vec<Range<u64>> = Vec::new();
    for extent in manifest.meta.extents.iter().chain(&manifest.meta.tables) {
        known.push(extent.offset..extent.offset + extent.bytes);
    }
    for (placed, meta) in snapshot.structure().blocks.iter().zip(&manifest.meta.blocks) {
        known.push(placed.pages_offset..placed.pages_end());
        // Up to the last hash: what follows it in the table is zero, like all padding.
        let hashes_len = placed.block.page_count().0 * HASH_LEN;
        known.push(meta.hashes_offset..meta.hashes_offset + hashes_len);
    }
    let metadata_end = snapshot.file_len().saturating_sub(FOOTER_LEN);
    known.push(manifest.footer.metadata_offset..metadata_end);
    known.push(metadata_end..snapshot.file_len());
    known.sort_by_key(|range| range.start);
    let mut end = 0;
    for range in known {
        if range.start > end {
            check_zeros(snapshot, end..range.start, findings)?;
        }
        end = end.max(range.end);
    }
    // A copy may have added zeros.
    check_zeros(snapshot, end..snapshot.padded_len(), findings)
}

fn check_zeros(
    snapshot: &Snapshot,
    range: Range<u64>,
    findings: &mut Findings,
) -> Result<(), PagesError> {
    let holes = PagesError::reading("the holes of the file");
    let seeker = DataSeeker::open(snapshot.file().as_fd()).map_err(&holes)?;
    let mut rest = range;
    while let Some(data) = seeker.next(&rest).map_err(&holes)? {
        rest.start = data.end;
        for piece in pieces(data, WINDOW_LEN) {
            let bytes = snapshot.read(piece.start, piece.end - piece.start)?;
            if let Some(index) = bytes.iter().position(|&byte| byte != 0) {
                findings.section(FindingKind::Padding, "padding", piece.start + index as u64);
            }
        }
    }
    Ok(())
}

/// The check of all pages.
#[derive(Debug)]
struct PageCheck<'a> {
    snapshot: &'a Snapshot,
    manifest: &'a Manifest,
    /// The pages that the file itself has.
    bitmaps: Vec<PageBitmap>,
    /// The pages that the base has; `None` if the file is not thin.
    of_base: Option<Vec<PageBitmap>>,
    /// Finds data in the file where no page has any.
    seeker: DataSeeker,
    file: DataFile,
    direct_io: DirectIoInUse,
    options: &'a CheckOptions,
    control: &'a Control<'a>,
}

/// What a worker has seen.
#[derive(Debug, Default)]
struct Checked<'a> {
    pages: u64,
    found: Findings,
    /// `None` before the first page.
    hashes: Option<PageHashes<'a>>,
    /// Those of the base.
    base_hashes: Option<PageHashes<'a>>,
}

impl<'a> PageCheck<'a> {
    fn new(
        snapshot: &'a Snapshot,
        manifest: &'a Manifest,
        options: &'a CheckOptions,
        control: &'a Control<'a>,
        findings: &mut Findings,
    ) -> Result<PageCheck<'a>, PagesError> {
        snapshot.check_bitmaps_fit(3)?;
        let mut bitmaps = Vec::new();
        for (placed, meta) in snapshot.structure().blocks.iter().zip(&manifest.meta.blocks) {
            let bitmap = snapshot.bitmap(placed)?;
            if bitmap.data_count().0 != meta.pages_data {
                findings.section(FindingKind::PageCount, placed.block.name(), placed.bitmap_offset);
            }
            bitmaps.push(bitmap);
        }
        let of_base = snapshot.base_pages()?;
        for (bitmap, of_base) in bitmaps.iter_mut().zip(of_base.iter().flatten()) {
            *bitmap = bitmap.without(of_base);
        }
        let seeker = DataSeeker::open(snapshot.file().as_fd())
            .map_err(PagesError::reading("the file once more"))?;
        let opened = open_for_reading(snapshot, options.direct_io);
        let (file, direct_io) = opened.map_err(PagesError::reading("the file once more"))?;
        Ok(PageCheck {
            snapshot,
            manifest,
            bitmaps,
            of_base,
            seeker,
            file,
            direct_io,
            options,
            control,
        })
    }

    fn place(&self, block: usize) -> Place {
        let placed = &self.snapshot.structure().blocks[block];
        Place {
            page_len: placed.block.page_size().bytes(),
            pages_offset: placed.pages_offset,
            hashes_offset: self.manifest.meta.blocks[block].hashes_offset,
        }
    }

    /// Checks all pages in parallel; returns how many, and the back end.
    fn run(&self, findings: &mut Findings) -> Result<(u64, BackendInUse), PagesError> {
        let (all, backend) = self.read(|checked, window, read| match read {
            Ok(bytes) => self.verify(window, bytes, checked),
            Err(_) => self.verify_one_by_one(window, checked),
        })?;
        let mut pages = 0;
        for checked in all {
            pages += checked.pages;
            findings.append(checked.found);
        }
        Ok((pages, backend))
    }

    /// Reads all windows in parallel and hands each to `take`; returns what every worker has seen,
    /// and the back end.
    fn read(
        &self,
        take: impl Fn(&mut Checked<'a>, &Window, io::Result<&[u8]>) -> Result<(), PagesError> + Sync,
    ) -> Result<(Vec<Checked<'a>>, BackendInUse), PagesError> {
        let width = (self.options.io, self.options.jobs.count());
        let blocks = &self.snapshot.structure().blocks;
        let workers = Workers::start_reading(&self.file, width, WINDOW_LEN);
        let workers = workers.map_err(PagesError::reading(
            "the file: take threads, memory and the back end that was asked for",
        ))?;
        let (bitmaps, control) = (&self.bitmaps[..], self.control);
        WindowReader {
            blocks,
            bitmaps,
            window_len: WINDOW_LEN,
            more: Some(self),
            fill: None,
            control,
        }
        .read(workers, take)
    }

    /// Compares the pages of a window with their hashes.
    fn verify(
        &self,
        window: &Window,
        bytes: &[u8],
        checked: &mut Checked<'a>,
    ) -> Result<(), PagesError> {
        let Checked { pages, found, hashes, base_hashes } = checked;
        let hashes = hashes.get_or_insert_with(|| PageHashes::new(self.snapshot));
        let placed = &self.snapshot.structure().blocks[window.block];
        let bitmap = &self.bitmaps[window.block];
        let page_len = usize::try_from(placed.block.page_size().bytes()).expect("64 KiB at most");
        let first = window.range.start / page_len as u64;
        for (page, bytes) in (first..).zip(bytes.chunks(page_len)) {
            let recorded = hashes.recorded(window.block, PageIndex(page))?.unwrap_or_default();
            if bitmap.contains(PageIndex(page)) {
                *pages += 1;
                if !is_page(bytes, recorded, self.snapshot.key()) {
                    found.page(FindingKind::PageHash, placed, page);
                }
            } else {
                if !is_zero(bytes) {
                    found.page(FindingKind::StalePage, placed, page);
                }
                let base = self.snapshot.base().filter(|_| self.is_of_base(window.block, page));
                if let Some(base) = base {
                    let hashes = base_hashes.get_or_insert_with(|| PageHashes::new(base));
                    let number = base.block_number(&placed.block);
                    let known = number.map(|number| hashes.recorded(number, PageIndex(page)));
                    if known.transpose()?.flatten() != Some(recorded) {
                        found.page(FindingKind::BasePage, placed, page);
                    }
                } else if recorded != Hash::default() {
                    found.page(FindingKind::StrayHash, placed, page);
                }
            }
        }
        Ok(())
    }

    fn is_of_base(&self, block: usize, page: u64) -> bool {
        self.of_base.as_ref().is_some_and(|of_base| of_base[block].contains(PageIndex(page)))
    }

    /// Reads a window again page by page, after a read error, to find the pages that cannot be
    /// read.
    fn verify_one_by_one(
        &self,
        window: &Window,
        checked: &mut Checked<'a>,
    ) -> Result<(), PagesError> {
        let placed = &self.snapshot.structure().blocks[window.block];
        let page_len = placed.block.page_size().bytes();
        let mut bytes = vec![0; usize::try_from(page_len).expect("64 KiB at most")];
        for page in pieces(window.range.clone(), page_len) {
            let offset = placed.pages_offset + page.start;
            if let Err(error) = self.snapshot.file().read_exact_at(&mut bytes, offset) {
                checked.found.unreadable(placed, page.start / page_len, &error);
                continue;
            }
            let window = Window { range: page, ..window.clone() };
            self.verify(&window, &bytes, checked)?;
        }
        Ok(())
    }
}

/// Places in the file that hold bytes although no page there has data, and pages with a hash. All
/// others are holes with a hash of zeros: zero pages.
impl MorePlaces for PageCheck<'_> {
    fn first(&self, block: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        let place = self.place(block);
        let pages = self.seeker.first(&place.in_file(range))?;
        let pages = pages.map(|offset| offset - place.pages_offset);
        let hashes = self.seeker.first(&place.hashes(range))?.map(|offset| place.page_of(offset));
        let first = pages.into_iter().chain(hashes).min();
        Ok(first.map(|first| first.max(range.start)).filter(|first| range.contains(first)))
    }

    fn to_read(&self, block: usize, window: &Range<u64>) -> io::Result<Option<Range<u64>>> {
        // To the end of the window: a hole costs nothing to read, but to find where the next one
        // begins the kernel would search all data that follows.
        let first = self.first(block, window)?;
        let page_len = self.place(block).page_len;
        Ok(first.map(|first| first - first % page_len..window.end))
    }
}

/// Where the pages and the hashes of a block lie in the file.
#[derive(Clone, Copy, Debug)]
struct Place {
    page_len: u64,
    pages_offset: u64,
    hashes_offset: u64,
}

impl Place {
    /// Returns where `range` of the block lies in the file.
    fn in_file(&self, range: &Range<u64>) -> Range<u64> {
        self.pages_offset + range.start..self.pages_offset + range.end
    }

    /// Returns where the hashes of the pages of `range` lie.
    fn hashes(&self, range: &Range<u64>) -> Range<u64> {
        let hash = |page: u64| self.hashes_offset + page * HASH_LEN;
        hash(range.start / self.page_len)..hash(range.end.div_ceil(self.page_len))
    }

    /// Returns the block offset of the page whose hash contains the byte at file offset `offset`.
    fn page_of(&self, offset: u64) -> u64 {
        (offset - self.hashes_offset) / HASH_LEN * self.page_len
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use vmfile_format::{PageSize, RamBlock, RamLayout};

    use super::*;
    use crate::OwnMemory;
    use crate::memory_file::{Contents, FileOptions, save};

    const NAME: &str = "memory.vmf";

    /// Saves a block of 4096-byte pages.
    fn saved(memory: &[u8]) -> (tempfile::TempDir, Snapshot) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        let block = RamBlock::new("ram".to_owned(), memory.len() as u64, PageSize::KIB_4).unwrap();
        let ram = RamLayout::new(vec![block]).unwrap();
        let contents = Contents::new("test-1.0", ram, &[("cpu", &[1])]);
        let (source, options) = (OwnMemory::new(vec![memory]), FileOptions::default());
        save(&path, contents, &source, &options, &Control::none()).unwrap();
        let snapshot = Snapshot::open(&path, 0).unwrap();
        (directory, snapshot)
    }

    /// A disk that cannot read one page spoils the read of its whole window.
    #[test]
    fn of_a_window_that_cannot_be_read_each_page_is_looked_at() {
        let memory = vec![7; 8 * 4096];
        let (directory, snapshot) = saved(&memory);
        let (options, control) = (CheckOptions::default(), Control::none());
        let (manifest, mut none) = (snapshot.manifest().unwrap(), Findings::default());
        let pages = PageCheck::new(&snapshot, manifest, &options, &control, &mut none).unwrap();
        let window = |range: Range<u64>| Window { block: 0, whole: 0..8 * 4096, range };
        // The hashes of all pages are read with the first.
        let mut checked = Checked::default();
        pages.verify(&window(0..4096), &memory[..4096], &mut checked).unwrap();
        let first = snapshot.structure().blocks[0].pages_offset;
        let file = OpenOptions::new().write(true).open(directory.path().join(NAME)).unwrap();
        file.set_len(first + 5 * 4096 + 100).unwrap();
        file.write_all_at(&[8], first + 3 * 4096).unwrap();
        pages.verify_one_by_one(&window(2 * 4096..7 * 4096), &mut checked).unwrap();
        let found = checked.found.list.iter();
        let found: Vec<_> =
            found.map(|finding| (finding.kind, finding.page.unwrap(), finding.offset)).collect();
        let at = |kind, page: u64| (kind, page, first + page * 4096);
        let unreadable = FindingKind::Unreadable;
        assert_eq!(found, [at(FindingKind::PageHash, 3), at(unreadable, 5), at(unreadable, 6)]);
        assert_eq!(checked.pages, 4);
    }

    /// Holes of a large file cost nothing to check: only what lies in the file is looked at.
    #[test]
    fn places_of_interest_begin_where_the_file_has_bytes() {
        let (directory, snapshot) = saved(&vec![0; 8 << 20]);
        let (options, control) = (CheckOptions::default(), Control::none());
        let (manifest, mut none) = (snapshot.manifest().unwrap(), Findings::default());
        let pages = PageCheck::new(&snapshot, manifest, &options, &control, &mut none).unwrap();
        let at = |page: u64| page * 4096;
        let first = |range: Range<u64>| pages.first(0, &range).unwrap();
        assert_eq!(first(0..at(2048)), None);
        // A table has 256 hashes in 4096 bytes.
        let file = OpenOptions::new().write(true).open(directory.path().join(NAME)).unwrap();
        file.write_all_at(&[1], manifest.meta.blocks[0].hashes_offset + 700 * HASH_LEN).unwrap();
        assert_eq!(first(0..at(2048)), Some(at(512)));
        assert_eq!(first(at(600)..at(2048)), Some(at(600)));
        assert_eq!(first(0..at(512)), None);
        assert_eq!(first(at(768)..at(2048)), None);
        let pages_offset = snapshot.structure().blocks[0].pages_offset;
        file.write_all_at(&[1], pages_offset + at(300) + 9).unwrap();
        assert_eq!(first(0..at(2048)), Some(at(300)));
        assert_eq!(first(at(301)..at(2048)), Some(at(512)));
        assert_eq!(pages.to_read(0, &(0..at(512))).unwrap(), Some(at(300)..at(512)));
        assert_eq!(pages.to_read(0, &(at(1024)..at(1536))).unwrap(), None);
    }
}
