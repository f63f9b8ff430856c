//! Writes RAM into the file: copies it, tests it for zeros, hashes it, and writes each page to its
//! place.
//!
//! Workers take units of 16 MiB from a shared counter, in the order of the file. Each page is
//! copied once, and the copy is tested for zeros and hashed while it is in the processor's cache.
//! The copy is what is written: whatever another process does to the memory meanwhile, the bytes in
//! the file are those that were hashed. Runs of data go out as large writes; the hashes of a unit
//! follow as one.

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use vmfile_engine::{BackendInUse, Direction, HashKey, Memory, SharedBuffer, Transfer};
use vmfile_format::manifest::HASH_LEN;
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex};

use crate::base::Base;
use crate::control::{Control, Meter};
use crate::draft::FileLayout;
use crate::error::PagesError;
use crate::lane::{Lane, Workers};
use crate::memory::{Beneath, PageSource};
use crate::page_hashes::{Hash, NO_HASH, PageHashes};
use crate::plan::{BASE_BRIDGE_LEN, UNIT_LEN, Unit, Units, WINDOW_LEN, in_window, pieces};
use crate::protected_ram::ProtectedRam;
use crate::runs::{Looked, PageRuns};
use crate::snapshot::{Snapshot, SnapshotError};

/// The pages in which the kernel reports what a process has written: those of x86.
const PAGE_LEN: u64 = 4096;

/// What was written.
#[derive(Debug)]
pub struct Written {
    /// The pages of each block that have data.
    pub bitmaps: Vec<PageBitmap>,
    /// Those of them that are the pages of the base; nothing if there is none.
    pub of_base: Vec<PageBitmap>,
    /// How many bytes the pages that were written have.
    pub data_bytes: u64,
    /// How many bytes of RAM were read.
    pub read_bytes: u64,
    /// The back end that wrote them.
    pub backend: BackendInUse,
}

/// Writes the data of all blocks of `source` to their `places` by `workers`, whose lanes lead to
/// the file; `total_bytes` is how much there may be, for the progress.
///
/// # Errors
///
/// Returns the first [`PagesError`] that any worker met, after all of them have stopped.
pub fn write_ram(
    workers: Workers,
    places: &FileLayout,
    source: &dyn PageSource,
    total_bytes: u64,
    control: &Control<'_>,
) -> Result<Written, PagesError> {
    let order = Order { unit_len: UNIT_LEN, urgent: &|| None };
    write(workers, places, (source, &order), total_bytes, control)
}

/// As [`write_ram`], for the RAM of a process that runs: what its threads wait for goes first.
///
/// # Errors
///
/// As for [`write_ram`].
pub fn write_protected_ram(
    workers: Workers,
    places: &FileLayout,
    source: &ProtectedRam<'_>,
    total_bytes: u64,
    control: &Control<'_>,
) -> Result<Written, PagesError> {
    // A window copied aside keeps a buffer until its unit is written.
    let order = Order { unit_len: WINDOW_LEN, urgent: &|| source.urgent() };
    write(workers, places, (source, &order), total_bytes, control)
}

/// In which order units are written.
struct Order<'a> {
    unit_len: u64,
    /// Returns a unit that goes before all others: the block's number, and a byte of it.
    urgent: &'a (dyn Fn() -> Option<(usize, u64)> + Sync),
}

fn write(
    workers: Workers,
    places: &FileLayout,
    (source, order): (&dyn PageSource, &Order<'_>),
    total_bytes: u64,
    control: &Control<'_>,
) -> Result<Written, PagesError> {
    let blocks = places.blocks();
    let bitmap = |placed: &PlacedBlock| Mutex::new(PageBitmap::new(placed.block.page_count()));
    let lens = blocks.iter().map(|placed| placed.block.used_length());
    let units = Units::new(lens, order.unit_len);
    let shared = Shared {
        places,
        source,
        order,
        units: &units,
        bitmaps: blocks.iter().map(bitmap).collect(),
        of_base: places.base().map_or(Vec::new(), |_| blocks.iter().map(bitmap).collect()),
        mapped: mapped(places, source)?,
        read_bytes: AtomicU64::new(0),
        meter: Meter::new(control, total_bytes),
        control,
    };
    let part = |lane| {
        let base = places.base().map(|base| (base, PageHashes::new(base.snapshot())));
        let mapped = blocks.iter().map(|_| None).collect();
        Worker { shared: &shared, lane, base, mapped }.units()
    };
    let (_, backend) = workers.drive(&units, part, failed)?;
    // `total_bytes` may count pages that turned out to be zero.
    shared.meter.finish();
    let bitmap = |bitmap: Mutex<_>| bitmap.into_inner().unwrap_or_else(PoisonError::into_inner);
    let bitmaps: Vec<PageBitmap> = shared.bitmaps.into_iter().map(bitmap).collect();
    let of_base: Vec<PageBitmap> = shared.of_base.into_iter().map(bitmap).collect();
    let data_bytes = places.data_bytes(&bitmaps) - places.data_bytes(&of_base);
    let read_bytes = shared.read_bytes.into_inner();
    Ok(Written { bitmaps, of_base, data_bytes, read_bytes, backend })
}

fn failed(source: io::Error) -> PagesError {
    PagesError::WriteFile { what: "guest RAM", source }
}

/// What all workers share.
struct Shared<'a> {
    places: &'a FileLayout,
    source: &'a dyn PageSource,
    order: &'a Order<'a>,
    units: &'a Units,
    bitmaps: Vec<Mutex<PageBitmap>>,
    /// The pages that are those of the base; nothing if there is none.
    of_base: Vec<Mutex<PageBitmap>>,
    /// For each block, the file of the base's chain of which it is a private mapping.
    mapped: Vec<Option<Mapped<'a>>>,
    read_bytes: AtomicU64,
    meter: Meter<'a>,
    control: &'a Control<'a>,
}

/// A file of which a block of the source is a private mapping.
struct Mapped<'a> {
    file: &'a Snapshot,
    /// The block's number in the file.
    number: usize,
    /// Its pages with data there.
    bitmap: PageBitmap,
}

/// Finds the blocks of `source` that are private mappings of the base of `places`, or of a file below it.
fn mapped<'a>(
    places: &'a FileLayout,
    source: &dyn PageSource,
) -> Result<Vec<Option<Mapped<'a>>>, PagesError> {
    let asked = PagesError::reading("which file a RAM block is mapped from");
    let mut all = Vec::new();
    for (number, placed) in places.blocks().iter().enumerate() {
        let is_of_base = places.in_base(number).is_some();
        let is_small = placed.block.page_size().bytes() == PAGE_LEN;
        let beneath = match is_of_base && is_small {
            true => source.beneath(number).map_err(&asked)?,
            false => None,
        };
        let chain = places.base().map(|base| base.snapshot().chain());
        let mut found = None;
        for file in chain.into_iter().flatten().filter(|_| beneath.is_some()) {
            let metadata = file.file().metadata().map_err(&asked)?;
            let (device, inode) = (metadata.dev(), metadata.ino());
            let Some(number) = file.block_number(&placed.block) else { continue };
            let known = &file.structure().blocks[number];
            let offset = known.pages_offset;
            if Some(Beneath { device, inode, offset }) == beneath {
                found = Some(Mapped { file, number, bitmap: file.bitmap(known)? });
                break;
            }
        }
        all.push(found);
    }
    Ok(all)
}

struct Worker<'a> {
    shared: &'a Shared<'a>,
    lane: Lane,
    base: Option<(&'a Base, PageHashes<'a>)>,
    /// The hashes of the file of which each block is a private mapping, once they were needed.
    mapped: Vec<Option<PageHashes<'a>>>,
}

impl Worker<'_> {
    fn units(mut self) -> Result<(), PagesError> {
        let shared = self.shared;
        while let Some(unit) = shared.next_unit()? {
            if shared.control.is_stopped() {
                return Err(PagesError::Stopped);
            }
            let done_bytes = self.unit(&unit)?;
            shared.meter.add(done_bytes);
        }
        self.lane.drain().map_err(failed)
    }

    /// Writes a unit; returns how many bytes of data it has.
    fn unit(&mut self, unit: &Unit) -> Result<u64, PagesError> {
        let mut pages = UnitPages::new(unit, &self.shared.places.blocks()[unit.block]);
        for window in pieces(unit.range.clone(), WINDOW_LEN) {
            self.window(unit.block, &window, &mut pages)?;
        }
        if pages.data > 0 {
            self.hashes(unit.block, &pages)?;
        }
        let first = PageIndex(pages.first);
        let note = |bitmap: &Mutex<PageBitmap>, words: &[u64]| {
            bitmap.lock().unwrap_or_else(PoisonError::into_inner).replace_words(first, words);
        };
        note(&self.shared.bitmaps[unit.block], &pages.words);
        if let Some(of_base) = self.shared.of_base.get(unit.block) {
            note(of_base, &pages.of_base);
        }
        Ok(pages.data * pages.page_len)
    }

    /// Copies a window into a buffer, tests and hashes its pages there, and writes those with data.
    fn window(
        &mut self,
        block: usize,
        window: &Range<u64>,
        pages: &mut UnitPages,
    ) -> Result<(), PagesError> {
        let shared = self.shared;
        let mut buffer = self.lane.buffer().map_err(failed)?;
        let len = in_window(window.end - window.start);
        let in_base = self.in_base(block, window)?;
        let failed = |source| shared.read_error(block, window, source);
        let read = if self.is_mapped_from_base(block, window, &in_base)? {
            shared.source.read_written(block, window, &mut buffer[..len]).map_err(failed)?
        } else if shared.source.read(block, window, &mut buffer[..len]).map_err(failed)? {
            vec![window.clone()]
        } else {
            return Ok(());
        };
        let read_bytes = read.iter().map(|read| read.end - read.start).sum();
        shared.read_bytes.fetch_add(read_bytes, Ordering::Relaxed);
        let bytes = &buffer[..len];
        let copy = Copied { start: window.start, bytes, read: &read, in_base: &in_base };
        let runs = pages.look(&copy, shared.places.key());
        let buffer: SharedBuffer = buffer.freeze();
        let pages_offset = shared.places.blocks()[block].pages_offset;
        for run in runs.runs() {
            let file_offset = pages_offset + run.first * pages.page_len;
            self.submit(file_offset, Memory::Shared(buffer.clone(), runs.bytes(&run.slots)))?;
        }
        Ok(())
    }

    /// Returns the hashes that the base has of the pages of a window: zeros for a zero page. Nothing if
    /// there is no base, or no such block in it.
    fn in_base(&mut self, block: usize, window: &Range<u64>) -> Result<Vec<Hash>, PagesError> {
        let Some((base, hashes)) = &mut self.base else { return Ok(Vec::new()) };
        let places = self.shared.places;
        let Some(number) = places.in_base(block) else { return Ok(Vec::new()) };
        let page_len = places.blocks()[block].block.page_size().bytes();
        let bitmap = base.usable(number);
        let pages = (window.start / page_len..window.end / page_len).map(PageIndex);
        Ok(pages.map(|page| hashes.in_file(number, bitmap, page)).collect::<Result<_, _>>()?)
    }

    /// Whether the block is a private mapping of a file, and those pages of a window that the process has
    /// not written since are the pages of the base, whose hashes are `in_base`.
    fn is_mapped_from_base(
        &mut self,
        block: usize,
        window: &Range<u64>,
        in_base: &[Hash],
    ) -> Result<bool, PagesError> {
        let Some(mapped) = &self.shared.mapped[block] else { return Ok(false) };
        let Mapped { file, number, bitmap } = mapped;
        let hashes = self.mapped[block].get_or_insert_with(|| PageHashes::new(file));
        let first = window.start / PAGE_LEN;
        for (page, in_base) in (first..).map(PageIndex).zip(in_base) {
            if hashes.in_file(*number, bitmap, page)? != *in_base {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn hashes(&mut self, block: usize, pages: &UnitPages) -> Result<(), PagesError> {
        // The table ends in zeros up to a multiple of 4096 bytes: whole pages of hashes.
        let len = pages.hashes.len().next_multiple_of(4096);
        let mut buffer = self.lane.table().map_err(failed)?;
        let (hashes, rest) = buffer[..len].split_at_mut(pages.hashes.len());
        hashes.copy_from_slice(&pages.hashes);
        rest.fill(0);
        let memory = Memory::Shared(buffer.freeze(), 0..len);
        self.submit(self.shared.places.hashes()[block] + pages.first * HASH_LEN, memory)
    }

    fn submit(&mut self, file_offset: u64, memory: Memory) -> Result<(), PagesError> {
        let transfer = Transfer { direction: Direction::Write, file_offset, memory, tag: 0 };
        self.lane.submit(transfer).map_err(failed)
    }
}

impl Shared<'_> {
    fn next_unit(&self) -> Result<Option<Unit>, PagesError> {
        while let Some((block, offset)) = (self.order.urgent)() {
            let unit = self.units.take_at(block, offset);
            if unit.is_some() {
                return Ok(unit);
            }
        }
        self.units.take(|block, range| {
            let found = self.source.first_data(block, &range);
            found.map_err(|source| self.read_error(block, &range, source))
        })
    }

    fn read_error(&self, block: usize, range: &Range<u64>, source: io::Error) -> PagesError {
        let source = match source.downcast::<SnapshotError>() {
            // The pages come from files.
            Ok(error) => return error.into(),
            Err(source) => source,
        };
        PagesError::ReadRam {
            block: self.places.blocks()[block].block.name().to_owned(),
            block_offset: range.start,
            len: range.end - range.start,
            source,
        }
    }
}

/// What is known of a unit's pages so far.
#[derive(Debug)]
struct UnitPages {
    page_len: u64,
    /// The index in the block of the unit's first page.
    first: u64,
    words: Vec<u64>,
    /// The pages that are those of the base.
    of_base: Vec<u64>,
    hashes: Vec<u8>,
    /// How many pages have data.
    data: u64,
}

impl UnitPages {
    fn new(unit: &Unit, placed: &PlacedBlock) -> UnitPages {
        let page_len = placed.block.page_size().bytes();
        let pages = (unit.range.end - unit.range.start).div_ceil(page_len);
        UnitPages {
            page_len,
            first: unit.range.start / page_len,
            words: vec![0; in_window(pages.div_ceil(64))],
            of_base: vec![0; in_window(pages.div_ceil(64))],
            hashes: vec![0; in_window(pages * HASH_LEN)],
            data: 0,
        }
    }

    /// Tests the pages that were copied, and hashes them with `key`. Those that were not copied are the
    /// pages of the base.
    fn look(&mut self, copy: &Copied<'_>, key: HashKey) -> PageRuns {
        let page_len = in_window(self.page_len);
        let first = copy.start / self.page_len;
        let mut runs = PageRuns::new(page_len, copy.bytes.len() / page_len, key);
        for ((slot, page), bytes) in (first..).enumerate().zip(copy.bytes.chunks(page_len)) {
            let in_base = copy.in_base.get(slot).copied();
            let looked = if copy.has(page * self.page_len) {
                let is_same = |hash| in_base == Some(hash);
                runs.look((slot, page), bytes, is_same, |gap| self.bridge(copy, gap))
            } else {
                runs.keep(slot, in_base.unwrap_or(NO_HASH))
            };
            let index = page - self.first;
            let (word, bit) = (in_window(index / 64), 1 << (index % 64));
            if looked != Looked::Zero {
                self.words[word] |= bit;
                self.data += 1;
            }
            if looked == Looked::Same {
                self.of_base[word] |= bit;
            }
        }
        let hashes = runs.hashes(0..copy.bytes.len() / page_len);
        let at = in_window((first - self.first) * HASH_LEN);
        self.hashes[at..at + hashes.len()].copy_from_slice(hashes);
        runs
    }

    /// Whether a gap between two pages that are written may be written as well: all of it was copied.
    /// If so, its pages are in the new file, also those that the base has.
    fn bridge(&mut self, copy: &Copied<'_>, gap: Range<u64>) -> bool {
        let index = |page: u64| page - self.first;
        let bit = |page: u64| (in_window(index(page) / 64), 1 << (index(page) % 64));
        let mut bits = gap.clone().map(bit);
        let has_base = bits.any(|(word, bit)| self.of_base[word] & bit != 0);
        let is_short = (gap.end - gap.start) * self.page_len <= BASE_BRIDGE_LEN;
        let is_copied = gap.clone().all(|page| copy.has(page * self.page_len));
        let is_bridged = is_copied && (is_short || !has_base);
        if is_bridged && has_base {
            gap.map(bit).for_each(|(word, bit)| self.of_base[word] &= !bit);
        }
        is_bridged
    }
}

/// A window that was copied, or parts of it.
struct Copied<'a> {
    /// The offset of the window in the block.
    start: u64,
    bytes: &'a [u8],
    /// The ranges of the block that were copied, in order.
    read: &'a [Range<u64>],
    /// The hashes that the base has of the pages; zeros for a zero page. Nothing if there is no base.
    in_base: &'a [Hash],
}

impl Copied<'_> {
    /// Whether the page at `offset` in the block was copied.
    fn has(&self, offset: u64) -> bool {
        let first = self.read.partition_point(|read| read.end <= offset);
        self.read.get(first).is_some_and(|read| read.start <= offset)
    }
}

#[cfg(test)]
mod tests {
    use vmfile_format::{PageSize, RamBlock};

    use super::*;

    #[test]
    fn the_pages_of_a_window_are_counted_from_the_start_of_the_unit() {
        for page_size in [4096, 16384] {
            let size = PageSize::new(page_size).unwrap();
            let block = RamBlock::new("ram".to_owned(), 2 * UNIT_LEN, size).unwrap();
            let placed =
                PlacedBlock { block, record_offset: 0, bitmap_offset: 64, pages_offset: 1 << 20 };
            let unit = Unit { block: 0, range: UNIT_LEN..2 * UNIT_LEN };
            let mut pages = UnitPages::new(&unit, &placed);
            let mut bytes = vec![0; in_window(WINDOW_LEN)];
            bytes[in_window(2 * page_size) + 9] = 1;
            let start = UNIT_LEN + WINDOW_LEN;
            let read = Range { start, end: start + WINDOW_LEN };
            let read = std::slice::from_ref(&read);
            let copy = Copied { start, bytes: &bytes, read, in_base: &[] };
            let runs = pages.look(&copy, HashKey::NONE);
            let first = (UNIT_LEN + WINDOW_LEN) / page_size;
            assert_eq!(runs.runs()[0].first, first + 2);
            assert_eq!(pages.data, 1);
            let bit = in_window(WINDOW_LEN / page_size) + 2;
            assert_eq!(pages.words[bit / 64], 1 << (bit % 64));
            assert_ne!(pages.hashes[bit * 16..(bit + 1) * 16], [0; 16]);
        }
    }
}
