//! `multifd::Init` and `multifd::Packet`: what one channel carries.
//!
//! The first byte of the input chooses the size of the pages. The rest is what a channel carries,
//! without the contents of pages: one packet after another.
//!
//! Contract: no panic; a packet needs no more than `PACKET_LEN_MAX` bytes; its pages lie in their
//! block, and its data length is within the limit; a packet stays the same when it is encoded and
//! decoded again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmfile_format::limits::MULTIFD_DATA_LEN_MAX;
use vmfile_format::stream::multifd::{INIT_LEN, Init, PACKET_LEN_MAX, Packet};
use vmfile_format::{PageSize, RamBlock, RamLayout};

fn layout(size: PageSize) -> RamLayout {
    let block = |(name, pages): (&str, u64)| {
        RamBlock::new(name.into(), pages * size.bytes(), size).expect("a block")
    };
    RamLayout::new([("pc.ram", 4096), ("pc.bios", 4)].map(block).into()).expect("a layout")
}

fuzz_target!(|input: &[u8]| {
    let Some((&bits, bytes)) = input.split_first() else { return };
    let ram = layout(PageSize::new(512 << (bits % 8)).expect("512 bytes to 64 KiB"));
    let mut rest = bytes;
    match Init::decode(bytes) {
        Ok(init) => {
            assert_eq!(Init::decode(&init.encode()), Ok(init));
            rest = &bytes[INIT_LEN..];
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    loop {
        let offset = (bytes.len() - rest.len()) as u64;
        match Packet::decode(rest, offset, &ram) {
            Ok(Some((packet, len))) => {
                check(&packet, &ram);
                assert_eq!(Packet::decode(&packet.encode(&ram), 0, &ram), Ok(Some((packet, len))));
                rest = &rest[len..];
            }
            Ok(None) => {
                assert!(rest.len() < PACKET_LEN_MAX);
                return;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert!(error.offset >= offset);
                return;
            }
        }
    }
});

fn check(packet: &Packet, ram: &RamLayout) {
    assert!(u64::from(packet.data_len) <= MULTIFD_DATA_LEN_MAX);
    let Some(pages) = &packet.pages else {
        assert_eq!(packet.data_len, 0);
        return;
    };
    let block = &ram.blocks()[pages.block];
    let mut all = pages.normal.iter().chain(&pages.zero);
    assert!(all.all(|page| page.0 < block.page_count().0));
    assert!(pages.normal.len() + pages.zero.len() <= 1024);
}
