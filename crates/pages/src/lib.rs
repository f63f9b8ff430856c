//! Saves RAM into a file by direct I/O: every page has a fixed place there, and a hash.
//!
//! A VMM hands over its memory as a [`PageSource`] and gets a file in which every page has an
//! aligned place of its own, zero pages are holes, and everything has a checksum. The file is
//! QEMU's mapped-ram format with vmfile's manifest behind it; `docs/format.md` says what its bytes
//! mean. The memory may be the caller's own ([`OwnMemory`]), that of another process
//! ([`ProcessRam`]), or whatever else implements the trait. No QEMU is needed.
//!
//! [`memory_file::save`] writes such a file, [`Snapshot`] is one that was opened and whose
//! structure was checked, and [`memory_file::load`] brings its pages into a [`PageSink`].
//! `examples/own_memory.rs` and `examples/pages_of_file.rs` in this crate are whole programs.
//!
//! ```
//! use vmfile_pages::memory_file::{Contents, FileOptions, load, save, state};
//! use vmfile_pages::{
//!     Control, OwnMemory, OwnMemoryMut, PageSize, RamBlock, RamLayout, Snapshot,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("vm.vmf");
//! // The memory of a guest: 4 MiB, of which one page is not zero.
//! let mut memory = vec![0_u8; 4 << 20];
//! memory[5 * 4096..][..5].copy_from_slice(b"hello");
//! let block = RamBlock::new("ram".to_owned(), 4 << 20, PageSize::KIB_4)?;
//!
//! let options = FileOptions::default();
//! let saved = save(
//!     &path,
//!     Contents::new("example-1.0", RamLayout::new(vec![block])?, &[("cpu0", b"registers")]),
//!     &OwnMemory::new(vec![&memory]),
//!     &options,
//!     &Control::none(),
//! )?;
//! assert_eq!(saved.pages_data, 1);
//!
//! // Every page is compared with its hash on its way back. The snapshot begins at byte 0 of its file.
//! let snapshot = Snapshot::open(&path, 0)?;
//! let mut restored = vec![0xff_u8; 4 << 20];
//! load(&snapshot, &OwnMemoryMut::new(vec![&mut restored]), &options, &Control::none())?;
//! assert_eq!(restored, memory);
//! assert_eq!(state(&snapshot, "cpu0")?.as_deref(), Some(&b"registers"[..]));
//! # Ok(())
//! # }
//! ```
//!
//! [`check`](mod@check) says what is damaged in a file. The other modules are for programs that
//! move pages in another way: [`draft`] is a file in the making, [`lane`] threads with transfers in
//! flight, [`window_reader`] reads many pages of a file at once, and [`page_writer`] writes pages
//! that come in any order.
//!
//! **Invariant:** bytes that are written are those that were hashed; bytes that are brought into
//! RAM are those that were compared. **Invariant:** a name never leads to a partial file.

#![forbid(unsafe_code)]

// The signatures below have types of these crates.
pub use vmfile_engine as engine;
pub use vmfile_format as format;

pub mod base;
pub mod check;
pub mod control;
pub mod copied_ram;
pub mod draft;
pub mod error;
mod findings;
pub mod jobs;
pub mod lane;
pub mod layers;
pub mod memory;
pub mod memory_file;
pub mod page_hashes;
pub mod page_writer;
pub mod plan;
pub mod process_ram;
mod proof;
pub mod protected_ram;
pub mod ram_loader;
pub mod ram_writer;
mod ranges;
pub mod reading;
pub mod received_ram;
mod runs;
mod shared_bitmap;
pub mod snapshot;
mod snapshot_error;
pub mod window_reader;

pub use control::{Control, Progress};
pub use error::PagesError;
pub use jobs::Jobs;
pub use memory::{OwnMemory, OwnMemoryMut, PageSink, PageSource};
pub use process_ram::{ProcessRam, ProcessRamError};
pub use vmfile_engine::{
    Access, Backend, BackendInUse, BackingError, DataFile, DirectIo, DirectIoInUse, Existing,
    PublishError, Unpublished,
};
pub use vmfile_format::{FormatError, PageBitmap, PageIndex, PageSize, RamBlock, RamLayout};

pub use reading::Verified;
pub use snapshot::{FileFormat, Manifest, Snapshot, SnapshotError};
