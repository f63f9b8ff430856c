//! Saves a running QEMU virtual machine to a file and brings it back.
//!
//! One verb, one module. The library never prints, never exits and never reads the environment: it
//! returns numbers and typed errors.

#![forbid(unsafe_code)]

pub mod convert;
pub mod error;
mod guard;
mod image_facts;
pub mod info;
mod leftover;
pub mod list;
mod new_file;
pub mod receive;
pub mod restore;
mod restore_error;
pub mod save;
pub mod send;

pub use new_file::new_file;
pub use restore_error::{ImageChange, Mismatch, RestoreError};
pub use vmfile_engine::{Backend, DirectIo, Existing, PublishError, Unpublished, inherited};
pub use vmfile_pages::PagesError;
pub use vmfile_pages::check;
pub use vmfile_pages::control::{Control, Progress};
pub use vmfile_pages::jobs::Jobs;
pub use vmfile_pages::process_ram::ProcessRamError;
pub use vmfile_pages::snapshot::{FileFormat, Manifest, Snapshot, SnapshotError};
pub use vmfile_qemu::{
    CommandLineError, DiscoverError, LaunchedQemu, Vm, VmAddress, VmError, resolve,
};
pub use vmfile_stream::Channels;
pub use vmfile_stream::multifd::ChannelsError;
