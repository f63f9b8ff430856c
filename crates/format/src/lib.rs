//! The bytes of a saved virtual machine and what they mean.
//!
//! QEMU's migration stream, its mapped-ram layout (every RAM page at a fixed place in the file) and
//! the manifest that vmfile appends after QEMU's last byte. `docs/format.md` says the same in
//! words.
//!
//! ```
//! use vmfile_format::mapped_ram::MappedRamLayout;
//! use vmfile_format::stream::configuration::Configuration;
//! use vmfile_format::{PageIndex, PageSize, RamBlock, RamLayout};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Where do the pages of a machine with 128 MiB of RAM lie in a file?
//! let ram = RamBlock::new("pc.ram".to_owned(), 128 << 20, PageSize::KIB_4)?;
//! let machine = "pc-q35-10.0".to_owned();
//! let configuration = Configuration { machine, ..Configuration::default() };
//! // QEMU gives each section of a stream a number: that of RAM.
//! let section_id = 2;
//! let layout = MappedRamLayout::new(&configuration, RamLayout::new(vec![ram])?, section_id)?;
//! let block = &layout.blocks()[0];
//! assert_eq!(block.pages_offset, 2 << 20);
//! assert_eq!(block.page_offset(PageIndex(5)), Some((2 << 20) + 5 * 4096));
//! # Ok(())
//! # }
//! ```
//!
//! This crate performs no I/O: it takes bytes and returns values, and it does not panic on any
//! input. A number from a file is bounded before it is used to index, allocate or multiply.

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
/// It finds damage; it does not protect against an attacker.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u128 {
    twox_hash::XxHash3_128::oneshot(bytes)
}
