//! The userfaultfd of another process: which pages its threads wait for, and the lifting of their
//! write protection.
//!
//! A process that has write-protected its memory by a userfaultfd (Linux 5.7; shared files on tmpfs
//! and hugetlbfs, 5.19) stops each thread that writes to a protected page until the protection is
//! lifted. The descriptor belongs to the memory and not to the process that holds it: a duplicate
//! reads the same faults and lifts the same protection. See Linux's
//! `Documentation/admin-guide/mm/userfaultfd.rst`.

#![expect(unsafe_code, reason = "the ioctls of a userfaultfd have no safe wrapper")]

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::process_memory::ProcessMemory;

/// What `/proc/PID/fd` shows for a userfaultfd.
const LINK: &[u8] = b"anon_inode:[userfaultfd]";

/// A userfaultfd that another process has opened for its own memory.
///
/// Addresses are those of that process.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Returns the numbers of the userfaultfds that a process has open.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn all_of(process: &ProcessMemory) -> io::Result<BTreeSet<i32>> {
        process.descriptors(LINK)
    }

    /// Takes a duplicate of descriptor `number` of `process`, which must be a userfaultfd that does
    /// not block.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error: `ENOSYS` before Linux 5.6, and
    /// [`io::ErrorKind::PermissionDenied`] without the right to trace the process.
    pub fn borrow(process: &ProcessMemory, number: i32) -> io::Result<Userfault> {
        let fd = process.descriptor(number)?;
        if !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK) {
            // Another thread may read a fault between our `poll` and our `read`.
            return Err(io::Error::other("the process opened its userfaultfd for blocking reads"));
        }
        Ok(Userfault { fd })
    }

    /// Waits at most `limit` for threads that stand still; returns the addresses they wait for, at
    /// most 16, and none if the time is over.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn wait(&self, limit: Duration) -> io::Result<Vec<u64>> {
        let limit = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut bytes = [0; 16 * MESSAGE_LEN];
        let len = match rustix::io::read(&self.fd, &mut bytes) {
            Ok(len) => len,
            // Another reader was quicker, or the thread's wait ended by a signal.
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        };
        Ok(bytes[..len].chunks_exact(MESSAGE_LEN).filter_map(fault_address).collect())
    }

    /// Lifts the write protection of `addresses`, whole pages, and wakes the threads that wait
    /// there.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error: [`io::ErrorKind::NotFound`] if the range is not registered.
    pub fn lift(&self, addresses: &Range<u64>) -> io::Result<()> {
        self.change(addresses, 0)
    }

    /// Write-protects `addresses`, whole pages, once more.
    ///
    /// # Errors
    ///
    /// As for [`Userfault::lift`].
    pub fn protect(&self, addresses: &Range<u64>) -> io::Result<()> {
        self.change(addresses, WRITEPROTECT_MODE_WP)
    }

    /// Wakes the threads that wait in `addresses`, whole pages. One whose page is still protected
    /// comes back at once, and [`Userfault::wait`] returns its address once more: also if another
    /// reader of the userfaultfd had taken the first message.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn wake(&self, addresses: &Range<u64>) -> io::Result<()> {
        let mut arguments = [addresses.start, addresses.end - addresses.start];
        // The request's type is `c_int` with some C libraries and `c_ulong` with others.
        let request = UFFDIO_WAKE as libc::Ioctl;
        // SAFETY: `arguments` has the layout of `struct uffdio_range`, two words; the kernel keeps
        // no pointer to it.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, arguments.as_mut_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn change(&self, addresses: &Range<u64>, mode: u64) -> io::Result<()> {
        let (start, len) = (addresses.start, addresses.end - addresses.start);
        let mut arguments = WriteProtect { start, len, mode };
        loop {
            // The request's type is `c_int` with some C libraries and `c_ulong` with others.
            let request = UFFDIO_WRITEPROTECT as libc::Ioctl;
            // SAFETY: `arguments` has the kernel's layout, its size asserted below; the kernel
            // keeps no pointer to it.
            let result =
                unsafe { libc::ioctl(self.fd.as_raw_fd(), request, ptr::from_mut(&mut arguments)) };
            let error = match result {
                0 => return Ok(()),
                _ => io::Error::last_os_error(),
            };
            // EAGAIN: the process's mappings are being changed.
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
                return Err(error);
            }
            std::thread::yield_now();
        }
    }
}

/// `struct uffdio_writeprotect` of Linux's `include/uapi/linux/userfaultfd.h`.
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

const _: () = assert!(size_of::<WriteProtect>() == 24);

/// `_IOWR(0xAA, 0x06, struct uffdio_writeprotect)`, with the bits as all but four architectures lay
/// them out.
const UFFDIO_WRITEPROTECT: u64 = (3 << 30) | (24 << 16) | (0xaa << 8) | 0x06;

const WRITEPROTECT_MODE_WP: u64 = 1;

/// `_IOR(0xAA, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: u64 = (2 << 30) | (16 << 16) | (0xaa << 8) | 0x02;

/// The length of `struct uffd_msg`, in the same file.
const MESSAGE_LEN: usize = 32;

const EVENT_PAGEFAULT: u8 = 0x12;

/// Returns the address in a message, if it is a page fault: the event's number is the first byte,
/// the address the third word of 8 bytes.
fn fault_address(message: &[u8]) -> Option<u64> {
    let address = message.get(16..24)?.try_into().ok()?;
    (message[0] == EVENT_PAGEFAULT).then(|| u64::from_ne_bytes(address))
}
