//! The packets of the multifd channels: pages on connections beside the stream's own.
//!
//! ```text
//! init     64 bytes, once on each channel
//! packet   320 bytes and be64 for each page that it could carry: 512 KiB of pages
//! data     the packet's normal pages, as they are or compressed
//! packet   ...
//! ```
//!
//! A packet with the flag SYNC ends a round on its channel. Since QEMU 9.0 it carries no pages, and
//! packets name zero pages as well.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::MULTIFD_DATA_LEN_MAX;
use crate::page::{PageIndex, PageSize};
use crate::ram_block::{RamBlock, RamLayout, at};

/// Length of the init packet, in bytes.
pub const INIT_LEN: usize = 64;
/// Length of a packet without the offsets of its pages, in bytes.
pub const HEADER_LEN: usize = 320;
/// Most bytes that [`Packet::decode`] may need: a packet for pages of 512 bytes.
pub const PACKET_LEN_MAX: usize = HEADER_LEN + 8 * 1024;

/// The first four bytes on a channel, and of each packet.
pub const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
/// How many bytes of pages one packet carries at most. Fixed since QEMU 4.0.
pub const PACKET_PAGES_LEN: u64 = 512 << 10;
/// Room for the name of a block, in bytes, with its NUL.
const NAME_LEN: usize = 256;

mod flag {
    pub(super) const SYNC: u32 = 0x01;
    pub(super) const COMPRESSION: u32 = 0x3e;
    pub(super) const ZLIB: u32 = 0x02;
    pub(super) const ZSTD: u32 = 0x04;
    pub(super) const QPL: u32 = 0x08;
    pub(super) const UADK: u32 = 0x10;
    pub(super) const QATZIP: u32 = 0x20;
    pub(super) const DEVICE_STATE: u32 = 0x40;
}

/// The first packet on a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Init {
    /// The uuid of the VM; zeros if it has none.
    pub uuid: [u8; 16],
    /// The channel's number, from 0.
    pub channel: u8,
}

impl Init {
    /// Decodes the first [`INIT_LEN`] bytes of a channel.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if `bytes` are fewer, or are no init packet of version 1.
    pub fn decode(bytes: &[u8]) -> Result<Init, FormatError> {
        let mut cursor = Cursor::new(bytes, 0);
        cursor.expect_be32("multifd magic", MAGIC)?;
        cursor.expect_be32("multifd version", VERSION)?;
        let uuid = cursor.be128("uuid")?.to_be_bytes();
        let channel = cursor.u8("number of the channel")?;
        cursor.bytes("rest of the init packet", 7 + 32)?;
        Ok(Init { uuid, channel })
    }

    /// Encodes the packet.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(INIT_LEN);
        bytes.extend_from_slice(&MAGIC.to_be_bytes());
        bytes.extend_from_slice(&VERSION.to_be_bytes());
        bytes.extend_from_slice(&self.uuid);
        bytes.push(self.channel);
        bytes.resize(INIT_LEN, 0);
        bytes
    }
}

/// How the data of a packet are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// They are the pages, one after another.
    None,
    /// A piece of the channel's one zlib stream, flushed.
    Zlib,
    /// A piece of the channel's one zstd stream, flushed.
    Zstd,
}

/// A packet of RAM; its data follow it on the wire.
///
/// A packet that was decoded has pages that lie in their block, and fits the limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Whether the round ends here, after this packet's pages if it has some.
    pub sync: bool,
    /// How the data are compressed; without data it means nothing.
    pub compression: Compression,
    /// Counts the packets of all channels.
    pub number: u64,
    /// The pages, and the place of their block in the [`RamLayout`]; `None` if there are none.
    pub pages: Option<PacketPages>,
    /// How many bytes follow the packet; 0 if it has no normal pages.
    pub data_len: u32,
}

/// The pages of a packet, all of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketPages {
    /// The place of the block in the [`RamLayout`].
    pub block: usize,
    /// The pages whose bytes the data are, in this order.
    pub normal: Vec<PageIndex>,
    /// Pages of zeros. QEMU before 9.0 sends these in the stream.
    pub zero: Vec<PageIndex>,
}

impl Packet {
    /// Decodes the packet that `bytes` begin with, at `offset` of its channel.
    ///
    /// Returns it with its length, after which the data begin; `None` if more bytes are needed, at
    /// most [`PACKET_LEN_MAX`].
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if it is no packet of pages of `ram`, or its data are longer than
    /// their limit.
    pub fn decode(
        bytes: &[u8],
        offset: u64,
        ram: &RamLayout,
    ) -> Result<Option<(Packet, usize)>, FormatError> {
        match decode(bytes, offset, ram) {
            Ok(packet) => Ok(Some((packet, packet_len(page_size(ram))))),
            Err(error) if matches!(error.kind, FormatErrorKind::Ends { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Encodes the packet as QEMU 9.0 and later do.
    ///
    /// # Panics
    ///
    /// Panics if there are more pages than fit, or if their block is not in `ram`.
    #[must_use]
    pub fn encode(&self, ram: &RamLayout) -> Vec<u8> {
        let size = page_size(ram);
        let flags = match self.compression {
            Compression::None => 0,
            Compression::Zlib => flag::ZLIB,
            Compression::Zstd => flag::ZSTD,
        };
        let flags = flags | if self.sync { flag::SYNC } else { 0 };
        let (normal, zero) = match &self.pages {
            Some(pages) => (pages.normal.as_slice(), pages.zero.as_slice()),
            None => (&[][..], &[][..]),
        };
        let block = self.pages.as_ref().map(|pages| ram.blocks().get(pages.block));
        let name = block.map_or("", |block| block.expect("a block of the layout").name());
        let count = |pages: &[PageIndex]| u32::try_from(pages.len()).expect("few pages");
        let mut bytes = Vec::with_capacity(packet_len(size));
        for field in [MAGIC, VERSION, flags, pages_max(size), count(normal), self.data_len] {
            bytes.extend_from_slice(&field.to_be_bytes());
        }
        bytes.extend_from_slice(&self.number.to_be_bytes());
        bytes.extend_from_slice(&count(zero).to_be_bytes());
        bytes.resize(HEADER_LEN.saturating_sub(NAME_LEN), 0);
        bytes.extend_from_slice(name.as_bytes());
        bytes.resize(HEADER_LEN, 0);
        for page in normal.iter().chain(zero) {
            let block_offset = page.block_offset(size).expect("a page of its block");
            bytes.extend_from_slice(&block_offset.to_be_bytes());
        }
        assert!(bytes.len() <= packet_len(size), "a packet has room for its pages");
        bytes.resize(packet_len(size), 0);
        bytes
    }
}

fn page_size(ram: &RamLayout) -> PageSize {
    ram.blocks().first().map_or(PageSize::KIB_4, RamBlock::page_size)
}

/// Returns how many pages a packet has room for.
fn pages_max(size: PageSize) -> u32 {
    let pages = PACKET_PAGES_LEN.checked_div(size.bytes()).unwrap_or(0);
    u32::try_from(pages).expect("a page has 512 bytes at least")
}

/// Returns how long a packet is, in bytes, however many pages it names.
#[must_use]
pub fn packet_len(size: PageSize) -> usize {
    let pages = usize::try_from(pages_max(size)).expect("at most 1024");
    HEADER_LEN.saturating_add(pages.saturating_mul(8))
}

fn decode(bytes: &[u8], offset: u64, ram: &RamLayout) -> Result<Packet, FormatError> {
    let size = page_size(ram);
    let mut cursor = Cursor::new(bytes, offset);
    cursor.expect_be32("multifd magic", MAGIC)?;
    cursor.expect_be32("multifd version", VERSION)?;
    let flags_offset = cursor.offset();
    let flags = cursor.be32("multifd flags")?;
    // A packet with device state has another form after its flags.
    let compression = at(flags_offset, compression(flags))?;
    let max = pages_max(size);
    // The length on the wire follows from the page size, whatever this says: a packet without pages
    // may say 0.
    limited(&mut cursor, "capacity of a multifd packet", max)?;
    let normal = limited(&mut cursor, "number of pages in a multifd packet", max)?;
    let data_offset = cursor.offset();
    let data_len = cursor.be32("length of the multifd data")?;
    let number = cursor.be64("number of the multifd packet")?;
    let zero_max = max.saturating_sub(normal);
    let zero = limited(&mut cursor, "number of zero pages in a multifd packet", zero_max)?;
    cursor.bytes("reserved bytes of a multifd packet", 4 + 24)?;
    let name_offset = cursor.offset();
    let name = cursor.bytes("name of a RAM block", NAME_LEN)?;
    // A SYNC of QEMU before 9.0 repeats the length of the packet before it.
    let data_len = if normal == 0 { 0 } else { data_len };
    at(data_offset, check_data_len(data_len, normal, compression, size))?;

    let pages = if normal == 0 && zero == 0 {
        // The name is empty, or left from an earlier packet.
        None
    } else {
        let block = at(name_offset, block_named(name, ram))?;
        let normal = page_list(&mut cursor, normal, ram, block)?;
        let zero = page_list(&mut cursor, zero, ram, block)?;
        Some(PacketPages { block, normal, zero })
    };
    let taken = usize::try_from(cursor.offset().saturating_sub(offset)).unwrap_or(usize::MAX);
    cursor.bytes("unused offsets of a multifd packet", packet_len(size).saturating_sub(taken))?;
    Ok(Packet { sync: flags & flag::SYNC != 0, compression, number, pages, data_len })
}

fn compression(flags: u32) -> Result<Compression, FormatErrorKind> {
    let refused =
        |what, name: &str| Err(FormatErrorKind::Unsupported { what, name: String::from(name) });
    if flags & flag::DEVICE_STATE != 0 {
        return refused("multifd packet", "device state");
    }
    if flags & !(flag::SYNC | flag::COMPRESSION) != 0 {
        return refused("multifd packet with the flags", &format!("{flags:#x}"));
    }
    match flags & flag::COMPRESSION {
        0 => Ok(Compression::None),
        flag::ZLIB => Ok(Compression::Zlib),
        flag::ZSTD => Ok(Compression::Zstd),
        flag::QPL => refused("multifd compression", "qpl"),
        flag::UADK => refused("multifd compression", "uadk"),
        flag::QATZIP => refused("multifd compression", "qatzip"),
        _ => refused("multifd packet with the flags", &format!("{flags:#x}")),
    }
}

fn check_data_len(
    found: u32,
    normal: u32,
    compression: Compression,
    size: PageSize,
) -> Result<(), FormatErrorKind> {
    let field = "length of the multifd data";
    let expected = u64::from(normal).saturating_mul(size.bytes());
    let found = u64::from(found);
    if compression == Compression::None && found != expected {
        return Err(FormatErrorKind::Differs { field, found, expected });
    }
    if found > MULTIFD_DATA_LEN_MAX {
        return Err(FormatErrorKind::TooLarge { field, found, max: MULTIFD_DATA_LEN_MAX });
    }
    Ok(())
}

fn block_named(name: &[u8], ram: &RamLayout) -> Result<usize, FormatErrorKind> {
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let name = core::str::from_utf8(name)
        .map_err(|_| FormatErrorKind::NotText { field: "name of a RAM block" })?;
    ram.position(name).ok_or_else(|| FormatErrorKind::UnknownBlock { name: name.to_string() })
}

fn page_list(
    cursor: &mut Cursor<'_>,
    count: u32,
    ram: &RamLayout,
    block: usize,
) -> Result<Vec<PageIndex>, FormatError> {
    let block = ram.blocks().get(block).expect("`block_named` found it");
    let mut pages = Vec::new();
    for _ in 0..count {
        let offset = cursor.offset();
        let block_offset = cursor.be64("offset of a page")?;
        pages.push(at(offset, block.page_at(block_offset))?);
    }
    Ok(pages)
}

fn limited(cursor: &mut Cursor<'_>, field: &'static str, max: u32) -> Result<u32, FormatError> {
    let offset = cursor.offset();
    let found = cursor.be32(field)?;
    if found > max {
        let kind = FormatErrorKind::TooLarge { field, found: found.into(), max: max.into() };
        return Err(FormatError::new(offset, kind));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::vec;

    use proptest::prelude::*;

    use super::*;

    fn ram() -> RamLayout {
        let block = |(name, pages): (&str, u64)| {
            RamBlock::new(name.to_string(), pages * 4096, PageSize::KIB_4).unwrap()
        };
        RamLayout::new([("pc.ram", 256), ("pc.bios", 4)].map(block).into()).unwrap()
    }

    /// Two normal pages and a zero page of `pc.bios`.
    fn packet() -> Packet {
        let pages = PacketPages {
            block: 1,
            normal: vec![PageIndex(2), PageIndex(0)],
            zero: vec![PageIndex(3)],
        };
        Packet {
            sync: false,
            compression: Compression::None,
            number: 7,
            pages: Some(pages),
            data_len: 8192,
        }
    }

    /// Decodes `packet()` with other bytes at a place.
    fn refusal(at: usize, bytes: &[u8]) -> String {
        let mut packet = packet().encode(&ram());
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        Packet::decode(&packet, 0x40, &ram()).unwrap_err().to_string()
    }

    #[test]
    fn packets_have_the_bytes_of_qemu() {
        let bytes = packet().encode(&ram());
        // The length on the wire of QEMU 10.0.2.
        assert_eq!(bytes.len(), 1344);
        let head = [
            [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 0, 128],
            [0, 0, 0, 2, 0, 0, 0x20, 0],
            [0, 0, 0, 0, 0, 0, 0, 7],
            [0, 0, 0, 1, 0, 0, 0, 0],
        ];
        assert_eq!(bytes[..40], head.concat());
        assert_eq!(&bytes[64..72], b"pc.bios\0");
        let offsets = [[0, 0, 0, 0, 0, 0, 0x20, 0], [0; 8], [0, 0, 0, 0, 0, 0, 0x30, 0], [0; 8]];
        assert_eq!(bytes[320..352], offsets.concat());
        assert_eq!(Packet::decode(&bytes, 0, &ram()), Ok(Some((packet(), 1344))));
        for len in 0..1344 {
            assert_eq!(Packet::decode(&bytes[..len], 0, &ram()), Ok(None), "{len}");
        }
    }

    /// A reader that has room for less would wait for the rest of a packet for ever.
    #[test]
    fn the_longest_packet_is_that_of_the_smallest_pages() {
        assert_eq!(packet_len(PageSize::new(512).unwrap()), PACKET_LEN_MAX);
        assert_eq!(packet_len(PageSize::new(65536).unwrap()), HEADER_LEN + 8 * 8);
    }

    #[test]
    fn a_sync_packet_without_pages_has_any_name_capacity_and_length() {
        let sync = Packet { sync: true, pages: None, data_len: 0, ..packet() };
        let mut bytes = sync.encode(&ram());
        assert_eq!(bytes[8..12], [0, 0, 0, 1]);
        bytes[12..16].fill(0);
        // QEMU 7.2 leaves the length here that the packet before had.
        bytes[20..24].copy_from_slice(&[0, 8, 0, 0]);
        bytes[64..80].fill(0xff);
        assert_eq!(Packet::decode(&bytes, 0, &ram()), Ok(Some((sync, 1344))));
    }

    #[test]
    fn a_sync_packet_of_old_versions_carries_pages() {
        let sync = Packet { sync: true, ..packet() };
        let bytes = sync.encode(&ram());
        assert_eq!(Packet::decode(&bytes, 0, &ram()), Ok(Some((sync, 1344))));
    }

    #[test]
    fn packets_that_are_not_as_they_should_be_are_refused() {
        let refusals: [(usize, &[u8], &str); 12] = [
            (0, &[0], "at offset 0x40: multifd magic is 0x223344, expected 0x11223344"),
            (7, &[2], "at offset 0x44: multifd version is 0x2, expected 0x1"),
            (11, &[0x40], "at offset 0x48: multifd packet \"device state\" is not supported"),
            (11, &[0x08], "at offset 0x48: multifd compression \"qpl\" is not supported"),
            (11, &[0x11], "at offset 0x48: multifd compression \"uadk\" is not supported"),
            (11, &[0x20], "at offset 0x48: multifd compression \"qatzip\" is not supported"),
            (11, &[0x06], "at offset 0x48: multifd packet with the flags \"0x6\" is not supported"),
            (10, &[1], "at offset 0x48: multifd packet with the flags \"0x100\" is not supported"),
            (
                15,
                &[129],
                "at offset 0x4c: capacity of a multifd packet is 129, at most 128 is accepted",
            ),
            (
                19,
                &[129],
                "at offset 0x50: number of pages in a multifd packet is 129, at most 128 is accepted",
            ),
            (23, &[1], "at offset 0x54: length of the multifd data is 0x2001, expected 0x2000"),
            (
                35,
                &[127],
                "at offset 0x60: number of zero pages in a multifd packet is 127, at most 126 is accepted",
            ),
        ];
        for (at, bytes, text) in refusals {
            assert_eq!(refusal(at, bytes), text);
        }
    }

    #[test]
    fn pages_outside_their_block_are_refused() {
        let text = "at offset 0x80: RAM block \"xc.bios\" is not in the block list";
        assert_eq!(refusal(64, b"x"), text);
        assert_eq!(refusal(64, &[0xff]), "at offset 0x80: name of a RAM block is not UTF-8");
        let text = "at offset 0x180: page ends at 0x5000, past 0x4000";
        assert_eq!(refusal(326, &[0x40]), text);
        let text = "at offset 0x188: offset of a page is 0x1, not a multiple of 4096";
        assert_eq!(refusal(335, &[1]), text);
    }

    #[test]
    fn compressed_data_have_a_limit() {
        for compression in [Compression::Zlib, Compression::Zstd] {
            let of = |data_len| Packet { compression, data_len, ..packet() };
            let bytes = of(0x10_0000).encode(&ram());
            assert_eq!(Packet::decode(&bytes, 0, &ram()), Ok(Some((of(0x10_0000), 1344))));
            let bytes = of(0x10_0001).encode(&ram());
            let error = Packet::decode(&bytes, 0, &ram()).unwrap_err();
            let text = "length of the multifd data is 1048577, at most 1048576 is accepted";
            assert_eq!(error.kind.to_string(), text);
        }
    }

    #[test]
    fn the_init_packet_says_which_vm_and_which_channel() {
        let init = Init { uuid: [5; 16], channel: 3 };
        let bytes = init.encode();
        assert_eq!(bytes.len(), INIT_LEN);
        assert_eq!(bytes[..8], [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
        assert_eq!((bytes[8], bytes[23], bytes[24]), (5, 5, 3));
        assert_eq!(Init::decode(&bytes), Ok(init));
        assert!(Init::decode(&bytes[..63]).is_err());
        let error = Init::decode(b"QEVM\0\0\0\x03").unwrap_err();
        let text = "at offset 0x0: multifd magic is 0x5145564d, expected 0x11223344";
        assert_eq!(error.to_string(), text);
    }

    proptest! {
        #[test]
        fn every_packet_survives_its_encoding(
            sync in any::<bool>(),
            number in any::<u64>(),
            normal in proptest::collection::vec(0_u64..256, 0..64),
            zero in proptest::collection::vec(0_u64..256, 0..64),
        ) {
            let data_len = u32::try_from(normal.len() * 4096).unwrap();
            let of = |pages: Vec<u64>| pages.into_iter().map(PageIndex).collect::<Vec<_>>();
            let pages = PacketPages { block: 0, normal: of(normal), zero: of(zero) };
            let pages = (!pages.normal.is_empty() || !pages.zero.is_empty()).then_some(pages);
            let compression = Compression::None;
            let packet = Packet { sync, compression, number, pages, data_len };
            let decoded = Packet::decode(&packet.encode(&ram()), 0, &ram());
            prop_assert_eq!(decoded, Ok(Some((packet, 1344))));
            std::println!("cases: 1 mutations");
        }
    }
}
