//! The RAM of a file that is being received: which pages have data, and the hash of each.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use vmfile_engine::{DataFile, HashKey, punch_hole};
use vmfile_format::manifest::HASH_LEN;
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::{PageBitmap, PageIndex};

use crate::page_hashes::NO_HASH;
use crate::plan::{WINDOW_LEN, pieces};
use crate::shared_bitmap::SharedBitmap;

/// The RAM of a file that is being received, shared by all its writers.
#[derive(Debug)]
pub struct ReceivedRam {
    file: DataFile,
    key: HashKey,
    blocks: Vec<ReceivedBlock>,
}

#[derive(Debug)]
struct ReceivedBlock {
    placed: PlacedBlock,
    hashes_offset: u64,
    /// Pages whose data is in the file.
    data: SharedBitmap,
    /// Pages whose places were written, at any time.
    written: SharedBitmap,
}

impl ReceivedRam {
    /// Prepares to write `blocks`, whose tables of hashes are at the file offsets `hashes`; the hashes
    /// have `key`.
    pub fn new(
        file: DataFile,
        blocks: &[PlacedBlock],
        (hashes, key): (&[u64], HashKey),
    ) -> ReceivedRam {
        let blocks = blocks.iter().zip(hashes).map(|(placed, &hashes_offset)| ReceivedBlock {
            data: SharedBitmap::new(placed.block.page_count()),
            written: SharedBitmap::new(placed.block.page_count()),
            placed: placed.clone(),
            hashes_offset,
        });
        ReceivedRam { file, key, blocks: blocks.collect() }
    }

    /// Makes holes of the places of pages that were written and are zero now.
    pub fn empty_stale_places(&self) -> io::Result<()> {
        for block in &self.blocks {
            let page_len = block.placed.block.page_size().bytes();
            for run in block.written.without(&block.data).data_runs() {
                let start = block.placed.pages_offset + run.start.0 * page_len;
                let range = start..start + run.count().0 * page_len;
                empty(&self.file, range)?;
            }
        }
        Ok(())
    }

    /// Returns the key of the page hashes.
    pub fn key(&self) -> HashKey {
        self.key
    }

    /// Returns where a block's pages go.
    pub fn placed(&self, block: usize) -> &PlacedBlock {
        &self.blocks[block].placed
    }

    /// Returns the length of a block's pages, in bytes.
    pub fn page_len(&self, block: usize) -> u64 {
        self.blocks[block].placed.block.page_size().bytes()
    }

    /// Returns whether the data of a page are in the file, or on their way to it.
    pub fn has_data(&self, block: usize, page: PageIndex) -> bool {
        self.blocks[block].data.contains(page)
    }

    /// Reads a page's place into `data`.
    pub fn read(&self, block: usize, page: PageIndex, data: &mut [u8]) -> io::Result<()> {
        let offset = self.placed(block).page_offset(page).expect("a page of the block");
        self.file.buffered().read_exact_at(data, offset)
    }

    /// Notes that a page has data; returns whether its place was written before.
    pub fn remember(&self, block: usize, page: PageIndex) -> bool {
        let block = &self.blocks[block];
        block.data.set(page);
        block.written.set(page)
    }

    /// Notes that a page is zero; if it had data before, clears its hash in the file.
    pub fn forget(&self, block: usize, page: PageIndex) -> io::Result<()> {
        if !self.blocks[block].data.clear(page) {
            return Ok(());
        }
        self.put_hashes(block, page, &NO_HASH)
    }

    /// Writes the hashes of `first` and the pages after it.
    pub fn put_hashes(&self, block: usize, first: PageIndex, hashes: &[u8]) -> io::Result<()> {
        let offset = self.blocks[block].hashes_offset + first.0 * HASH_LEN;
        self.file.buffered().write_all_at(hashes, offset)
    }

    /// Returns which pages of each block have their data in the file.
    pub fn bitmaps(&self) -> Vec<PageBitmap> {
        self.blocks.iter().map(|block| block.data.snapshot()).collect()
    }
}

/// The error of a file system that cannot make holes.
const EOPNOTSUPP: i32 = rustix::io::Errno::OPNOTSUPP.raw_os_error();

/// Makes `range` of the file a hole, or zeros where the file system has no holes.
pub fn empty(file: &DataFile, range: Range<u64>) -> io::Result<()> {
    match punch_hole(file.as_fd(), range.clone()) {
        Err(error) if error.raw_os_error() == Some(EOPNOTSUPP) => {}
        result => return result,
    }
    let zeros = vec![0; usize::try_from(WINDOW_LEN).expect("a window")];
    for piece in pieces(range, WINDOW_LEN) {
        let len = usize::try_from(piece.end - piece.start).expect("a window");
        file.buffered().write_all_at(&zeros[..len], piece.start)?;
    }
    Ok(())
}
