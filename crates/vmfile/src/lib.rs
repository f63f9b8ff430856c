//! Saves a running QEMU virtual machine to a file and brings it back.
//!
//! One verb, one module. The library never prints, never exits and never reads the environment: it
//! returns numbers and typed errors.

#![forbid(unsafe_code)]

mod beside;
pub mod check;
mod control;
pub mod convert;
mod draft;
pub mod error;
mod guard;
mod image_facts;
pub mod info;
mod jobs;
mod lane;
mod leftover;
pub mod list;
mod listener;
mod multifd;
mod new_file;
mod page_hashes;
mod page_writer;
mod plan;
mod proof;
mod ram_loader;
mod ram_writer;
mod ranges;
mod reading;
pub mod receive;
mod received_ram;
pub mod restore;
mod restore_error;
pub mod save;
pub mod send;
mod shared_bitmap;
mod snapshot;
mod source;
mod stream_receiver;
mod window_reader;

pub use control::{Control, Progress};
pub use jobs::Jobs;
pub use multifd::{CHANNELS_MAX, ChannelsError};
pub use new_file::new_file;
pub use proof::ProofError;
pub use ram_loader::LoadError;
pub use restore_error::{ImageChange, Mismatch, RestoreError};
pub use snapshot::{Manifest, Snapshot, SnapshotError};
pub use source::process::ProcessRamError;
pub use vmfile_engine::{Backend, DirectIo, Existing, PublishError, Unpublished, inherited};
pub use vmfile_qemu::{
    CommandLineError, DiscoverError, LaunchedQemu, Vm, VmAddress, VmError, resolve,
};
