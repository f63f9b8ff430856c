//! A worker's way to the disk: transfers in flight, and the buffers they use.
//!
//! Each worker has one lane. A lane reaps when its queue or its buffers are used up, so that a
//! worker never waits for memory that only it could give back.

use std::io;
use std::thread;

use vmfile_engine::{
    Backend, BackendInUse, BufferPool, Completion, DataFile, PooledBuffer, Storage, Transfer,
    open_storage,
};

use crate::plan::WINDOW_LEN;

/// Bytes of buffers that all lanes of one verb have together: enough to keep a fast disk busy,
/// half of the 64 MiB that vmfile may take.
const BUFFERS_LEN: usize = 32 << 20;

/// Length of each buffer: one window.
const WINDOW: usize = 2 << 20;
const _: () = assert!(WINDOW as u64 == WINDOW_LEN);

/// Transfers in flight: as many as the engine takes, for guests whose data lies in small pieces.
const DEPTH: usize = 64;

/// Transfers in flight, and the buffers they use.
#[derive(Debug)]
pub(crate) struct Lane {
    storage: Box<dyn Storage>,
    pool: BufferPool,
}

/// Runs `work` in `jobs` threads, each with a lane of its own to `file`, and waits for all of them;
/// returns what each returned, and the back end that was used.
pub(crate) fn on_lanes<T: Send>(
    file: &DataFile,
    (backend, jobs): (Backend, usize),
    work: impl Fn(Lane) -> T + Sync,
) -> io::Result<(Vec<T>, BackendInUse)> {
    let opened: Vec<(Lane, BackendInUse)> =
        (0..jobs).map(|_| Lane::open(file, backend, jobs)).collect::<io::Result<_>>()?;
    let (lanes, mut in_use): (Vec<Lane>, Vec<BackendInUse>) = opened.into_iter().unzip();
    let work = &work;
    let results = thread::scope(|scope| {
        let spawn = |lane| scope.spawn(move || work(lane));
        let workers: Vec<_> = lanes.into_iter().map(spawn).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, T>| worker.join().expect("no panic");
        workers.into_iter().map(join).collect()
    });
    Ok((results, in_use.pop().expect("there is at least one job")))
}

impl Lane {
    /// Opens one of `lanes` lanes to `file`.
    pub(crate) fn open(
        file: &DataFile,
        backend: Backend,
        lanes: usize,
    ) -> io::Result<(Lane, BackendInUse)> {
        let buffers = (BUFFERS_LEN / WINDOW / lanes.max(1)).max(2);
        let opened = open_storage(file, backend, DEPTH)?;
        // Several transfers may share a buffer; one buffer is being filled while others are in flight.
        let pool = BufferPool::new(buffers + 1, WINDOW, 4096);
        let lane = Lane { storage: opened.storage, pool };
        Ok((lane, opened.backend))
    }

    /// Submits `transfer`; waits for another one first if the queue is full.
    pub(crate) fn submit(&mut self, transfer: Transfer) -> io::Result<()> {
        while self.storage.in_flight() >= self.storage.depth() {
            self.reap()?;
        }
        self.storage.submit(transfer)
    }

    /// Returns a free buffer, after waiting for transfers that hold all of them.
    pub(crate) fn buffer(&mut self) -> io::Result<PooledBuffer> {
        loop {
            if let Some(buffer) = self.pool.try_take() {
                return Ok(buffer);
            }
            assert!(self.reap()?, "a buffer is free, in flight, or with the one who asks");
        }
    }

    /// Returns a buffer if one is free.
    pub(crate) fn free_buffer(&self) -> Option<PooledBuffer> {
        self.pool.try_take()
    }

    /// Waits until nothing is in flight.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        while self.reap()? {}
        Ok(())
    }

    /// Whether another transfer can be submitted without waiting.
    pub(crate) fn has_room(&self) -> bool {
        self.storage.in_flight() < self.storage.depth()
    }

    /// Waits for the next read to complete and returns it; `None` if nothing is in flight.
    pub(crate) fn next_read(&mut self) -> io::Result<Option<Completion>> {
        self.storage.reap()
    }

    /// Reaps one write; its memory is free again. Returns whether there was one.
    fn reap(&mut self) -> io::Result<bool> {
        let Some(completion) = self.storage.reap()? else { return Ok(false) };
        completion.result?;
        Ok(true)
    }
}
