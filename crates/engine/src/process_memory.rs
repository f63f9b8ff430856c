//! The memory of another process: what it has mapped, what backs it, and the bytes.

#![expect(unsafe_code, reason = "process_vm_readv and process_vm_writev have no safe wrapper")]

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{CWD, Dir, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use crate::extents::{FileSystem, file_system};
use crate::maps::{self, Mapping};

/// What the file behind a process's memory is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Bytes are only copied out.
    Read,
    /// Bytes are copied out and in.
    ReadWrite,
}

/// The memory of a process. If the process ends and another one gets its pid, that is noticed.
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
    /// [`io::ErrorKind::PermissionDenied`] if this process may not look at its memory.
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
        // Both were opened by pid. If the process of the pidfd still lives now, the pid was its own
        // all the time.
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
    /// # Errors
    ///
    /// As [`ProcessMemory::read_pieces`].
    pub fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        let whole = 0..into.len();
        self.read_pieces(address, &[whole], into)
    }

    /// Copies the bytes of `pieces`, each to its place in `into`, whose first byte lies at
    /// `address`.
    ///
    /// Fastest with pieces of a MiB or so. Reading a page that was never touched does not allocate
    /// it in private memory, but does in a shared file.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error, or one that wraps a [`Fault`] with the first address that could
    /// not be read; the bytes before it are in `into`.
    ///
    /// # Panics
    ///
    /// Panics if a piece does not lie in `into`.
    pub fn read_pieces(
        &self,
        address: u64,
        pieces: &[Range<usize>],
        into: &mut [u8],
    ) -> io::Result<()> {
        self.read_to(&placed(address, pieces)?, into)
    }

    /// Copies the bytes of `ranges`, one after another, into the first bytes of `into`.
    ///
    /// # Errors
    ///
    /// As [`ProcessMemory::read_pieces`].
    ///
    /// # Panics
    ///
    /// Panics if they do not fit into `into`.
    pub fn gather(&self, ranges: &[Range<u64>], into: &mut [u8]) -> io::Result<()> {
        let mut end = 0;
        let at = |range: &Range<u64>| {
            let start = end;
            end += usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
            (start..end, range.start)
        };
        self.read_to(&ranges.iter().map(at).collect::<Vec<_>>(), into)
    }

    /// Copies bytes from an address of the process to a place in `into`, for each of `pieces`.
    fn read_to(&self, pieces: &[(Range<usize>, u64)], into: &mut [u8]) -> io::Result<()> {
        let (start, len) = (into.as_mut_ptr(), into.len());
        self.move_pieces(pieces, (start, len), |local, remote| {
            // SAFETY:
            // - `move_pieces` made `local` of pieces inside `into`, which is borrowed for writing
            //   until this returns; the kernel checks `remote` itself.
            // - Each list is as long as it says, and the kernel keeps neither after the call.
            unsafe {
                libc::process_vm_readv(
                    self.pid_raw(),
                    local.as_ptr(),
                    local.len() as libc::c_ulong,
                    remote.as_ptr(),
                    remote.len() as libc::c_ulong,
                    0,
                )
            }
        })?;
        // The call takes a pid. If the process lives after the call, its own memory was read.
        if has_ended(&self.pidfd)? { Err(no_such_process()) } else { Ok(()) }
    }

    /// Copies `from` into the memory at `address`.
    ///
    /// # Errors
    ///
    /// As [`ProcessMemory::write_pieces`].
    pub fn write(&self, address: u64, from: &[u8]) -> io::Result<()> {
        let whole = 0..from.len();
        self.write_pieces(address, &[whole], from)
    }

    /// Copies the bytes of `pieces`, each from its place in `from`, whose first byte belongs to
    /// `address`.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error, or one that wraps a [`Fault`] with the first address that could
    /// not be written; the bytes before it were.
    ///
    /// # Panics
    ///
    /// Panics if a piece does not lie in `from`.
    pub fn write_pieces(
        &self,
        address: u64,
        pieces: &[Range<usize>],
        from: &[u8],
    ) -> io::Result<()> {
        // The call takes a pid, and must not write into another process that has it now. Between
        // this check and the call, the process would have to end, its parent would have to reap it,
        // and all other pids would have to be used once: that takes much longer.
        if has_ended(&self.pidfd)? {
            return Err(no_such_process());
        }
        let (start, len) = (from.as_ptr().cast_mut(), from.len());
        self.move_pieces(&placed(address, pieces)?, (start, len), |local, remote| {
            // SAFETY:
            // - `move_pieces` made `local` of pieces inside `from`, which is borrowed until this
            //   returns, and the kernel only reads there; it checks `remote` itself.
            // - Each list is as long as it says, and the kernel keeps neither after the call.
            unsafe {
                libc::process_vm_writev(
                    self.pid_raw(),
                    local.as_ptr(),
                    local.len() as libc::c_ulong,
                    remote.as_ptr(),
                    remote.len() as libc::c_ulong,
                    0,
                )
            }
        })
    }

    /// Moves all bytes of `pieces`, each with its address in the process, by `call`, which is given
    /// the two lists of one system call.
    fn move_pieces(
        &self,
        pieces: &[(Range<usize>, u64)],
        (start, len): (*mut u8, usize),
        call: impl Fn(&[libc::iovec], &[libc::iovec]) -> isize,
    ) -> io::Result<()> {
        for pieces in pieces.chunks(PIECES_PER_CALL) {
            let mut local = Vec::with_capacity(pieces.len());
            let mut remote = Vec::with_capacity(pieces.len());
            for (piece, address) in pieces {
                assert!(
                    piece.start <= piece.end && piece.end <= len,
                    "bytes {piece:?} of a buffer of {len} bytes"
                );
                let base = start.wrapping_add(piece.start).cast();
                local.push(libc::iovec { iov_base: base, iov_len: piece.len() });
                remote.push(libc::iovec {
                    iov_base: remote_pointer(*address)?,
                    iov_len: piece.len(),
                });
            }
            let mut next = 0;
            while next < local.len() {
                if local[next].iov_len == 0 {
                    next += 1;
                    continue;
                }
                let first = remote[next].iov_base.addr() as u64;
                let mut moved = moved_bytes(call(&local[next..], &remote[next..]), first)?;
                // The kernel may stop in the middle of a piece.
                while moved > 0 {
                    let step = moved.min(local[next].iov_len);
                    for list in [&mut local[next], &mut remote[next]] {
                        list.iov_base = list.iov_base.wrapping_byte_add(step);
                        list.iov_len -= step;
                    }
                    moved -= step;
                    next += usize::from(local[next].iov_len == 0);
                }
            }
        }
        Ok(())
    }

    /// Returns what backs `range`: private memory, or a file.
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

    /// Returns `/proc/PID/pagemap`.
    pub(crate) fn pagemap(&self) -> &File {
        &self.pagemap
    }

    /// Returns `/proc/PID`.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
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
            // Following these links takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE. The process may
            // also hold the file open, and that link needs neither.
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
        /// The file that it began as a copy of, open for reading, if any.
        file: Option<BackingFile>,
    },
    /// A file that it shares with other processes that map it.
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

/// Why it cannot be found what backs a range.
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
    /// The kernel returned an error.
    Io {
        /// The range.
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
                write!(f, "cannot look up what backs memory {:#x}..{:#x}", range.start, range.end)
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

/// Pieces that one system call takes: `IOV_MAX` (Linux's `UIO_MAXIOV`).
const PIECES_PER_CALL: usize = 1024;

fn remote_pointer(address: u64) -> io::Result<*mut libc::c_void> {
    let address = usize::try_from(address).map_err(|_| fault(address))?;
    Ok(ptr::without_provenance_mut(address))
}

/// Converts the result of a `process_vm_*` call at `address`.
fn moved_bytes(result: isize, address: u64) -> io::Result<usize> {
    match usize::try_from(result) {
        // The kernel stops before a page that it cannot reach, and the next call fails there.
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

/// Returns the address of each piece of a buffer whose first byte belongs to `address`.
fn placed(address: u64, pieces: &[Range<usize>]) -> io::Result<Vec<(Range<usize>, u64)>> {
    let at = |piece: &Range<usize>| Some((piece.clone(), address.checked_add(piece.start as u64)?));
    pieces.iter().map(at).collect::<Option<_>>().ok_or_else(|| fault(u64::MAX))
}

fn fault(address: u64) -> io::Error {
    io::Error::other(Fault { address })
}

/// An address of another process that could not be reached; inside an [`io::Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The first address that could not be reached.
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
}
