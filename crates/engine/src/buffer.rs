//! Buffers that direct I/O accepts, and a bounded pool of them.
//!
//! `O_DIRECT` wants the buffer's address to be a multiple of the device's memory alignment, which
//! `Vec<u8>` cannot promise.

#![expect(unsafe_code, reason = "owns a raw allocation, for its alignment")]

use std::alloc::{self, Layout};
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, madvise};

/// The smallest alignment of a buffer, in bytes: no device in use asks for more than its 4 KiB
/// page.
pub const ALIGNMENT_MIN: usize = 4096;

/// The length of a huge page of x86-64 and of most others.
const HUGE_PAGE_LEN: usize = 2 << 20;

/// A zeroed, fixed-length byte buffer with a chosen alignment.
///
/// # Invariants
///
/// - `start` came from the global allocator with `layout`, and nothing else frees it.
/// - `layout.size()` is not zero, and all its bytes are initialized.
pub struct AlignedBuffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its bytes as a `Box<[u8]>` would; nothing in it belongs to a thread.
unsafe impl Send for AlignedBuffer {}

// SAFETY: through a shared reference the bytes can only be read.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Allocates `len` zero bytes at an address that is a multiple of `align` and of
    /// [`ALIGNMENT_MIN`].
    ///
    /// A buffer of whole huge pages asks for them. The kernel can then hand the device one long
    /// piece of memory instead of hundreds of small ones: a request has a limited number of pieces,
    /// so it covers four times as much of the disk, and pinning is cheaper (Linux 6.18,
    /// virtio-blk).
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::OutOfMemory`] if there is no memory.
    ///
    /// # Panics
    ///
    /// Panics if `len` is zero or if `align` is not a power of two.
    pub fn zeroed(len: usize, align: usize) -> io::Result<AlignedBuffer> {
        assert_ne!(len, 0, "a direct I/O buffer cannot be empty");
        let is_huge = len % HUGE_PAGE_LEN == 0;
        let align = align.max(if is_huge { HUGE_PAGE_LEN } else { ALIGNMENT_MIN });
        let layout = Layout::from_size_align(len, align).expect("align is a power of two");
        // SAFETY: `layout` has a non-zero size, asserted above.
        let start = unsafe { alloc::alloc(layout) };
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        if is_huge {
            // This comes before the first touch, or it has no effect. It may fail: without huge
            // pages everything is only slower.
            //
            // SAFETY:
            // - The range is this allocation and nothing else, in whole pages.
            // - The advice changes neither bytes nor what may be done with them.
            let _ = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxHugepage) };
        }
        // SAFETY:
        // - `start` points to `len` bytes of an allocation that nothing else refers to.
        // - Bytes need no alignment.
        unsafe { start.as_ptr().write_bytes(0, len) };
        Ok(AlignedBuffer { start, layout })
    }

    /// Returns where the bytes lie, for the kernel.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY:
        // - `start` points to `layout.size()` initialized bytes of one allocation (invariants).
        // - The slice borrows `self`, so no other code writes or frees the bytes while it lives.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; the borrow of `self` is unique, and so is the slice.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: `start` came from the global allocator with this `layout` (invariants).
        unsafe { alloc::dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer").field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// A fixed number of equal buffers, taken and given back.
///
/// All of its memory is allocated and touched when the pool is made, so that nothing fails later
/// for lack of memory. A clone is another handle on the same buffers. A buffer returns to the pool
/// when it is dropped, in any thread.
#[derive(Clone, Debug)]
pub struct BufferPool {
    shelf: Arc<Shelf>,
}

impl BufferPool {
    /// Makes a pool of `count` buffers of `len` bytes, each aligned to `align`.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::OutOfMemory`] if there is no memory for all of them.
    ///
    /// # Panics
    ///
    /// Panics if `count` or `len` is zero or `align` is not a power of two.
    pub fn new(count: usize, len: usize, align: usize) -> io::Result<BufferPool> {
        assert_ne!(count, 0, "a pool without buffers could never give one");
        let free = (0..count).map(|_| AlignedBuffer::zeroed(len, align));
        let free = Mutex::new(free.collect::<io::Result<_>>()?);
        let shelf = Shelf { free, returned: Condvar::new(), count, len };
        Ok(BufferPool { shelf: Arc::new(shelf) })
    }

    /// Takes a buffer, waiting until one comes back if none is free.
    ///
    /// A thread that itself must reap completions for buffers to come back would wait forever
    /// here; it uses [`BufferPool::try_take`] and reaps on `None`. The bytes are whatever the last
    /// user left.
    #[must_use]
    pub fn take(&self) -> PooledBuffer {
        let mut free = self.shelf.lock();
        loop {
            if let Some(buffer) = free.pop() {
                return self.lend(buffer);
            }
            free = self.shelf.returned.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a buffer, or returns `None` at once if none is free.
    #[must_use]
    pub fn try_take(&self) -> Option<PooledBuffer> {
        let buffer = self.shelf.lock().pop()?;
        Some(self.lend(buffer))
    }

    /// Returns the length of every buffer, in bytes.
    #[must_use]
    pub fn buffer_len(&self) -> usize {
        self.shelf.len
    }

    /// Returns how many buffers the pool has, taken or not.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shelf.count
    }

    /// Returns how many buffers are free at this moment.
    #[must_use]
    pub fn free_count(&self) -> usize {
        self.shelf.lock().len()
    }

    fn lend(&self, buffer: AlignedBuffer) -> PooledBuffer {
        PooledBuffer { buffer: Some(buffer), shelf: Arc::clone(&self.shelf) }
    }
}

#[derive(Debug)]
struct Shelf {
    /// The buffer that came back last is taken first: the processor's cache may still hold it.
    free: Mutex<Vec<AlignedBuffer>>,
    returned: Condvar,
    count: usize,
    len: usize,
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, Vec<AlignedBuffer>> {
        // Nothing that holds the lock leaves the list half changed, so a poisoned one is whole.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer on loan from a [`BufferPool`]; dropping it gives it back.
#[derive(Debug)]
pub struct PooledBuffer {
    /// `None` only inside `drop`.
    buffer: Option<AlignedBuffer>,
    shelf: Arc<Shelf>,
}

impl PooledBuffer {
    /// Makes the bytes read-only and shareable, without a copy.
    #[must_use]
    pub fn freeze(self) -> SharedBuffer {
        SharedBuffer { buffer: Arc::new(self) }
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.aligned().start()
    }

    fn aligned(&self) -> &AlignedBuffer {
        self.buffer.as_ref().expect("taken only by drop")
    }
}

impl Deref for PooledBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.aligned()
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buffer.as_mut().expect("taken only by drop")
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.shelf.lock().push(buffer);
            self.shelf.returned.notify_one();
        }
    }
}

/// A read-only buffer with several owners, so that pieces of it can be in flight at once.
///
/// The buffer goes back to its pool when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct SharedBuffer {
    buffer: Arc<PooledBuffer>,
}

impl SharedBuffer {
    /// Makes the buffer writable again if this is its only owner, else hands `self` back.
    ///
    /// # Errors
    ///
    /// Returns `self` while another clone lives.
    pub fn thaw(self) -> Result<PooledBuffer, SharedBuffer> {
        Arc::try_unwrap(self.buffer).map_err(|buffer| SharedBuffer { buffer })
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.buffer.start()
    }
}

impl Deref for SharedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_zeroed_buffer_is_aligned_and_zero() {
        let buffer = AlignedBuffer::zeroed(3 * 4096, 512).unwrap();
        assert_eq!(buffer.len(), 3 * 4096);
        assert_eq!(buffer.as_ptr().addr() % ALIGNMENT_MIN, 0);
        assert!(buffer.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_buffer_of_whole_huge_pages_lies_on_them() {
        let buffer = AlignedBuffer::zeroed(2 * HUGE_PAGE_LEN, 4096).unwrap();
        assert_eq!(buffer.as_ptr().addr() % HUGE_PAGE_LEN, 0);
        assert!(buffer.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_larger_alignment_is_kept() {
        let buffer = AlignedBuffer::zeroed(10, 1 << 16).unwrap();
        assert_eq!(buffer.as_ptr().addr() % (1 << 16), 0);
    }

    /// No address space is that large: the allocator fails, and the process does not abort.
    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let error = AlignedBuffer::zeroed(1 << 62, 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
        let error = BufferPool::new(2, 1 << 62, 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }

    #[test]
    fn an_empty_pool_gives_nothing_until_a_buffer_comes_back() {
        let pool = BufferPool::new(2, 4096, 4096).unwrap();
        let first = pool.try_take().unwrap();
        let second = pool.try_take().unwrap();
        assert!(pool.try_take().is_none());

        drop(first);

        assert_eq!(pool.free_count(), 1);
        assert!(pool.try_take().is_some());
        drop(second);
        assert_eq!(pool.free_count(), 2);
    }

    #[test]
    fn a_waiting_taker_is_woken_by_a_returned_buffer() {
        let pool = BufferPool::new(1, 4096, 4096).unwrap();
        let held = pool.take();
        let waiter = thread::spawn({
            let pool = pool.clone();
            move || pool.take().len()
        });

        drop(held);

        assert_eq!(waiter.join().unwrap(), 4096);
    }

    #[test]
    fn a_shared_buffer_returns_to_its_pool_with_its_last_clone() {
        let pool = BufferPool::new(1, 4096, 4096).unwrap();
        let mut buffer = pool.take();
        buffer[0] = 7;
        let shared = buffer.freeze();
        let clone = shared.clone();
        drop(shared);
        assert_eq!(pool.free_count(), 0);
        assert_eq!(clone[0], 7);

        drop(clone);

        assert_eq!(pool.free_count(), 1);
    }

    #[test]
    fn only_the_last_owner_can_thaw() {
        let pool = BufferPool::new(1, 4096, 4096).unwrap();
        let shared = pool.take().freeze();
        let clone = shared.clone();
        let shared = shared.thaw().unwrap_err();
        drop(clone);

        let mut buffer = shared.thaw().unwrap();

        buffer[0] = 1;
        assert_eq!(buffer[0], 1);
    }
}
