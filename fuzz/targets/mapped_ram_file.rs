//! `MappedRamFile::read`, with the input as a file that may begin anywhere.
//!
//! The first two bytes of the input say where the stream begins (big-endian) and how the file is
//! laid out: see `SparseFile`.
//!
//! Contract: no panic; no read outside the file and none longer than the limits; `read` ends; the
//! parts that it finds lie inside the file, and each record begins where the pages before it end.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmfile_format::limits::{BLOCK_LEN_MAX, BLOCKS_MAX, DEVICE_STATE_LEN_MAX};
use vmfile_format::mapped_ram::{MARK, MappedRamFile};
use vmfile_format::{PageBitmap, ReadError};

/// A file that is mostly holes. The pages of each block begin at a multiple of 2 MiB, but an input
/// has only some KiB. So the piece of the input after each `PIECE` marker lies at the offset that
/// the marker names.
struct SparseFile<'a> {
    pieces: Vec<(u64, &'a [u8])>,
    len: u64,
}

/// Begins a piece; four bytes with its big-endian file offset follow.
const PIECE: &[u8] = b"@@";

/// All pieces begin below this, so that no run reads more than a few MiB.
const FILE_LEN_MAX: u64 = 16 << 20;

impl SparseFile<'_> {
    fn new(input: &[u8]) -> SparseFile<'_> {
        let mut pieces: Vec<(u64, &[u8])> = Vec::new();
        let (mut offset, mut start, mut at) = (0, 0, 0);
        while at < input.len() {
            let marker = input[at..].starts_with(PIECE).then(|| input.get(at + 2..at + 6));
            let Some(Some(place)) = marker else {
                at += 1;
                continue;
            };
            pieces.push((offset, &input[start..at]));
            let place = u32::from_be_bytes(place.try_into().expect("four bytes"));
            offset = u64::from(place) % FILE_LEN_MAX;
            at += 6;
            start = at;
        }
        pieces.push((offset, &input[start..]));
        let end = |&(offset, bytes): &(u64, &[u8])| offset + bytes.len() as u64;
        let len = pieces.iter().map(end).max().unwrap_or(0);
        SparseFile { pieces, len }
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let end = offset + len as u64;
        for &(piece, data) in &self.pieces {
            let from = offset.max(piece);
            let to = end.min(piece + data.len() as u64);
            if from < to {
                let target = (from - offset) as usize..(to - offset) as usize;
                bytes[target]
                    .copy_from_slice(&data[(from - piece) as usize..(to - piece) as usize]);
            }
        }
        bytes
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((start, rest)) = input.split_first_chunk::<2>() else { return };
    let start = u64::from(u16::from_be_bytes(*start));
    let file = SparseFile::new(rest);
    let mut reads = 0;
    let result = MappedRamFile::read(start, file.len, |offset, len| {
        reads += 1;
        assert!(len as u64 <= DEVICE_STATE_LEN_MAX, "a read of {len} bytes");
        assert!(reads <= BLOCKS_MAX + 4, "read number {reads}");
        if len == 0 {
            return Ok(Vec::new());
        }
        assert!(offset + len as u64 <= file.len, "a read past the end of the file");
        // A read error must not be a panic either.
        if len == 0x666 { Err(offset) } else { Ok(file.read(offset, len)) }
    });
    let structure = match result {
        Ok(structure) => structure,
        Err(ReadError::Format(error)) => {
            assert!(!error.to_string().is_empty());
            return;
        }
        Err(ReadError::Source(_)) => return,
    };
    let mut record = structure.head_end;
    for placed in &structure.blocks {
        assert_eq!(placed.record_offset, record);
        assert!(placed.block.used_length() <= BLOCK_LEN_MAX);
        assert!(placed.pages_end() <= file.len);
        assert!(placed.bitmap_offset + placed.bitmap_len() <= file.len);
        assert_eq!(structure.block(placed.block.name()), Some(placed));
        if let Some(mark) = placed.mark_offset() {
            assert_eq!(mark + MARK.len() as u64, placed.pages_offset);
            assert!(mark >= record);
        }
        let len = placed.bitmap_len() as usize;
        let bitmap = file.read(placed.bitmap_offset, len);
        let bitmap = PageBitmap::decode(&bitmap, placed.block.page_count()).expect("its length");
        for run in bitmap.data_runs() {
            assert!(placed.page_offset(run.end).expect("inside the file") <= placed.pages_end());
        }
        record = placed.pages_end();
    }
    assert_eq!(structure.ram_end_offset, record);
    assert_eq!(structure.ram().blocks().len(), structure.blocks.len());
    let state = &structure.device_state;
    assert!(record < state.start && state.start < state.end && state.end <= state.stream_end);
    assert!(state.stream_end <= file.len);
});
