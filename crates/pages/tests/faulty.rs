//! A storage whose transfers fail, are torn, or come late, in the middle of a file: the caller hears of it,
//! and no file gets its name that is not whole.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use vmfile_pages::check::{CheckOptions, check};
use vmfile_pages::draft::{Draft, FileLayout, SaveFacts, StreamTail};
use vmfile_pages::engine::{
    BackendInUse, Completion, Memory, Storage, Transfer, Unpublished, open_storage,
};
use vmfile_pages::format::manifest::VmMeta;
use vmfile_pages::format::stream::configuration::Configuration;
use vmfile_pages::format::stream::own_state::OwnState;
use vmfile_pages::lane::Workers;
use vmfile_pages::layers::Layers;
use vmfile_pages::ram_loader::load_ram;
use vmfile_pages::ram_writer::write_ram;
use vmfile_pages::reading::open_for_reading;
use vmfile_pages::{
    Backend, Control, DirectIo, Existing, OwnMemory, OwnMemoryMut, PageSize, PagesError, RamBlock,
    RamLayout, Snapshot,
};

/// Numbers of Linux's errors.
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// What happens to one transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing is transferred, and the kernel's error comes back.
    Error(i32),
    /// The first half is, and then there is an error.
    Torn(i32),
    /// It completes after all others that are in flight.
    Late,
}

/// Which transfer it happens to: a number that all storages of a file count down.
#[derive(Debug)]
struct Plan {
    left: AtomicI64,
    fault: Fault,
    file: File,
}

/// A storage that does what its plan says, and lets another one do the rest.
#[derive(Debug)]
struct Faulty {
    inner: Box<dyn Storage>,
    plan: Arc<Plan>,
    failed: VecDeque<Completion>,
    late: VecDeque<Transfer>,
}

impl Storage for Faulty {
    fn submit(&mut self, transfer: Transfer) -> io::Result<()> {
        if self.plan.left.fetch_sub(1, Ordering::Relaxed) != 0 {
            return self.inner.submit(transfer);
        }
        let error = match self.plan.fault {
            Fault::Late => {
                self.late.push_back(transfer);
                return Ok(());
            }
            Fault::Torn(error) => {
                let bytes: &[u8] = match &transfer.memory {
                    Memory::Shared(buffer, range) => &buffer[range.clone()],
                    Memory::Owned(buffer, range) => &buffer[range.clone()],
                };
                self.plan.file.write_all_at(&bytes[..bytes.len() / 2], transfer.file_offset)?;
                error
            }
            Fault::Error(error) => error,
        };
        let result = Err(io::Error::from_raw_os_error(error));
        self.failed.push_back(Completion { transfer, result });
        Ok(())
    }

    fn reap(&mut self) -> io::Result<Option<Completion>> {
        if let Some(failed) = self.failed.pop_front() {
            return Ok(Some(failed));
        }
        if self.inner.in_flight() == 0 {
            if let Some(late) = self.late.pop_front() {
                self.inner.submit(late)?;
            }
        }
        self.inner.reap()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.failed.len() + self.late.len()
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }
}

/// Two workers on the draft's file, of whose transfers number `at` has the fault.
fn workers(
    file: &vmfile_pages::DataFile,
    backend: Backend,
    (at, fault): (i64, Fault),
) -> (Workers, Arc<Plan>) {
    let writable = file.buffered().try_clone().unwrap();
    let plan = Arc::new(Plan { left: AtomicI64::new(at), fault, file: writable });
    let storage = || -> (Box<dyn Storage>, BackendInUse) {
        let opened = open_storage(file, backend, 8).unwrap();
        let (failed, late) = (VecDeque::new(), VecDeque::new());
        let faulty = Faulty { inner: opened.storage, plan: Arc::clone(&plan), failed, late };
        (Box::new(faulty), opened.backend)
    };
    let [(one, backend), (other, _)] = [storage(), storage()];
    (Workers::on(vec![one, other], backend).unwrap(), plan)
}

fn blocks() -> Vec<Vec<u8>> {
    let page = |number: usize| {
        let mut page = vec![0; 4096];
        if number % 7 != 0 {
            page.chunks_exact_mut(8)
                .for_each(|word| word.copy_from_slice(&(number as u64).to_le_bytes()));
        }
        page
    };
    vec![(0..2000).flat_map(page).collect(), (3000..3700).flat_map(page).collect()]
}

/// Saves `blocks`; returns how many transfers there were. The file has its name only if all is well.
fn save(
    path: &Path,
    blocks: &[Vec<u8>],
    backend: Backend,
    fault: (i64, Fault),
) -> Result<i64, PagesError> {
    let block = |(number, bytes): (usize, &Vec<u8>)| {
        RamBlock::new(format!("block{number}"), bytes.len() as u64, PageSize::KIB_4).unwrap()
    };
    let ram = RamLayout::new(blocks.iter().enumerate().map(block).collect()).unwrap();
    let draft =
        Draft::new(Unpublished::create_beside(path, Existing::Replace)?, DirectIo::Preferred)?;
    let state = OwnState::new(&[("cpu", b"state")]);
    let tail =
        StreamTail { sections: &state.sections, description: &state.description, state: None };
    let tail_len = (state.sections.len() + state.description.len()) as u64;
    let places = FileLayout::new(&Configuration::default(), ram, state.unused_id, tail_len)?;
    draft.reserve(places.tables())?;
    let (workers, plan) = workers(draft.file(), backend, fault);
    let source = OwnMemory::new(blocks.iter().map(Vec::as_slice).collect());
    let len: usize = blocks.iter().map(Vec::len).sum();
    let written = write_ram(workers, &places, &source, len as u64, &Control::none())?;
    let facts = SaveFacts {
        route: "direct".to_owned(),
        live: Some(false),
        pause_seconds: None,
        saved_at_unix_seconds: None,
        vm: VmMeta::of_machine("test-1.0"),
    };
    draft.finish(&places, (&written.bitmaps, &written.of_base), tail, facts)?;
    draft.prove()?.publish()?;
    Ok(fault.0 - plan.left.load(Ordering::Relaxed))
}

/// Loads the file, with a fault among the reads.
fn load(path: &Path, backend: Backend, fault: (i64, Fault)) -> Result<Vec<Vec<u8>>, PagesError> {
    let mut memory: Vec<Vec<u8>> = blocks().iter().map(|bytes| vec![0xa5; bytes.len()]).collect();
    let snapshot = Snapshot::open(path, 0)?;
    let layers = Layers::new(&snapshot)?;
    let (file, _) = open_for_reading(layers.main(), DirectIo::Preferred).unwrap();
    let (workers, _) = workers(&file, backend, fault);
    let sink = OwnMemoryMut::new(memory.iter_mut().map(Vec::as_mut_slice).collect());
    load_ram((&layers, workers), &[0, 1], &sink, &Control::none())?;
    drop(sink);
    Ok(memory)
}

const NEVER: (i64, Fault) = (i64::MAX, Fault::Late);

/// The number of the kernel's error that is among the causes of `error`.
fn kernel_error(error: &PagesError) -> Option<i32> {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(found) = cause {
        if let Some(number) = found.downcast_ref().and_then(io::Error::raw_os_error) {
            return Some(number);
        }
        cause = found.source();
    }
    None
}

/// Calls `test` for each back end with a file of `blocks`, the only one in its directory, and with how many
/// transfers its save took.
fn with_a_file(blocks: &[Vec<u8>], test: impl Fn(Backend, &Path, i64)) {
    for backend in [Backend::Threads, Backend::IoUring] {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = directory.path().join("memory");
        let transfers = save(&path, blocks, backend, NEVER).unwrap();
        test(backend, &path, transfers);
    }
}

#[test]
fn a_write_that_fails_is_told_and_leaves_the_old_file() {
    let blocks = blocks();
    with_a_file(&blocks, |backend, path, transfers| {
        assert!(transfers > 4, "{transfers}");
        let old = fs::read(path).unwrap();
        let mut faults = 0;
        for at in 0..transfers {
            for fault in [Fault::Error(EIO), Fault::Error(ENOSPC), Fault::Torn(EIO)] {
                let error = save(path, &blocks, backend, (at, fault)).unwrap_err();
                let (Fault::Error(number) | Fault::Torn(number)) = fault else { unreachable!() };
                assert_eq!(kernel_error(&error), Some(number), "{at} {fault:?}: {error}");
                assert_eq!(fs::read(path).unwrap(), old, "{at} {fault:?}");
                assert_eq!(
                    fs::read_dir(path.parent().unwrap()).unwrap().count(),
                    1,
                    "{at} {fault:?}"
                );
                faults += 1;
            }
        }
        println!("cases: {faults} faults");
    });
}

#[test]
fn a_transfer_that_comes_late_changes_nothing() {
    let blocks = blocks();
    with_a_file(&blocks, |backend, path, transfers| {
        let mut late = 0;
        for at in 0..transfers {
            save(path, &blocks, backend, (at, Fault::Late)).unwrap();
            let snapshot = Snapshot::open(path, 0).unwrap();
            let report = check(&snapshot, &CheckOptions::default(), &Control::none()).unwrap();
            assert_eq!(report.findings, [], "{at}");
            assert_eq!(load(path, backend, (at, Fault::Late)).unwrap(), blocks, "{at}");
            // One among the writes, and one among the reads.
            late += 2;
        }
        println!("cases: {late} faults");
    });
}

#[test]
fn a_read_that_fails_is_told() {
    let blocks = blocks();
    with_a_file(&blocks, |backend, path, _| {
        let mut failed = 0;
        for at in 0.. {
            match load(path, backend, (at, Fault::Error(EIO))) {
                Ok(memory) => {
                    assert_eq!(memory, blocks);
                    break;
                }
                Err(error) => assert_eq!(kernel_error(&error), Some(EIO), "{at}: {error}"),
            }
            failed += 1;
        }
        assert!(failed > 2, "{failed}");
        println!("cases: {failed} faults");
    });
}
