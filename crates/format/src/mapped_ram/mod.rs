//! RAM at fixed offsets: QEMU's mapped-ram file (QEMU 9.0 and later).
//!
//! ```text
//! header, configuration with the capability "mapped-ram"
//! 01 START "ram"  MEM_SIZE word
//! for each block:
//!     name, used length, header        at `record_offset`
//!     bitmap                           at `bitmap_offset`
//!     pages                            at `pages_offset`, one after another
//! EOS word, footer                     right after the last block's pages
//! device sections, EOF, description
//! ```
//!
//! Each block's record begins right after the pages of the block before it. QEMU's reader requires
//! this. Bitmaps may lie anywhere.

mod header;
mod layout;
mod reader;

pub use header::{HEADER_LEN, MappedRamHeader};
pub use layout::{MARK, MappedRamLayout, PAGES_ALIGNMENT, PlacedBlock};
pub use reader::MappedRamFile;
