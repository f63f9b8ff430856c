//! RAM at fixed places in a file.
#![forbid(unsafe_code)]

pub mod control;
pub mod draft;
pub mod error;
pub mod jobs;
pub mod lane;
pub mod memory;
pub mod page_hashes;
pub mod page_writer;
pub mod plan;
pub mod process_ram;
pub mod proof;
pub mod ram_loader;
pub mod ram_writer;
mod ranges;
pub mod reading;
pub mod received_ram;
mod runs;
mod shared_bitmap;
pub mod snapshot;
pub mod window_reader;

pub use error::PagesError;
