//! The back end of threads that call `pread` and `pwrite`, for where there is no `io_uring`.

#![expect(unsafe_code, reason = "hands addresses to the kernel for the length of a call")]

use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::crew::Panicked;
use crate::direct_io::DataFile;
use crate::storage::Storage;
use crate::transfer::{Completion, Direction, Progress, Transfer};

/// How many threads are started at most; further transfers in the queue wait for one of them.
const THREADS_MAX: usize = 16;

/// A queue of transfers and the threads that serve it.
#[derive(Debug)]
pub(crate) struct Threads {
    /// `None` only inside `drop`, which closes the queue that way.
    queue: Option<Sender<Transfer>>,
    completions: Receiver<Completion>,
    workers: Vec<JoinHandle<()>>,
    in_flight: usize,
    depth: usize,
}

/// What moves the bytes of one transfer.
type Carry = fn(&DataFile, &mut Progress) -> io::Result<()>;

impl Threads {
    pub(crate) fn new(file: &DataFile, depth: usize) -> io::Result<Threads> {
        Threads::with(file, depth, carry_out)
    }

    fn with(file: &DataFile, depth: usize, carry: Carry) -> io::Result<Threads> {
        let (queue, transfers) = mpsc::channel();
        let (done, completions) = mpsc::channel();
        let transfers = Arc::new(Mutex::new(transfers));
        let mut threads =
            Threads { queue: Some(queue), completions, workers: Vec::new(), in_flight: 0, depth };
        for _ in 0..depth.min(THREADS_MAX) {
            let (file, transfers, done) = (file.clone(), Arc::clone(&transfers), done.clone());
            let worker = thread::Builder::new()
                .name("vmfile-io".to_owned())
                .spawn(move || work(&file, &transfers, &done, carry))?;
            threads.workers.push(worker);
        }
        Ok(threads)
    }
}

impl Storage for Threads {
    fn submit(&mut self, transfer: Transfer) -> io::Result<()> {
        assert!(self.in_flight < self.depth, "reap before submitting beyond the depth");
        transfer.check();
        let queue = self.queue.as_ref().expect("taken only by drop");
        queue.send(transfer).map_err(|_| io::Error::other("no thread is left to serve"))?;
        self.in_flight += 1;
        Ok(())
    }

    fn reap(&mut self) -> io::Result<Option<Completion>> {
        if self.in_flight == 0 {
            return Ok(None);
        }
        let completion =
            self.completions.recv().map_err(|_| io::Error::other("no thread is left to serve"))?;
        self.in_flight -= 1;
        Ok(Some(completion))
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn depth(&self) -> usize {
        self.depth
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Closing the queue lets the threads finish what is in it and then end.
        self.queue = None;
        for worker in self.workers.drain(..) {
            // No panic leaves `work`: the completion of the transfer has it as an error.
            let _ = worker.join();
        }
    }
}

fn work(
    file: &DataFile,
    transfers: &Mutex<Receiver<Transfer>>,
    done: &Sender<Completion>,
    carry: Carry,
) {
    loop {
        let next = transfers.lock().unwrap_or_else(PoisonError::into_inner).recv();
        // The queue is closed: the storage is being dropped.
        let Ok(transfer) = next else { return };
        let mut progress = Progress::new(transfer);
        // Every transfer must get a completion: `reap` would wait for it for ever. No system call
        // is at work when `carry` unwinds, so the memory may go back.
        let result = catch_unwind(AssertUnwindSafe(|| carry(file, &mut progress)));
        let result = result.unwrap_or_else(|payload| {
            // Dropping it could panic again.
            mem::forget(payload);
            Err(Panicked.into())
        });
        if done.send(progress.complete(result)).is_err() {
            return;
        }
    }
}

fn carry_out(file: &DataFile, progress: &mut Progress) -> io::Result<()> {
    while progress.remaining() > 0 {
        let (address, offset) = (progress.address(), progress.file_offset());
        let piece = file.next_piece(address.addr(), offset, progress.remaining());
        let moved = match progress.transfer.direction {
            // SAFETY: `address` is valid for writes of `piece.len` bytes, which `progress` owns.
            Direction::Read => unsafe { read(piece.fd, address, piece.len, offset) },
            // SAFETY: `address` is valid for reads of `piece.len` bytes, which `progress` owns.
            Direction::Write => unsafe { write(piece.fd, address, piece.len, offset) },
        };
        match moved {
            Ok(len) => progress.advance(len)?,
            Err(error) => match error.raw_os_error() {
                // A signal before the first byte.
                Some(libc::EINTR) => {}
                // The descriptor was opened with O_NONBLOCK, and the file does not ignore that.
                Some(libc::EAGAIN) => thread::yield_now(),
                _ => return Err(error),
            },
        }
    }
    Ok(())
}

/// Calls `pread`.
///
/// # Safety
///
/// `into` is valid for writes of `len` bytes.
unsafe fn read(fd: RawFd, into: *mut u8, len: usize, offset: u64) -> io::Result<usize> {
    let offset = i64::try_from(offset).expect("a transfer ends below 2^63");
    // SAFETY: the caller's promise.
    let result = unsafe { libc::pread(fd, into.cast(), len, offset) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Calls `pwrite`.
///
/// # Safety
///
/// `from` is valid for reads of `len` bytes.
unsafe fn write(fd: RawFd, from: *const u8, len: usize, offset: u64) -> io::Result<usize> {
    let offset = i64::try_from(offset).expect("a transfer ends below 2^63");
    // SAFETY: the caller's promise.
    let result = unsafe { libc::pwrite(fd, from.cast(), len, offset) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::direct_io::DirectIo;
    use crate::transfer::Memory;

    /// If `work` did not catch panics, the transfer would be lost, and `reap` would wait for its
    /// completion for ever, with the VM paused.
    #[test]
    fn a_transfer_that_panics_is_completed_with_an_error() {
        let file = DataFile::new(tempfile::tempfile().unwrap(), DirectIo::Off).unwrap();
        let carry: Carry = |_, progress| {
            assert_ne!(progress.transfer.tag, 0, "the test's own panic");
            Ok(())
        };
        let mut threads = Threads::with(&file, 2, carry).unwrap();
        let pool = BufferPool::new(2, 4096, 4096).unwrap();
        for tag in 0..2 {
            let memory = Memory::Owned(pool.take(), 0..4096);
            let direction = Direction::Write;
            threads.submit(Transfer { direction, file_offset: 0, memory, tag }).unwrap();
        }
        for _ in 0..2 {
            let completion = threads.reap().unwrap().unwrap();
            assert_eq!(completion.result.is_err(), completion.transfer.tag == 0);
        }
        assert!(threads.reap().unwrap().is_none());
        assert_eq!(pool.free_count(), 2, "the memory is back");
    }
}
