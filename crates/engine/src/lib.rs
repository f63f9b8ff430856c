//! Bytes to the kernel and back: direct I/O, `io_uring`, and the memory of other processes.
//!
//! Everything here is counted in bytes, as `u64` or `usize`, and every range is half-open. The
//! crate knows files, mappings, processes and errors of the kernel; only the caller knows what the
//! bytes mean. It never prints, never exits and never reads the environment.
//!
//! ```
//! use vmfile_engine::{
//!     Backend, BufferPool, DataFile, DirectIo, Direction, Existing, Memory, Transfer, Unpublished,
//!     open_storage,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("data");
//! // A new file, which has no name yet, written past the page cache where that is possible.
//! let unpublished = Unpublished::create_beside(&path, Existing::Refuse)?;
//! let file = DataFile::new(unpublished.file().try_clone()?, DirectIo::Preferred)?;
//! let mut storage = open_storage(&file, Backend::Auto, 8)?.storage;
//!
//! let pool = BufferPool::new(1, 4096, 4096)?;
//! let mut buffer = pool.take();
//! buffer[..5].copy_from_slice(b"hello");
//! let memory = Memory::Owned(buffer, 0..4096);
//! storage.submit(Transfer { direction: Direction::Write, file_offset: 8192, memory, tag: 0 })?;
//! let completion = storage.reap()?.ok_or("one is in flight")?;
//! completion.result?;
//!
//! // First the file is on the disk, then it gets its name.
//! unpublished.make_durable()?.publish()?;
//! assert_eq!(&std::fs::read(&path)?[8192..8197], b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! A write goes this way: fill a [`PooledBuffer`], wrap it in a [`Transfer`], submit it to a
//! [`Storage`], reap its [`Completion`] and with it the memory. [`Unpublished`] gives the finished
//! file its name.
//!
//! **Invariant:** memory handed to the kernel belongs to the storage until its completion is
//! reaped. **Invariant:** memory that another process may write is never a `&[u8]`.

pub mod backend;
pub mod beside;
pub mod buffer;
pub mod crew;
mod descriptors;
pub mod direct_io;
pub mod extents;
pub mod guardian;
pub mod hash;
pub mod host;
pub mod inherited;
pub mod locks;
mod maps;
mod pagemap;
pub mod probe;
pub mod process_memory;
pub mod publish;
mod publish_error;
pub mod residency;
mod ring;
pub mod send_queue;
pub mod share;
pub mod storage;
mod threads;
pub mod transfer;
pub mod userfault;
mod waiting;
pub mod zero;

pub use backend::{Backend, BackendInUse, OpenStorage, open_storage};
pub use beside::beside;
pub use buffer::{AlignedBuffer, BufferPool, PooledBuffer, SharedBuffer};
pub use crew::{Crew, Panicked};
pub use direct_io::{DataFile, DirectIo, DirectIoInUse};
pub use extents::{
    DataSeeker, FileSystem, data_ranges, file_system, hugetlb_allocated_bytes, punch_hole,
};
pub use guardian::{Guardian, Step, Will};
pub use hash::{HashKey, RunningHash, page_hash};
pub use host::available_memory;
pub use inherited::inherited;
pub use locks::is_locked;
pub use maps::{Device, Mapping, Permissions};
pub use probe::{KernelProbe, Support};
pub use process_memory::{Access, Backing, BackingError, BackingFile, Fault, ProcessMemory};
pub use publish::{Durable, Existing, FindUser, PublishError, Unpublished, available_space};
pub use residency::{begin_reading, drop_cached, resident_bytes};
pub use send_queue::queued_len;
pub use share::{limit_cow_extents, share_extents};
pub use storage::Storage;
pub use transfer::{Completion, Direction, Memory, Transfer};
pub use userfault::Userfault;
pub use zero::is_zero;
