//! The back end of threads that call `pread` and `pwrite`, for where there is no `io_uring`.

#![expect(unsafe_code, reason = "hands addresses to the kernel for the length of a call")]

use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::direct_io::DataFile;
use crate::storage::Storage;
use crate::transfer::{Completion, Direction, Progress, Transfer};

/// Threads that are started at most; what is deeper in the queue waits for one of them.
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

impl Threads {
    pub(crate) fn new(file: &DataFile, depth: usize) -> io::Result<Threads> {
        let (queue, transfers) = mpsc::channel();
        let (done, completions) = mpsc::channel();
        let transfers = Arc::new(Mutex::new(transfers));
        let mut threads =
            Threads { queue: Some(queue), completions, workers: Vec::new(), in_flight: 0, depth };
        for _ in 0..depth.min(THREADS_MAX) {
            let (file, transfers, done) = (file.clone(), Arc::clone(&transfers), done.clone());
            let worker = thread::Builder::new()
                .name("vmfile-io".to_owned())
                .spawn(move || work(&file, &transfers, &done))?;
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
            // A worker that panicked has said so on its own.
            let _ = worker.join();
        }
    }
}

fn work(file: &DataFile, transfers: &Mutex<Receiver<Transfer>>, done: &Sender<Completion>) {
    loop {
        let next = transfers.lock().unwrap_or_else(PoisonError::into_inner).recv();
        // The queue is closed, or nobody wants completions any more: the storage is gone.
        let Ok(transfer) = next else { return };
        let mut progress = Progress::new(transfer);
        let result = carry_out(file, &mut progress);
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
                // A descriptor opened with O_NONBLOCK on something that takes it seriously.
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
