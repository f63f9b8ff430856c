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

/// Returns the parts of `range` that hold data, in order, apart from one another, and clipped to
/// `range` and to the end of the file.
///
/// Everything else in `range` reads as zeros. A file system without holes reports one range. The
/// file position of `file` is not touched: the search runs on a descriptor of its own, opened
/// through `/proc/self/fd`.
///
/// On hugetlbfs this cannot find holes and reports all as data: its `llseek` is the default one
/// (`hugetlbfs_file_operations`, Linux 6.18). Ask
/// [`ProcessMemory::touched`](crate::ProcessMemory::touched) of those who use the memory and
/// compare with [`hugetlb_allocated_bytes`]; where they disagree, read with `pread`, which fills
/// in zeros for a hole, and not through a mapping, which would allocate it.
///
/// # Errors
///
/// Returns the kernel's error, `EACCES` among others if the file may not be opened for reading.
pub fn data_ranges(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let own: File = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?.into();
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let start = match rustix::fs::seek(&own, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from `at` to the end of the file, or `at` is past it.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if start >= range.end {
            break;
        }
        let end = match rustix::fs::seek(&own, SeekFrom::Hole(start)) {
            Ok(end) => end,
            // The file was truncated, or its data punched out, since the other call.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if end <= start {
            // The data vanished between the calls; look again from here, but not forever.
            at = start + 1;
            continue;
        }
        let piece = start..end.min(range.end);
        match found.last_mut() {
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ => found.push(piece),
        }
        at = end;
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
