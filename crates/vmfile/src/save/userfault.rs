//! Saves a guest while it runs, from the memory of QEMU's process.
//!
//! QEMU's capability `background-snapshot` write-protects the guest's memory by a userfaultfd, and
//! then sends every page once. vmfile borrows that userfaultfd and does the work itself: QEMU's
//! stream goes to a socket that is not read, so that QEMU waits there with the memory protected.
//!
//! ```text
//! stop                            the guest stands still
//! the disks get their overlays, the devices are saved
//! migrate fd:                     QEMU protects the memory, and waits for room in the socket
//! borrow the userfaultfd, protect again what QEMU has let go
//! cont                            the guest runs; a thread of ours serves its faults
//! every window: read it, lift its protection, write it
//! migrate_cancel                  QEMU removes what is left of the protection
//! ```
//!
//! If this process dies, its end of the socket closes or the guardian cancels the migration: QEMU
//! then removes the protection, and the guest runs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use vmfile_engine::{BufferPool, ProcessMemory, Userfault, beside};
use vmfile_pages::draft::Draft;
use vmfile_pages::protected_ram::{ProtectedRam, aside_buffers};
use vmfile_pages::ram_writer::write_protected_ram;
use vmfile_pages::{ProcessRamError, RamBlock};
use vmfile_qemu::{RunState, Vm};
use vmfile_stream::held::HeldStream;

use super::direct::{Devices, DirectRoute};
use super::sending::Peer;
use super::{LiveDone, LiveMethod, SaveOptions, Work, Written};
use crate::error::SaveError;

/// How long QEMU may take to protect the guest's memory: it looks at every page before.
const PROTECT_TIMEOUT: Duration = Duration::from_secs(60);

/// What is set up while the guest runs.
#[derive(Debug)]
pub(super) struct UserfaultRoute {
    direct: DirectRoute,
    process: ProcessMemory,
    buffers: BufferPool,
}

impl UserfaultRoute {
    /// Finds the RAM, and refuses what can be refused while the guest runs.
    pub(super) fn prepare(
        vm: &mut Vm,
        draft: &Draft,
        options: &SaveOptions,
    ) -> Result<UserfaultRoute, SaveError> {
        let direct = DirectRoute::prepare(vm, draft, options)?;
        let pid = vm.pid()?;
        let out_of_reach = |source| ProcessRamError::Process { pid, source };
        let process = ProcessMemory::open(pid).map_err(out_of_reach)?;
        // The same right as for reading the memory, and a call that Linux has since 5.6.
        process.descriptor(0).map(drop).or_else(unless_closed).map_err(out_of_reach)?;
        let buffers = aside_buffers().map_err(SaveError::Workers)?;
        Ok(UserfaultRoute { direct, process, buffers })
    }

    /// Saves the guest, with the capability `background-snapshot` on. Whatever this returns, QEMU
    /// sends no more, and the guest may be stopped.
    pub(super) fn write(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let (mut held, theirs) = HeldStream::pair().map_err(SaveError::Socket)?;
        work.guard.keep_open(held.as_fd())?;
        // Discards the events of earlier pauses: the pause of this save is measured.
        let _ = work.vm.pause_seen();
        let written = self.write_held(work, (&mut held, theirs));
        Peer::of(held.into()).cancel(work.vm, written)
    }

    fn write_held(
        &mut self,
        work: &mut Work<'_>,
        (held, theirs): (&mut HeldStream, OwnedFd),
    ) -> Result<Written, SaveError> {
        let before = Userfault::all_of(&self.process).map_err(SaveError::Userfault)?;
        work.vm.stop()?;
        let found = work.vm.run_state()?;
        if found != RunState::Paused {
            return Err(SaveError::RunState { found: found.to_string() });
        }
        self.direct.process.look_again()?;
        work.disks.freeze(work.vm)?;
        let devices = Devices::save(work)?;
        work.vm.send_stream(theirs)?;
        let sent = held.wait_for_pages(PROTECT_TIMEOUT, work.control)?.clone();

        let after = Userfault::all_of(&self.process).map_err(SaveError::Userfault)?;
        let number = after.difference(&before).next().ok_or(SaveError::NoUserfault)?;
        let userfault = Userfault::borrow(&self.process, *number).map_err(SaveError::Userfault)?;
        let ram = &self.direct.process;
        let protected = ProtectedRam::new(ram, &userfault, self.buffers.clone());
        let protected = protected.map_err(SaveError::Userfault)?;
        for &(block, page) in held.pages() {
            let block = &sent.blocks()[block];
            let same = |known: &RamBlock| known.name() == block.name();
            let known = self.direct.ram.blocks().iter().position(same);
            let known = known.ok_or_else(|| not_known(block.name()))?;
            let offset = page.0 * block.page_size().bytes();
            protected.protect_again(known, offset).map_err(SaveError::Userfault)?;
        }

        let workers = self.direct.workers.take().expect("a route writes once");
        let (layout, data_bytes) = (&self.direct.ram, self.direct.data_bytes);
        let serve = || protected.serve();
        let both = beside(serve, |_| {
            let written = run_on(work.vm).and_then(|()| {
                let places = devices.places(work, layout)?;
                let control = work.control;
                let written =
                    write_protected_ram(workers, &places, &protected, data_bytes, control)?;
                Ok((places, written))
            });
            protected.end();
            written
        });
        let (served, written) = both.map_err(SaveError::Workers)?;
        let (places, written) = written?;
        served.map_err(SaveError::Userfault)?;
        protected.verify().map_err(SaveError::Userfault)?;
        if held.has_more()? {
            return Err(SaveError::Overtaken);
        }
        let pause_seconds = work.vm.pause_seen().unwrap_or_default().as_secs_f64();
        let live = LiveDone {
            method: LiveMethod::Userfault,
            pause_seconds,
            waits: Some(protected.faults().into()),
        };
        devices.finish(work, &places, written, Some(live))
    }
}

/// Lets the guest run on, with its memory protected.
fn run_on(vm: &mut Vm) -> Result<(), SaveError> {
    // QEMU sets the run state that the guest had when the migration began (10.0), which must not
    // happen after `cont`. Its answer comes after that.
    vm.run_state()?;
    Ok(vm.cont()?)
}

/// The descriptor is closed: that is no matter of rights.
fn unless_closed(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(Errno::BADF.raw_os_error()) { Ok(()) } else { Err(error) }
}

fn not_known(block: &str) -> SaveError {
    let reason = "QEMU sends it and does not list it".to_owned();
    SaveError::Block { block: block.to_owned(), reason }
}
