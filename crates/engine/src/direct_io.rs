//! A file that is read and written past the page cache where that is possible.
//!
//! # Mixing direct and buffered I/O
//!
//! Linux keeps the two coherent for requests that follow one another: a direct read first writes
//! back the cached pages of its range, and a direct write writes them back before and drops them
//! after (`generic_file_direct_write` and `iomap_dio_rw`, Linux 6.18). It promises nothing about
//! requests at the same time on the same cached page. Hence the rule for callers: two transfers
//! in flight may touch the same 4096-byte page of the file only if both are reads. A transfer's
//! own head, body and tail go one after the other, so it keeps the rule with itself.

#![expect(unsafe_code, reason = "an aligned read of the first page, to see whether it is allowed")]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};

use crate::buffer::AlignedBuffer;
use crate::extents::{FileSystem, file_system};
use crate::transfer::PIECE_LEN_MAX;

/// Whether bytes go past the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectIo {
    /// They must; a file that does not allow it is refused.
    Required,
    /// They do where the file allows it; [`DataFile::direct`] says whether.
    Preferred,
    /// They do not.
    Off,
}

/// Whether a file is used past the page cache, and at which alignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DirectIoInUse {
    /// Aligned bytes go past the page cache.
    Yes {
        /// What file offset and length must be multiples of, in bytes.
        offset_align: usize,
        /// What the memory's address must be a multiple of, in bytes.
        memory_align: usize,
    },
    /// All bytes go through the page cache.
    No {
        /// Why, for a report: no full stop, lower case.
        reason: String,
    },
}

/// What a report says about the use of direct I/O.
impl fmt::Display for DirectIoInUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DirectIoInUse::Yes { offset_align, .. } => {
                write!(f, "yes, {offset_align}-byte alignment")
            }
            DirectIoInUse::No { reason } => write!(f, "no: {reason}"),
        }
    }
}

/// An open file with a buffered descriptor and, where possible, a second one for direct I/O.
///
/// A clone is another handle on the same two descriptors.
#[derive(Clone, Debug)]
pub struct DataFile {
    descriptors: Arc<Descriptors>,
}

#[derive(Debug)]
struct Descriptors {
    buffered: File,
    direct: Option<File>,
    in_use: DirectIoInUse,
}

impl DataFile {
    /// Takes an open file and opens it once more for direct I/O, unless `direct_io` is off.
    ///
    /// The second descriptor is opened through `/proc/self/fd`, so the file may have been deleted
    /// or never have had a name. The alignment is what the kernel reports (`STATX_DIOALIGN`, Linux
    /// 6.1). Where it reports none, 4096 bytes are used, which every device so far accepts. A read
    /// of the first page tests that, if the file has a page and may be read.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::Unsupported`] with the reason if direct I/O is required and not
    /// possible, and the kernel's error if the file cannot be examined.
    pub fn new(file: File, direct_io: DirectIo) -> io::Result<DataFile> {
        let (direct, in_use) = match direct_io {
            DirectIo::Off => (None, DirectIoInUse::No { reason: "not asked for".to_owned() }),
            DirectIo::Required | DirectIo::Preferred => match open_direct(&file)? {
                Ok((direct, in_use)) => (Some(direct), in_use),
                Err(reason) if direct_io == DirectIo::Required => {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        format!("direct I/O is not possible: {reason}"),
                    ));
                }
                Err(reason) => (None, DirectIoInUse::No { reason }),
            },
        };
        Ok(DataFile { descriptors: Arc::new(Descriptors { buffered: file, direct, in_use }) })
    }

    /// Returns whether direct I/O is in use, and how or why not.
    #[must_use]
    pub fn direct(&self) -> &DirectIoInUse {
        &self.descriptors.in_use
    }

    /// Returns the file that [`DataFile::new`] got, for everything that is not a transfer.
    #[must_use]
    pub fn buffered(&self) -> &File {
        &self.descriptors.buffered
    }

    /// Decides the next piece of a transfer: through which descriptor, and how long.
    ///
    /// No other code decides this. From an unaligned offset, the bytes up to the next aligned one
    /// go through the page cache; then as much as is aligned goes past it; then the tail goes
    /// through it. If the memory is not aligned where the file is, all bytes go through the page
    /// cache.
    pub(crate) fn next_piece(&self, address: usize, file_offset: u64, len: usize) -> Piece {
        let plan = match (&self.descriptors.direct, &self.descriptors.in_use) {
            (Some(direct), &DirectIoInUse::Yes { offset_align, memory_align }) => {
                let (via, len) =
                    split(Alignment { offset_align, memory_align }, address, file_offset, len);
                (if via == Via::Direct { direct } else { &self.descriptors.buffered }, len)
            }
            _ => (&self.descriptors.buffered, len),
        };
        Piece { fd: plan.0.as_raw_fd(), len: plan.1.min(PIECE_LEN_MAX) }
    }
}

impl AsFd for DataFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptors.buffered.as_fd()
    }
}

/// The next piece of a transfer; the descriptor lives as long as the [`DataFile`] it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) fd: RawFd,
    pub(crate) len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Alignment {
    offset_align: usize,
    memory_align: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Via {
    Direct,
    Buffered,
}

fn split(align: Alignment, address: usize, file_offset: u64, len: usize) -> (Via, usize) {
    let Alignment { offset_align, memory_align } = align;
    let past = usize::try_from(file_offset % offset_align as u64).expect("less than the alignment");
    let head = if past == 0 { 0 } else { offset_align - past };
    if len < head + offset_align || address.wrapping_add(head) % memory_align != 0 {
        return (Via::Buffered, len);
    }
    if head > 0 {
        return (Via::Buffered, head);
    }
    (Via::Direct, len - len % offset_align)
}

/// Opens the same file once more, or says why direct I/O is not possible on it.
fn open_direct(file: &File) -> io::Result<Result<(File, DirectIoInUse), String>> {
    let stat = rustix::fs::fstat(file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => {}
        _ => return Ok(Err("neither a regular file nor a block device".to_owned())),
    }
    match file_system(file.as_fd())? {
        // Since Linux 6.6 tmpfs accepts the flag and goes through the page cache all the same.
        FileSystem::Tmpfs => return Ok(Err("tmpfs is page cache and nothing else".to_owned())),
        FileSystem::Hugetlbfs { .. } => return Ok(Err("hugetlbfs has no direct I/O".to_owned())),
        FileSystem::Other => {}
    }
    let reported = reported_alignment(file)?;
    if let Some(Alignment { offset_align: 0, .. }) = reported {
        return Ok(Err("the file system reports no direct I/O for this file".to_owned()));
    }
    let mode = rustix::fs::fcntl_getfl(file)? & OFlags::RWMODE;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let direct =
        match rustix::fs::open(path, mode | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) {
            Ok(direct) => File::from(direct),
            Err(errno) => return Ok(Err(format!("O_DIRECT: {}", io::Error::from(errno)))),
        };
    let align = match reported {
        Some(align) => align,
        None => match proven_alignment(&direct, stat.st_size > 0 && mode != OFlags::WRONLY) {
            Ok(align) => align,
            Err(error) => return Ok(Err(format!("a direct read of 4096 bytes: {error}"))),
        },
    };
    let Alignment { offset_align, memory_align } = align;
    Ok(Ok((direct, DirectIoInUse::Yes { offset_align, memory_align })))
}

/// Asks the kernel for the alignment; zero for "not possible", `None` for "not known".
fn reported_alignment(file: &File) -> io::Result<Option<Alignment>> {
    let stat = match rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) => stat,
        // Before Linux 4.11, or behind a seccomp filter that does not know the call.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    // The kernel says in `stx_mask` what it filled in; XFS and ext4 do since 6.1, btrfs not yet.
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(None);
    }
    let offset_align = usize::try_from(stat.stx_dio_offset_align).expect("32 bits fit");
    let memory_align = usize::try_from(stat.stx_dio_mem_align).expect("32 bits fit");
    if offset_align == 0 || memory_align == 0 {
        return Ok(Some(Alignment { offset_align: 0, memory_align: 0 }));
    }
    Ok(Some(Alignment { offset_align, memory_align }))
}

/// Proves an alignment of 4096 bytes by a read of the first page, if there is one to read.
fn proven_alignment(direct: &File, readable: bool) -> io::Result<Alignment> {
    const ALIGN: usize = 4096;
    if readable {
        let buffer = AlignedBuffer::zeroed(ALIGN, ALIGN)?;
        // SAFETY: `buffer` is valid for writes of `ALIGN` bytes and nothing else refers to it.
        let len =
            unsafe { libc::pread(direct.as_raw_fd(), buffer.start().as_ptr().cast(), ALIGN, 0) };
        if len < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(Alignment { offset_align: ALIGN, memory_align: ALIGN })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIGN: Alignment = Alignment { offset_align: 4096, memory_align: 512 };

    #[test]
    fn an_aligned_transfer_goes_direct_in_one_piece() {
        assert_eq!(split(ALIGN, 512, 8192, 4096 * 3), (Via::Direct, 4096 * 3));
    }

    #[test]
    fn the_tail_is_left_for_later() {
        assert_eq!(split(ALIGN, 0, 0, 4096 + 7), (Via::Direct, 4096));
        assert_eq!(split(ALIGN, 4096, 4096, 7), (Via::Buffered, 7));
    }

    #[test]
    fn a_head_leads_to_the_next_aligned_offset() {
        assert_eq!(split(ALIGN, 100, 100, 10_000), (Via::Buffered, 3996));
        assert_eq!(split(ALIGN, 4096, 4096, 6004), (Via::Direct, 4096));
    }

    #[test]
    fn a_head_that_leads_nowhere_takes_everything() {
        assert_eq!(split(ALIGN, 100, 100, 8000), (Via::Buffered, 8000));
        assert_eq!(split(ALIGN, 101, 100, 10_000), (Via::Buffered, 10_000));
        assert_eq!(split(ALIGN, 1, 0, 8192), (Via::Buffered, 8192));
    }

    #[test]
    fn every_transfer_is_covered_piece_by_piece() {
        for offset in [0, 1, 511, 512, 4095, 4096, 5000] {
            for address in [0, 1, 512, 904, 4096] {
                for len in [0, 1, 4095, 4096, 4097, 12_288, 20_000] {
                    let mut done = 0;
                    let mut pieces = 0;
                    while done < len {
                        let (_, piece) =
                            split(ALIGN, address + done, offset + done as u64, len - done);
                        assert!(piece > 0);
                        done += piece;
                        pieces += 1;
                    }
                    assert_eq!(done, len);
                    assert!(pieces <= 3, "head, body and tail");
                }
            }
        }
    }

    #[test]
    fn the_report_names_alignment_or_reason() {
        let yes = DirectIoInUse::Yes { offset_align: 512, memory_align: 4 };
        let no = DirectIoInUse::No { reason: "not asked for".to_owned() };
        assert_eq!(yes.to_string(), "yes, 512-byte alignment");
        assert_eq!(no.to_string(), "no: not asked for");
    }
}
