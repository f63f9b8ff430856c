//! A guest that runs while it is saved, by QEMU's stream.
//!
//! `background-snapshot`: QEMU stops the guest for some milliseconds, write-protects its memory and
//! sends every page once, as it was then. Where that cannot be, `pre-copy`: pages that the guest
//! changes are sent again, until few are left; the guest stands still while those are sent.

//!
//! The disks of that moment are frozen while the guest stands still: before the one, when vmfile
//! stops it, and at the end of the other, when QEMU waits with it (`pause-before-switchover`).

use super::{LiveMethod, RouteUsed};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use vmfile_engine::beside;
use vmfile_pages::lane::Workers;
use vmfile_qemu::{Feature, Outgoing, PUT_BACK_TIMEOUT, RunState, StreamSettings, Vm, VmError};
use vmfile_stream::incoming::WaitLimits;
use vmfile_stream::receiver::{Received, StreamReceiver};

use super::sending::{Peer, peer_process, sent};
use super::stream::written;
use super::{Disks, Live, LiveDone, Work, Written};
use crate::error::SaveError;
use crate::receive::ReceiveError;

/// How long QEMU may be silent: longer than any look at all of a large guest's memory.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How often QEMU is asked how far it is: a guest that stands still waits for the answer.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// How long QEMU may take to stop when it is told to.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(60);

/// A VM that can send itself while its guest runs, and the settings it had.
#[derive(Debug)]
pub(super) struct LiveRoute {
    before: StreamSettings,
    live: Live,
}

impl LiveRoute {
    /// Asks for the settings, which must be put back.
    pub(super) fn prepare(vm: &mut Vm, live: Live) -> Result<LiveRoute, SaveError> {
        Ok(LiveRoute { before: vm.stream_settings()?, live })
    }

    /// Returns the migration settings as they were.
    pub(super) fn settings(&self) -> &StreamSettings {
        &self.before
    }

    /// Lets QEMU send the guest, writes what comes, and then what belongs around it.
    pub(super) fn write(&self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let (method, ours) = self.choose(work.vm, !work.disks.is_empty())?;
        let received = self.receive(work, &method);
        let runs = work.vm.unstoppable(PUT_BACK_TIMEOUT, let_run);
        let put_back = work
            .vm
            .unstoppable(PUT_BACK_TIMEOUT, |vm| vm.change_stream_settings(&ours, &self.before));
        let mut received = match (received, runs) {
            (Ok(received), Ok(())) => received,
            (Err(error), Ok(())) => return Err(error),
            (Ok(_), Err(source)) => return Err(source.into()),
            (Err(cause), Err(source)) if source.is_closed() => {
                return Err(cause.with_qemu_gone(source));
            }
            (Err(cause), Err(source)) => {
                return Err(SaveError::LeftPaused { cause: Box::new(cause), source });
            }
        };
        put_back?;
        if !received.set_run_state(&work.meta.run_state) {
            return Err(SaveError::NoRunState);
        }
        let pause_seconds = work.vm.pause_seen().unwrap_or_default().as_secs_f64();
        super::describe::record(work)?;
        let facts = work.facts(RouteUsed::Stream, pause_seconds, true);
        work.draft.finish(&received.places, &received.bitmaps, received.tail(), facts)?;
        Ok(Written { live: Some(LiveDone { method, pause_seconds }), ..written(&received) })
    }

    /// Chooses how, by trying: QEMU refuses the capability where the memory does not allow it.
    fn choose(&self, vm: &mut Vm, hold: bool) -> Result<(LiveMethod, StreamSettings), SaveError> {
        let version = vm.version()?;
        let reason = match self.before.background_snapshot() {
            _ if !version.has(Feature::StoppableSnapshot) => {
                format!(
                    "QEMU {version} leaves the guest standing where a background-snapshot ends early"
                )
            }
            None => "this QEMU has no background-snapshot".to_owned(),
            Some(ours) => match vm.change_stream_settings(&self.before, &ours) {
                Ok(()) => return Ok((LiveMethod::BackgroundSnapshot, ours)),
                Err(VmError::Qmp(error)) if error.is_refused() => error.to_string(),
                Err(error) => return Err(error.into()),
            },
        };
        let ours = self.before.pre_copy(self.live.pause_max, hold);
        vm.change_stream_settings(&self.before, &ours)?;
        Ok((LiveMethod::PreCopy { reason }, ours))
    }

    fn receive(&self, work: &mut Work<'_>, method: &LiveMethod) -> Result<Received, SaveError> {
        let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
        let workers = Workers::start(work.draft.file(), (work.options.io, 1));
        let workers = workers.map_err(SaveError::Workers)?;
        // Its stream must not end while QEMU (10.0.2) sets a background snapshot up: QEMU then closes
        // its descriptor 0, which may be a monitor or a disk by then. The guardian's copy keeps it
        // open until QEMU was told to stop.
        work.guard.keep_open(ours.as_fd())?;
        // From here on only the pause of this save is among the events.
        let _ = work.vm.pause_seen();
        let stands = *method == LiveMethod::BackgroundSnapshot && !work.disks.is_empty();
        if stands {
            work.vm.stop()?;
            work.disks.freeze(work.vm)?;
        }
        work.vm.send_stream(theirs.into())?;
        let limits = WaitLimits {
            control: work.control,
            process: peer_process(work.vm),
            stall: Some(STALL_TIMEOUT),
            deadline: Some(Instant::now() + self.live.timeout),
        };
        let receiver = StreamReceiver { draft: work.draft, workers, limits };
        let mut watch = Watch { vm: &mut *work.vm, disks: &mut *work.disks, method, stands };
        let receive = move || receiver.run(ours.into(), || Ok::<_, SaveError>(()));
        let both = beside(receive, |is_through| {
            let watched = watch.until(is_through);
            if watched.is_err() {
                // Its stream ends then, and with it the receiving.
                let _ = watch.vm.end_sending(CANCEL_TIMEOUT);
            }
            watched
        });
        let (received, watched) = match both {
            Ok(both) => both,
            // The other end of its stream is closed, but QEMU may not have noticed.
            Err(source) => {
                return Err(Peer::default().give_up(work.vm, SaveError::Workers(source)));
            }
        };
        if !watched? && received.is_ok() {
            // Nothing was missing, and yet QEMU does not say that it sent all.
            sent(work.vm)?;
        }
        received.map_err(|error| match error {
            SaveError::Receive(ReceiveError::TimedOut { .. }) => {
                let timeout = self.live.timeout;
                Peer::default().give_up(work.vm, SaveError::NotConverged { timeout })
            }
            error => Peer::default().give_up(work.vm, error),
        })
    }
}

/// What must be done with QEMU while it sends.
struct Watch<'a> {
    vm: &'a mut Vm,
    disks: &'a mut Disks,
    method: &'a LiveMethod,
    /// The guest was stopped, and waits until its memory is write-protected.
    stands: bool,
}

impl Watch<'_> {
    /// Does it until QEMU has sent all, or `is_finished` says that the receiver has ended; returns
    /// whether all was sent.
    fn until(&mut self, is_finished: impl Fn() -> bool) -> Result<bool, SaveError> {
        loop {
            // Look at the receiver first, then ask QEMU: once all has arrived, QEMU is about to complete.
            let finished = is_finished();
            let (outgoing, ram) = self.vm.outgoing_ram()?;
            match outgoing {
                Outgoing::Active if self.stands && ram.is_some_and(|ram| ram.pages > 0) => {
                    // QEMU sends pages once they are protected. It then sets the state in which it
                    // found the guest (10.0), which must not come after `cont`.
                    self.vm.run_state()?;
                    self.vm.cont()?;
                    self.stands = false;
                }
                Outgoing::Held if !finished => {
                    self.disks.freeze(self.vm)?;
                    self.vm.switch_over()?;
                }
                Outgoing::Active if !finished => {}
                Outgoing::Completed => return self.completed(),
                // All pages have arrived, but QEMU may not have reported completion yet: ask it once more.
                Outgoing::Active if sent(self.vm).is_ok() => return self.completed(),
                _ => return Ok(false),
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// The file will have all of it: the guest need not wait for the disk.
    fn completed(&mut self) -> Result<bool, SaveError> {
        if self.stands || *self.method != LiveMethod::BackgroundSnapshot {
            self.vm.cont()?;
        }
        Ok(true)
    }
}

/// Sees to it that the guest runs, however the sending ended: QEMU lets it run on by itself if it
/// was cancelled in time.
fn let_run(vm: &mut Vm) -> Result<(), VmError> {
    if vm.run_state()? == RunState::Running { Ok(()) } else { vm.cont() }
}
