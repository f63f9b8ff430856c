//! Saves a guest while it runs, from the memory of QEMU's process.
//!
//! QEMU's capability `background-snapshot` write-protects the guest's memory by a userfaultfd, and
//! then sends every page once. vmfile borrows that userfaultfd and does the work itself: QEMU's
//! stream goes to a socket that is not read, so that QEMU waits there with the memory protected.
//!
//! ```text
//! migrate fd:                     QEMU looks at every page, which fills holes; it stops the guest,
//!                                 protects the memory, lets the guest run, and waits for room
//! borrow the userfaultfd          a thread of ours serves the guest's faults
//! stop                            the saved moment: the guest stands still once more
//! the disks get their overlays, the devices are saved
//! protect again what was lifted   a few windows; copy what QEMU let go: this pause is short
//! cont
//! every window: read it, lift its protection, write it
//! migrate_cancel                  QEMU removes what is left of the protection
//! ```
//!
//! If this process dies, its end of the socket closes or the guardian cancels the migration: QEMU
//! then removes the protection, and the guest runs.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use vmfile_engine::{BufferPool, Userfault, beside};
use vmfile_pages::protected_ram::{ProtectedRam, aside_buffers};
use vmfile_pages::ram_writer::write_protected_ram;
use vmfile_pages::{PageIndex, RamBlock, RamLayout};
use vmfile_qemu::RunState;
use vmfile_stream::error::HeldError;
use vmfile_stream::held::HeldStream;

use super::direct::{Devices, DirectRoute};
use super::hang_up::unless_stuck;
use super::live_memory::{LiveMemory, in_a_pause, refuse_if_overtaken};
use super::live_stream::refuse_unless_it_runs;
use super::sending::Peer;
use super::{LiveDone, LiveMethod, Work, Written};
use crate::error::{SaveError, UserfaultError};

/// How long QEMU may take from the first page until it lets the guest run: its main loop does that next,
/// before it answers a command.
const RESUME_TIMEOUT: Duration = Duration::from_millis(500);

/// How long to wait between two looks whether it has.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// How often QEMU is asked, while no page has come, whether the guest stands still.
const ASK_INTERVAL: Duration = Duration::from_millis(200);

impl LiveMemory {
    /// Saves the guest, with the capability `background-snapshot` on. Whatever this returns, QEMU
    /// sends no more, and the guest may be stopped.
    pub(super) fn by_userfault(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let buffers = aside_buffers().map_err(SaveError::Workers)?;
        let (mut held, theirs) = HeldStream::pair().map_err(SaveError::Socket)?;
        work.guard.keep_open(held.as_fd())?;
        let process = self.direct.process.process();
        let before = Userfault::all_of(process).map_err(UserfaultError::Kernel)?;
        let socket = rustix::fs::fstat(&theirs).map_err(|errno| SaveError::Socket(errno.into()))?;
        let resumes = work.vm.resumes();
        work.set_may_stand(true)?;
        refuse_unless_it_runs(work, true)?;
        // Only QEMU keeps this end, so that the stream ends if QEMU closes it.
        if let Err(error) = work.vm.send_stream(theirs) {
            let peer = Peer::of(held.into()).unless_refused(&error);
            return peer.cancel(work.vm, Err(error.into()));
        }
        match self.protect(work, &mut held, (&before, socket.st_ino)) {
            Ok(protected) => self.copy(work, (held, resumes), (protected, buffers)),
            Err(error) => Peer::of(held.into()).cancel(work.vm, Err(error)),
        }
    }

    /// Waits until QEMU has write-protected the guest's memory. `before` are the userfaultfds that QEMU had
    /// before, and `socket` is the inode of its end of the stream.
    fn protect(
        &mut self,
        work: &mut Work<'_>,
        held: &mut HeldStream,
        (before, socket): (&BTreeSet<i32>, u64),
    ) -> Result<Protected, SaveError> {
        let sent = first_page(work, held)?;
        let process = self.direct.process.process();
        // QEMU plugs no memory while it migrates, but may have before.
        if let Some(what) = differing_block(&sent, &self.direct.ram) {
            return Err(SaveError::ChangedMeanwhile { what });
        }
        let after = Userfault::all_of(process).map_err(UserfaultError::Kernel)?;
        let number = after.difference(before).next().ok_or(UserfaultError::Missing)?;
        let userfault = Userfault::borrow(process, *number).map_err(UserfaultError::Kernel)?;
        let theirs = process.socket(socket).map_err(UserfaultError::Kernel)?;
        self.direct.process.look_again()?;
        Ok(Protected { userfault, theirs, sent })
    }

    /// Copies the memory, and cancels QEMU's migration.
    fn copy(
        &mut self,
        work: &mut Work<'_>,
        (mut held, resumes): (HeldStream, u64),
        (protected, buffers): (Protected, BufferPool),
    ) -> Result<Written, SaveError> {
        let Protected { userfault, theirs, sent } = protected;
        let ours = match held.as_fd().try_clone_to_owned() {
            Ok(ours) => ours,
            Err(error) => {
                return Peer::of(held.into()).cancel(work.vm, Err(SaveError::Socket(error)));
            }
        };
        let workers = self.direct.workers.take().expect("a route writes once");
        let DirectRoute { ram: layout, process, data_bytes, .. } = &self.direct;
        let protected = match ProtectedRam::new(process, &userfault, buffers) {
            Ok(protected) => protected,
            Err(error) => {
                let error = UserfaultError::Kernel(error).into();
                return Peer::of(held.into()).cancel(work.vm, Err(error));
            }
        };
        let serve = || protected.serve();
        let both = beside(serve, |_| {
            let serving = Serving(&protected);
            let ended = || protected.fail("QEMU ended its migration");
            let written = unless_stuck((process.process(), ours.as_fd()), ended, || {
                wait_until_resumed(work, resumes)?;
                let devices = begin(work, &mut held, (theirs, &sent), (&protected, layout))?;
                let places = devices.places(work, layout)?;
                let control = work.control;
                let written =
                    write_protected_ram(workers, &places, &protected, *data_bytes, control)?;
                protected.verify().map_err(UserfaultError::Kernel)?;
                Ok((devices, places, written))
            });
            // QEMU ends the stream before it removes the protection. If another client has ended the
            // migration and started one of its own, the memory is protected anew, for that one.
            let written = match written {
                Err(error) if !is_of_memory(&error) => Err(error),
                written => held.still_held().map_err(SaveError::from).and(written),
            };
            let written = written.and_then(|written| match held.has_more()? {
                true => Err(UserfaultError::Overtaken.into()),
                false => Ok(written),
            });
            // The guest's faults are served up to here: what is zero is still protected, and QEMU
            // itself may wait for it.
            let written = Peer::of(held.into()).cancel(work.vm, written);
            drop(serving);
            written
        });
        let ((), written) = match both {
            Ok(both) => both,
            // The thread could not start, or panicked. Our end of the stream is closed, but QEMU
            // may not have noticed.
            Err(source) => {
                return Err(Peer::of(ours).give_up(work.vm, SaveError::Workers(source)));
            }
        };
        let (devices, places, written) = written?;
        let waits = Some(protected.faults().into());
        let live = LiveDone::now(work.vm, LiveMethod::Userfault, waits);
        devices.finish(work, &places, written, Some(live))
    }
}

/// Stops the guest for the saved moment, and has its devices saved. Drops QEMU's end of the stream.
fn begin(
    work: &mut Work<'_>,
    held: &mut HeldStream,
    (theirs, sent): (OwnedFd, &RamLayout),
    (protected, layout): (&ProtectedRam<'_>, &RamLayout),
) -> Result<Devices, SaveError> {
    // Here the guest need not stand still for it.
    held.wait_until_full(theirs.as_fd(), work.control)?;
    let devices = in_a_pause(work, |work| {
        let pages = held.wait_until_full(theirs.as_fd(), work.control)?;
        let lifted = pages.iter().map(|&page| place(page, sent, layout));
        Ok(Some(protected.begin(lifted).map_err(UserfaultError::Kernel)?))
    })?;
    let ((), devices) = devices.expect("a protection is never too much");
    Ok(devices)
}

/// Tells whether an error may have come because QEMU has removed the protection of its memory.
fn is_of_memory(error: &SaveError) -> bool {
    let kinds =
        matches!(error, SaveError::Pages(_) | SaveError::Userfault(UserfaultError::Kernel(_)));
    kinds && !error.is_stopped()
}

/// Faults are served until this is dropped, also by a panic: the thread that serves them is waited for.
struct Serving<'a, 'p>(&'a ProtectedRam<'p>);

impl Drop for Serving<'_, '_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Memory that QEMU has write-protected.
struct Protected {
    userfault: Userfault,
    /// A duplicate of QEMU's end of its stream.
    theirs: OwnedFd,
    /// QEMU's RAM blocks in the order of its stream.
    sent: RamLayout,
}

/// Waits for the first page; returns QEMU's RAM blocks. QEMU looks at all memory before it sends one.
fn first_page(work: &mut Work<'_>, held: &mut HeldStream) -> Result<RamLayout, SaveError> {
    let timeout = work.options.live.unwrap_or_default().timeout;
    let deadline = Instant::now() + timeout;
    loop {
        match held.wait_for_page(ASK_INTERVAL, work.control) {
            Ok(ram) => return Ok(ram.clone()),
            Err(HeldError::TimedOut(_)) if Instant::now() < deadline => {}
            Err(HeldError::TimedOut(_)) => return Err(HeldError::TimedOut(timeout).into()),
            Err(error) => return Err(error.into()),
        }
        // Not for long: once memory is protected, the main loop may wait for a page before it answers.
        work.vm.hear(ASK_INTERVAL)?;
        refuse_if_overtaken(work.vm)?;
    }
}

/// Waits until QEMU, which stopped the guest while it protected the memory, lets it run: a `stop` before
/// that would be undone. If another client had stopped the guest before, QEMU leaves it stopped.
fn wait_until_resumed(work: &mut Work<'_>, resumes: u64) -> Result<(), SaveError> {
    let deadline = Instant::now() + RESUME_TIMEOUT;
    while work.vm.resumes() == resumes {
        let found = work.vm.run_state()?;
        if Instant::now() >= deadline {
            if found == RunState::Running {
                break;
            }
            work.set_may_stand(false)?;
            return Err(SaveError::StoppedMeanwhile { found: found.to_string() });
        }
        thread::sleep(POLL_INTERVAL);
    }
    work.set_may_stand(false)
}

/// Names a block that only one of the lists has, or that has another length there.
fn differing_block(sent: &RamLayout, found: &RamLayout) -> Option<String> {
    let differs = |one: &RamLayout, other: &RamLayout| {
        let is_there = |block: &RamBlock| {
            let same = |known: &RamBlock| {
                (known.name(), known.used_length()) == (block.name(), block.used_length())
            };
            other.blocks().iter().any(same)
        };
        one.blocks().iter().find(|block| !is_there(block)).map(|block| block.name().to_owned())
    };
    differs(sent, found).or_else(|| differs(found, sent)).map(|name| format!("RAM block {name:?}"))
}

/// Returns where a page that QEMU has sent lies: our number of the block, and the offset in it.
fn place((block, page): (usize, PageIndex), sent: &RamLayout, layout: &RamLayout) -> (usize, u64) {
    let block = &sent.blocks()[block];
    let number = layout.blocks().iter().position(|known| known.name() == block.name());
    (number.expect("both have the same blocks"), page.0 * block.page_size().bytes())
}
