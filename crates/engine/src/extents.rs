//! Which parts of a file hold data, and on what kind of file system it lies.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

/// `TMPFS_MAGIC` in Linux's `include/uapi/linux/magic.h`; memfds report it too.
const TMPFS_MAGIC: u32 = 0x0102_1994;

/// `HUGETLBFS_MAGIC` in the same file.
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// What kind of file system a file is on, as far as reading its memory differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// Huge pages: holes cannot be found by seeking, and there is no `write`.
    Hugetlbfs {
        /// The size of its pages, in bytes.
        page_size: u64,
    },
    /// tmpfs, a memfd, or shared anonymous memory.
    Tmpfs,
    /// Anything else.
    Other,
}

/// Returns what kind of file system `file` is on.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn file_system(file: BorrowedFd<'_>) -> io::Result<FileSystem> {
    let stat = rustix::fs::fstatfs(file)?;
    // The field's type differs between architectures; the magic numbers have 32 bits.
    match u32::try_from(stat.f_type) {
        Ok(HUGETLBFS_MAGIC) => {
            let page_size = u64::try_from(stat.f_bsize)
                .map_err(|_| io::Error::other("hugetlbfs reports a negative page size"))?;
            Ok(FileSystem::Hugetlbfs { page_size })
        }
        Ok(TMPFS_MAGIC) => Ok(FileSystem::Tmpfs),
        _ => Ok(FileSystem::Other),
    }
}

/// Finds where a file holds data. It has a descriptor of its own, because `lseek` moves the
/// position.
///
/// Everything else reads as zeros. A file system without holes reports one range.
///
/// On hugetlbfs this cannot find holes and reports all as data: its `llseek` is the default one
/// (`hugetlbfs_file_operations`, Linux 6.18). Call
/// [`ProcessMemory::touched`](crate::ProcessMemory::touched) for the processes that use the memory,
/// and compare with [`hugetlb_allocated_bytes`]; where they disagree, read with `pread`, which
/// fills in zeros for a hole, and not through a mapping, which would allocate it.
#[derive(Debug)]
pub struct DataSeeker {
    own: File,
}

impl DataSeeker {
    /// Opens `file` once more, through `/proc/self/fd`.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error, `EACCES` among others if the file may not be opened for reading.
    pub fn open(file: BorrowedFd<'_>) -> io::Result<DataSeeker> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let own = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(DataSeeker { own: own.into() })
    }

    /// Returns the first byte of `range` that is data.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn first(&self, range: &Range<u64>) -> io::Result<Option<u64>> {
        if range.is_empty() {
            return Ok(None);
        }
        match rustix::fs::seek(&self.own, SeekFrom::Data(range.start)) {
            Ok(start) => Ok((start < range.end).then_some(start)),
            // No data up to the end of the file, or the range begins past it.
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Returns the first part of `range` that is data, up to the next hole.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn next(&self, range: &Range<u64>) -> io::Result<Option<Range<u64>>> {
        let mut range = range.clone();
        while let Some(start) = self.first(&range)? {
            match rustix::fs::seek(&self.own, SeekFrom::Hole(start)) {
                Ok(end) if end > start => return Ok(Some(start..end.min(range.end))),
                // The data vanished between the calls; look again from here, but not forever.
                Ok(_) => range.start = start + 1,
                // The file was truncated since the other call.
                Err(Errno::NXIO) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(None)
    }
}

/// Returns the parts of `range` that hold data, in order, apart from one another, and clipped to
/// `range` and to the end of the file; see [`DataSeeker`].
///
/// The list may be as long as `range` has pages: pass a bounded range of a file that you do not
/// know.
///
/// # Errors
///
/// Returns the kernel's error, `EACCES` among others if the file may not be opened for reading.
pub fn data_ranges(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let seeker = DataSeeker::open(file)?;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut rest = range;
    while let Some(piece) = seeker.next(&rest)? {
        rest.start = piece.end;
        match found.last_mut() {
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ => found.push(piece),
        }
    }
    Ok(found)
}

/// Returns how many bytes of huge pages a file on hugetlbfs holds.
///
/// hugetlbfs counts every allocated page in `st_blocks` (`hugetlb_reserve_pages` and
/// `hugetlb_unreserve_pages` in `mm/hugetlb.c`, Linux 6.18), even where no process maps it.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn hugetlb_allocated_bytes(file: BorrowedFd<'_>) -> io::Result<u64> {
    /// `st_blocks` counts in these units on every file system.
    const UNIT: u64 = 512;
    let units = rustix::fs::fstat(file)?.st_blocks;
    u64::try_from(units)
        .ok()
        .and_then(|units| units.checked_mul(UNIT))
        .ok_or_else(|| io::Error::other("st_blocks is out of range"))
}

/// Makes `range` of `file` a hole; the length of the file stays.
///
/// # Errors
///
/// Returns the kernel's error: `EOPNOTSUPP` where the file system has no holes.
pub fn punch_hole(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, range.start, range.end - range.start)?)
}
