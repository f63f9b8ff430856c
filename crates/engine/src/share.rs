//! Shares the extents of one file with another one, so that neither needs room for the bytes of both.

#![expect(unsafe_code, reason = "these requests have no safe wrapper")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

/// `FICLONERANGE` in Linux's `include/uapi/linux/fs.h` (Linux 4.5): `_IOW(0x94, 13, struct file_clone_range)`.
const FICLONERANGE: u64 = 0x4020_940d;

/// `struct file_clone_range`.
#[repr(C)]
struct CloneRange {
    from: i64,
    from_offset: u64,
    len: u64,
    to_offset: u64,
}

const _: () = assert!(size_of::<CloneRange>() == 32);

/// Makes `range` of the file `from` the content of the file `to` at `to_offset`: both then have the
/// same bytes on the disk, until one of them is written to.
///
/// # Errors
///
/// Returns the kernel's error: `EOPNOTSUPP` where the file system shares no extents (ext4, tmpfs),
/// `EXDEV` if the files are on two file systems, `EINVAL` if a place is not a multiple of the file
/// system's blocks.
pub fn share_extents(
    from: BorrowedFd<'_>,
    range: Range<u64>,
    to: BorrowedFd<'_>,
    to_offset: u64,
) -> io::Result<()> {
    let arguments = CloneRange {
        from: from.as_raw_fd().into(),
        from_offset: range.start,
        // 0 would mean: to the end of the file.
        len: range
            .end
            .checked_sub(range.start)
            .filter(|&len| len > 0)
            .ok_or(io::ErrorKind::InvalidInput)?,
        to_offset,
    };
    // The request's type is `c_int` with some C libraries and `c_ulong` with others.
    let request = FICLONERANGE as libc::Ioctl;
    // SAFETY: `arguments` has the kernel's layout, its size asserted above; the kernel keeps no
    // pointer to it.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), request, ptr::from_ref(&arguments)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR` in Linux's `include/uapi/linux/fs.h` (Linux 4.5).
const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u64 = 0x401c_5820;

/// `FS_XFLAG_COWEXTSIZE`: `cow_extent_len` counts.
const FS_XFLAG_COWEXTSIZE: u32 = 0x0001_0000;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct FileAttributes {
    flags: u32,
    extent_len: u32,
    extents: u32,
    project: u32,
    cow_extent_len: u32,
    padding: [u8; 8],
}

const _: () = assert!(size_of::<FileAttributes>() == 28);

/// Has the file system reserve no more room than `len` bytes for each write to a part of `file` that is
/// shared. XFS reserves 128 KiB otherwise, and keeps what is not used for minutes.
///
/// # Errors
///
/// Returns the kernel's error: `EOPNOTSUPP` or `ENOTTY` where the file system has no such setting.
pub fn limit_cow_extents(file: BorrowedFd<'_>, len: u32) -> io::Result<()> {
    let mut attributes = FileAttributes::default();
    let get = FS_IOC_FSGETXATTR as libc::Ioctl;
    // SAFETY: `attributes` has the kernel's layout, its size asserted above; the kernel fills it and
    // keeps no pointer to it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), get, ptr::from_mut(&mut attributes)) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.flags |= FS_XFLAG_COWEXTSIZE;
    attributes.cow_extent_len = len;
    let set = FS_IOC_FSSETXATTR as libc::Ioctl;
    // SAFETY: as above; the kernel reads it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), set, ptr::from_ref(&attributes)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn nothing_is_not_everything_and_a_pipe_shares_no_extents() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(8192).unwrap();
        let error = share_extents(from.as_fd(), 4096..4096, to.as_fd(), 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(to.metadata().unwrap().len(), 0);
        let (reader, _writer) = io::pipe().unwrap();
        assert!(share_extents(from.as_fd(), 0..4096, reader.as_fd(), 0).is_err());
    }
}
