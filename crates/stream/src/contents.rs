//! What a stream contains, and in which order. This reads the file's tables and device state; it
//! sends nothing.

use std::ops::Range;

use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::page::PageRange;
use vmfile_format::ram_block::RamBlock;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::encoder;
use vmfile_format::{PageBitmap, PageIndex};
use vmfile_pages::layers::Layers;
use vmfile_pages::page_hashes::PageHashes;
use vmfile_pages::plan::{WINDOW_LEN, pieces};
use vmfile_pages::snapshot::{Snapshot, SnapshotError};

/// Zero pages of blocks below this length, in bytes, are always sent: firmware is among these
/// blocks, and the destination has already filled it, so that its pages are not zero.
pub const LARGE_BLOCK_LEN: u64 = 4 << 20;

/// The longest gap between two pages with data that one read spans, in bytes.
const GAP_LEN_MAX: u64 = 64 << 10;

/// Which pages of a block are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// All of them: zero pages too, whatever the destination has there.
    All,
    /// Those with data: the destination has zeros elsewhere.
    Data,
    /// None: the destination has them already.
    None,
}

/// What a stream contains.
#[derive(Debug)]
pub struct StreamContents<'a> {
    /// The file, and those below it.
    pub layers: Layers<'a>,
    /// The blocks of which pages are sent, in the order of the file.
    pub blocks: Vec<BlockContents<'a>>,
    /// The device sections and EOF.
    pub devices: Vec<u8>,
    /// What QEMU says about the device sections, from its section type on.
    pub description: Vec<u8>,
}

/// A block of which pages are sent.
#[derive(Debug)]
pub struct BlockContents<'a> {
    /// Its place in the block list.
    pub index: usize,
    /// The block, and its place in [`Layers::main`].
    pub placed: &'a PlacedBlock,
    /// Its pages that have data.
    pub bitmap: PageBitmap,
    /// Whether its zero pages are sent.
    pub zero_pages: bool,
}

/// Pages that are sent together, at most a window of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The place of the block in [`StreamContents::blocks`].
    pub block: usize,
    /// The pages; those without data are sent as zero pages, or not at all.
    pub pages: PageRange,
    /// The bytes of the block from the first page with data to the last; empty if there is none.
    pub bytes: Range<u64>,
}

impl Window {
    /// Returns how many bytes are read for it; at most a window.
    pub fn read_len(&self) -> usize {
        usize::try_from(self.bytes.end - self.bytes.start).expect("a window")
    }
}

impl<'a> StreamContents<'a> {
    /// Collects what is sent of `snapshot`: all device state, and of each block the pages that
    /// `pages` selects.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError`] if the file cannot be read.
    pub fn new(
        snapshot: &'a Snapshot,
        pages: impl Fn(&RamBlock) -> Pages,
    ) -> Result<StreamContents<'a>, SnapshotError> {
        let structure = snapshot.structure();
        let layers = Layers::of_blocks(snapshot, |block| pages(block) != Pages::None)?;
        let mut blocks = Vec::new();
        for index in 0..structure.blocks.len() {
            let placed = layers.placed(index);
            let pages = pages(&placed.block);
            if pages != Pages::None {
                let bitmap = layers.bitmap(index).clone();
                let zero_pages = pages == Pages::All;
                blocks.push(BlockContents { index, placed, bitmap, zero_pages });
            }
        }
        let devices = snapshot.device_state()?;
        let mut description = Vec::new();
        match structure.device_state.vm_description {
            Some((offset, len)) => {
                encoder::begin_vm_description(&mut description, len);
                description.extend_from_slice(&snapshot.read(offset, len)?);
            }
            None => encoder::vm_description(&mut description),
        }
        Ok(StreamContents { layers, blocks, devices, description })
    }

    /// Returns the file.
    pub fn snapshot(&self) -> &'a Snapshot {
        self.layers.snapshot()
    }

    /// Returns the configuration of a plain stream: no capability.
    pub fn configuration(&self) -> Configuration {
        let found = &self.snapshot().structure().configuration;
        Configuration { capabilities: Vec::new(), ..found.clone() }
    }

    /// Returns how many pages with data are sent, and their length in bytes.
    pub fn data(&self) -> (u64, u64) {
        self.blocks.iter().fold((0, 0), |(pages, bytes), block| {
            let count = block.bitmap.data_count().0;
            (pages + count, bytes + count * block.placed.block.page_size().bytes())
        })
    }

    /// Returns the length of the pages with data in `window`, in bytes.
    pub fn data_len(&self, window: &Window) -> u64 {
        let block = &self.blocks[window.block];
        let runs = block.bitmap.runs_within(window.pages);
        runs.map(|run| run.count().0).sum::<u64>() * block.placed.block.page_size().bytes()
    }

    /// Returns how many zero pages are sent.
    pub fn zero_pages(&self) -> u64 {
        let blocks = self.blocks.iter().filter(|block| block.zero_pages);
        blocks.map(|block| block.bitmap.page_count().0 - block.bitmap.data_count().0).sum()
    }

    /// Adds to `bytes`, those of `window` that were read from [`Layers::main`], the pages that are in
    /// other files, and compares all pages with data with their hashes.
    ///
    /// # Errors
    ///
    /// Returns [`SnapshotError::DamagedPage`] for the first page that differs from its hash.
    pub fn complete(
        &self,
        window: &Window,
        bytes: &mut [u8],
        hashes: &mut PageHashes<'_>,
    ) -> Result<(), SnapshotError> {
        let block = &self.blocks[window.block];
        let start = window.bytes.start;
        let first = PageIndex(start / block.placed.block.page_size().bytes());
        self.layers.fill(block.index, start, bytes)?;
        self.layers.verify(hashes, block.index, first, bytes)
    }

    /// Returns the windows in the order of the file; each page that is sent is in one of them.
    pub fn windows(&self) -> impl Iterator<Item = Window> + Send + '_ {
        let blocks = self.blocks.iter().enumerate();
        blocks.flat_map(|(index, block)| {
            let cells = pieces(0..block.placed.block.used_length(), WINDOW_LEN);
            cells.flat_map(move |cell| block.windows(index, &cell))
        })
    }
}

impl BlockContents<'_> {
    /// Cuts `cell`, byte offsets of the block, into windows that leave out long gaps.
    fn windows(&self, block: usize, cell: &Range<u64>) -> Vec<Window> {
        let page_len = self.placed.block.page_size().bytes();
        let pages = PageRange::new(cell.start / page_len, cell.end / page_len);
        let mut windows: Vec<Window> = Vec::new();
        for run in self.bitmap.runs_within(pages) {
            let bytes = run.start.0 * page_len..run.end.0 * page_len;
            match windows.last_mut() {
                Some(last) if bytes.start - last.bytes.end <= GAP_LEN_MAX => {
                    last.bytes.end = bytes.end;
                    last.pages.end = run.end;
                }
                last => {
                    let start = last.map_or(pages.start, |last| last.pages.end);
                    windows.push(Window { block, pages: PageRange { start, end: run.end }, bytes });
                }
            }
        }
        match windows.last_mut() {
            Some(last) => last.pages.end = pages.end,
            None if self.zero_pages => windows.push(Window { block, pages, bytes: 0..0 }),
            None => {}
        }
        windows
    }
}
