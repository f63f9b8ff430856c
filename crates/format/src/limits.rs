//! How large each thing in a file may be, with the reason for each limit.
//!
//! A limit is checked before memory is allocated or a loop begins.

/// Longest RAM block name, in bytes. QEMU's `idstr` has room for 256 with its terminator.
pub const BLOCK_NAME_LEN_MAX: usize = 255;

/// Most RAM blocks in one VM. A `pc` has eight; 4096 leaves room for a board full of DIMMs and
/// devices with option ROMs.
pub const BLOCKS_MAX: usize = 4096;

/// Largest RAM block, in bytes: 64 TiB, above every host that exists, and far enough from the end
/// of `u64` that sums of [`BLOCKS_MAX`] of them cannot overflow.
pub const BLOCK_LEN_MAX: u64 = 1 << 46;

/// Most pages in one RAM block: 64 TiB of 4 KiB pages, whose bitmap takes 2 GiB of memory.
pub const BLOCK_PAGES_MAX: u64 = 1 << 34;

/// Longest machine type name, in bytes. QEMU reads it into a buffer of its own size; real names
/// stay under 40.
pub const MACHINE_NAME_LEN_MAX: u32 = 256;

/// Most capability names in the configuration section. QEMU 10.2 knows two.
pub const CAPABILITIES_MAX: u32 = 64;

/// Longest header with configuration of a sequential stream, in bytes: the limits of its fields add
/// up to less.
pub const CONFIGURATION_LEN_MAX: usize = 32 << 10;

/// How much longer than a page its zlib form may be, in bytes. Incompressible data grows by 33
/// bytes at 64 KiB.
pub const COMPRESSED_EXTRA_LEN_MAX: usize = 1024;

/// Most data of one multifd packet, in bytes: twice the pages of a packet. Incompressible data grow
/// by less than a hundredth, with zlib as with zstd.
pub const MULTIFD_DATA_LEN_MAX: u64 = 1 << 20;

/// Largest device state, in bytes, with everything that follows the RAM section up to QEMU's last
/// byte. A virtual machine with dozens of devices has a few MiB.
pub const DEVICE_STATE_LEN_MAX: u64 = 256 << 20;

/// Longest VM description that is parsed, in bytes: that of a `pc` has 100 KB.
pub const VM_DESCRIPTION_LEN_MAX: u64 = 16 << 20;

/// Most device sections in one device state.
pub const DEVICE_SECTIONS_MAX: usize = 16 << 10;

/// Largest manifest, in bytes, page hashes not counted: the command line and the list of RAM blocks
/// make it a few KiB.
pub const MANIFEST_LEN_MAX: u64 = 16 << 20;

/// Most values in a manifest: words, numbers, names and whatever else stands before a comma. Each takes some
/// fifty bytes of memory. A VM with 4096 processors and as many RAM blocks has a third of them.
pub const MANIFEST_VALUES_MAX: u64 = 1 << 17;

/// Most objects and lists in a manifest: an object of few bytes may take hundreds in memory.
pub const MANIFEST_OBJECTS_MAX: u64 = 1 << 15;

/// Largest length of a file, in bytes: the kernel's `loff_t` is signed.
pub const FILE_LEN_MAX: u64 = i64::MAX as u64;

/// Most files below a thin one. Each is opened and has its tables read by whatever reads pages, and all
/// of them must be kept.
pub const CHAIN_LEN_MAX: usize = 32;
