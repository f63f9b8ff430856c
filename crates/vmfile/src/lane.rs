//! A worker's way to the disk: transfers in flight, and the buffers they use.
//!
//! Each worker has one lane. A lane reaps when its queue or its buffers are used up, so that a
//! worker never waits for memory that only it could give back.

use std::io;

use vmfile_engine::{
    Backend, BackendInUse, BufferPool, Completion, DataFile, PooledBuffer, Storage, Transfer,
    open_storage,
};

/// Bytes of buffers that all lanes of one verb have together: enough to keep a fast disk busy,
/// half of the 64 MiB that vmfile may take.
const BUFFERS_LEN: usize = 32 << 20;

/// Transfers in flight: as many as the engine takes, for guests whose data lies in small pieces.
const DEPTH: usize = 64;

/// Transfers in flight, and the buffers they use.
#[derive(Debug)]
pub(crate) struct Lane {
    storage: Box<dyn Storage>,
    pool: BufferPool,
}

impl Lane {
    /// Opens one of `lanes` lanes to `file`, with buffers of `buffer_len` bytes.
    pub(crate) fn open(
        file: &DataFile,
        backend: Backend,
        lanes: usize,
        buffer_len: usize,
    ) -> io::Result<(Lane, BackendInUse)> {
        let buffers = (BUFFERS_LEN / buffer_len / lanes.max(1)).max(2);
        let opened = open_storage(file, backend, DEPTH)?;
        // Several transfers may share a buffer; one buffer is being filled while others are in flight.
        let pool = BufferPool::new(buffers + 1, buffer_len, 4096);
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
