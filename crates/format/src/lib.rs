//! The bytes of a saved virtual machine and what they mean.
//!
//! QEMU's migration stream, its mapped-ram layout (every RAM page at a fixed place in the file) and
//! the manifest that vmfile appends after QEMU's last byte. `docs/format.md` says the same in words.
//!
//! This crate performs no I/O: it is handed bytes and hands back values, and it does not panic on
//! any input. A number from a file is bounded before it is used to index, allocate or multiply.

#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod cursor;
pub mod error;
pub mod limits;
pub mod manifest;
pub mod mapped_ram;
pub mod page;
pub mod page_bitmap;
pub mod qcow2;
pub mod ram_block;
pub mod stream;

pub use error::{FormatError, ReadError};
pub use page::{PageCount, PageIndex, PageRange, PageSize};
pub use page_bitmap::PageBitmap;
pub use ram_block::{RamBlock, RamLayout};

/// Returns the XXH3-128 checksum of `bytes`, the one checksum of this format.
///
/// It finds damage; it is no proof against somebody who means harm.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u128 {
    twox_hash::XxHash3_128::oneshot(bytes)
}
