//! A mapping in the test's own process. Tests of other crates include this file, because unsafe
//! code is here only.

#![expect(unsafe_code, reason = "maps memory to look at")]

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Maps memory in this process: a file from an offset on, or anonymous memory.
pub(crate) fn map(len: u64, flags: MapFlags, file: Option<(BorrowedFd<'_>, u64)>) -> *mut c_void {
    let len = usize::try_from(len).unwrap();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    match file {
        Some((file, offset)) => {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { rustix::mm::mmap(ptr::null_mut(), len, protection, flags, file, offset) }
        }
        // SAFETY: as above.
        None => unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, protection, flags) },
    }
    .unwrap()
}

/// A mapping in this process, which is only looked at by system calls.
pub(crate) struct Mapped {
    start: *mut c_void,
    len: usize,
}

impl Mapped {
    /// Maps `len` bytes of a file from an offset on, or of no file.
    pub(crate) fn new(len: u64, flags: MapFlags, file: Option<(&File, u64)>) -> Mapped {
        let start = map(len, flags, file.map(|(file, offset)| (file.as_fd(), offset)));
        Mapped { start, len: usize::try_from(len).unwrap() }
    }

    /// Maps private memory of this process, of which a write touches no more than its page.
    pub(crate) fn private(len: u64, file: Option<(&File, u64)>) -> Mapped {
        let mapped = Mapped::new(len, MapFlags::PRIVATE, file);
        // SAFETY: advice about a mapping of ours, which changes no byte.
        unsafe { rustix::mm::madvise(mapped.start, mapped.len, Advice::LinuxNoHugepage) }.unwrap();
        mapped
    }

    /// Returns the address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.start.addr() as u64
    }

    /// Returns the length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: a mapping of ours, which no reference points into.
        let _ = unsafe { rustix::mm::munmap(self.start, self.len) };
    }
}
