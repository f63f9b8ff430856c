//! Memory of the test's own process, write-protected by a real userfaultfd. Tests of other crates
//! include this file, because unsafe code is here only.

#![expect(unsafe_code, reason = "maps memory, and protects it by ioctls of a userfaultfd")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags};
use vmfile_engine::{ProcessMemory, Userfault};

pub(crate) const PAGE: usize = 4096;

/// The length of a window, in bytes: a huge page.
const WINDOW_LEN: usize = 2 << 20;

/// Memory of this process in whole windows, and how it is protected.
pub(crate) struct Guarded {
    start: *mut c_void,
    pub(crate) len: usize,
    fd: OwnedFd,
}

// SAFETY: the memory is only touched by system calls and by volatile writes, from any thread.
unsafe impl Sync for Guarded {}

/// `struct uffdio_api`, `struct uffdio_register` and `struct uffdio_range` of Linux's
/// `include/uapi/linux/userfaultfd.h`.
type Api = [u64; 3];
type Register = [u64; 4];
type Bounds = [u64; 2];
const API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0x00);
const UNREGISTER: Opcode = opcode::read::<Bounds>(0xaa, 0x01);
const FEATURE_WP: u64 = 1;
const MODE_WP: u64 = 2;

impl Guarded {
    /// Maps windows, fills two of three pages, and write-protects all of them; `None` if the kernel
    /// does not allow it.
    pub(crate) fn new(windows: usize) -> Option<Guarded> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: a descriptor of its own; what it does to memory comes later.
        let fd = unsafe { rustix::mm::userfaultfd(flags) };
        let Ok(fd) = fd else {
            println!("skipped: no userfaultfd: {}", fd.unwrap_err());
            return None;
        };
        let len = windows * WINDOW_LEN;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE)
        };
        let guarded = Guarded { start: start.unwrap(), len, fd };
        for page in 0..len / PAGE {
            // Reading the third page enters the zero page, as QEMU does before it protects.
            if page % 3 == 2 {
                guarded.touch(page);
            } else {
                guarded.put(page, 1);
            }
        }
        guarded.ask::<API, Api>([0xaa, FEATURE_WP, 0]).unwrap();
        let register: Register = [guarded.address(), len as u64, MODE_WP, 0];
        if let Err(error) = guarded.ask::<REGISTER, Register>(register) {
            println!("skipped: no write protection by userfaultfd: {error}");
            return None;
        }
        guarded.userfault().protect(&(guarded.address()..guarded.address() + len as u64)).unwrap();
        Some(guarded)
    }

    /// Returns the address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.start.addr() as u64
    }

    /// Returns the userfaultfd as another process would get it.
    pub(crate) fn userfault(&self) -> Userfault {
        let process = ProcessMemory::open(std::process::id()).unwrap();
        let number = self.fd.as_raw_fd();
        assert!(Userfault::all_of(&process).unwrap().contains(&number));
        Userfault::borrow(&process, number).unwrap()
    }

    /// Writes to a page as a vCPU does: this thread stands still while the page is protected.
    pub(crate) fn put(&self, page: usize, value: u64) {
        let word = u64::try_from(page).unwrap() << 16 | value;
        let at = self.start.cast::<u64>().wrapping_byte_add(page * PAGE);
        // SAFETY: inside the mapping, aligned; nothing in this process refers to the bytes.
        unsafe { at.write_volatile(word) };
    }

    fn touch(&self, page: usize) {
        let at = self.start.cast::<u8>().wrapping_byte_add(page * PAGE);
        // SAFETY: inside the mapping; nothing in this process refers to the bytes.
        let _ = unsafe { at.read_volatile() };
    }

    /// Returns the first 8 bytes of each page, by the kernel: the rest of each page is zero.
    pub(crate) fn words(&self) -> Vec<u64> {
        let process = ProcessMemory::open(std::process::id()).unwrap();
        let word = |page: usize| {
            let mut word = [0; 8];
            process.read(self.address() + (page * PAGE) as u64, &mut word).unwrap();
            u64::from_ne_bytes(word)
        };
        (0..self.len / PAGE).map(word).collect()
    }

    /// Removes the protection, as QEMU does at the end of its migration.
    pub(crate) fn unregister(&self) {
        self.ask::<UNREGISTER, Bounds>([self.address(), self.len as u64]).unwrap();
    }

    /// Calls an ioctl of the userfaultfd.
    fn ask<const OPCODE: Opcode, T>(&self, mut value: T) -> io::Result<()> {
        // SAFETY: each opcode above was made for its type.
        let request = unsafe { Updater::<OPCODE, T>::new(&mut value) };
        // SAFETY: the kernel changes no memory but the value, which outlives the call.
        Ok(unsafe { ioctl(&self.fd, request) }?)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { rustix::mm::munmap(self.start, self.len) }.unwrap();
    }
}
