//! Which file of a chain has each page of a VM.
//!
//! A thin file lacks pages, which are in its base, or in the base's own. The readers of RAM read the
//! file with the most pages by their lanes ([`Layers::main`]), and [`Layers::fill`] adds the pages that
//! are elsewhere. A file that is not thin is a chain of one.

use std::io;
use std::mem;
use std::ops::Range;

use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageCount, PageIndex, PageRange, RamBlock};

use crate::memory::PageSource;
use crate::page_hashes::{PageHashes, is_page};
use crate::plan::in_window;
use crate::snapshot::{Snapshot, SnapshotError};

/// The files that have the pages of a VM.
#[derive(Debug)]
pub struct Layers<'a> {
    /// From the file itself downwards.
    files: Vec<Layer<'a>>,
    /// The number of the file that lanes read.
    main: usize,
    /// The pages of each block that are read.
    bitmaps: Vec<PageBitmap>,
}

#[derive(Clone, Debug)]
struct Layer<'a> {
    snapshot: &'a Snapshot,
    /// For each block of the file itself, where it is in this file, and the pages that are taken from
    /// here.
    blocks: Vec<Option<(&'a PlacedBlock, PageBitmap)>>,
}

impl<'a> Layers<'a> {
    /// Finds out where the pages of `snapshot` are.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::NoBase`] if the file is thin and was opened without its base, and
    /// [`SnapshotError::Read`] if the kernel refuses to read a table.
    pub fn new(snapshot: &'a Snapshot) -> Result<Layers<'a>, SnapshotError> {
        Layers::of_blocks(snapshot, |_| true)
    }

    /// Does the same for the blocks that are `wanted`. Of other blocks no bitmap is read, and no page is
    /// there: that of a large one takes longer than all the rest of a restore by mapping.
    ///
    /// # Errors
    ///
    /// As [`Layers::new`].
    pub fn of_blocks(
        snapshot: &'a Snapshot,
        wanted: impl Fn(&RamBlock) -> bool,
    ) -> Result<Layers<'a>, SnapshotError> {
        // Those of the file, what is missing, and what each file of the chain has.
        snapshot.check_bitmaps_fit(4)?;
        let own = &snapshot.structure().blocks;
        let none = || PageBitmap::new(PageCount(0));
        let bitmap = |placed: &PlacedBlock| match wanted(&placed.block) {
            true => snapshot.bitmap(placed),
            false => Ok(none()),
        };
        let bitmaps: Vec<PageBitmap> = own.iter().map(bitmap).collect::<Result<_, _>>()?;
        let mut missing = bitmaps.clone();
        let mut files = Vec::new();
        let mut next = Some(snapshot);
        while let Some(file) = next {
            let of_base = file.base_pages()?;
            let mut blocks = Vec::new();
            for (placed, missing) in own.iter().zip(&mut missing) {
                blocks.push(file.block_number(&placed.block).map(|number| {
                    let here = match &of_base {
                        Some(of_base) if wanted(&placed.block) => {
                            let here = missing.without(&of_base[number]);
                            *missing = missing.and(&of_base[number]);
                            here
                        }
                        // All that is missing is here.
                        _ => mem::replace(missing, none()),
                    };
                    (&file.structure().blocks[number], here)
                }));
            }
            files.push(Layer { snapshot: file, blocks });
            next = file.base();
            if of_base.is_some() && next.is_none() {
                return Err(SnapshotError::NoBase { path: file.path().to_path_buf() });
            }
        }
        let lacks = missing.iter().position(|missing| missing.data_count().0 > 0);
        if let Some(number) = lacks {
            let lowest = files.last().expect("the file itself").snapshot;
            return Err(SnapshotError::BaseLacksPages {
                path: lowest.path().to_path_buf(),
                block: own[number].block.name().to_owned(),
            });
        }
        let main = main(&files);
        Ok(Layers { files, main, bitmaps })
    }

    /// Returns the file itself.
    #[must_use]
    pub fn snapshot(&self) -> &'a Snapshot {
        self.files[0].snapshot
    }

    /// Returns the file that is read by lanes: it has all blocks, and most of the pages.
    #[must_use]
    pub fn main(&self) -> &'a Snapshot {
        self.files[self.main].snapshot
    }

    /// Returns where block `number` is in [`Layers::main`].
    #[must_use]
    pub fn placed(&self, number: usize) -> &'a PlacedBlock {
        self.files[self.main].blocks[number].as_ref().expect("the main file has all blocks").0
    }

    /// Returns the pages of block `number` that are read: those that are not zero.
    #[must_use]
    pub fn bitmap(&self, number: usize) -> &PageBitmap {
        &self.bitmaps[number]
    }

    /// Returns what the newer files of a chain change in the lowest one: the pages that they have, and the
    /// pages of each block that are zero and have bytes in the lowest file. `None` if there is no newer
    /// one.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses to read a bitmap.
    pub fn changes(&self) -> Result<Option<(Layers<'a>, Vec<PageBitmap>)>, SnapshotError> {
        let Some((lowest, newer)) = self.files.split_last().filter(|(_, newer)| !newer.is_empty())
        else {
            return Ok(None);
        };
        let (mut bitmaps, mut zero) = (Vec::new(), Vec::new());
        for (bitmap, block) in self.bitmaps.iter().zip(&lowest.blocks) {
            match block {
                Some((placed, here)) => {
                    bitmaps.push(bitmap.without(here));
                    zero.push(lowest.snapshot.bitmap(placed)?.without(bitmap));
                }
                None => {
                    bitmaps.push(bitmap.clone());
                    zero.push(PageBitmap::new(bitmap.page_count()));
                }
            }
        }
        let (files, main) = (newer.to_vec(), main(newer));
        Ok(Some((Layers { files, main, bitmaps }, zero)))
    }

    /// Returns the pages of each block of the lowest file that no newer file has.
    #[must_use]
    pub fn of_lowest(&self) -> Vec<(&'a PlacedBlock, &PageBitmap)> {
        let lowest = self.files.last().expect("the file itself");
        lowest.blocks.iter().flatten().map(|(placed, pages)| (*placed, pages)).collect()
    }

    /// Returns the lowest file: one that is whole.
    #[must_use]
    pub fn lowest(&self) -> &'a Snapshot {
        self.files.last().expect("the file itself").snapshot
    }

    /// Replaces, in `bytes` of block `number` that begin at `start` and were read from
    /// [`Layers::main`], the pages that other files have.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::Read`] if the kernel refuses.
    pub fn fill(&self, number: usize, start: u64, bytes: &mut [u8]) -> Result<(), SnapshotError> {
        let others = self.files.iter().enumerate().filter(|(file, _)| *file != self.main);
        for (_, file) in others {
            let Some((placed, pages)) = &file.blocks[number] else { continue };
            let page_len = placed.block.page_size().bytes();
            let end = start + bytes.len() as u64;
            let range = PageRange::new(start / page_len, end.div_ceil(page_len));
            for run in pages.runs_within(range) {
                let (from, to) = (run.start.0 * page_len, (run.end.0 * page_len).min(end));
                let in_bytes = |at: u64| usize::try_from(at - start).expect("a window");
                let bytes = &mut bytes[in_bytes(from)..in_bytes(to)];
                file.snapshot.read_into(placed.pages_offset + from, bytes)?;
            }
        }
        Ok(())
    }

    /// Reads `range` of block `number`, whole pages and a window at most, into `into`, and compares them
    /// with their hashes.
    ///
    /// # Errors
    ///
    /// As [`Layers::fill`] and [`Layers::verify`].
    pub fn read_verified(
        &self,
        number: usize,
        range: &Range<u64>,
        into: &mut [u8],
    ) -> Result<(), SnapshotError> {
        let placed = self.placed(number);
        let page_len = placed.block.page_size().bytes();
        let mut hashes = PageHashes::new(self.snapshot());
        self.main().read_into(placed.pages_offset + range.start, into)?;
        self.fill(number, range.start, into)?;
        self.verify(&mut hashes, number, PageIndex(range.start / page_len), into)?;
        // The main file may have bytes of a page that is zero now.
        let pages = PageRange::new(range.start / page_len, range.end.div_ceil(page_len));
        for gap in self.bitmap(number).gaps_within(pages) {
            let in_window = |page: PageIndex| in_window(page.0 * page_len - range.start);
            into[in_window(gap.start)..in_window(gap.end)].fill(0);
        }
        Ok(())
    }

    /// Compares the pages with data among `bytes`, which begin with page `first` of block `number`, with
    /// the hashes of the file itself.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::DamagedPage`] for the first one that is not what was written; it names
    /// the file of the chain that has the page.
    pub fn verify(
        &self,
        hashes: &mut PageHashes<'_>,
        number: usize,
        first: PageIndex,
        bytes: &[u8],
    ) -> Result<(), SnapshotError> {
        let Some(key) = self.snapshot().manifest().map(|_| self.snapshot().key()) else {
            return Ok(());
        };
        let page_len = self.placed(number).block.page_size().bytes();
        let page_len = usize::try_from(page_len).expect("64 KiB at most");
        let bitmap = self.bitmap(number);
        for (page, bytes) in (first.0..).map(PageIndex).zip(bytes.chunks(page_len)) {
            if !bitmap.contains(page) {
                continue;
            }
            let recorded = hashes.recorded(number, page)?.unwrap_or_default();
            if !is_page(bytes, recorded, key) {
                return Err(self.damaged(number, page));
            }
        }
        Ok(())
    }

    /// Says that a page, or its hash, is not what was written.
    fn damaged(&self, number: usize, page: PageIndex) -> SnapshotError {
        let has = |layer: &&Layer<'_>| {
            layer.blocks[number].as_ref().is_some_and(|(_, pages)| pages.contains(page))
        };
        let layer = self.files.iter().find(has).unwrap_or(&self.files[0]);
        let placed = layer.blocks[number].as_ref().map(|(placed, _)| *placed);
        SnapshotError::DamagedPage {
            path: layer.snapshot.path().to_path_buf(),
            block: self.placed(number).block.name().to_owned(),
            page: page.0,
            offset: placed.and_then(|placed| placed.page_offset(page)).unwrap_or(u64::MAX),
        }
    }
}

/// Every page that is read is compared with its hash.
impl PageSource for Layers<'_> {
    fn first_data(&self, block: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        let page_len = self.placed(block).block.page_size().bytes();
        let pages = PageRange::new(range.start / page_len, range.end.div_ceil(page_len));
        let first = self.bitmap(block).first_within(pages);
        Ok(first.map(|page| (page.0 * page_len).max(range.start)))
    }

    fn read(&self, block: usize, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool> {
        if self.first_data(block, range)?.is_none() {
            return Ok(false);
        }
        self.read_verified(block, range, into).map_err(io::Error::other)?;
        Ok(true)
    }
}

/// Returns the number of the file that has all blocks, and of these the most pages.
fn main(files: &[Layer<'_>]) -> usize {
    let pages = |layer: &Layer<'_>| {
        let counts = layer.blocks.iter().map(|block| Some(block.as_ref()?.1.data_count().0));
        counts.sum::<Option<u64>>()
    };
    let counted =
        files.iter().enumerate().filter_map(|(number, layer)| Some((pages(layer)?, number)));
    // The file itself has all blocks.
    counted.max().map_or(0, |(_, number)| number)
}
