//! Saves a guest while it runs, from QEMU's stream.
//!
//! `background-snapshot`: QEMU stops the guest for some milliseconds, write-protects its memory and
//! sends every page once, as it was then. If QEMU cannot do that, `pre-copy`: QEMU sends the pages that
//! the guest changes again, until few are left; it stops the guest while it sends those.
//!
//! The disks are frozen while the guest stands still: for `background-snapshot`, vmfile stops the
//! guest before QEMU sends; for `pre-copy`, QEMU stops it at the end and waits
//! (`pause-before-switchover`). There vmfile also looks whether the guest has fallen asleep meanwhile.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmfile_engine::beside;
use vmfile_pages::lane::Workers;
use vmfile_qemu::{Outgoing, RunState};
use vmfile_stream::incoming::WaitLimits;
use vmfile_stream::receiver::{Received, StreamReceiver};

use super::live_memory::{let_run_by_another, refuse_if_overtaken};
use super::sending::{Ended, Peer, peer_process, wait_until_sent};
use super::sleep::cannot_migrate;
use super::stream::written;
use super::target::page_size_unnamed;
use super::{LiveDone, LiveMethod, RouteUsed, Work, Written};
use crate::error::SaveError;
use crate::receive::ReceiveError;

/// How long QEMU may send nothing: scanning all memory of a large guest takes less.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How long to wait between two queries of QEMU's progress: a stopped guest waits for it.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Has QEMU send the guest, by settings that are in place already, and receives it within `timeout`.
pub(super) fn receive(
    work: &mut Work<'_>,
    method: &LiveMethod,
    timeout: Duration,
) -> Result<Received, SaveError> {
    let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
    let workers = Workers::start(work.draft.file(), (work.options.io, 1));
    let workers = workers.map_err(SaveError::Workers)?;
    let page_size = page_size_unnamed(work.vm)?;
    // The stream must not end while QEMU (10.0.2) sets up a background snapshot: QEMU would
    // close its descriptor 0, which may be a monitor or a disk. If this process ends, the
    // guardian's copy keeps the stream open until QEMU was told to stop.
    work.guard.keep_open(ours.as_fd())?;
    let is_snapshot = matches!(method, LiveMethod::BackgroundSnapshot { .. });
    let stands = is_snapshot && !work.disks.is_empty();
    // QEMU stops the guest: for a background snapshot at the beginning, for pre-copy at the end.
    work.set_may_stand(true)?;
    let mut begun = (work.vm.stops(), work.vm.resumes());
    if stands {
        if !work.vm.stop_if_running()? {
            return Err(stopped_meanwhile(work)?);
        }
        begun = (work.vm.stops(), work.vm.resumes());
        work.disks.freeze(work.vm)?;
    }
    if !stands {
        refuse_unless_it_runs(work, is_snapshot)?;
    }
    let end = ours.try_clone().map_err(SaveError::Socket)?;
    work.vm.send_stream(theirs.into())?;
    let limits = WaitLimits {
        control: work.control,
        process: peer_process(work.vm),
        stall: Some(STALL_TIMEOUT),
        deadline: Some(Instant::now() + timeout),
    };
    let receiver = StreamReceiver { draft: work.draft, workers, limits, page_size };
    let (progress, is_over) = (Progress::default(), AtomicBool::new(false));
    let progress = &progress;
    let mut watch = Watch { work: &mut *work, is_snapshot, stands, begun, progress };
    let spare = end.try_clone().map_err(SaveError::Socket);
    let receive = || {
        let received = receiver.run(ours.into(), || Ok::<_, SaveError>(()));
        if received.is_ok() {
            progress.has_all.store(true, Ordering::Relaxed);
        } else {
            progress.has_failed.store(true, Ordering::Relaxed);
            // QEMU must not wait for room: in the last phase of pre-copy it holds the lock that its
            // answers need.
            Peer::of(end.into()).drain(&is_over);
        }
        received
    };
    let both = beside(receive, |is_through| {
        let watched = watch.until(is_through);
        let must_end = watched.is_err() || progress.has_failed.load(Ordering::Relaxed);
        // This ends the stream, and with it the receiver.
        let ended = must_end.then(|| Ended::now(watch.work.vm));
        is_over.store(true, Ordering::Relaxed);
        (watched, ended)
    });
    let (received, (watched, ended)) = match both {
        Ok(both) => both,
        // The receiver could not start or panicked.
        Err(source) => {
            return Err(Peer::of(spare?.into()).give_up(work.vm, SaveError::Workers(source)));
        }
    };
    let error = match (watched, received) {
        (Ok(true), Ok(received)) => return Ok(received),
        // The receiver has everything, but QEMU has not reported completion.
        (Ok(false), Ok(received)) => return wait_until_sent(work.vm).map(|()| received),
        (Err(error), _) => return Err(error),
        (_, Err(SaveError::Receive(ReceiveError::TimedOut { .. }))) => {
            SaveError::NotConverged { timeout }
        }
        (_, Err(error)) => error,
    };
    Err(ended.unwrap_or_else(|| Ended::now(work.vm)).reason(error))
}

/// How far the receiver is.
#[derive(Debug, Default)]
struct Progress {
    /// It has received everything.
    has_all: AtomicBool,
    /// It has ended with an error, and discards what comes now.
    has_failed: AtomicBool,
}

/// Controls QEMU while it sends.
struct Watch<'a, 'w> {
    work: &'a mut Work<'w>,
    is_snapshot: bool,
    /// How often the guest had been stopped and let run when QEMU began.
    begun: (u64, u64),
    /// Whether the guest is stopped, until QEMU has write-protected its memory.
    stands: bool,
    progress: &'a Progress,
}

impl Watch<'_, '_> {
    /// Runs until QEMU has sent everything or `is_finished` says that the receiver has ended;
    /// returns whether QEMU has sent everything.
    fn until(&mut self, is_finished: impl Fn() -> bool) -> Result<bool, SaveError> {
        loop {
            // Look at the receiver first, then ask QEMU: once all has arrived, QEMU is about to
            // complete.
            let finished = is_finished();
            let has_all = self.progress.has_all.load(Ordering::Relaxed);
            if self.progress.has_failed.load(Ordering::Relaxed) || (finished && !has_all) {
                return Ok(false);
            }
            let (outgoing, ram) = self.work.vm.outgoing_ram()?;
            refuse_if_overtaken(self.work.vm)?;
            let sends =
                matches!(outgoing, Outgoing::Active) && ram.is_some_and(|ram| ram.pages > 0);
            if self.is_snapshot && sends {
                self.protected()?;
            }
            match outgoing {
                Outgoing::Active | Outgoing::Held if self.is_stopped_by_another()? => {
                    return Err(stopped_meanwhile(self.work)?);
                }
                // While QEMU holds the migration, the guest can no longer fall asleep.
                Outgoing::Active | Outgoing::Held if self.has_fallen_asleep() => {
                    return Err(cannot_migrate());
                }
                Outgoing::Held if !finished => {
                    self.work.disks.freeze(self.work.vm)?;
                    self.work.vm.switch_over()?;
                }
                Outgoing::Active if !finished => {}
                Outgoing::Completed => return self.completed(),
                // All pages have arrived, but QEMU may not have reported completion yet: ask it
                // once more.
                Outgoing::Active if wait_until_sent(self.work.vm).is_ok() => {
                    return self.completed();
                }
                _ => return Ok(false),
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// QEMU has protected the memory and sends pages, and the guest can run.
    fn protected(&mut self) -> Result<(), SaveError> {
        if !self.work.footprint.may_stand {
            return Ok(());
        }
        // QEMU first sets the run state that the guest had before (10.0), which must not happen after
        // `cont`.
        self.work.vm.run_state()?;
        if std::mem::take(&mut self.stands) {
            // The disks are of the moment at which vmfile stopped the guest: QEMU lets a guest that was
            // stopped before stand still.
            if self.work.vm.resumes() != self.begun.1 {
                return Err(let_run_by_another());
            }
            self.work.vm.cont()?;
        }
        self.work.set_may_stand(false)
    }

    /// Whether another client, or the guest itself, has stopped a guest that pre-copy sends. When QEMU
    /// stops it, its run state is `finish-migrate`.
    fn is_stopped_by_another(&mut self) -> Result<bool, SaveError> {
        let (stops, resumes) = self.begun;
        let stands = self.work.vm.stops() - stops > self.work.vm.resumes() - resumes;
        if self.is_snapshot || !stands {
            return Ok(false);
        }
        let state = self.work.vm.run_state()?;
        Ok(!matches!(state, RunState::Running | RunState::FinishMigrate | RunState::PostMigrate))
    }

    /// Whether a guest that pre-copy sends has fallen asleep. QEMU's events of it come before the answer that
    /// says where the migration is.
    fn has_fallen_asleep(&self) -> bool {
        !self.is_snapshot && self.work.vm.has_fallen_asleep()
    }

    /// Resumes the guest if it is stopped: QEMU has sent everything, and the guest need not wait
    /// for the disk.
    fn completed(&mut self) -> Result<bool, SaveError> {
        if self.is_snapshot {
            self.protected()?;
        } else {
            self.work.vm.cont()?;
            self.work.set_may_stand(false)?;
        }
        Ok(true)
    }
}

/// Completes the file of a guest that QEMU has sent.
pub(super) fn finish(
    work: &mut Work<'_>,
    mut received: Box<Received>,
    method: LiveMethod,
) -> Result<Written, SaveError> {
    let (state, bytes) = received.device_state_mut();
    super::describe::write_run_state(work, state, bytes)?;
    let live = LiveDone::now(work.vm, method, None);
    super::describe::record(work)?;
    let facts = work.facts(RouteUsed::Stream, live.pause_seconds, true);
    work.draft.finish(&received.places, (&received.bitmaps, &[]), received.tail(), facts)?;
    Ok(Written { live: Some(live), ..written(&received) })
}

/// Refuses a guest that something else has stopped: right before QEMU is told to send it, because QEMU aborts
/// if it sends a background snapshot of a guest that has panicked, shut down or met an I/O error (10.0, 11.1).
/// For anything but a background snapshot, the guest must not sleep either.
pub(super) fn refuse_unless_it_runs(
    work: &mut Work<'_>,
    is_snapshot: bool,
) -> Result<(), SaveError> {
    let state = work.vm.run_state()?;
    if !is_snapshot && state == RunState::Suspended {
        return Err(cannot_migrate());
    }
    if work.vm.runs_or_sleeps(&state)? { Ok(()) } else { Err(stopped_meanwhile(work)?) }
}

/// Returns the error for a guest that something else has stopped, and leaves it so.
fn stopped_meanwhile(work: &mut Work<'_>) -> Result<SaveError, SaveError> {
    work.set_may_stand(false)?;
    Ok(SaveError::StoppedMeanwhile { found: work.vm.run_state()?.to_string() })
}
