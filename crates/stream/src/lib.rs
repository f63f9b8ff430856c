//! Converts QEMU's migration stream into pages at fixed places in a file, and back.
//!
//! In: a [`StreamReceiver`](receiver::StreamReceiver) reads a stream from a pipe or a socket
//! ([`incoming`]), with multifd channels beside it if there are any ([`multifd`]), and writes every
//! page to its place in a [`Draft`](vmfile_pages::draft::Draft). A page that QEMU sends again
//! overwrites the earlier one.
//!
//! Out: [`StreamContents`](contents::StreamContents) says which pages of an open file are sent;
//! [`write_stream`](stream_writer::write_stream) reads them ahead, compares each with its hash, and
//! writes a stream that any QEMU takes; [`write_channels`](channel_writer::write_channels) sends
//! the pages by multifd channels beside it.
//!
//! ```
//! use std::io::Read as _;
//! use std::os::unix::net::UnixStream;
//!
//! # use vmfile_pages::memory_file::{self, FileOptions, save};
//! # use vmfile_pages::{OwnMemory, PageSize, RamBlock, RamLayout};
//! use vmfile_pages::{Backend, Control, DataFile, DirectIo, Snapshot};
//! use vmfile_stream::contents::{StreamContents, Pages};
//! use vmfile_stream::outlet::Outlet;
//! use vmfile_stream::stream_writer::{Source, write_stream};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("vm.vmf");
//! # let ram = RamLayout::new(vec![RamBlock::new("pc.ram".to_owned(), 65536, PageSize::KIB_4)?])?;
//! # let (memory, options) = (OwnMemory::new(vec![&[7; 65536]]), FileOptions::default());
//! # let saved = memory_file::Contents::new("example-1.0", ram, &[("cpu", b"state")]);
//! # save(&path, saved, &memory, &options, &Control::none())?;
//! // A file with every page at a fixed place, as a stream into a socket.
//! let snapshot = Snapshot::open(&path, 0)?;
//! let contents = StreamContents::new(&snapshot, |_| Pages::All)?;
//! let (ours, mut theirs) = UnixStream::pair()?;
//! let not_stopped = || false;
//! let mut outlet = Outlet::new(ours.into(), &not_stopped)?;
//! let file = DataFile::new(snapshot.file().try_clone()?, DirectIo::Off)?;
//! let source = Source { file, io: Backend::Auto };
//! // 64 KiB fit into the socket. More than that needs a reader that reads meanwhile.
//! write_stream(&contents, &source, &mut outlet, &Control::none())?;
//! drop(outlet);
//!
//! let mut stream = Vec::new();
//! theirs.read_to_end(&mut stream)?;
//! assert!(stream.starts_with(b"QEVM"));
//! # Ok(())
//! # }
//! ```
//!
//! The caller passes open descriptors: the crate starts no QEMU, and does not talk to QEMU's
//! monitor.

#![forbid(unsafe_code)]

// The signatures below have types of these crates.
pub use vmfile_engine as engine;
pub use vmfile_format as format;
pub use vmfile_pages as pages;

pub mod channel_writer;
pub mod channels;
pub mod contents;
pub mod error;
pub mod held;
pub mod incoming;
pub mod listener;
pub mod multifd;
pub mod outlet;
mod pages_in_order;
pub mod receiver;
pub mod stream_writer;

pub use channels::Channels;
pub use error::{ReceiveError, SendError};
