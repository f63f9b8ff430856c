//! Memory that is written while it is saved, protected by a real userfaultfd: the file has the
//! moment at which the save began.
//!
//! The process is that of the test. Where the kernel does not allow this, a test prints `skipped: `
//! and the reason.

#![expect(clippy::print_stdout, reason = "a skipped test says why")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

#[path = "../../engine/tests/memory/guarded.rs"]
mod guarded;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::time::Duration;

use vmfile_pages::draft::FileLayout;
use vmfile_pages::format::stream::configuration::Configuration;
use vmfile_pages::lane::Workers;
use vmfile_pages::plan::WINDOW_LEN;
use vmfile_pages::process_ram::BlockAt;
use vmfile_pages::protected_ram::{ASIDE_LEN_MAX, ProtectedRam, aside_buffers};
use vmfile_pages::ram_writer::{Written, write_protected_ram};
use vmfile_pages::{
    Access, Backend, Control, DataFile, DirectIo, PageIndex, PageSize, PagesError, ProcessRam,
    RamBlock, RamLayout,
};

use crate::guarded::{Guarded, PAGE};

const WINDOW: usize = 2 << 20;
const _: () = assert!(WINDOW as u64 == WINDOW_LEN);

fn ram_of(memory: &Guarded) -> ProcessRam {
    let (address, len) = (memory.address(), memory.len as u64);
    let block = BlockAt { name: "ram".to_owned(), address, len };
    ProcessRam::open(std::process::id(), &[block], Access::Read).unwrap()
}

/// Lets every thread go on, also if the test fails: the test would wait for them for ever.
struct LetGo<'a>(&'a ProtectedRam<'a>, &'a Guarded);

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        self.0.end();
        self.1.unregister();
    }
}

/// A file for the memory.
struct Target {
    file: File,
    places: FileLayout,
}

impl Target {
    fn new(len: usize) -> Target {
        let block = RamBlock::new("ram".to_owned(), len as u64, PageSize::KIB_4).unwrap();
        let ram = RamLayout::new(vec![block]).unwrap();
        let places = FileLayout::new(&Configuration::default(), ram, 1, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(places.hashes()[0] + (len / PAGE) as u64 * 16).unwrap();
        Target { file, places }
    }

    fn write(&self, protected: &ProtectedRam<'_>) -> Result<Written, PagesError> {
        let file = DataFile::new(self.file.try_clone().unwrap(), DirectIo::Off).unwrap();
        let workers = Workers::start(&file, (Backend::Threads, 2)).unwrap();
        write_protected_ram(workers, &self.places, protected, 0, &Control::none())
    }

    /// Expects the pages of a moment, and data exactly where they were not zero.
    fn assert_holds(&self, written: &Written, words: &[u64]) {
        for (page, &word) in words.iter().enumerate() {
            let offset = self.places.blocks()[0].pages_offset + (page * PAGE) as u64;
            let mut found = [0; 8];
            self.file.read_exact_at(&mut found, offset).unwrap();
            assert_eq!(u64::from_ne_bytes(found), word, "page {page}");
            let has_data = written.bitmaps[0].contains(PageIndex(page as u64));
            assert_eq!(has_data, word != 0, "page {page}");
        }
    }
}

#[test]
fn what_is_written_meanwhile_is_not_in_the_file() {
    let Some(memory) = Guarded::new(24) else { return };
    let (ram, userfault) = (ram_of(&memory), memory.userfault());
    let protected = ProtectedRam::new(&ram, &userfault, aside_buffers().unwrap()).unwrap();
    let target = Target::new(memory.len);
    let pages = memory.len / PAGE;
    thread::scope(|scope| {
        let _let_go = LetGo(&protected, &memory);
        let served = scope.spawn(|| protected.serve());
        // Before the moment: this counts.
        (0..pages).step_by(997).for_each(|page| memory.put(page, 2));
        let words = memory.words();
        assert!(words.iter().any(|word| word % 65536 == 2), "the writes were not lost");
        protected.begin([]).unwrap();
        // After it: this does not, whether the writer comes first or the save.
        let writers: Vec<_> = (0..2)
            .map(|first| {
                let memory = &memory;
                let pages = (first..pages).step_by(2);
                scope.spawn(move || pages.rev().for_each(|page| memory.put(page, 3)))
            })
            .collect();
        while protected.faults().count == 0 {
            thread::yield_now();
        }
        let written = target.write(&protected).unwrap();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        protected.verify().unwrap();
        protected.end();
        served.join().unwrap();
        target.assert_holds(&written, &words);
    });
    println!("cases: 1 saves");
    assert!(memory.words().iter().all(|word| word % 65536 == 3), "no write was lost");
    assert!(protected.faults().count > 0);
}

/// A writer that is quicker than the disk waits for it, and the memory that is kept aside stays
/// below its limit.
#[test]
fn a_writer_waits_when_no_more_can_be_kept_aside() {
    let room = usize::try_from(ASIDE_LEN_MAX / WINDOW_LEN).unwrap();
    let windows = room + 5;
    let Some(memory) = Guarded::new(windows) else { return };
    let (ram, userfault) = (ram_of(&memory), memory.userfault());
    let protected = ProtectedRam::new(&ram, &userfault, aside_buffers().unwrap()).unwrap();
    let target = Target::new(memory.len);
    let words = memory.words();
    protected.begin([]).unwrap();
    thread::scope(|scope| {
        let _let_go = LetGo(&protected, &memory);
        let served = scope.spawn(|| protected.serve());
        let writer = scope.spawn(|| {
            (0..windows).for_each(|window| memory.put(window * WINDOW / PAGE, 3));
        });
        while protected.faults().count < room as u64 {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(protected.faults().aside_bytes, ASIDE_LEN_MAX);
        assert!(!writer.is_finished(), "nothing has been written: it waits");
        let written = target.write(&protected).unwrap();
        writer.join().unwrap();
        protected.end();
        served.join().unwrap();
        target.assert_holds(&written, &words);
    });
    println!("cases: 1 saves");
    assert_eq!(protected.faults().count, windows as u64);
}

/// Another client of QEMU cancels the migration: the file would not be of one moment.
#[test]
fn a_protection_that_is_removed_meanwhile_is_noticed() {
    let Some(memory) = Guarded::new(3) else { return };
    let (ram, userfault) = (ram_of(&memory), memory.userfault());
    let protected = ProtectedRam::new(&ram, &userfault, aside_buffers().unwrap()).unwrap();
    protected.begin([]).unwrap();
    protected.verify().unwrap();
    memory.unregister();
    assert_eq!(protected.verify().unwrap_err().kind(), io::ErrorKind::NotFound);
    let error = Target::new(memory.len).write(&protected).unwrap_err();
    assert!(matches!(error, PagesError::ReadRam { .. }), "{error}");
}

/// QEMU reads its userfaultfd until it has to wait for room: a fault that it took was not seen, and
/// the vCPU waited for ever, and with it QEMU's main loop.
#[test]
fn a_fault_that_another_reader_took_is_served() {
    let Some(memory) = Guarded::new(2) else { return };
    let (ram, userfault) = (ram_of(&memory), memory.userfault());
    let protected = ProtectedRam::new(&ram, &userfault, aside_buffers().unwrap()).unwrap();
    thread::scope(|scope| {
        let _let_go = LetGo(&protected, &memory);
        let writer = scope.spawn(|| memory.put(1, 2));
        while userfault.wait(Duration::from_millis(1)).unwrap().is_empty() {}
        let served = scope.spawn(|| protected.serve());
        writer.join().unwrap();
        protected.end();
        served.join().unwrap();
    });
    assert_eq!(memory.words()[1] % 65536, 2);
}

/// What the process has lifted by itself before the moment, or lifts right after it, is in the file
/// as it was.
#[test]
fn a_page_that_the_process_lets_go_is_copied_at_the_moment() {
    let Some(memory) = Guarded::new(2) else { return };
    let (ram, userfault) = (ram_of(&memory), memory.userfault());
    let protected = ProtectedRam::new(&ram, &userfault, aside_buffers().unwrap()).unwrap();
    let page = |page: u64| {
        let start = memory.address() + page * PAGE as u64;
        start..start + PAGE as u64
    };
    userfault.lift(&page(0)).unwrap();
    memory.put(0, 2);
    let words = memory.words();
    protected.begin([(0, 0), (0, PAGE as u64)]).unwrap();
    userfault.lift(&page(1)).unwrap();
    let target = Target::new(memory.len);
    thread::scope(|scope| {
        let _let_go = LetGo(&protected, &memory);
        let served = scope.spawn(|| protected.serve());
        (0..2).for_each(|page| memory.put(page, 3));
        let written = target.write(&protected).unwrap();
        protected.end();
        served.join().unwrap();
        target.assert_holds(&written, &words);
    });
    println!("cases: 1 saves");
}
