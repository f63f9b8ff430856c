//! QEMU's migration stream to pages at fixed places in a file, and back.
//!
//! In: a [`StreamReceiver`](receiver::StreamReceiver) reads a stream from a pipe or a socket
//! ([`incoming`]), with multifd channels beside it if there are any ([`multifd`]), and writes every page to
//! its place in a [`Draft`](vmfile_pages::draft::Draft). A page that comes again overwrites its place.
//!
//! Out: [`Contents`](contents::Contents) says which pages of an open file are sent;
//! [`write_stream`](stream_writer::write_stream) reads them ahead, compares each with its hash, and writes a
//! stream that any QEMU takes; [`write_channels`](channel_writer::write_channels) sends the pages by multifd
//! channels beside it.
//!
//! The crate is handed open descriptors and hands back what it found: it starts no QEMU, and does not
//! talk to one's monitor.

#![forbid(unsafe_code)]

pub mod channel_writer;
pub mod channels;
pub mod contents;
pub mod error;
pub mod incoming;
pub mod listener;
pub mod multifd;
pub mod outlet;
mod pages_in_order;
pub mod receiver;
pub mod stream_writer;

pub use channels::Channels;
pub use error::{ReceiveError, SendError};
