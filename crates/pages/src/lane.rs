//! A worker's queue of transfers to the disk, and the buffers they use.
//!
//! Each worker has one lane. A lane reaps completions when its queue is full or all its buffers are
//! in use, so a worker never waits for a buffer that only itself could free.

use std::io;
use std::sync::{Mutex, PoisonError};

use vmfile_engine::{
    Backend, BackendInUse, BufferPool, Completion, Crew, DataFile, PooledBuffer, Storage, Transfer,
    open_storage,
};

use crate::plan::{Units, WINDOW_LEN, in_window};

/// Length of the buffers of all lanes of one verb together: enough to keep a fast disk busy, and
/// half of the 64 MiB of memory that vmfile may use. Each lane has one buffer on top.
const BUFFERS_LEN: usize = 32 << 20;

/// Length of each buffer of a lane that writes: one window.
const WINDOW: usize = 2 << 20;
const _: () = assert!(WINDOW as u64 == WINDOW_LEN);

/// The most buffers for small pieces that a lane has: they keep a disk as busy as [`DEPTH`] would.
const SMALL_BUFFERS: usize = 16;

/// Length of the buffers for page hashes, and how many each lane has: those of a unit fit into one.
const TABLE: usize = 64 << 10;
const TABLES: usize = 16;

/// Transfers in flight in one lane: many, for guests whose data lies in small pieces.
const DEPTH: usize = 64;

/// Transfers in flight, and the buffers they use.
#[derive(Debug)]
pub struct Lane {
    storage: Box<dyn Storage>,
    pool: BufferPool,
    /// `None` in a lane that only reads.
    tables: Option<BufferPool>,
}

/// Which buffers a lane has.
#[derive(Clone, Copy, Debug)]
enum Buffers {
    /// Windows, and tables of page hashes.
    ToWrite,
    /// For pieces of at most so many bytes.
    ToRead { len: usize },
}

/// Threads that wait for work, each with a lane of its own to a file.
///
/// Everything that the kernel could refuse is already there: threads, rings, and buffers whose
/// memory was touched.
#[derive(Debug)]
pub struct Workers {
    crew: Crew,
    lanes: Vec<Lane>,
    backend: BackendInUse,
}

impl Workers {
    /// Starts `jobs` threads, opens their lanes to `file`, and takes the memory of all buffers.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error; the threads that were started have ended by then.
    pub fn start(file: &DataFile, width: (Backend, usize)) -> io::Result<Workers> {
        Workers::open(file, width, Buffers::ToWrite)
    }

    /// As [`Workers::start`], for work that only reads, `len` bytes at once at most: up to
    /// [`WINDOW_LEN`]. Such lanes have less memory to touch, which is much of the time of a small
    /// read.
    ///
    /// # Errors
    ///
    /// As [`Workers::start`].
    pub fn start_reading(
        file: &DataFile,
        width: (Backend, usize),
        len: u64,
    ) -> io::Result<Workers> {
        Workers::open(file, width, Buffers::ToRead { len: in_window(len) })
    }

    /// As [`Workers::start`], with a thread for each of `storages`: for a caller that has its own way to a
    /// file, or lets transfers fail.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error if it has no further thread or memory.
    pub fn on(storages: Vec<Box<dyn Storage>>, backend: BackendInUse) -> io::Result<Workers> {
        let crew = Crew::start(storages.len())?;
        let count = storages.len();
        let lane = |storage| Lane::on(storage, count, Buffers::ToWrite);
        let lanes = storages.into_iter().map(lane).collect::<io::Result<Vec<_>>>()?;
        Ok(Workers { crew, lanes, backend })
    }

    fn open(
        file: &DataFile,
        (backend, jobs): (Backend, usize),
        buffers: Buffers,
    ) -> io::Result<Workers> {
        let mut crew = Crew::start(jobs)?;
        // Each thread opens its own lane: touching the buffers takes a while.
        let opened: Vec<_> = (0..jobs).map(|_| Mutex::new(None)).collect();
        crew.run(&|number| {
            let lane = Lane::open(file, (backend, jobs), buffers);
            *opened[number].lock().unwrap_or_else(PoisonError::into_inner) = Some(lane);
        })?;
        let lane = |opened: Mutex<Option<_>>| {
            let opened = opened.into_inner().unwrap_or_else(PoisonError::into_inner);
            opened.expect("no thread panicked")
        };
        let opened = opened.into_iter().map(lane).collect::<io::Result<Vec<_>>>()?;
        let (lanes, mut in_use): (Vec<Lane>, Vec<BackendInUse>) = opened.into_iter().unzip();
        let backend = in_use.pop().expect("there is at least one job");
        Ok(Workers { crew, lanes, backend })
    }

    /// Returns how many threads there are.
    pub fn count(&self) -> usize {
        self.crew.count()
    }

    /// Returns the back end that is used.
    pub fn backend(&self) -> &BackendInUse {
        &self.backend
    }

    /// Runs `work` in each thread, with the thread's number, from 0, and its lane. Waits for all
    /// threads and returns their results.
    ///
    /// # Errors
    ///
    /// Returns an error if `work` panicked in one of them.
    pub fn run<T: Send>(self, work: impl Fn(usize, Lane) -> T + Sync) -> io::Result<Vec<T>> {
        let Workers { mut crew, lanes, .. } = self;
        let lanes: Vec<_> = lanes.into_iter().map(|lane| Mutex::new(Some(lane))).collect();
        let results: Vec<_> = lanes.iter().map(|_| Mutex::new(None)).collect();
        crew.run(&|number| {
            let lane = lanes[number].lock().unwrap_or_else(PoisonError::into_inner).take();
            let result = work(number, lane.expect("each thread has its own number"));
            *results[number].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        })?;
        let result = |result: Mutex<Option<T>>| {
            let result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
            result.expect("no thread panicked")
        };
        Ok(results.into_iter().map(result).collect())
    }

    /// Runs `part` in each thread, with its lane: a loop that takes from `units` until none are
    /// left. Waits for all threads; returns their results and the back end. If one fails or panics,
    /// no thread gets another unit.
    ///
    /// # Errors
    ///
    /// Returns the first error of `part`, or what `failed` makes of the error that a thread
    /// panicked.
    pub(crate) fn drive<T: Send, E: Send>(
        self,
        units: &Units,
        part: impl Fn(Lane) -> Result<T, E> + Sync,
        failed: impl FnOnce(io::Error) -> E,
    ) -> Result<(Vec<T>, BackendInUse), E> {
        let backend = self.backend().clone();
        let results = self.run(|_, lane| units.work(|| part(lane))).map_err(failed)?;
        Ok((results.into_iter().collect::<Result<_, E>>()?, backend))
    }
}

/// Runs `work` in `jobs` threads, each with a lane of its own to `file`, and waits for all of them;
/// returns what each returned, and the back end that was used.
pub fn on_lanes<T: Send>(
    file: &DataFile,
    width: (Backend, usize),
    work: impl Fn(Lane) -> T + Sync,
) -> io::Result<(Vec<T>, BackendInUse)> {
    let workers = Workers::start(file, width)?;
    let backend = workers.backend().clone();
    Ok((workers.run(|_, lane| work(lane))?, backend))
}

impl Lane {
    /// Opens one of `lanes` lanes to `file`, and takes the memory of its buffers.
    fn open(
        file: &DataFile,
        (backend, lanes): (Backend, usize),
        buffers: Buffers,
    ) -> io::Result<(Lane, BackendInUse)> {
        let opened = open_storage(file, backend, DEPTH)?;
        Ok((Lane::on(opened.storage, lanes, buffers)?, opened.backend))
    }

    /// Makes one of `lanes` lanes to `storage`, and takes the memory of its buffers.
    fn on(storage: Box<dyn Storage>, lanes: usize, buffers: Buffers) -> io::Result<Lane> {
        let windows = (BUFFERS_LEN / WINDOW / lanes.max(1)).max(1);
        let (count, len, tables) = match buffers {
            Buffers::ToWrite => (windows, WINDOW, Some(BufferPool::new(TABLES, TABLE, 4096)?)),
            Buffers::ToRead { len } if len < WINDOW => (SMALL_BUFFERS, len, None),
            Buffers::ToRead { .. } => (windows, WINDOW, None),
        };
        // Several transfers may share a buffer; one buffer is being filled while others are in
        // flight.
        let pool = BufferPool::new(count + 1, len, 4096)?;
        Ok(Lane { storage, pool, tables })
    }

    /// Submits `transfer`; waits for another one first if the queue is full.
    pub fn submit(&mut self, transfer: Transfer) -> io::Result<()> {
        while self.storage.in_flight() >= self.storage.depth() {
            self.reap()?;
        }
        self.storage.submit(transfer)
    }

    /// Returns a free buffer; if transfers hold all of them, waits for one to complete.
    pub fn buffer(&mut self) -> io::Result<PooledBuffer> {
        let pool = self.pool.clone();
        self.buffer_of(&pool)
    }

    /// As [`Lane::buffer`], for the page hashes of a unit: 64 KiB.
    pub(crate) fn table(&mut self) -> io::Result<PooledBuffer> {
        let tables = self.tables.clone().expect("a lane that writes");
        self.buffer_of(&tables)
    }

    fn buffer_of(&mut self, pool: &BufferPool) -> io::Result<PooledBuffer> {
        loop {
            if let Some(buffer) = pool.try_take() {
                return Ok(buffer);
            }
            assert!(self.reap()?, "a buffer is free, in flight, or with the one who asks");
        }
    }

    /// Returns a buffer if one is free.
    pub fn free_buffer(&self) -> Option<PooledBuffer> {
        self.pool.try_take()
    }

    /// Waits until nothing is in flight.
    pub fn drain(&mut self) -> io::Result<()> {
        while self.reap()? {}
        Ok(())
    }

    /// Whether another transfer can be submitted without waiting.
    pub fn has_room(&self) -> bool {
        self.storage.in_flight() < self.storage.depth()
    }

    /// Waits for the next read to complete and returns it; `None` if nothing is in flight.
    pub fn next_read(&mut self) -> io::Result<Option<Completion>> {
        self.storage.reap()
    }

    /// Reaps one write; its memory is free again. Returns whether there was one.
    fn reap(&mut self) -> io::Result<bool> {
        let Some(completion) = self.storage.reap()? else { return Ok(false) };
        completion.result?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::iter;

    use vmfile_engine::{DirectIo, Direction, Memory};

    use super::*;

    /// A worker that panicked ended the process, or its caller waited for it for ever.
    #[test]
    fn a_worker_that_panics_is_an_error_for_the_caller() {
        let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
        let workers = Workers::start(&file, (Backend::Threads, 2)).unwrap();
        let work = |number: usize, _: Lane| assert_ne!(number, 1, "the test's own panic");
        let error = workers.run(work).unwrap_err();
        assert_eq!(error.to_string(), "a worker thread panicked, which is a bug in vmfile");
    }

    /// With more buffers, a save would take more memory than vmfile may use; with fewer, a disk
    /// would stand still.
    #[test]
    fn all_lanes_share_the_length_of_the_buffers_and_each_has_one_more() {
        let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
        for (jobs, expected) in [(1, 17), (4, 5), (17, 2)] {
            let workers = Workers::start(&file, (Backend::Threads, jobs)).unwrap();
            assert_eq!(workers.count(), jobs);
            let count = |_, lane: Lane| {
                let buffers: Vec<_> = iter::from_fn(|| lane.free_buffer()).collect();
                buffers.len()
            };
            assert_eq!(workers.run(count).unwrap(), vec![expected; jobs]);
        }
    }

    #[test]
    fn a_full_queue_has_no_room_until_a_transfer_was_reaped() {
        let plain = tempfile::tempfile().unwrap();
        let file = DataFile::new(plain.try_clone().unwrap(), DirectIo::Off).unwrap();
        let work = |mut lane: Lane| {
            let buffer = lane.buffer().unwrap().freeze();
            let write = |number: u64| Transfer {
                direction: Direction::Write,
                file_offset: number * 4096,
                memory: Memory::Shared(buffer.clone(), 0..4096),
                tag: 0,
            };
            for number in 0..DEPTH as u64 {
                assert!(lane.has_room(), "before transfer {number}");
                lane.submit(write(number)).unwrap();
            }
            assert!(!lane.has_room());
            // This one waits for another.
            lane.submit(write(DEPTH as u64)).unwrap();
            assert!(!lane.has_room());
            lane.drain().unwrap();
            assert!(lane.has_room());
            assert!(lane.next_read().unwrap().is_none(), "everything was reaped");
        };
        on_lanes(&file, (Backend::Threads, 1), work).unwrap();
        assert_eq!(plain.metadata().unwrap().len(), (DEPTH as u64 + 1) * 4096);
    }
}
