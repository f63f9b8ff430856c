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
//! All integers are big-endian. Payloads have no length of their own: see [`device_state`].

pub mod configuration;
pub mod device_state;
pub mod encoder;

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
pub mod ram_flag {
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
}

/// The version of the "ram" section; QEMU refuses any other.
pub const RAM_SECTION_VERSION: u32 = 4;
