//! What vmfile appends after QEMU's last byte, which QEMU ignores.
//!
//! ```text
//! ... QEMU's last byte
//! zeros to a multiple of 4096
//! page hashes of block 0      16 bytes for each page, zeros for a zero page
//! page hashes of block 1 ...    each table begins at a multiple of 4096
//! further tables              of any kind, if there are some
//! metadata                    JSON
//! footer                      the last 64 bytes of the file
//! ```
//!
//! The hash of page `i` lies at a fixed place, `hashes_offset + 16 * i`, as the page does: several
//! writers need no order among them, and one page can be checked without reading the hashes of the
//! others.

mod base;
mod disks;
pub mod features;
mod footer;
mod machine;
mod meta;
mod page_hashes;
mod surroundings;
mod values;

pub use base::{BASE_PAGES, BaseMeta, SnapshotId, decode_base_pages, encode_base_pages};
pub use disks::{DiskMeta, EmptyDriveMeta, FileMeta, ImageMeta, IoLimitsMeta};
pub use features::Features;
pub use footer::{FOOTER_LEN, FOOTER_MAGIC, Footer};
pub use machine::{
    ChangeMeta, CpuMeta, CpuSectionMeta, DeviceMeta, MemoryDeviceMeta, MemoryRangeMeta, PartsMeta,
    PinMeta,
};
pub use meta::{BlockMeta, ExtentMeta, Meta, VmMeta};
pub use page_hashes::{
    HASH_LEN, TABLE_ALIGNMENT, decode_hash, encode_hash, place_tables, table_len,
};
pub use surroundings::SurroundingsMeta;
