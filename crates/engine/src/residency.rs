//! How much of a file the page cache holds, filling it, and giving it back.

#![expect(unsafe_code, reason = "cachestat has no safe wrapper, and mincore needs a mapping")]

use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use rustix::fs::Advice;
use rustix::mm::{MapFlags, ProtFlags};

/// The number of `cachestat(2)`, the same on every architecture since Linux 6.5.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of Linux's `include/uapi/linux/mman.h`.
#[repr(C)]
struct CacheStatRange {
    offset: u64,
    len: u64,
}

/// `struct cachestat`, in the same file; counts of pages.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

const _: () = assert!(size_of::<CacheStatRange>() == 16);
const _: () = assert!(size_of::<CacheStat>() == 40);

/// Returns how many bytes of `range` of `file` are in the page cache, in whole pages.
///
/// Asks `cachestat` (Linux 6.5), else counts with `mincore`, which reports everything as cached to
/// a process that may not write the file.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn resident_bytes(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<u64> {
    if range.is_empty() {
        return Ok(0);
    }
    match cached_pages(file, &range) {
        Ok(pages) => Ok(pages * page_size()),
        // The kernel does not have the call, a filter forbids it, or it does not support this kind
        // of file.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP)
            ) =>
        {
            counted_by_mincore(file, range)
        }
        Err(error) => Err(error),
    }
}

/// Asks the kernel to drop the cached pages of `range`, which must have been written back.
///
/// Dirty pages and pages that a process maps stay, and so does a folio only partly in `range`: the
/// cache keeps and drops pages in folios, which can be of a megabyte and more (seen on ext4, Linux
/// 6.18). Drop whole files, or large pieces. An end past 2^63, where no file reaches, is the end of
/// the file.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn drop_cached(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    // The kernel's length is signed, and zero means "to the end of the file": no length here.
    let len = NonZeroU64::new(range.end - range.start).filter(|_| i64::try_from(range.end).is_ok());
    Ok(rustix::fs::fadvise(file, range.start, len, Advice::DontNeed)?)
}

/// Asks the kernel to begin reading `range`, and no more, into the page cache; returns before the
/// disk has answered. What the kernel does not read now is read when it is needed.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn begin_reading(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<()> {
    let Some(len) = NonZeroU64::new(range.end.saturating_sub(range.start)) else { return Ok(()) };
    Ok(rustix::fs::fadvise(file, range.start, Some(len), Advice::WillNeed)?)
}

/// Tests whether the kernel has `cachestat`, with a descriptor that cannot exist.
pub(crate) fn probe() -> io::Result<()> {
    let range = CacheStatRange { offset: 0, len: 1 };
    match cachestat(-1, &range) {
        // The kernel has the call, which looks at its descriptor first.
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Ok(()),
    }
}

fn cached_pages(file: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<u64> {
    let range = CacheStatRange { offset: range.start, len: range.end - range.start };
    cachestat(file.as_raw_fd(), &range).map(|stat| stat.cached)
}

fn cachestat(fd: libc::c_int, range: &CacheStatRange) -> io::Result<CacheStat> {
    let mut stat = CacheStat::default();
    let flags: libc::c_uint = 0;
    // SAFETY:
    // - Both pointers are to live values with the kernel's layout, sizes asserted above.
    // - The kernel writes `stat` before it returns and keeps neither pointer.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, fd, ptr::from_ref(range), ptr::from_mut(&mut stat), flags)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(stat) }
}

fn counted_by_mincore(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<u64> {
    /// Bytes that are mapped and counted at a time.
    const WINDOW: u64 = 1 << 30;
    let page_size = page_size();
    let file_len = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
    let end = range.end.min(file_len.next_multiple_of(page_size));
    let mut at = range.start - range.start % page_size;
    let mut resident = 0;
    while at < end {
        let len = WINDOW.min(end - at);
        resident += resident_pages(file, at, len, page_size)? * page_size;
        at += len;
    }
    Ok(resident)
}

fn resident_pages(file: BorrowedFd<'_>, offset: u64, len: u64, page_size: u64) -> io::Result<u64> {
    let pages = len.div_ceil(page_size);
    let len = usize::try_from(len).expect("a window fits the address space");
    let mut flags = vec![0_u8; usize::try_from(pages).expect("fewer than bytes")];
    // SAFETY: a new mapping at an address of the kernel's choice changes no memory in use.
    let start = unsafe {
        rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, offset)
    }?;
    // SAFETY:
    // - `start` is a mapping of `len` bytes; it is looked at, not read.
    // - `flags` has a byte for each of its pages.
    let result = unsafe { libc::mincore(start.cast(), len, flags.as_mut_ptr()) };
    let result = if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: the mapping was made above and nothing refers into it.
    unsafe { rustix::mm::munmap(start, len) }?;
    result?;
    // Only the lowest bit is defined.
    Ok(flags.iter().map(|flag| u64::from(flag & 1)).sum())
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn mincore_and_cachestat_count_alike() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 64 << 10]).unwrap();
        for range in [0..64 << 10, 4096..12_288, 60 << 10..1 << 20] {
            let by_mincore = counted_by_mincore(file.as_fd(), range.clone()).unwrap();
            match cached_pages(file.as_fd(), &range) {
                Ok(pages) => assert_eq!(by_mincore, pages * page_size(), "{range:?}"),
                Err(error) => println!("skipped: cachestat: {error}"),
            }
        }
        assert_eq!(counted_by_mincore(file.as_fd(), 0..64 << 10).unwrap(), 64 << 10);
    }
}
