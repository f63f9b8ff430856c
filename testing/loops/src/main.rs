//! The hot loops, one at a time, for `cargo xtask test loops`, which counts their instructions.
//!
//! Without an argument the program lists the loops: name, function, number of rounds, and what a
//! round processes. With a name it runs that loop once. The input of a loop is made outside of it
//! and is the same each time. The loop is a function that is not inlined, so that callgrind can
//! count the instructions between its entry and its return.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program, not a library")]

use std::env;
use std::hint::black_box;
use std::process::ExitCode;

use vmfile_engine::{HashKey, is_zero, page_hash};
use vmfile_format::stream::decoder::{Event, StreamDecoder};
use vmfile_format::stream::encoder::{RamSection, counted_text};
use vmfile_format::stream::{MAGIC, VERSION, section};
use vmfile_format::{PageBitmap, PageCount, PageIndex, PageSize, RamBlock, RamLayout};

const PAGE_LEN: usize = 4096;

/// The number of pages that are tested, hashed and decoded: 4 MiB.
const PAGES: usize = 1024;

/// The number of pages in the bitmap: 4 GiB of RAM.
const BITMAP_PAGES: u64 = 1 << 20;

/// A loop, and how it is run.
struct Loop {
    name: &'static str,
    /// The function that callgrind counts; two loops may run one function on different input.
    function: &'static str,
    rounds: u64,
    /// What each round processes.
    what: &'static str,
    run: fn(),
}

const LOOPS: [Loop; 7] = [
    Loop {
        name: "test_zero_pages",
        function: "test_zero_pages",
        rounds: PAGES as u64,
        what: "page of 4 KiB",
        run: || {
            let pages = vec![0; PAGES * PAGE_LEN];
            assert_eq!(test_zero_pages(black_box(&pages)), PAGES);
        },
    },
    Loop {
        name: "hash_pages",
        function: "hash_pages",
        rounds: PAGES as u64,
        what: "page of 4 KiB",
        run: || {
            black_box(hash_pages(black_box(&words(PAGES * PAGE_LEN))));
        },
    },
    Loop {
        name: "decode_pages",
        function: "decode_stream",
        rounds: PAGES as u64,
        what: "page of a stream",
        run: || {
            let page = words(PAGE_LEN);
            let stream = stream(|section, bytes, block, index| {
                section.page(bytes, block, index, &page);
            });
            assert_eq!(decode_stream(black_box(&stream)), PAGES);
        },
    },
    Loop {
        name: "decode_zero_pages",
        function: "decode_stream",
        rounds: PAGES as u64,
        what: "zero page of a stream",
        run: || {
            let stream = stream(RamSection::zero_page);
            assert_eq!(decode_stream(black_box(&stream)), PAGES);
        },
    },
    Loop {
        name: "decode_bitmap",
        function: "decode_bitmap",
        rounds: BITMAP_PAGES / 64,
        what: "word of 64 pages",
        run: || {
            black_box(decode_bitmap(black_box(&bitmap().encode())));
        },
    },
    Loop {
        name: "encode_bitmap",
        function: "encode_bitmap",
        rounds: BITMAP_PAGES / 64,
        what: "word of 64 pages",
        run: || {
            black_box(encode_bitmap(black_box(&bitmap())));
        },
    },
    Loop {
        name: "find_runs",
        function: "find_runs",
        rounds: BITMAP_PAGES / RUN_PAGES / 2,
        what: "run of pages with data",
        run: || {
            let pages = find_runs(black_box(&bitmap()));
            assert_eq!(pages, BITMAP_PAGES / 2);
        },
    },
];

fn main() -> ExitCode {
    let Some(name) = env::args().nth(1) else {
        for Loop { name, function, rounds, what, .. } in &LOOPS {
            println!("{name} {function} {rounds} {what}");
        }
        return ExitCode::SUCCESS;
    };
    match LOOPS.iter().find(|known| known.name == name) {
        Some(known) => {
            (known.run)();
            ExitCode::SUCCESS
        }
        None => {
            eprintln!("no loop {name}");
            ExitCode::FAILURE
        }
    }
}

#[inline(never)]
fn test_zero_pages(pages: &[u8]) -> usize {
    pages.chunks_exact(PAGE_LEN).filter(|page| is_zero(page)).count()
}

#[inline(never)]
fn hash_pages(pages: &[u8]) -> u128 {
    pages.chunks_exact(PAGE_LEN).fold(0, |all, page| all ^ page_hash(page, HashKey::new(7)))
}

/// Decodes a stream up to its end; returns how many pages it has.
#[inline(never)]
fn decode_stream(stream: &[u8]) -> usize {
    let mut decoder = StreamDecoder::new();
    let (mut rest, mut pages) = (stream, 0);
    loop {
        let step = decoder.next(rest).expect("a stream of this program");
        rest = &rest[step.consumed..];
        match step.event {
            Some(Event::Page { .. } | Event::ZeroPage { .. }) => pages += 1,
            Some(_) => {}
            None => return pages,
        }
    }
}

#[inline(never)]
fn decode_bitmap(bytes: &[u8]) -> Option<PageBitmap> {
    PageBitmap::decode(bytes, PageCount(BITMAP_PAGES))
}

#[inline(never)]
fn encode_bitmap(bitmap: &PageBitmap) -> Vec<u8> {
    bitmap.encode()
}

#[inline(never)]
fn find_runs(bitmap: &PageBitmap) -> u64 {
    bitmap.data_runs().map(|run| run.count().0).sum()
}

/// Returns bytes in which no page is zero and no two pages are alike.
fn words(len: usize) -> Vec<u8> {
    let mut word = 1_u64;
    let next = || {
        // Xorshift: any sequence will do, as long as it is the same each time.
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        Some(word)
    };
    std::iter::from_fn(next).flat_map(u64::to_le_bytes).take(len).collect()
}

/// The bitmap alternates between this many pages without data and as many with data.
const RUN_PAGES: u64 = 16;

fn bitmap() -> PageBitmap {
    let mut bitmap = PageBitmap::new(PageCount(BITMAP_PAGES));
    for page in (0..BITMAP_PAGES).filter(|page| page / RUN_PAGES % 2 == 1) {
        bitmap.set(PageIndex(page), true);
    }
    bitmap
}

/// Returns the stream of a VM with one RAM block, whose pages are appended by `append`.
fn stream(
    append: impl Fn(&mut RamSection, &mut Vec<u8>, (usize, &RamBlock), PageIndex),
) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&MAGIC.to_be_bytes());
    bytes.extend_from_slice(&VERSION.to_be_bytes());
    // The length of the machine type has four bytes: these three, and the one before the text.
    bytes.extend_from_slice(&[section::CONFIGURATION, 0, 0, 0]);
    counted_text(&mut bytes, "pc-i440fx-10.0");
    let block = RamBlock::new("pc.ram".to_owned(), (PAGES * PAGE_LEN) as u64, PageSize::KIB_4);
    let block = block.expect("a block as QEMU has it");
    let layout = RamLayout::new(vec![block.clone()]).expect("one block");
    let mut section = RamSection::begin(&mut bytes, 2, &layout);
    for page in 0..PAGES as u64 {
        append(&mut section, &mut bytes, (0, &block), PageIndex(page));
    }
    section.finish(&mut bytes);
    bytes
}
