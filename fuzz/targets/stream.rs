//! `StreamDecoder`, and `xbzrle::apply` on the deltas that it finds.
//!
//! The first byte of the input chooses the length of the pieces into which the stream is cut.
//!
//! Contract: no panic; decoding ends; the events, the error and the offset where decoding ends are
//! the same for the stream in one piece and in pieces; `EVENT_LEN_MAX` bytes are always enough;
//! pages lie in their blocks, whose number and lengths are within the limits.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmfile_format::limits::{BLOCK_LEN_MAX, BLOCKS_MAX};
use vmfile_format::stream::decoder::{EVENT_LEN_MAX, Event, StreamDecoder};
use vmfile_format::stream::xbzrle;
use vmfile_format::{FormatError, PageIndex, RamLayout, checksum};

/// The result of decoding a stream: a line for each event, the device state, where decoding ended,
/// and its error.
#[derive(Debug, PartialEq)]
struct Decoded {
    events: Vec<String>,
    device_state: Vec<u8>,
    offset: u64,
    end: Result<(), FormatError>,
}

fuzz_target!(|input: &[u8]| {
    let Some((&piece, bytes)) = input.split_first() else { return };
    let whole = decode(bytes, bytes.len());
    if let Err(error) = &whole.end {
        assert!(!error.to_string().is_empty());
        assert!(error.offset <= bytes.len() as u64);
    }
    let cut = decode(bytes, usize::from(piece) * 8 + 1);
    assert_eq!(whole, cut);
});

fn decode(bytes: &[u8], piece: usize) -> Decoded {
    let mut decoder = StreamDecoder::new();
    let mut blocks = None;
    let mut decoded =
        Decoded { events: Vec::new(), device_state: Vec::new(), offset: 0, end: Ok(()) };
    let (mut start, mut end) = (0, bytes.len().min(piece));
    loop {
        match decoder.next(&bytes[start..end]) {
            Ok(step) => {
                start += step.consumed;
                assert!(start <= end);
                assert_eq!(decoder.offset(), start as u64);
                match step.event {
                    Some(Event::DeviceState(piece)) => {
                        assert!(!piece.is_empty());
                        decoded.device_state.extend_from_slice(piece);
                    }
                    Some(event) => decoded.events.push(describe(&event, &mut blocks)),
                    None if end == bytes.len() => {
                        decoded.end = decoder.finish();
                        break;
                    }
                    None => {
                        assert!(end - start < EVENT_LEN_MAX, "so many bytes are enough");
                        end = bytes.len().min(end + piece);
                    }
                }
            }
            Err(error) => {
                assert_eq!(decoder.next(&bytes[start..end]), Err(error.clone()));
                decoded.end = Err(error);
                break;
            }
        }
    }
    decoded.offset = decoder.offset();
    decoded
}

/// Checks an event and describes it in one line.
fn describe(event: &Event<'_>, blocks: &mut Option<RamLayout>) -> String {
    let place = |block: usize, page: PageIndex, data: &[u8]| {
        let layout: &RamLayout = blocks.as_ref().expect("a block list comes before pages");
        let ram_block = &layout.blocks()[block];
        assert!(page.0 < ram_block.page_count().0);
        format!("{block} {page} {} {:x}", data.len(), checksum(data))
    };
    match event {
        Event::RamBlocks { ram, section_id } => {
            assert!(ram.blocks().len() <= BLOCKS_MAX);
            assert!(ram.blocks().iter().all(|block| block.used_length() <= BLOCK_LEN_MAX));
            *blocks = Some(ram.clone());
            format!("blocks {section_id} {ram:?}")
        }
        Event::Page { block, page, data } => {
            let line = place(*block, *page, data);
            let size = blocks.as_ref().map(|ram| ram.blocks()[*block].page_size().bytes());
            assert_eq!(size, Some(data.len() as u64));
            format!("page {line}")
        }
        Event::ZeroPage { block, page } => format!("zero {}", place(*block, *page, &[])),
        Event::Xbzrle { block, page, delta } => {
            assert!(delta.len() <= 65536);
            let _ = xbzrle::apply(delta, &mut [0; 4096]);
            format!("xbzrle {}", place(*block, *page, delta))
        }
        Event::CompressedPage { block, page, zlib } => {
            format!("compressed {}", place(*block, *page, zlib))
        }
        other => format!("{other:?}"),
    }
}
