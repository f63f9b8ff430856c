//! The `io_uring` back end.
//!
//! Linux 5.6 or later: plain reads and writes at an offset are all it needs.

#![expect(unsafe_code, reason = "hands addresses to the kernel that it uses after the call")]

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::thread;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};

use crate::direct_io::DataFile;
use crate::storage::Storage;
use crate::transfer::{Completion, Direction, Progress, Transfer};

/// How many transfers are collected before the kernel gets them, unless a wait comes first.
const BATCH: usize = 8;

/// After how many bytes the kernel gets the transfers, however few they are: large ones gain
/// nothing from being collected, and the device should not wait.
const BATCH_BYTES: usize = 256 << 10;

/// Transfers in flight in a ring.
///
/// # Invariants
///
/// - Every entry that the kernel has or may still take from the submission queue names a slot of
///   `slots` that is `Some`, whose memory and descriptors therefore live.
/// - A slot is emptied only after its completion entry has been read from the ring.
pub(crate) struct Ring {
    ring: IoUring,
    file: DataFile,
    slots: Vec<Option<Progress>>,
    free: Vec<usize>,
    finished: VecDeque<Completion>,
    in_flight: usize,
    unsubmitted: usize,
    unsubmitted_bytes: usize,
}

// SAFETY: the addresses in `slots` point into memory that the slots own and that belongs to no
// thread; the ring's own mappings belong to the process. Requests that the kernel cancels when a
// submitting thread ends are submitted again, see `Outcome`.
unsafe impl Send for Ring {}

impl Ring {
    pub(crate) fn new(file: DataFile, depth: usize) -> io::Result<Ring> {
        let entries = u32::try_from(depth.next_power_of_two()).expect("the depth is limited");
        // The completion queue has twice as many entries, so it cannot overflow.
        let ring = IoUring::new(entries)?;
        if !ring.params().is_feature_rw_cur_pos() {
            // This feature came with 5.6, as did plain reads and writes.
            return Err(io::Error::new(io::ErrorKind::Unsupported, "older than Linux 5.6"));
        }
        Ok(Ring {
            ring,
            file,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            finished: VecDeque::new(),
            in_flight: 0,
            unsubmitted: 0,
            unsubmitted_bytes: 0,
        })
    }

    /// Queues the next piece of the transfer in `slot`, or finishes it if nothing is left.
    fn queue_next(&mut self, slot: usize, flags: Flags) {
        let progress = self.slots[slot].as_ref().expect("the slot is in use");
        if progress.remaining() == 0 {
            return self.finish(slot, Ok(()));
        }
        let (address, offset) = (progress.address(), progress.file_offset());
        let piece = self.file.next_piece(address.addr(), offset, progress.remaining());
        let len = u32::try_from(piece.len).expect("a piece is at most 1 GiB");
        let fd = types::Fd(piece.fd);
        let entry: Entry = match progress.transfer.direction {
            Direction::Read => opcode::Read::new(fd, address, len).offset(offset).build(),
            Direction::Write => opcode::Write::new(fd, address, len).offset(offset).build(),
        };
        let entry = entry.flags(flags).user_data(slot as u64);
        // SAFETY:
        // - `address` is valid for `len` bytes, for writes if this is a read (`Progress`), and
        //   stays so until the slot is emptied, after the completion (invariants).
        // - The descriptor lives in `self.file`, which outlives the ring's use of it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue has an entry for every slot");
        self.unsubmitted += 1;
        self.unsubmitted_bytes += piece.len;
    }

    fn finish(&mut self, slot: usize, result: io::Result<()>) {
        let progress = self.slots[slot].take().expect("the slot is in use");
        self.free.push(slot);
        self.finished.push_back(progress.complete(result));
    }

    /// Submits what is queued to the kernel, and waits for `want` completions.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                // A signal; the caller looks at the completions and comes back.
                Some(libc::EINTR) => {}
                // Completions wait to be read first; the caller does that.
                Some(libc::EBUSY) => {}
                // No memory for requests at this moment; some comes back with completions.
                Some(libc::EAGAIN) => thread::sleep(Duration::from_millis(1)),
                _ => return Err(error),
            },
        }
        self.unsubmitted = self.ring.submission().len();
        if self.unsubmitted == 0 {
            self.unsubmitted_bytes = 0;
        }
        Ok(())
    }

    /// Reads every completion there is, and continues short transfers.
    fn collect(&mut self) {
        while let Some(entry) = { self.ring.completion().next() } {
            let slot = usize::try_from(entry.user_data()).expect("a slot number");
            let progress = self.slots[slot].as_mut().expect("the slot is in use");
            match Outcome::of(entry.result()) {
                Outcome::Moved(len) => match progress.advance(len) {
                    Ok(()) => self.queue_next(slot, Flags::empty()),
                    Err(error) => self.finish(slot, Err(error)),
                },
                Outcome::Again => self.queue_next(slot, Flags::empty()),
                Outcome::AgainInWorker => self.queue_next(slot, Flags::ASYNC),
                Outcome::Refused(error) => self.finish(slot, Err(error)),
            }
        }
    }
}

/// What a completion entry's result means.
#[derive(Debug)]
enum Outcome {
    Moved(usize),
    Again,
    AgainInWorker,
    Refused(io::Error),
}

impl Outcome {
    fn of(result: i32) -> Outcome {
        if let Ok(len) = usize::try_from(result) {
            return Outcome::Moved(len);
        }
        match -result {
            // A signal reached the kernel's worker before the first byte.
            libc::EINTR => Outcome::Again,
            // The thread that submitted it has ended, and the kernel cancels what it had queued.
            libc::ECANCELED => Outcome::Again,
            // The kernel would have had to wait; a worker of the kernel may do that.
            libc::EAGAIN => Outcome::AgainInWorker,
            errno => Outcome::Refused(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Storage for Ring {
    fn submit(&mut self, transfer: Transfer) -> io::Result<()> {
        assert!(self.in_flight < self.slots.len(), "reap before submitting beyond the depth");
        let progress = Progress::new(transfer);
        // A finished transfer has left its slot though it is not reaped yet, so one is free.
        let slot = self.free.pop().expect("fewer in flight than slots");
        self.slots[slot] = Some(progress);
        self.in_flight += 1;
        self.queue_next(slot, Flags::empty());
        if self.unsubmitted >= BATCH || self.unsubmitted_bytes >= BATCH_BYTES {
            self.enter(0)?;
        }
        Ok(())
    }

    fn reap(&mut self) -> io::Result<Option<Completion>> {
        loop {
            self.collect();
            if let Some(completion) = self.finished.pop_front() {
                self.in_flight -= 1;
                // The pieces that `collect` queued, and newer transfers, should not wait until the
                // caller runs out of completions.
                if self.unsubmitted > 0 {
                    self.enter(0)?;
                }
                return Ok(Some(completion));
            }
            if self.in_flight == 0 {
                return Ok(None);
            }
            self.enter(1)?;
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn depth(&self) -> usize {
        self.slots.len()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        loop {
            match self.reap() {
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(_) => break,
            }
        }
        // The ring is broken and the kernel may still use the memory: it must never be freed.
        mem::forget(mem::take(&mut self.slots));
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight)
            .field("depth", &self.slots.len())
            .finish_non_exhaustive()
    }
}

/// Tests whether a ring can be set up.
pub(crate) fn probe() -> io::Result<()> {
    let ring = IoUring::new(2)?;
    if ring.params().is_feature_rw_cur_pos() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "older than Linux 5.6"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_tried_again_is_and_nothing_else() {
        assert!(matches!(Outcome::of(17), Outcome::Moved(17)));
        assert!(matches!(Outcome::of(0), Outcome::Moved(0)));
        assert!(matches!(Outcome::of(-libc::EINTR), Outcome::Again));
        assert!(matches!(Outcome::of(-libc::ECANCELED), Outcome::Again));
        assert!(matches!(Outcome::of(-libc::EAGAIN), Outcome::AgainInWorker));
        let Outcome::Refused(error) = Outcome::of(-libc::ENOSPC) else { panic!("refused") };
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
}
