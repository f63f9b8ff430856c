//! The RAM of another process: what backs each block, and where in it there may be data.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use vmfile_engine::{
    Access, Backing, BackingError, BackingFile, DataSeeker, FileSystem, ProcessMemory,
    hugetlb_allocated_bytes,
};

use crate::memory::{Beneath, PageSink, PageSource};
use crate::plan::{UNIT_LEN, Units, in_window, pieces};
use crate::ranges;

/// The page length of x86, in bytes: Linux reports in such pages what a process has touched.
const PAGE_LEN: u64 = 4096;

/// One block as it lies in the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockAt {
    /// The block's name.
    pub name: String,
    /// Address of its first byte in the process.
    pub address: u64,
    /// Its length in bytes, whole pages.
    pub len: u64,
}

/// The RAM of a process, looked up and not yet read.
#[derive(Debug)]
pub struct ProcessRam {
    process: Arc<ProcessMemory>,
    blocks: Vec<BlockMemory>,
}

/// The memory of one block.
///
/// It is copied by system calls and never mapped: if another process truncates the file that backs
/// it, a call fails, and there is no `SIGBUS`. Only the copy is looked at, so that no change by
/// another process comes between two looks.
#[derive(Debug)]
struct BlockMemory {
    at: BlockAt,
    process: Arc<ProcessMemory>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Private memory of the process; pages that it has not written show the file beneath, if there
    /// is one.
    Private { beneath: Option<FilePart> },
    /// A shared file that can say where its holes are. It is read and written as a file: the kernel
    /// then makes pages without zeroing and mapping each of them first, in half the time of writing
    /// through a mapping (Linux 6.18).
    File(FilePart),
    /// A shared file on hugetlbfs, which cannot say where its holes are and has no `write` (Linux
    /// 6.18). The process's page tables say which pages it has. `all` is set if the file has
    /// further pages: then all of it is read, and a hole reads as zeros.
    HugePages { file: FilePart, page_size: u64, all: bool },
}

/// The part of a file that backs a block.
#[derive(Debug)]
struct FilePart {
    file: File,
    seeker: DataSeeker,
    /// Where in the file the block begins.
    offset: u64,
    /// How long the block is.
    len: u64,
}

/// Why the RAM of a process cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ProcessRamError {
    /// The memory of the process cannot be opened or read.
    #[error("look into process {pid}")]
    Process {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// What backs a block cannot be found, or cannot be used.
    #[error("find what backs RAM block {block:?} of process {pid}")]
    Backing {
        /// The process.
        pid: u32,
        /// The block.
        block: String,
        /// What was found.
        source: BackingError,
    },
    /// A block's file cannot be opened once more, or the kernel does not tell which pages are in
    /// use.
    #[error("{what} of RAM block {block:?}")]
    File {
        /// The operation that failed.
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
    /// Returns [`ProcessRamError`] if the memory of the process cannot be opened or read, or does
    /// not match `blocks`.
    pub fn open(
        pid: u32,
        blocks: &[BlockAt],
        access: Access,
    ) -> Result<ProcessRam, ProcessRamError> {
        let process = |source| ProcessRamError::Process { pid, source };
        let memory = Arc::new(ProcessMemory::open(pid).map_err(process)?);
        if let Some(block) = blocks.first() {
            // A missing permission to read shows here, before anything is stopped.
            memory.read(block.address, &mut [0; 8]).map_err(process)?;
        }
        let open = |at: &BlockAt| {
            let backing =
                memory.backing(at.address..at.address + at.len, access).map_err(|source| {
                    ProcessRamError::Backing { pid, block: at.name.clone(), source }
                })?;
            let kind = Kind::open(backing, at)
                .map_err(|source| file_error("open the file once more", at, source))?;
            let mut block = BlockMemory { at: at.clone(), process: Arc::clone(&memory), kind };
            let counted = block.count_huge_pages();
            counted.map_err(|source| block.error("count the huge pages", source))?;
            Ok(block)
        };
        let blocks = blocks.iter().map(open).collect::<Result<Vec<_>, ProcessRamError>>()?;
        Ok(ProcessRam { process: memory, blocks })
    }

    /// Returns the memory of the process.
    #[must_use]
    pub fn process(&self) -> &ProcessMemory {
        &self.process
    }

    /// Looks once more where the pages of blocks on hugetlbfs are. Call it when the process stands
    /// still: it may have touched further pages since [`ProcessRam::open`].
    ///
    /// # Errors
    ///
    /// Returns [`ProcessRamError`] if the kernel returns an error.
    pub fn look_again(&mut self) -> Result<(), ProcessRamError> {
        self.blocks.iter_mut().try_for_each(|block| {
            block.count_huge_pages().map_err(|source| block.error("count the huge pages", source))
        })
    }

    /// Returns the length of the largest pages that the RAM is made of for certain, in bytes: those
    /// of hugetlbfs.
    #[must_use]
    pub fn page_len_max(&self) -> u64 {
        let page_len = |block: &BlockMemory| match block.kind {
            Kind::HugePages { page_size, .. } => page_size,
            Kind::Private { .. } | Kind::File(_) => PAGE_LEN,
        };
        self.blocks.iter().map(page_len).max().unwrap_or(PAGE_LEN)
    }

    /// Returns where each block lies in the process.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = Range<u64>> {
        self.blocks.iter().map(|block| block.addresses(&(0..block.at.len)))
    }

    /// Returns the parts of `range`, no longer than a unit, that are not in a file beneath: what has
    /// to be copied to keep a moment. A page of a private mapping of a file that the process has
    /// not written is the file's.
    pub(crate) fn own(&self, block: usize, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.blocks[block].own(range)
    }

    /// Returns the first byte of `range` that [`ProcessRam::own`] would report.
    pub(crate) fn first_own(&self, block: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        self.blocks[block].first_own(range)
    }

    /// Copies `ranges` of a block, one after another, into `into`, which has their length.
    pub(crate) fn gather(
        &self,
        block: usize,
        ranges: &[Range<u64>],
        into: &mut [u8],
    ) -> io::Result<()> {
        self.blocks[block].gather(ranges, into)
    }

    /// Returns the first byte of `range` that may be data in the file beneath the block.
    pub(crate) fn first_beneath(
        &self,
        block: usize,
        range: &Range<u64>,
    ) -> io::Result<Option<u64>> {
        match &self.blocks[block].kind {
            Kind::Private { beneath: Some(file) } => file.first_data(range),
            _ => Ok(None),
        }
    }

    /// Reads a range from the file beneath the block; zeros if there is none.
    pub(crate) fn read_beneath(&self, block: usize, start: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.blocks[block].kind {
            Kind::Private { beneath: Some(file) } => file.read(start, into),
            _ => {
                into.fill(0);
                Ok(())
            }
        }
    }

    /// Returns how many bytes may be data; gaps of up to `gap_max` bytes between them count too.
    ///
    /// # Errors
    ///
    /// Returns [`ProcessRamError`] if the kernel returns an error.
    pub fn data_len(&self, gap_max: u64) -> Result<u64, ProcessRamError> {
        let len = |block: &BlockMemory| {
            let len = block.data_len(gap_max);
            len.map_err(|source| block.error("ask for the touched pages", source))
        };
        self.blocks.iter().map(len).sum()
    }
}

impl PageSource for ProcessRam {
    fn first_data(&self, block: usize, range: &Range<u64>) -> io::Result<Option<u64>> {
        self.blocks[block].first_data(range)
    }

    fn read(&self, block: usize, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool> {
        self.blocks[block].read(range, into)
    }

    fn beneath(&self, block: usize) -> io::Result<Option<Beneath>> {
        let Kind::Private { beneath: Some(part) } = &self.blocks[block].kind else {
            return Ok(None);
        };
        let metadata = part.file.metadata()?;
        let (device, inode) = (metadata.dev(), metadata.ino());
        Ok(Some(Beneath { device, inode, offset: part.offset }))
    }

    fn read_written(
        &self,
        block: usize,
        range: &Range<u64>,
        into: &mut [u8],
    ) -> io::Result<Vec<Range<u64>>> {
        let block = &self.blocks[block];
        let own = block.own(range)?;
        let in_window =
            |own: &Range<u64>| in_window(own.start - range.start)..in_window(own.end - range.start);
        let pieces: Vec<_> = own.iter().map(in_window).collect();
        block.process.read_pieces(block.at.address + range.start, &pieces, into)?;
        Ok(own)
    }
}

impl PageSink for ProcessRam {
    fn data(&self, block: usize, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.blocks[block].data(range)
    }

    fn write(
        &self,
        block: usize,
        start: u64,
        parts: &[Range<usize>],
        bytes: &[u8],
    ) -> io::Result<()> {
        self.blocks[block].write(start, parts, bytes)
    }
}

impl BlockMemory {
    /// Returns the first byte of `range`, a range of the block, that may be data; all before it is
    /// zero as far as the kernel knows.
    fn first_data(&self, range: &Range<u64>) -> io::Result<Option<u64>> {
        let touched = || {
            let found = self.process.first_touched(&self.addresses(range))?;
            Ok::<_, io::Error>(found.map(|address| address - self.at.address))
        };
        match &self.kind {
            Kind::Private { beneath: None } => touched(),
            Kind::Private { beneath: Some(file) } => {
                let (own, beneath) = (touched()?, file.first_data(range)?);
                Ok(own.into_iter().chain(beneath).min())
            }
            Kind::File(file) => file.first_data(range),
            Kind::HugePages { file, all, .. } => {
                file.check_len()?;
                if *all { Ok((!range.is_empty()).then_some(range.start)) } else { touched() }
            }
        }
    }

    /// Returns the parts of `range`, a range of the block and no longer than a unit, that may be
    /// data.
    fn data(&self, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut found = match &self.kind {
            Kind::Private { .. } | Kind::HugePages { all: false, .. } => {
                let found = self.process.touched(self.addresses(range))?;
                let own =
                    |range: Range<u64>| range.start - self.at.address..range.end - self.at.address;
                found.into_iter().map(own).collect()
            }
            Kind::File(_) => Vec::new(),
            Kind::HugePages { all: true, .. } => vec![range.clone()],
        };
        if let Kind::Private { beneath: Some(file) } | Kind::File(file) = &self.kind {
            file.add_data(range, &mut found)?;
        }
        Ok(ranges::merge(found, PAGE_LEN, range.end))
    }

    fn own(&self, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        if !matches!(self.kind, Kind::Private { .. }) {
            return self.data(range);
        }
        let found = self.process.own(self.addresses(range))?;
        let in_block =
            |found: Range<u64>| found.start - self.at.address..found.end - self.at.address;
        Ok(found.into_iter().map(in_block).collect())
    }

    fn first_own(&self, range: &Range<u64>) -> io::Result<Option<u64>> {
        if !matches!(self.kind, Kind::Private { .. }) {
            return self.first_data(range);
        }
        let found = self.process.first_own(&self.addresses(range))?;
        Ok(found.map(|address| address - self.at.address))
    }

    fn gather(&self, ranges: &[Range<u64>], into: &mut [u8]) -> io::Result<()> {
        match &self.kind {
            Kind::Private { .. } => {
                let at = |range: &Range<u64>| self.addresses(range);
                self.process.gather(&ranges.iter().map(at).collect::<Vec<_>>(), into)
            }
            Kind::File(file) | Kind::HugePages { file, .. } => {
                let mut rest = into;
                for range in ranges {
                    let (part, after) = rest.split_at_mut(in_window(range.end - range.start));
                    file.read(range.start, part)?;
                    rest = after;
                }
                Ok(())
            }
        }
    }

    /// Copies `range`, a window of the block, into `into`; returns `false` if none of it can be
    /// data, and `into` is then not to be used.
    fn read(&self, range: &Range<u64>, into: &mut [u8]) -> io::Result<bool> {
        match &self.kind {
            Kind::Private { .. } => {
                // A page that the process never touched is not read: that would enter the zero page
                // into its page tables.
                let found = self.data(range)?;
                let mut end = 0;
                let mut pieces = Vec::with_capacity(found.len());
                for found in &found {
                    let piece =
                        in_window(found.start - range.start)..in_window(found.end - range.start);
                    into[end..piece.start].fill(0);
                    end = piece.end;
                    pieces.push(piece);
                }
                into[end..].fill(0);
                self.process.read_pieces(self.at.address + range.start, &pieces, into)?;
                Ok(!pieces.is_empty())
            }
            Kind::File(file) | Kind::HugePages { file, .. } => {
                // Holes between data are read as well: that gives zeros and makes no page.
                let has_data = self.first_data(range)?.is_some();
                if has_data {
                    file.read(range.start, into)?;
                }
                Ok(has_data)
            }
        }
    }

    /// Copies `pieces` of `bytes` into the block; the first byte of `bytes` belongs to the block's
    /// byte `start`.
    fn write(&self, start: u64, pieces: &[Range<usize>], bytes: &[u8]) -> io::Result<()> {
        match &self.kind {
            Kind::File(file) => pieces.iter().try_for_each(|piece| {
                let offset = file.offset + start + piece.start as u64;
                file.file.write_all_at(&bytes[piece.clone()], offset)
            }),
            Kind::Private { .. } | Kind::HugePages { .. } => {
                self.process.write_pieces(self.at.address + start, pieces, bytes)
            }
        }
    }

    fn data_len(&self, gap_max: u64) -> io::Result<u64> {
        // A file is looked at in cells of `gap_max`: it may have as many ranges of data as pages.
        let by_file = matches!(&self.kind, Kind::File(_));
        let units = Units::new([self.at.len], if by_file { gap_max } else { UNIT_LEN });
        let mut len = 0;
        while let Some(unit) = units.take(|_, range| self.first_data(&range))? {
            if by_file {
                len += unit.range.end - unit.range.start;
                continue;
            }
            let mut end: Option<u64> = None;
            for range in self.data(&unit.range)? {
                let gap = end.map_or(0, |end| range.start - end);
                len += range.end - range.start + if gap <= gap_max { gap } else { 0 };
                end = Some(range.end);
            }
        }
        Ok(len)
    }

    fn count_huge_pages(&mut self) -> io::Result<()> {
        let addresses = self.addresses(&(0..self.at.len));
        let Kind::HugePages { file, page_size, all } = &mut self.kind else { return Ok(()) };
        let mut touched_bytes = 0;
        for piece in pieces(addresses, HUGE_SCAN_LEN) {
            let touched = ranges::merge(self.process.touched(piece)?, *page_size, u64::MAX);
            touched_bytes += touched.iter().map(|range| range.end - range.start).sum::<u64>();
        }
        *all = touched_bytes < hugetlb_allocated_bytes(file.file.as_fd())?;
        Ok(())
    }

    fn addresses(&self, range: &Range<u64>) -> Range<u64> {
        self.at.address + range.start..self.at.address + range.end
    }

    fn error(&self, what: &'static str, source: io::Error) -> ProcessRamError {
        file_error(what, &self.at, source)
    }
}

/// How many bytes of memory in huge pages one scan covers: at most 512 ranges of 2 MiB pages.
const HUGE_SCAN_LEN: u64 = 2 << 30;

impl Kind {
    fn open(backing: Backing, at: &BlockAt) -> io::Result<Kind> {
        Ok(match backing {
            Backing::Private { file: None } => Kind::Private { beneath: None },
            Backing::Private { file: Some(file) } => {
                Kind::Private { beneath: Some(FilePart::open(file, at)?) }
            }
            Backing::Shared { file } => match file.file_system {
                FileSystem::Hugetlbfs { page_size } => {
                    let file = FilePart::open(file, at)?;
                    Kind::HugePages { file, page_size, all: true }
                }
                FileSystem::Tmpfs | FileSystem::Other => Kind::File(FilePart::open(file, at)?),
            },
        })
    }
}

impl FilePart {
    fn open(BackingFile { file, offset, .. }: BackingFile, at: &BlockAt) -> io::Result<FilePart> {
        let seeker = DataSeeker::open(file.as_fd())?;
        Ok(FilePart { file, seeker, offset, len: at.len })
    }

    fn first_data(&self, range: &Range<u64>) -> io::Result<Option<u64>> {
        let found = self.seeker.first(&self.in_file(range))?;
        if found.is_none() {
            // Past the end of a file there is no data either.
            self.check_len()?;
        }
        Ok(found.map(|offset| offset - self.offset))
    }

    /// Adds the pages of `range` that are data, one by one. The kernel is not asked where the next
    /// hole is: it would look for it beyond the range, through all data that follows.
    fn add_data(&self, range: &Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        let mut rest = range.clone();
        while let Some(start) = self.first_data(&rest)? {
            rest.start = (start - start % PAGE_LEN + PAGE_LEN).min(range.end);
            found.push(start..rest.start);
        }
        Ok(())
    }

    fn read(&self, start: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, self.offset + start).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.cut(),
            _ => error,
        })
    }

    fn check_len(&self) -> io::Result<()> {
        if self.file.metadata()?.len() < self.offset + self.len { Err(self.cut()) } else { Ok(()) }
    }

    fn cut(&self) -> io::Error {
        let found = self.file.metadata().map_or(0, |meta| meta.len());
        let expected = self.offset + self.len;
        let what = "the file that backs it has been cut";
        io::Error::other(format!("{what}: it has {found} bytes, expected {expected}"))
    }

    fn in_file(&self, range: &Range<u64>) -> Range<u64> {
        self.offset + range.start..self.offset + range.end
    }
}

fn file_error(what: &'static str, at: &BlockAt, source: io::Error) -> ProcessRamError {
    ProcessRamError::File { what, block: at.name.clone(), source }
}
