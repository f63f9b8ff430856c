//! Saves a guest while it runs: chooses the method, and carries out those that need QEMU's stream.
//!
//! `userfault` and `aside`: see `userfault.rs` and `aside.rs`. `background-snapshot`: QEMU stops the
//! guest for some milliseconds, write-protects its memory and sends every page once, as it was then.
//! If QEMU cannot do that, `pre-copy`: QEMU sends the pages that the guest changes again, until few
//! are left; it stops the guest while it sends those.
//!
//! The disks are frozen while the guest stands still: for `background-snapshot`, vmfile stops the
//! guest before QEMU sends; for `pre-copy`, QEMU stops it at the end and waits
//! (`pause-before-switchover`).

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

use super::live_memory::LiveMemory;
use super::sending::{Peer, peer_process, wait_until_sent};
use super::stream::written;
use super::{Disks, Live, LiveDone, Work, Written};
use crate::error::{SaveError, UserfaultError};
use crate::receive::ReceiveError;

/// How long QEMU may send nothing: scanning all memory of a large guest takes less.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How long to wait between two queries of QEMU's progress: a stopped guest waits for it.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// How long QEMU may take to stop sending.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(60);

/// QEMU's migration settings before the save, and the caller's options.
#[derive(Debug)]
pub(super) struct LiveRoute {
    before: StreamSettings,
    live: Live,
    /// `Err` says why the memory of QEMU's process is not used.
    memory: Result<LiveMemory, String>,
    /// Whether no other method may be used than those that read this memory.
    only_memory: bool,
    /// Who writes to the guest's RAM and is not stopped by a write protection.
    other_writer: Option<String>,
}

/// A method, and what it needs.
struct Chosen {
    method: LiveMethod,
    /// QEMU's settings for it.
    settings: StreamSettings,
    /// How many bytes are to be copied aside.
    copied_bytes: u64,
}

impl LiveRoute {
    /// Asks QEMU for its migration settings, which are put back later.
    pub(super) fn prepare(
        vm: &mut Vm,
        live: Live,
        (memory, only_memory): (Result<LiveMemory, String>, bool),
    ) -> Result<LiveRoute, SaveError> {
        let (before, other_writer) = (vm.stream_settings()?, vm.other_writer()?);
        Ok(LiveRoute { before, live, memory, only_memory, other_writer })
    }

    /// Returns the migration settings that QEMU had before the save.
    pub(super) fn settings(&self) -> &StreamSettings {
        &self.before
    }

    /// Saves the VM by the best method that is possible, and completes the file.
    pub(super) fn write(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let hold = !work.disks.is_empty();
        let chosen = self.choose(work.vm, hold)?;
        if let Some(written) = self.by(work, &chosen)? {
            return Ok(written);
        }
        let pause_max = self.live.pause_max;
        let reason = format!("the guest's memory could not be copied aside within {pause_max:?}");
        let chosen = self.pre_copy(work.vm, hold, reason)?;
        let written = self.by(work, &chosen)?;
        Ok(written.expect("only a copy aside can be too much"))
    }

    /// Saves the VM by one method; returns `None` if the copy aside took too long. The guest runs
    /// afterwards, with QEMU's settings as they were.
    fn by(&mut self, work: &mut Work<'_>, chosen: &Chosen) -> Result<Option<Written>, SaveError> {
        let pause_max = self.live.pause_max;
        let Chosen { method, settings, copied_bytes } = chosen;
        let copied = match (&mut self.memory, method) {
            (Ok(memory), LiveMethod::Userfault) => memory.by_userfault(work).map(Copied::File),
            (Ok(memory), LiveMethod::Aside { .. }) => {
                let copied = memory.by_copy(work, (method, *copied_bytes, pause_max));
                copied.map(|written| written.map_or(Copied::TooLong, Copied::File))
            }
            _ => {
                let given_up = work.base.without_memory(work.options, "QEMU sends the memory");
                let received = given_up.and_then(|()| self.receive(work, method));
                received.map(Box::new).map(Copied::Stream)
            }
        };
        let runs = work.vm.unstoppable(PUT_BACK_TIMEOUT, resume_unless_running);
        let put_back = work
            .vm
            .unstoppable(PUT_BACK_TIMEOUT, |vm| vm.change_stream_settings(settings, &self.before));
        let copied = match (copied, runs) {
            (Ok(copied), Ok(())) => copied,
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
        match copied {
            Copied::File(written) => Ok(Some(written)),
            Copied::Stream(received) => finish(work, received, method.clone()).map(Some),
            Copied::TooLong => Ok(None),
        }
    }

    /// Chooses the method by trying: QEMU refuses the capability if the guest's memory does not
    /// allow it.
    fn choose(&self, vm: &mut Vm, hold: bool) -> Result<Chosen, SaveError> {
        let protected = self.protection(vm)?;
        let memory = self.memory.as_ref();
        let mut reasons = Vec::new();
        match (&protected, memory.map(|memory| &memory.not_by_userfault)) {
            (Ok(settings), Ok(None)) => {
                let (method, settings) = (LiveMethod::Userfault, settings.clone());
                return Ok(Chosen { method, settings, copied_bytes: 0 });
            }
            (Ok(_), Ok(Some(reason))) | (Ok(_), Err(reason)) | (Err(reason), _) => {
                reasons.push(reason.clone());
            }
        }
        match memory.map(|memory| memory.to_copy(self.live.pause_max)) {
            Ok(Ok(copied_bytes)) => {
                self.unprotect(vm, &protected)?;
                let method = LiveMethod::Aside { reason: reasons.remove(0) };
                return Ok(Chosen { method, settings: self.before.clone(), copied_bytes });
            }
            Ok(Err(reason)) => reasons.push(reason),
            Err(_) => {}
        }
        let reason = reasons.join("; ");
        match protected {
            _ if self.only_memory => {
                self.unprotect(vm, &protected)?;
                Err(UserfaultError::NotPossible { reason }.into())
            }
            Ok(settings) => {
                let method = LiveMethod::BackgroundSnapshot { reason };
                Ok(Chosen { method, settings, copied_bytes: 0 })
            }
            Err(_) => self.pre_copy(vm, hold, reason),
        }
    }

    /// Has QEMU switch on `background-snapshot`; returns its settings then, or why it cannot be
    /// used.
    fn protection(&self, vm: &mut Vm) -> Result<Result<StreamSettings, String>, SaveError> {
        let version = vm.version()?;
        Ok(Err(match (&self.other_writer, self.before.background_snapshot()) {
            (Some(other), _) => format!("{other} writes to the guest's RAM from outside of QEMU"),
            _ if !version.has(Feature::StoppableSnapshot) => {
                format!(
                    "QEMU {version} leaves the guest stopped if a background-snapshot ends early"
                )
            }
            (None, None) => "this QEMU has no background-snapshot".to_owned(),
            (None, Some(ours)) => match vm.change_stream_settings(&self.before, &ours) {
                Ok(()) => return Ok(Ok(ours)),
                Err(VmError::Qmp(error)) if error.is_refused() => error.to_string(),
                Err(error) => return Err(error.into()),
            },
        }))
    }

    /// Puts back the settings that [`LiveRoute::protection`] has changed.
    fn unprotect(
        &self,
        vm: &mut Vm,
        protected: &Result<StreamSettings, String>,
    ) -> Result<(), VmError> {
        let changed = protected.as_ref().ok();
        changed.map_or(Ok(()), |ours| vm.change_stream_settings(ours, &self.before))
    }

    fn pre_copy(&self, vm: &mut Vm, hold: bool, reason: String) -> Result<Chosen, SaveError> {
        if self.only_memory {
            return Err(UserfaultError::NotPossible { reason }.into());
        }
        let settings = self.before.pre_copy(self.live.pause_max, hold);
        vm.change_stream_settings(&self.before, &settings)?;
        Ok(Chosen { method: LiveMethod::PreCopy { reason }, settings, copied_bytes: 0 })
    }

    fn receive(&self, work: &mut Work<'_>, method: &LiveMethod) -> Result<Received, SaveError> {
        let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
        let workers = Workers::start(work.draft.file(), (work.options.io, 1));
        let workers = workers.map_err(SaveError::Workers)?;
        // The stream must not end while QEMU (10.0.2) sets up a background snapshot: QEMU would
        // close its descriptor 0, which may be a monitor or a disk. If this process ends, the
        // guardian's copy keeps the stream open until QEMU was told to stop.
        work.guard.keep_open(ours.as_fd())?;
        // Discards the events of earlier pauses: `write` measures the pause of this save.
        let _ = work.vm.pause_seen();
        let stands = is_snapshot(method) && !work.disks.is_empty();
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
                // This ends the stream, and with it the receiver.
                let _ = watch.vm.end_sending(CANCEL_TIMEOUT);
            }
            watched
        });
        let (received, watched) = match both {
            Ok(both) => both,
            // The receiver could not start or panicked. Our end of the stream is closed, but QEMU
            // may not have noticed.
            Err(source) => {
                return Err(Peer::default().give_up(work.vm, SaveError::Workers(source)));
            }
        };
        if !watched? && received.is_ok() {
            // The receiver has everything, but QEMU has not reported completion.
            wait_until_sent(work.vm)?;
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

/// Controls QEMU while it sends.
struct Watch<'a> {
    vm: &'a mut Vm,
    disks: &'a mut Disks,
    method: &'a LiveMethod,
    /// Whether the guest is stopped, until QEMU has write-protected its memory.
    stands: bool,
}

impl Watch<'_> {
    /// Runs until QEMU has sent everything or `is_finished` says that the receiver has ended;
    /// returns whether QEMU has sent everything.
    fn until(&mut self, is_finished: impl Fn() -> bool) -> Result<bool, SaveError> {
        loop {
            // Look at the receiver first, then ask QEMU: once all has arrived, QEMU is about to
            // complete.
            let finished = is_finished();
            let (outgoing, ram) = self.vm.outgoing_ram()?;
            match outgoing {
                Outgoing::Active if self.stands && ram.is_some_and(|ram| ram.pages > 0) => {
                    // QEMU sends pages once they are protected. It then sets the run state that the
                    // guest had before (10.0), which must not happen after `cont`.
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
                // All pages have arrived, but QEMU may not have reported completion yet: ask it
                // once more.
                Outgoing::Active if wait_until_sent(self.vm).is_ok() => return self.completed(),
                _ => return Ok(false),
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Resumes the guest if it is stopped: QEMU has sent everything, and the guest need not wait
    /// for the disk.
    fn completed(&mut self) -> Result<bool, SaveError> {
        if self.stands || !is_snapshot(self.method) {
            self.vm.cont()?;
        }
        Ok(true)
    }
}

/// Resumes the guest unless it runs: QEMU resumes it by itself if the migration was cancelled in
/// time.
fn resume_unless_running(vm: &mut Vm) -> Result<(), VmError> {
    if vm.run_state()? == RunState::Running { Ok(()) } else { vm.cont() }
}

/// What was copied while the guest ran.
enum Copied {
    /// The file, which is complete but for its name.
    File(Written),
    Stream(Box<Received>),
    /// Nothing: the copy aside took too long.
    TooLong,
}

/// Completes the file of a guest that QEMU has sent.
fn finish(
    work: &mut Work<'_>,
    mut received: Box<Received>,
    method: LiveMethod,
) -> Result<Written, SaveError> {
    if !received.set_run_state(&work.meta.run_state) {
        return Err(SaveError::NoRunState);
    }
    let pause_seconds = work.vm.pause_seen().unwrap_or_default().as_secs_f64();
    super::describe::record(work)?;
    let facts = work.facts(RouteUsed::Stream, pause_seconds, true);
    work.draft.finish(&received.places, (&received.bitmaps, &[]), received.tail(), facts)?;
    let live = LiveDone { method, pause_seconds, waits: None };
    Ok(Written { live: Some(live), ..written(&received) })
}

fn is_snapshot(method: &LiveMethod) -> bool {
    matches!(method, LiveMethod::BackgroundSnapshot { .. })
}
