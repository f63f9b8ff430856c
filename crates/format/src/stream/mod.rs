//! QEMU's migration stream, as far as a saved VM needs it.
//!
//! ```text
//! "QEVM"  be32 3
//! 07 CONFIGURATION   machine type, subsections
//! 01 START "ram"     words, then 7e FOOTER
//! 02 PART, 03 END    of a section that was started
//! 04 FULL            one device, whole
//! 08 COMMAND
//! 00 EOF
//! 06 VMDESCRIPTION   JSON, optional
//! ```
//!
//! All integers are big-endian. Payloads have no length of their own: [`decoder`] knows that of
//! "ram" and of the other sections with parts, and [`device_state`] finds those of the devices.

pub mod configuration;
pub mod decoder;
pub mod description;
pub mod device_state;
pub mod encoder;
pub mod multifd;
pub mod own_state;
mod parts;
mod ram_word;
mod run_state;
pub mod xbzrle;

/// "QEVM", the first four bytes.
pub const MAGIC: u32 = 0x5145_564d;
/// The only version of the stream that QEMU has written since 2009.
pub const VERSION: u32 = 3;

/// The byte that begins each part of the stream.
pub mod section {
    /// The end of the sections.
    pub const EOF: u8 = 0x00;
    /// The first part of a section that comes in several.
    pub const START: u8 = 0x01;
    /// A further part.
    pub const PART: u8 = 0x02;
    /// The last part.
    pub const END: u8 = 0x03;
    /// A section that comes whole.
    pub const FULL: u8 = 0x04;
    /// Inside a device's payload or the configuration.
    pub const SUBSECTION: u8 = 0x05;
    /// The JSON description of the device sections.
    pub const VM_DESCRIPTION: u8 = 0x06;
    /// Machine type and validated capabilities.
    pub const CONFIGURATION: u8 = 0x07;
    /// A message between source and destination.
    pub const COMMAND: u8 = 0x08;
    /// Ends each START, PART, END and FULL; carries the section's id. Since QEMU 2.4.
    pub const FOOTER: u8 = 0x7e;
}

/// The words of the "ram" section: flags in the bits below the page size, an offset above them.
///
/// A word has one flag; only [`CONTINUE`](ram_flag::CONTINUE) is combined with another.
pub mod ram_flag {
    /// A page of one byte value. No QEMU since 2009 writes it.
    pub const FULL: u64 = 0x01;
    /// The page is zero; one fill byte, 0, follows.
    pub const ZERO: u64 = 0x02;
    /// The block list follows; the address part is the total length.
    pub const MEM_SIZE: u64 = 0x04;
    /// One raw page follows.
    pub const PAGE: u64 = 0x08;
    /// The payload ends.
    pub const EOS: u64 = 0x10;
    /// The page belongs to the block that was named last.
    pub const CONTINUE: u64 = 0x20;
    /// A change to the page as it was sent before; one byte 1, be16 length and that many bytes
    /// follow.
    pub const XBZRLE: u64 = 0x40;
    /// Used with RDMA.
    pub const HOOK: u64 = 0x80;
    /// One page as a zlib stream; be32 length and that many bytes follow. Removed in QEMU 9.1.
    pub const COMPRESS_PAGE: u64 = 0x100;
    /// All that the multifd channels carry up to their next SYNC comes before what follows here.
    /// Since QEMU 8.1.
    pub const MULTIFD_FLUSH: u64 = 0x200;
}

/// The codes of the commands: messages between source and destination.
pub mod command {
    /// Asks the destination to answer on the return path.
    pub const OPEN_RETURN_PATH: u16 = 1;
    /// Asks for a PONG.
    pub const PING: u16 = 2;
    /// Says that postcopy may follow.
    pub const POSTCOPY_ADVISE: u16 = 3;
    /// Begins postcopy on the destination.
    pub const POSTCOPY_LISTEN: u16 = 4;
    /// Lets the guest run on the destination.
    pub const POSTCOPY_RUN: u16 = 5;
    /// Says which pages are out of date.
    pub const POSTCOPY_RAM_DISCARD: u16 = 6;
    /// A stream inside the stream follows.
    pub const PACKAGED: u16 = 7;
    /// Begins COLO.
    pub const ENABLE_COLO: u16 = 8;
    /// Goes on after a broken postcopy.
    pub const POSTCOPY_RESUME: u16 = 9;
    /// Asks which pages have arrived.
    pub const RECV_BITMAP: u16 = 10;
    /// Says that the source has stopped. Since QEMU 10.0.
    pub const SWITCHOVER_START: u16 = 11;
}

/// The version of the "ram" section; QEMU refuses any other.
pub const RAM_SECTION_VERSION: u32 = 4;
