//! The RAM of another process: what backs each block, and where in it there may be data.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use vmfile_engine::{
    Access, Backing, BackingError, BackingFile, FileSystem, ProcessMemory, Region, data_ranges,
    hugetlb_allocated_bytes,
};

use crate::ram_loader::Writer;
use crate::ram_writer::{PAGE_LEN, Reader};
use crate::ranges;

/// One block as it lies in the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockAt {
    /// The block's name.
    pub(crate) name: String,
    /// Address of its first byte in the process.
    pub(crate) address: u64,
    /// Its length in bytes, whole pages.
    pub(crate) len: u64,
}

/// The RAM of a process, looked up and not yet read.
#[derive(Debug)]
pub(crate) struct ProcessRam {
    memory: Arc<ProcessMemory>,
    blocks: Vec<BlockRam>,
}

#[derive(Debug)]
struct BlockRam {
    at: BlockAt,
    backing: RamBacking,
}

#[derive(Debug)]
enum RamBacking {
    /// Memory of the process's own, perhaps a copy of a file where it was not written.
    Private { file: Option<BackingFile> },
    /// A file that is mapped here as well.
    Shared { region: Arc<Region>, file: Arc<File>, offset: u64, file_system: FileSystem },
}

/// A block as it is read.
#[derive(Debug)]
pub(crate) struct Readable {
    /// Byte ranges of the block that may hold data.
    pub(crate) ranges: Vec<Range<u64>>,
    /// How they are best read.
    pub(crate) reader: Reader,
}

/// A block as it is written.
#[derive(Debug)]
pub(crate) struct Writable {
    /// Byte ranges of the block that may hold data already.
    pub(crate) touched: Vec<Range<u64>>,
    /// How the block is best written.
    pub(crate) writer: Writer,
}

/// Why the RAM of a process cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ProcessRamError {
    /// The process may not be looked into.
    #[error("look into process {pid}")]
    Process {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// It cannot be said what backs a block.
    #[error("find what backs RAM block {block:?} of process {pid}")]
    Backing {
        /// The process.
        pid: u32,
        /// The block.
        block: String,
        /// What was found.
        source: BackingError,
    },
    /// A block's file cannot be mapped or asked for its holes.
    #[error("{what} of RAM block {block:?}")]
    File {
        /// What was to be done.
        what: &'static str,
        /// The block.
        block: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl ProcessRam {
    /// Looks up what backs `blocks` in process `pid`; reads no page.
    ///
    /// # Errors
    ///
    /// Returns [`ProcessRamError`] if the process may not be looked into or its memory is not
    /// what the blocks say.
    pub(crate) fn open(
        pid: u32,
        blocks: &[BlockAt],
        access: Access,
    ) -> Result<ProcessRam, ProcessRamError> {
        let process = |source| ProcessRamError::Process { pid, source };
        let memory = Arc::new(ProcessMemory::open(pid).map_err(process)?);
        if let Some(block) = blocks.first() {
            // The right to read is tried now, while nothing has been stopped yet.
            memory.read(block.address, &mut [0; 8]).map_err(process)?;
        }
        let open = |at: &BlockAt| {
            let backing =
                memory.backing(at.address..at.address + at.len, access).map_err(|source| {
                    ProcessRamError::Backing { pid, block: at.name.clone(), source }
                })?;
            Ok(BlockRam { at: at.clone(), backing: RamBacking::open(backing, at, access)? })
        };
        let blocks = blocks.iter().map(open).collect::<Result<Vec<_>, ProcessRamError>>()?;
        Ok(ProcessRam { memory, blocks })
    }

    /// Returns, for each block, the byte ranges that may hold data; everything else is zero as far
    /// as the kernel knows. With them, how the block is best read.
    ///
    /// # Errors
    ///
    /// Returns [`ProcessRamError`] if the kernel cannot be asked.
    pub(crate) fn scan(&self) -> Result<Vec<Readable>, ProcessRamError> {
        self.blocks.iter().map(|block| self.scan_block(block)).collect()
    }

    /// Returns, for each block, the byte ranges that may hold data already, and how the block is
    /// best written.
    ///
    /// # Errors
    ///
    /// Returns [`ProcessRamError`] if the kernel cannot be asked.
    pub(crate) fn scan_for_writing(&self) -> Result<Vec<Writable>, ProcessRamError> {
        let scan = |block: &BlockRam| {
            let touched = self.scan_block(block)?.ranges;
            let writer = match &block.backing {
                RamBacking::Private { .. } => {
                    Writer::Process(Arc::clone(&self.memory), block.at.address)
                }
                RamBacking::Shared { file, offset, file_system: FileSystem::Tmpfs, .. } => {
                    Writer::File(Arc::clone(file), *offset)
                }
                RamBacking::Shared { region, .. } => Writer::Region(Arc::clone(region)),
            };
            Ok(Writable { touched, writer })
        };
        self.blocks.iter().map(scan).collect()
    }

    fn scan_block(&self, block: &BlockRam) -> Result<Readable, ProcessRamError> {
        let at = &block.at;
        let (found, reader) = match &block.backing {
            RamBacking::Private { file } => {
                let mut found = self.touched(at)?;
                if let Some(BackingFile { file, offset, .. }) = file {
                    // What the process has not written shows the file underneath.
                    found.extend(holes(at, file, *offset)?);
                }
                (found, Reader::Process(Arc::clone(&self.memory), at.address))
            }
            RamBacking::Shared { region, file, offset, file_system } => match file_system {
                FileSystem::Hugetlbfs { page_size } => {
                    self.scan_hugetlb(at, region, file, (*offset, *page_size))?
                }
                FileSystem::Tmpfs | FileSystem::Other => {
                    (holes(at, file, *offset)?, Reader::Region(Arc::clone(region)))
                }
            },
        };
        Ok(Readable { ranges: ranges::merge(found, PAGE_LEN, at.len), reader })
    }

    /// hugetlbfs cannot say where its holes are (Linux 6.18), and touching one through a mapping
    /// takes a huge page from the pool. The process's page tables say which pages it has; if the
    /// file has others as well, all of it is read as a file, which gives zeros for a hole.
    fn scan_hugetlb(
        &self,
        at: &BlockAt,
        region: &Arc<Region>,
        file: &Arc<File>,
        (offset, page_size): (u64, u64),
    ) -> Result<(Vec<Range<u64>>, Reader), ProcessRamError> {
        let touched = ranges::merge(self.touched(at)?, page_size, at.len);
        let touched_bytes: u64 = touched.iter().map(|range| range.end - range.start).sum();
        let allocated = hugetlb_allocated_bytes(file.as_fd())
            .map_err(|source| file_error("count the huge pages", at, source))?;
        if touched_bytes >= allocated {
            Ok((touched, Reader::Region(Arc::clone(region))))
        } else {
            let whole = 0..at.len;
            Ok((Vec::from([whole]), Reader::File(Arc::clone(file), offset)))
        }
    }

    fn touched(&self, at: &BlockAt) -> Result<Vec<Range<u64>>, ProcessRamError> {
        let found = self
            .memory
            .touched(at.address..at.address + at.len)
            .map_err(|source| file_error("ask for the touched pages", at, source))?;
        let block = |range: Range<u64>| range.start - at.address..range.end - at.address;
        Ok(found.into_iter().map(block).collect())
    }
}

impl RamBacking {
    fn open(backing: Backing, at: &BlockAt, access: Access) -> Result<RamBacking, ProcessRamError> {
        Ok(match backing {
            Backing::Private { file } => RamBacking::Private { file },
            Backing::Shared { file: BackingFile { file, offset, file_system } } => {
                let region = Region::map(file.as_fd(), offset, at.len, access)
                    .map_err(|source| file_error("map the file", at, source))?;
                let (region, file) = (Arc::new(region), Arc::new(file));
                RamBacking::Shared { region, file, offset, file_system }
            }
        })
    }
}

/// Returns the ranges of the block for which `file` holds data.
fn holes(at: &BlockAt, file: &File, offset: u64) -> Result<Vec<Range<u64>>, ProcessRamError> {
    let found = data_ranges(file.as_fd(), offset..offset + at.len)
        .map_err(|source| file_error("find the holes of the file", at, source))?;
    let block = |range: Range<u64>| range.start - offset..range.end - offset;
    Ok(found.into_iter().map(block).collect())
}

fn file_error(what: &'static str, at: &BlockAt, source: io::Error) -> ProcessRamError {
    ProcessRamError::File { what, block: at.name.clone(), source }
}
