//! Pages that arrive in any order and more than once: the contents of the file at the end.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use vmfile_pages::draft::FileLayout;
use vmfile_pages::format::mapped_ram::PlacedBlock;
use vmfile_pages::format::stream::configuration::Configuration;
use vmfile_pages::lane::{Lane, on_lanes};
use vmfile_pages::page_hashes::is_page;
use vmfile_pages::page_writer::{Counts, PageWriter};
use vmfile_pages::plan::WINDOW_LEN;
use vmfile_pages::received_ram::ReceivedRam;
use vmfile_pages::{Backend, DataFile, DirectIo, PageIndex, PageSize, RamBlock, RamLayout};

/// A file of two blocks, into which pages are written.
struct Receiver {
    file: File,
    data_file: DataFile,
    ram: ReceivedRam,
    page_len: usize,
    hashes: Vec<u64>,
}

impl Receiver {
    fn new(page_size: u64, pages: [u64; 2]) -> Receiver {
        let size = PageSize::new(page_size).unwrap();
        let block = |(number, pages): (usize, u64)| {
            RamBlock::new(format!("block{number}"), pages * page_size, size).unwrap()
        };
        let blocks = pages.into_iter().enumerate().map(block).collect();
        let places =
            FileLayout::new(&Configuration::default(), RamLayout::new(blocks).unwrap(), 1, 0);
        let places = places.unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(places.hashes()[1] + pages[1] * 16).unwrap();
        let data_file = DataFile::new(file.try_clone().unwrap(), DirectIo::Off).unwrap();
        let hashes = places.hashes().to_vec();
        let ram = ReceivedRam::new(data_file.clone(), places.blocks(), (&hashes, places.key()));
        Receiver { file, data_file, ram, page_len: usize::try_from(page_size).unwrap(), hashes }
    }

    /// Runs `work` with a single writer; returns its counts.
    fn write(&self, work: impl Fn(&mut PageWriter<'_>) + Sync) -> Counts {
        let work = |lane: Lane| {
            let mut writer = PageWriter::new(&self.ram, lane, true);
            work(&mut writer);
            writer.drain().unwrap();
            writer.counts()
        };
        on_lanes(&self.data_file, (Backend::Threads, 1), work).unwrap().0[0]
    }

    fn page(&self, byte: u8) -> Vec<u8> {
        vec![byte; self.page_len]
    }

    fn placed(&self, block: usize) -> &PlacedBlock {
        self.ram.placed(block)
    }

    /// Returns the byte that fills a page's place in the file; all its bytes must be the same.
    fn place(&self, block: usize, page: u64) -> u8 {
        let mut bytes = self.page(0);
        let offset = self.placed(block).pages_offset + page * self.page_len as u64;
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        assert!(bytes.iter().all(|&byte| byte == bytes[0]), "page {page} of block {block}");
        bytes[0]
    }

    fn hash(&self, block: usize, page: u64) -> [u8; 16] {
        let mut hash = [0; 16];
        self.file.read_exact_at(&mut hash, self.hashes[block] + page * 16).unwrap();
        hash
    }

    /// Checks all pages of a block: those in `expected` have that byte and its hash, all others are
    /// zero and have no hash.
    fn holds(&self, block: usize, expected: &[(u64, u8)]) {
        let bitmap = &self.ram.bitmaps()[block];
        for page in 0..self.placed(block).block.page_count().0 {
            let byte = expected.iter().find(|place| place.0 == page).map_or(0, |place| place.1);
            assert_eq!(self.place(block, page), byte, "page {page} of block {block}");
            assert_eq!(bitmap.contains(PageIndex(page)), byte != 0);
            assert_eq!(self.ram.has_data(block, PageIndex(page)), byte != 0);
            match byte {
                0 => assert_eq!(self.hash(block, page), [0; 16], "page {page} of block {block}"),
                byte => assert!(is_page(&self.page(byte), self.hash(block, page), self.ram.key())),
            }
        }
    }
}

#[test]
fn pages_of_all_blocks_and_windows_go_to_their_places() {
    for page_size in [4096, 16384, 65536] {
        let in_window = WINDOW_LEN / page_size;
        let receiver = Receiver::new(page_size, [2 * in_window + 3, in_window]);
        let ram = [(0, 1), (1, 2), (in_window - 1, 3), (in_window, 4), (2 * in_window + 2, 5)];
        let rom = [(1, 6), (in_window - 1, 7)];
        let counts = receiver.write(|writer| {
            for (page, byte) in ram {
                writer.page(0, PageIndex(page), &receiver.page(byte)).unwrap();
            }
            for (page, byte) in rom {
                writer.page(1, PageIndex(page), &receiver.page(byte)).unwrap();
            }
        });
        receiver.holds(0, &ram);
        receiver.holds(1, &rom);
        assert_eq!((counts.written_bytes, counts.rewritten_bytes), (7 * page_size, 0));
        assert_eq!(receiver.ram.page_len(1), page_size);
    }
}

#[test]
fn a_page_that_comes_again_overwrites_its_place_and_is_counted() {
    let receiver = Receiver::new(4096, [1030, 4]);
    let counts = receiver.write(|writer| {
        for byte in 1..=5 {
            for page in [3, 700, 1029] {
                writer.page(0, PageIndex(page), &receiver.page(byte)).unwrap();
            }
        }
        writer.page(1, PageIndex(3), &receiver.page(9)).unwrap();
    });
    receiver.holds(0, &[(3, 5), (700, 5), (1029, 5)]);
    receiver.holds(1, &[(3, 9)]);
    assert_eq!(counts.written_bytes, 16 * 4096);
    assert_eq!(counts.rewritten_bytes, 12 * 4096);
    let mut sum = counts;
    sum += Counts { written_bytes: 5, rewritten_bytes: 7 };
    assert_eq!((sum.written_bytes, sum.rewritten_bytes), (16 * 4096 + 5, 12 * 4096 + 7));
}

#[test]
fn a_page_that_becomes_zero_leaves_nothing_behind() {
    let receiver = Receiver::new(4096, [1030, 600]);
    receiver.write(|writer| {
        for page in [0, 1, 2, 3, 70, 71, 512, 1029] {
            writer.page(0, PageIndex(page), &receiver.page(1)).unwrap();
        }
        for page in [0, 599] {
            writer.page(1, PageIndex(page), &receiver.page(2)).unwrap();
        }
        writer.drain().unwrap();
        // Zero pages by `zero_page`, and one as a data page full of zeros.
        for page in [1, 2, 70, 1029] {
            writer.zero_page(0, PageIndex(page)).unwrap();
        }
        writer.page(0, PageIndex(512), &receiver.page(0)).unwrap();
        writer.zero_page(1, PageIndex(0)).unwrap();
        writer.zero_page(1, PageIndex(5)).unwrap();
        // A page that was zero in between.
        writer.page(0, PageIndex(2), &receiver.page(3)).unwrap();
    });
    // Stale bytes stay until the end.
    assert_eq!((receiver.place(0, 1), receiver.hash(0, 1)), (1, [0; 16]));
    receiver.ram.empty_stale_places().unwrap();
    receiver.holds(0, &[(0, 1), (2, 3), (3, 1), (71, 1)]);
    receiver.holds(1, &[(599, 2)]);
}

#[test]
fn a_page_that_is_zero_before_it_was_written_is_not_written() {
    let receiver = Receiver::new(4096, [1024, 1024]);
    let counts = receiver.write(|writer| {
        for page in [199, 200, 201] {
            writer.page(0, PageIndex(page), &receiver.page(1)).unwrap();
        }
        // These are not the pending page: one is of another block, one of another window.
        writer.zero_page(1, PageIndex(200)).unwrap();
        writer.zero_page(0, PageIndex(512 + 200)).unwrap();
        writer.zero_page(0, PageIndex(200)).unwrap();
    });
    receiver.holds(0, &[(199, 1), (201, 1)]);
    assert_eq!(counts.written_bytes, 2 * 4096);
}

#[test]
fn the_current_bytes_of_a_page_are_those_that_came_last() {
    let receiver = Receiver::new(16384, [256, 4]);
    receiver.write(|writer| {
        let current =
            |writer: &mut PageWriter<'_>, page| writer.current(0, PageIndex(page)).unwrap();
        assert_eq!(current(writer, 200), receiver.page(0));
        writer.page(0, PageIndex(200), &receiver.page(1)).unwrap();
        assert_eq!(current(writer, 200), receiver.page(1));
        writer.page(0, PageIndex(200), &receiver.page(2)).unwrap();
        writer.page(0, PageIndex(201), &receiver.page(3)).unwrap();
        assert_eq!(current(writer, 200), receiver.page(2));
        assert_eq!(current(writer, 201), receiver.page(3));
        writer.zero_page(0, PageIndex(200)).unwrap();
        assert_eq!(current(writer, 200), receiver.page(0));
    });
}

#[test]
fn pages_that_come_together_are_written_from_their_buffer() {
    let receiver = Receiver::new(4096, [1024, 600]);
    let counts = receiver.write(|writer| {
        let mut buffer = writer.buffer().unwrap();
        assert_eq!(buffer.len() as u64, WINDOW_LEN);
        buffer.fill(0xee);
        let places = [(0, 5), (1, 6), (2, 9), (4, 11), (9, 599)];
        for (number, (slot, _)) in (1..).zip(places) {
            buffer[slot * 4096..(slot + 1) * 4096].fill(number);
        }
        // One of the pages is zero.
        buffer[2 * 4096..3 * 4096].fill(0);
        let places = places.map(|(slot, page)| (slot, PageIndex(page)));
        writer.pages(1, &places, buffer).unwrap();
    });
    receiver.holds(1, &[(5, 1), (6, 2), (11, 4), (599, 5)]);
    receiver.holds(0, &[]);
    assert_eq!(counts.written_bytes, 4 * 4096);
}

#[test]
fn a_gap_that_holds_a_page_is_not_written_over() {
    let receiver = Receiver::new(4096, [512, 4]);
    receiver.write(|writer| {
        writer.page(0, PageIndex(7), &receiver.page(7)).unwrap();
        writer.drain().unwrap();
        for page in [2, 4, 6, 8, 10] {
            writer.page(0, PageIndex(page), &receiver.page(1)).unwrap();
        }
    });
    receiver.holds(0, &[(2, 1), (4, 1), (6, 1), (7, 7), (8, 1), (10, 1)]);
}

/// A page that stays behind in an open window would hold a buffer and wait for another page.
#[test]
fn a_window_is_written_with_its_last_page() {
    let receiver = Receiver::new(16384, [256, 4]);
    receiver.write(|writer| {
        writer.page(0, PageIndex(3), &receiver.page(1)).unwrap();
        writer.page(0, PageIndex(126), &receiver.page(2)).unwrap();
        assert_eq!(writer.counts().written_bytes, 0);
        writer.page(0, PageIndex(127), &receiver.page(3)).unwrap();
        assert_eq!(writer.counts().written_bytes, 3 * 16384);
    });
    receiver.holds(0, &[(3, 1), (126, 2), (127, 3)]);
}
