//! The memory of another process: what it has mapped, what backs it, and the bytes.

#![expect(unsafe_code, reason = "process_vm_readv, process_vm_writev and PAGEMAP_SCAN are raw")]

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{CWD, Dir, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use crate::extents::{FileSystem, file_system};
use crate::maps::{self, Mapping};
use crate::region::Access;

/// The memory of a process, which stays that process: a pid used again is noticed.
///
/// Everything here needs the right to trace the process (`PTRACE_MODE_ATTACH_REALCREDS` in
/// `ptrace(2)`): the same user and no change of credentials, or `CAP_SYS_PTRACE`. Without it the
/// calls fail with [`io::ErrorKind::PermissionDenied`]; for a process that has ended they fail
/// with `ESRCH`.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: Pid,
    pidfd: OwnedFd,
    /// `/proc/PID`, opened, so that it cannot become another process's.
    directory: OwnedFd,
    pagemap: File,
}

impl ProcessMemory {
    /// Opens the memory of the process `pid`.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error: `ESRCH` if there is no such process, and
    /// [`io::ErrorKind::PermissionDenied`] if its memory may not be looked at.
    pub fn open(pid: u32) -> io::Result<ProcessMemory> {
        let number = i32::try_from(pid).map_err(|_| no_such_process())?;
        let pid = Pid::from_raw(number).ok_or_else(no_such_process)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let directory = rustix::fs::openat(
            CWD,
            format!("/proc/{number}"),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(gone_if_missing)?;
        // Both were opened by number. If the first process still lives now, the number was its
        // own all the time.
        if has_ended(&pidfd)? {
            return Err(no_such_process());
        }
        let pagemap = open_in(&directory, "pagemap", OFlags::RDONLY)?.into();
        Ok(ProcessMemory { pid, pidfd, directory, pagemap })
    }

    /// Returns the process's id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Returns a descriptor of the process itself: it polls readable when the process ends.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Returns all mappings of the process, by rising address.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn mappings(&self) -> io::Result<Vec<Mapping>> {
        let mut bytes = Vec::new();
        File::from(open_in(&self.directory, "maps", OFlags::RDONLY)?).read_to_end(&mut bytes)?;
        maps::parse(&bytes)
    }

    /// Copies the memory from `address` on into `into`.
    ///
    /// Fastest in pieces of about 1 MiB. Reading a page that was never touched does not allocate
    /// it in private memory, but does in a shared file.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error, or one that wraps a [`Fault`] with the first address that could
    /// not be read; the bytes before it are in `into`.
    pub fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let rest = &mut into[done..];
            let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
            let at = address.checked_add(done as u64).ok_or_else(|| fault(u64::MAX))?;
            let remote = libc::iovec { iov_base: remote(at)?, iov_len: rest.len() };
            // SAFETY:
            // - `local` is valid for writes of its length; the kernel checks `remote` itself.
            // - Both lists have one element, and the kernel keeps neither after the call.
            let moved = unsafe {
                libc::process_vm_readv(self.pid_raw(), &raw const local, 1, &raw const remote, 1, 0)
            };
            done += moved_bytes(moved, at)?;
        }
        // The call takes a number. A process that lives after it was itself what was read.
        if has_ended(&self.pidfd)? { Err(no_such_process()) } else { Ok(()) }
    }

    /// Copies `from` into the memory at `address`.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error, or one that wraps a [`Fault`] with the first address that could
    /// not be written; the bytes before it were.
    pub fn write(&self, address: u64, from: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            // The call takes a number, and must not write into another process that has it now.
            // Between this look and the call the process would have to end, be waited for by its
            // parent, and all other numbers be used once; the parent of a VM in our hands is not
            // that quick.
            if has_ended(&self.pidfd)? {
                return Err(no_such_process());
            }
            let rest = &from[done..];
            let local =
                libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
            let at = address.checked_add(done as u64).ok_or_else(|| fault(u64::MAX))?;
            let remote = libc::iovec { iov_base: remote(at)?, iov_len: rest.len() };
            // SAFETY:
            // - `local` is valid for reads of its length and only read; the kernel checks
            //   `remote` itself.
            // - Both lists have one element, and the kernel keeps neither after the call.
            let moved = unsafe {
                libc::process_vm_writev(
                    self.pid_raw(),
                    &raw const local,
                    1,
                    &raw const remote,
                    1,
                    0,
                )
            };
            done += moved_bytes(moved, at)?;
        }
        Ok(())
    }

    /// Says what backs `range`: private memory, or a file that can be mapped here too.
    ///
    /// The range may span several mappings as long as they are of one kind and, if shared, of one
    /// file at offsets that follow one another. `access` is how a shared file is opened.
    ///
    /// # Errors
    ///
    /// Returns [`BackingError`] if part of the range is not mapped, if it is not all of one kind,
    /// or if the file cannot be opened.
    pub fn backing(&self, range: Range<u64>, access: Access) -> Result<Backing, BackingError> {
        let mappings =
            self.mappings().map_err(|source| BackingError::Io { range: range.clone(), source })?;
        let covering = covering(&mappings, &range)?;
        let first = covering[0];
        if !first.has_file() {
            return Ok(Backing::Private { file: None });
        }
        let io_error = |source| BackingError::Io { range: range.clone(), source };
        let access = if first.shared { access } else { Access::Read };
        let file = self.open_file_of(first, access).map_err(io_error)?;
        let file_system = file_system(file.as_fd()).map_err(io_error)?;
        let offset = first.file_offset + (range.start - first.range.start);
        let file = BackingFile { file, offset, file_system };
        Ok(if first.shared {
            Backing::Shared { file }
        } else {
            Backing::Private { file: Some(file) }
        })
    }

    /// Returns the parts of `range` of which the process has a page, present or swapped out, in
    /// order, merged, clipped to `range`, and else page-aligned.
    ///
    /// Everything else in private anonymous memory reads as zeros. It does *not* in a shared file,
    /// whose pages other processes, or nobody, may have mapped: ask
    /// [`data_ranges`](crate::data_ranges) there. Pages that are the kernel's shared zero page are
    /// left out where the kernel can tell.
    ///
    /// Uses the `PAGEMAP_SCAN` ioctl (Linux 6.7), which skips what has no page tables, else reads
    /// 8 bytes a page from `/proc/PID/pagemap`.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn touched(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        match touched_by_scan(&self.pagemap, &range) {
            // The kernel is older than the ioctl.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                touched_by_entries(&self.pagemap, &range)
            }
            result => result,
        }
    }

    fn pid_raw(&self) -> libc::pid_t {
        self.pid.as_raw_nonzero().get()
    }

    /// Opens the file of a mapping, even if it has no name any more.
    fn open_file_of(&self, mapping: &Mapping, access: Access) -> io::Result<File> {
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let Range { start, end } = mapping.range;
        match open_in(&self.directory, format!("map_files/{start:x}-{end:x}"), flags) {
            Ok(file) => Ok(file.into()),
            // Following these links takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE. The process
            // may also hold the file open, and that link asks for less.
            Err(error) => match self.find_open_file(mapping, flags)? {
                Some(file) => Ok(file),
                None => Err(error),
            },
        }
    }

    fn find_open_file(&self, mapping: &Mapping, flags: OFlags) -> io::Result<Option<File>> {
        let directory = open_in(&self.directory, "fd", OFlags::RDONLY | OFlags::DIRECTORY)?;
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            // Closed meanwhile, or not a number at all.
            let Ok(stat) = rustix::fs::statat(&directory, name, rustix::fs::AtFlags::empty())
            else {
                continue;
            };
            let same = stat.st_ino == mapping.inode
                && rustix::fs::major(stat.st_dev) == mapping.device.major
                && rustix::fs::minor(stat.st_dev) == mapping.device.minor;
            if same {
                let file =
                    rustix::fs::openat(&directory, name, flags | OFlags::CLOEXEC, Mode::empty())?;
                return Ok(Some(file.into()));
            }
        }
        Ok(None)
    }
}

/// What backs a range of a process's memory.
#[derive(Debug)]
pub enum Backing {
    /// Memory of its own: only [`ProcessMemory::read`] and [`ProcessMemory::write`] reach it.
    Private {
        /// The file it started as a copy of, open for reading, if any.
        file: Option<BackingFile>,
    },
    /// A file that it shares with whoever maps it too.
    Shared {
        /// The file.
        file: BackingFile,
    },
}

/// A file that backs memory.
#[derive(Debug)]
pub struct BackingFile {
    /// The file, opened anew.
    pub file: File,
    /// Where in the file the range starts, in bytes.
    pub offset: u64,
    /// What kind of file system it is on.
    pub file_system: FileSystem,
}

/// Why it cannot be said what backs a range.
#[derive(Debug)]
#[non_exhaustive]
pub enum BackingError {
    /// Part of the range is not mapped.
    Unmapped {
        /// The first address that is not.
        address: u64,
    },
    /// The range is not of one kind or not of one file from start to end.
    Mixed {
        /// The first address of another kind or place.
        address: u64,
    },
    /// The kernel refused.
    Io {
        /// The range that was asked for.
        range: Range<u64>,
        /// What the kernel said.
        source: io::Error,
    },
}

impl fmt::Display for BackingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackingError::Unmapped { address } => write!(f, "nothing is mapped at {address:#x}"),
            BackingError::Mixed { address } => {
                write!(f, "another kind of mapping, or another place, begins at {address:#x}")
            }
            BackingError::Io { range, .. } => {
                write!(f, "cannot look behind memory {:#x}..{:#x}", range.start, range.end)
            }
        }
    }
}

impl Error for BackingError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            BackingError::Io { source, .. } => Some(source),
            BackingError::Unmapped { .. } | BackingError::Mixed { .. } => None,
        }
    }
}

/// Returns the mappings that cover `range` without a gap, all of one kind and place; at least one.
fn covering<'a>(
    mappings: &'a [Mapping],
    range: &Range<u64>,
) -> Result<Vec<&'a Mapping>, BackingError> {
    let mut found: Vec<&Mapping> = Vec::new();
    let mut at = range.start;
    let overlapping = mappings
        .iter()
        .filter(|mapping| mapping.range.end > range.start && mapping.range.start < range.end);
    for mapping in overlapping {
        if mapping.range.start > at {
            break;
        }
        if let Some(last) = found.last() {
            let follows = match (last.has_file(), mapping.has_file()) {
                (false, false) => true,
                (true, true) => {
                    last.inode == mapping.inode
                        && last.device == mapping.device
                        && last.file_offset.checked_add(last.range.end - last.range.start)
                            == Some(mapping.file_offset)
                }
                _ => false,
            };
            if last.shared != mapping.shared || !follows {
                return Err(BackingError::Mixed { address: mapping.range.start });
            }
        }
        at = mapping.range.end;
        found.push(mapping);
    }
    if at < range.end || found.is_empty() {
        return Err(BackingError::Unmapped { address: at });
    }
    Ok(found)
}

/// `struct pm_scan_arg` of Linux's `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`, in the same file.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArguments>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);

/// `_IOWR('f', 16, struct pm_scan_arg)`, with the bits as all but four architectures lay them out.
const PAGEMAP_SCAN: u64 = (3 << 30) | (96 << 16) | (0x66 << 8) | 16;

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Regions that the kernel fills in per call: 96 KiB of answers.
const REGIONS_PER_SCAN: usize = 4096;

fn touched_by_scan(pagemap: &File, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let (mut at, end) = whole_pages(range);
    let mut regions = vec![PageRegion::default(); REGIONS_PER_SCAN];
    let mut found = Vec::new();
    while at < end {
        let (count, walk_end) = scan(pagemap, at..end, &mut regions)?;
        for region in &regions[..count] {
            push_merged(&mut found, clip(region.start..region.end, range));
        }
        if walk_end <= at {
            return Err(io::Error::other("PAGEMAP_SCAN did not advance"));
        }
        at = walk_end;
    }
    Ok(found)
}

/// Scans once; returns how many of `regions` were filled in and how far the kernel came.
fn scan(pagemap: &File, range: Range<u64>, regions: &mut [PageRegion]) -> io::Result<(usize, u64)> {
    let mut arguments = ScanArguments {
        size: size_of::<ScanArguments>() as u64,
        start: range.start,
        end: range.end,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: regions.len() as u64,
        // Not the zero page, and present or swapped.
        category_inverted: PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..ScanArguments::default()
    };
    // The request's type is `c_int` with some C libraries and `c_ulong` with others.
    let request = PAGEMAP_SCAN as libc::Ioctl;
    // SAFETY:
    // - `arguments` has the kernel's layout, sizes asserted above, and says its own size.
    // - `vec` and `vec_len` are those of `regions`, which is borrowed for writing and outlives
    //   the call; the kernel keeps neither.
    let result =
        unsafe { libc::ioctl(pagemap.as_raw_fd(), request, ptr::from_mut(&mut arguments)) };
    match usize::try_from(result) {
        Ok(count) => Ok((count.min(regions.len()), arguments.walk_end)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Entries of `/proc/PID/pagemap` that are read at a time: 512 KiB, for 256 MiB of memory.
const ENTRIES_PER_READ: usize = 1 << 16;

/// Bits of an entry, from Linux's `Documentation/admin-guide/mm/pagemap.rst`.
const ENTRY_PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

fn touched_by_entries(pagemap: &File, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    const ENTRY: usize = size_of::<u64>();
    let page_size = page_size();
    let (mut at, end) = whole_pages(range);
    let mut bytes = vec![0; ENTRIES_PER_READ * ENTRY];
    let mut found = Vec::new();
    while at < end {
        let pages = usize::try_from((end - at) / page_size).unwrap_or(usize::MAX);
        let len = pages.min(ENTRIES_PER_READ) * ENTRY;
        let len = pagemap.read_at(&mut bytes[..len], at / page_size * ENTRY as u64)?;
        if len < ENTRY {
            // Past the last address a process can have.
            break;
        }
        for entry in bytes[..len].chunks_exact(ENTRY) {
            let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
            if entry & ENTRY_PRESENT_OR_SWAPPED != 0 {
                push_merged(&mut found, clip(at..at + page_size, range));
            }
            at += page_size;
        }
    }
    Ok(found)
}

/// Says whether the ioctl is there, on our own memory.
pub(crate) fn probe_pagemap_scan() -> io::Result<()> {
    let pagemap = File::open(Path::new("/proc/self/pagemap"))?;
    let mut regions = [PageRegion::default()];
    scan(&pagemap, 0..page_size(), &mut regions).map(|_| ())
}

fn push_merged(found: &mut Vec<Range<u64>>, next: Range<u64>) {
    match found.last_mut() {
        _ if next.is_empty() => {}
        Some(last) if last.end == next.start => last.end = next.end,
        _ => found.push(next),
    }
}

fn clip(found: Range<u64>, asked: &Range<u64>) -> Range<u64> {
    found.start.max(asked.start)..found.end.min(asked.end)
}

/// Rounds outwards to whole pages; the end saturates at the last page of the address space.
fn whole_pages(range: &Range<u64>) -> (u64, u64) {
    let page_size = page_size();
    let start = range.start - range.start % page_size;
    let end = range.end.checked_next_multiple_of(page_size);
    (start, end.unwrap_or(u64::MAX - (page_size - 1)))
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

fn open_in(
    directory: &OwnedFd,
    path: impl rustix::path::Arg,
    flags: OFlags,
) -> io::Result<OwnedFd> {
    rustix::fs::openat(directory, path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
}

/// Says whether the process of a pidfd has ended: its descriptor polls readable then.
fn has_ended(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(ready) => return Ok(ready > 0),
            // A signal.
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn remote(address: u64) -> io::Result<*mut libc::c_void> {
    let address = usize::try_from(address).map_err(|_| fault(address))?;
    Ok(ptr::without_provenance_mut(address))
}

/// Reads the result of a `process_vm_*` call at `address`.
fn moved_bytes(result: isize, address: u64) -> io::Result<usize> {
    match usize::try_from(result) {
        // The kernel stops short at a page it cannot reach, and names it by failing there.
        Ok(0) => Err(fault(address)),
        Ok(len) => Ok(len),
        Err(_) => {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EFAULT) => Err(fault(address)),
                // A signal before the first byte: nothing was moved.
                Some(libc::EINTR) => Ok(0),
                _ => Err(error),
            }
        }
    }
}

fn fault(address: u64) -> io::Error {
    io::Error::other(Fault { address })
}

/// An address of another process that could not be reached; inside an [`io::Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The first address that could not.
    pub address: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no memory can be reached at {:#x}", self.address)
    }
}

impl Error for Fault {}

fn no_such_process() -> io::Error {
    io::Error::from_raw_os_error(libc::ESRCH)
}

fn gone_if_missing(errno: Errno) -> io::Error {
    match errno {
        Errno::NOENT => no_such_process(),
        errno => errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mappings(text: &str) -> Vec<Mapping> {
        maps::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn neighbors_of_one_file_cover_a_range_together() {
        let mappings = mappings(
            "1000-3000 rw-s 00005000 00:01 7 /memfd:a\n3000-4000 rw-s 00007000 00:01 7 /memfd:a\n",
        );
        assert_eq!(covering(&mappings, &(0x1000..0x4000)).unwrap().len(), 2);
        assert_eq!(covering(&mappings, &(0x2000..0x2800)).unwrap().len(), 1);
    }

    #[test]
    fn a_gap_is_named_by_its_first_address() {
        let mappings = mappings("1000-3000 rw-p 0 00:00 0\n4000-5000 rw-p 0 00:00 0\n");
        for (range, gap) in [
            (0x1000..0x5000, 0x3000),
            (0x0000..0x2000, 0x0000),
            (0x4000..0x6000, 0x5000),
            (0x7000..0x8000, 0x7000),
        ] {
            let error = covering(&mappings, &range).unwrap_err();
            let BackingError::Unmapped { address } = error else { panic!("{error}") };
            assert_eq!(address, gap);
        }
    }

    #[test]
    fn a_change_of_kind_file_or_place_is_mixed() {
        for second in [
            "2000-3000 rw-p 00002000 00:01 7",
            "2000-3000 rw-s 00002000 00:01 8",
            "2000-3000 rw-s 00002000 00:02 7",
            "2000-3000 rw-s 00003000 00:01 7",
            "2000-3000 rw-p 00000000 00:00 0",
        ] {
            let mappings = mappings(&format!("1000-2000 rw-s 00001000 00:01 7\n{second}\n"));
            let error = covering(&mappings, &(0x1000..0x3000)).unwrap_err();
            assert!(matches!(error, BackingError::Mixed { address: 0x2000 }), "{second}");
        }
    }

    #[test]
    fn anonymous_neighbors_need_no_common_place() {
        let mappings = mappings("1000-2000 rw-p 0 00:00 0\n2000-3000 r--p 0 00:00 0 [heap]\n");
        assert_eq!(covering(&mappings, &(0x1000..0x3000)).unwrap().len(), 2);
    }

    #[test]
    fn touching_pieces_are_merged_and_clipped() {
        let mut found = Vec::new();
        for piece in [0x0000..0x2000, 0x2000..0x3000, 0x5000..0x6000, 0x9000..0xa000] {
            push_merged(&mut found, clip(piece, &(0x1800..0x5100)));
        }
        assert_eq!(found, [0x1800..0x3000, 0x5000..0x5100]);
    }

    #[test]
    fn pages_are_rounded_outwards_up_to_the_last_one() {
        let page_size = page_size();
        assert_eq!(whole_pages(&(1..page_size + 1)), (0, 2 * page_size));
        assert_eq!(whole_pages(&(0..u64::MAX)).1, u64::MAX - (page_size - 1));
    }

    #[test]
    fn both_ways_of_asking_find_the_same_pages() {
        let memory = rustix::param::page_size() * 64;
        let mut bytes = vec![0_u8; memory];
        for page in [3, 4, 9, 63] {
            bytes[page * rustix::param::page_size()] = 1;
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let start = bytes.as_ptr().addr() as u64;
        let range = start..start + memory as u64;
        let by_entries = touched_by_entries(&pagemap, &range).unwrap();
        match touched_by_scan(&pagemap, &range) {
            Ok(by_scan) => assert_eq!(by_scan, by_entries),
            Err(error) => println!("skipped: PAGEMAP_SCAN: {error}"),
        }
        assert!(!by_entries.is_empty());
        drop(bytes);
    }
}
