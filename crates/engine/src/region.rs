//! A mapping of memory that another process goes on writing.
//!
//! Rust's rules say that nobody writes the bytes behind a `&[u8]`. The processes that share this
//! memory do not know that rule, so a [`Region`] never becomes a slice: bytes are copied out of it
//! and into it with volatile accesses, or the kernel reads and writes it for direct I/O.

#![expect(unsafe_code, reason = "maps memory and copies from and to raw pointers")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags};

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Bytes are only copied out.
    Read,
    /// Bytes are copied out and in.
    ReadWrite,
}

/// A shared mapping of a piece of a file, usually of a memfd or of hugetlbfs.
///
/// Copies are not atomic as a whole: while another process writes, a copy may hold old and new
/// bytes side by side. Whoever needs one moment stops the writers first.
///
/// Two traps that no check here can remove:
///
/// - If the file is truncated below the mapping, touching the lost pages raises `SIGBUS`. Only map
///   files whose owner keeps their length.
/// - Reading a hole of tmpfs, a memfd or hugetlbfs through a mapping *allocates* the page. Touch
///   only what [`data_ranges`](crate::data_ranges) reports as data.
///
/// # Invariants
///
/// - `start` is the address of a live `MAP_SHARED` mapping of `len` bytes, not zero, which only
///   `drop` removes.
/// - The mapping is writable if `access` is [`Access::ReadWrite`].
/// - No Rust reference into the mapping ever exists.
pub struct Region {
    start: NonNull<u8>,
    len: usize,
    access: Access,
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for Region {}

// SAFETY: all access is by volatile copies or by the kernel; neither assumes that the bytes stay
// as they are, so several threads may do both at once.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `len` bytes of `file` from `offset`.
    ///
    /// `offset` must be a multiple of the page size of the file, and for hugetlbfs `len` too.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error; `EINVAL` also for a length of zero.
    pub fn map(file: BorrowedFd<'_>, offset: u64, len: u64, access: Access) -> io::Result<Region> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice changes no memory in use.
        let start = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, offset)
        }?;
        let start = NonNull::new(start.cast::<u8>()).expect("the kernel maps nothing at address 0");
        Ok(Region { start, len, access })
    }

    /// Returns the length, in bytes; never zero.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Returns what the mapping may be used for.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Copies the bytes from `offset` on into `into`.
    ///
    /// # Panics
    ///
    /// Panics if the range ends outside the mapping.
    pub fn load(&self, offset: u64, into: &mut [u8]) {
        let source = self.pointer(offset, into.len());
        // SAFETY:
        // - `pointer` checked that `into.len()` bytes from `source` lie in the mapping, which is
        //   live and readable (invariants).
        // - `into` is unique and, as no reference into the mapping exists, does not overlap it.
        unsafe { copy_volatile::<true>(source.as_ptr(), into.as_mut_ptr(), into.len()) }
    }

    /// Copies `from` to `offset`.
    ///
    /// # Panics
    ///
    /// Panics if the range ends outside the mapping or the mapping is [`Access::Read`].
    pub fn store(&self, offset: u64, from: &[u8]) {
        assert_eq!(self.access, Access::ReadWrite, "a store needs a writable mapping");
        let target = self.pointer(offset, from.len());
        // SAFETY:
        // - `pointer` checked that `from.len()` bytes from `target` lie in the mapping, which is
        //   live and, as asserted, writable (invariants).
        // - `from` is a Rust slice and so lies outside the mapping (invariants).
        unsafe { copy_volatile::<false>(from.as_ptr(), target.as_ptr(), from.len()) }
    }

    /// Says whether every byte of `range` was zero when it was looked at.
    ///
    /// # Panics
    ///
    /// Panics if the range ends outside the mapping.
    #[must_use]
    pub fn is_zero(&self, range: Range<u64>) -> bool {
        /// Bytes per look: they stay in the first-level cache between the copy and the test.
        const PIECE: usize = 4096;
        let mut piece = [0; PIECE];
        let mut offset = range.start;
        while offset < range.end {
            let len = usize::try_from(range.end - offset).map_or(PIECE, |len| len.min(PIECE));
            self.load(offset, &mut piece[..len]);
            if !crate::zero::is_zero(&piece[..len]) {
                return false;
            }
            offset += len as u64;
        }
        true
    }

    /// Returns the address of `offset`, for the kernel.
    ///
    /// # Panics
    ///
    /// Panics if `len` bytes from there end outside the mapping.
    pub(crate) fn pointer(&self, offset: u64, len: usize) -> NonNull<u8> {
        let end = offset.checked_add(len as u64).expect("a range of memory ends below 2^64");
        assert!(
            end <= self.len as u64,
            "bytes {offset:#x} to {end:#x} of a mapping of {:#x}",
            self.len
        );
        let offset = usize::try_from(offset).expect("smaller than the mapping's length");
        // SAFETY: `offset <= self.len`, so the result lies in the mapping or one past its end.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone (invariants) and no reference into it exists.
        let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        // It cannot fail for a whole mapping, short of the kernel's own lack of memory, and then
        // the mapping merely stays.
        debug_assert!(result.is_ok(), "munmap: {result:?}");
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("len", &self.len)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

type Word = u64;
const WORD: usize = size_of::<Word>();
/// Words per turn of the loop: enough to hide the loop itself.
const UNROLL: usize = 8;

/// Copies `len` bytes, with volatile accesses on the shared side: the source if `FROM_SHARED`,
/// else the target.
///
/// # Safety
///
/// - `source` is valid for reads and `target` for writes of `len` bytes.
/// - They do not overlap.
unsafe fn copy_volatile<const FROM_SHARED: bool>(source: *const u8, target: *mut u8, len: usize) {
    let shared = if FROM_SHARED { source } else { target.cast_const() };
    // Volatile accesses must be aligned; the private side is accessed unaligned where it must be.
    let head = shared.align_offset(WORD).min(len);
    let words = (len - head) / WORD;
    let turns = words / UNROLL;
    let mut at = 0;
    while at < head {
        // SAFETY: `at < len`; the caller's promise.
        unsafe { copy_one::<u8, FROM_SHARED>(source, target, at) };
        at += 1;
    }
    for _ in 0..turns {
        for word in 0..UNROLL {
            // SAFETY: a whole word from `at + word * WORD` ends within `len`, and the shared side
            // is aligned there because it is at `head`.
            unsafe { copy_one::<Word, FROM_SHARED>(source, target, at + word * WORD) };
        }
        at += UNROLL * WORD;
    }
    for _ in 0..words % UNROLL {
        // SAFETY: as above.
        unsafe { copy_one::<Word, FROM_SHARED>(source, target, at) };
        at += WORD;
    }
    while at < len {
        // SAFETY: `at < len`; the caller's promise.
        unsafe { copy_one::<u8, FROM_SHARED>(source, target, at) };
        at += 1;
    }
}

/// Copies one `T` at byte `at`, volatile on the shared side.
///
/// # Safety
///
/// - `source + at` is valid for reads and `target + at` for writes of a `T`.
/// - The shared side is aligned for `T`. Any bytes make a `T`.
#[inline(always)]
unsafe fn copy_one<T: Copy, const FROM_SHARED: bool>(
    source: *const u8,
    target: *mut u8,
    at: usize,
) {
    // SAFETY: within the source, the caller's promise.
    let source = unsafe { source.add(at) }.cast::<T>();
    // SAFETY: within the target, the caller's promise.
    let target = unsafe { target.add(at) }.cast::<T>();
    if FROM_SHARED {
        // SAFETY: valid and aligned, the caller's promise.
        let value = unsafe { source.read_volatile() };
        // SAFETY: valid, the caller's promise.
        unsafe { target.write_unaligned(value) };
    } else {
        // SAFETY: valid, the caller's promise.
        let value = unsafe { source.read_unaligned() };
        // SAFETY: valid and aligned, the caller's promise.
        unsafe { target.write_volatile(value) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::MemfdFlags;

    use super::*;

    fn region_of(len: u64, access: Access) -> Region {
        let file = rustix::fs::memfd_create("region", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        Region::map(file.as_fd(), 0, len, access).unwrap()
    }

    #[test]
    fn bytes_come_back_at_every_alignment_and_length() {
        let region = region_of(4096, Access::ReadWrite);
        let from: Vec<u8> = (0..200_u8).collect();
        for offset in 0..17_u64 {
            for len in (0..40).chain([63, 64, 65, 127, 128, 200]) {
                let mut into = vec![0xff; len + 2];
                region.store(offset, &from[..len]);
                region.load(offset, &mut into[1..=len]);
                assert_eq!(into[1..=len], from[..len]);
                assert_eq!((into[0], into[len + 1]), (0xff, 0xff));
            }
        }
    }

    #[test]
    fn a_store_changes_no_byte_outside_its_range() {
        let region = region_of(4096, Access::ReadWrite);
        region.store(3, &[0xaa; 70]);
        let mut bytes = [0; 80];
        region.load(0, &mut bytes);
        assert_eq!(bytes[..3], [0; 3]);
        assert_eq!(bytes[3..73], [0xaa; 70]);
        assert_eq!(bytes[73..], [0; 7]);
    }

    #[test]
    fn one_byte_anywhere_makes_a_range_not_zero() {
        let region = region_of(3 * 4096, Access::ReadWrite);
        assert!(region.is_zero(0..3 * 4096));
        region.store(2 * 4096 + 17, &[1]);
        assert!(!region.is_zero(0..3 * 4096));
        assert!(region.is_zero(0..2 * 4096 + 17));
        assert!(region.is_zero(2 * 4096 + 18..3 * 4096));
    }

    #[test]
    #[should_panic(expected = "of a mapping of 0x1000")]
    fn a_load_past_the_end_panics() {
        region_of(4096, Access::Read).load(4090, &mut [0; 7]);
    }

    #[test]
    #[should_panic(expected = "writable")]
    fn a_store_into_a_read_only_region_panics() {
        region_of(4096, Access::Read).store(0, &[1]);
    }

    #[test]
    fn an_empty_mapping_is_refused() {
        let file = rustix::fs::memfd_create("region", MemfdFlags::CLOEXEC).unwrap();
        let error = Region::map(file.as_fd(), 0, 0, Access::Read).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
