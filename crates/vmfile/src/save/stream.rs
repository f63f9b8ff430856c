//! The route `stream`: RAM and device state from QEMU's own migration stream.
//!
//! It needs only access to the monitor, and works with every QEMU. vmfile changes QEMU's migration
//! capabilities and parameters for it, and puts them back.

use super::RouteUsed;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use vmfile_pages::draft::Draft;
use vmfile_pages::lane::Workers;
use vmfile_qemu::{Feature, PUT_BACK_TIMEOUT, RunState, SettingsChange, StreamSettings, Vm};
use vmfile_stream::Channels;
use vmfile_stream::incoming::WaitLimits;
use vmfile_stream::listener::{Listener, SocketPlace};
use vmfile_stream::receiver::{Received, StreamReceiver};

use super::sending::{Peer, peer_process, wait_until_sent};
use super::sleep::sleeps;
use super::target::page_size_unnamed;
use super::{SaveOptions, Work, Written};
use crate::error::SaveError;

/// How long QEMU may send nothing: while the guest is stopped, QEMU has nothing to wait for.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// QEMU's migration settings before the save, and what is needed to receive the VM.
#[derive(Debug)]
pub(super) struct StreamRoute {
    before: StreamSettings,
    /// The settings for a VM that need not be paused afterwards.
    ours: StreamSettings,
    /// The settings with which a VM stays paused, if QEMU has them.
    snapshot: Option<StreamSettings>,
    change: SettingsChange,
    /// How many connections carry pages beside the stream.
    channels: Option<Channels>,
    /// Where to make the socket for these connections; `None` once it exists, or without channels.
    place: Option<SocketPlace>,
    /// That socket; `None` before it exists, and once it was used.
    listener: Option<Listener>,
    /// A thread for each connection, started while the VM runs; `None` once they were used.
    workers: Option<Workers>,
}

impl StreamRoute {
    /// Asks QEMU for its migration settings, which are put back later.
    pub(super) fn prepare(
        vm: &mut Vm,
        options: &SaveOptions,
        draft: &Draft,
    ) -> Result<StreamRoute, SaveError> {
        let channels = options.channels;
        let before = vm.stream_settings()?;
        let ours = match channels {
            None => before.plain(),
            Some(channels) => before.multifd(channels.count()),
        };
        let snapshot = before.background_snapshot();
        let all: Vec<_> = snapshot.iter().chain([&ours]).cloned().collect();
        let change = SettingsChange::new(&before, &all);
        let process = vm.pid().ok();
        let place = channels.map(|_| SocketPlace::new(process));
        let width = (options.io, usize::from(Channels::count_of(channels)) + 1);
        let workers = Some(Workers::start(draft.file(), width).map_err(SaveError::Workers)?);
        Ok(StreamRoute { before, ours, snapshot, change, channels, place, listener: None, workers })
    }

    /// Returns what the save may change in QEMU's migration settings.
    pub(super) fn settings(&self) -> &SettingsChange {
        &self.change
    }

    /// Returns the paths of the socket that QEMU connects to, and of its directory.
    pub(super) fn sockets(&self) -> Vec<PathBuf> {
        self.place.as_ref().map(|place| place.paths().to_vec()).unwrap_or_default()
    }

    /// Makes the socket that QEMU connects to.
    pub(super) fn listen(&mut self) -> Result<(), SaveError> {
        self.listener = self.place.take().map(SocketPlace::listen).transpose()?;
        Ok(())
    }

    /// Has QEMU send the paused VM, writes it to the file, and completes the file.
    pub(super) fn write(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let changed = self.change_settings(work);
        let channels = self.channels.zip(self.listener.take());
        let received = changed.and_then(|()| {
            let workers = self.workers.take().expect("a route writes once");
            receive(work, channels, workers)
        });
        // Also after an error: some settings may have been changed.
        let put_back =
            work.vm.unstoppable(PUT_BACK_TIMEOUT, |vm| vm.put_back_stream_settings(&self.change));
        let mut received = received?;
        put_back?;
        // QEMU writes "paused": the VM was paused for the save.
        let (state, bytes) = received.device_state_mut();
        super::describe::write_run_state(work, state, bytes)?;
        super::describe::record(work)?;
        let facts = work.facts(RouteUsed::Stream, work.seconds_paused(), false);
        work.draft.finish(&received.places, (&received.bitmaps, &[]), received.tail(), facts)?;
        Ok(written(&received))
    }
}

impl StreamRoute {
    /// Changes QEMU's settings.
    ///
    /// A VM that stays paused is sent as a background snapshot if QEMU can do that: it is then
    /// paused as before, and can be saved once more. One whose guest sleeps must be.
    fn change_settings(&self, work: &mut Work<'_>) -> Result<(), SaveError> {
        let sleeps = sleeps(work)?;
        if sleeps || work.stays_paused() {
            match self.change_for_a_snapshot(work.vm) {
                Ok(()) => return Ok(()),
                Err(reason) if sleeps => return Err(SaveError::Sleeps { reason }),
                Err(reason) => work.warn_of_postmigrate(&reason),
            }
        }
        Ok(work.vm.change_stream_settings(&self.before, &self.ours)?)
    }

    /// Changes QEMU's settings to those of a background snapshot, or says why they were not
    /// changed.
    fn change_for_a_snapshot(&self, vm: &mut Vm) -> Result<(), String> {
        let version = vm.version().map_err(|error| error.to_string())?;
        if !version.has(Feature::PausedSnapshot) {
            return Err(format!("QEMU {version} lets the guest run after a background snapshot"));
        }
        // QEMU aborts (10.0, 11.1): a VM that has panicked, say, does not become one that is paused.
        let state = vm.run_state().map_err(|error| error.to_string())?;
        if state != RunState::Paused {
            return Err(format!("QEMU takes no background snapshot of a VM that is {state}"));
        }
        if self.channels.is_some() {
            return Err("QEMU takes no background snapshot by channels".to_owned());
        }
        let ours = self.snapshot.as_ref();
        let ours = ours.ok_or_else(|| "this QEMU has no background-snapshot".to_owned())?;
        vm.change_stream_settings(&self.before, ours).map_err(|error| error.to_string())
    }
}

/// Receives the VM. When this returns, even with an error, QEMU does not send any more.
fn receive(
    work: &mut Work<'_>,
    channels: Option<(Channels, Listener)>,
    workers: Workers,
) -> Result<Received, SaveError> {
    let process = peer_process(work.vm);
    let page_size = page_size_unnamed(work.vm)?;
    let limits =
        WaitLimits { control: work.control, process, stall: Some(STALL_TIMEOUT), deadline: None };
    let mut peer = Peer::default();
    let connections = match channels {
        None => {
            let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
            peer.begin(work.vm, theirs.into()).map(|()| ours.into())
        }
        Some((channels, listener)) => {
            peer.connect((work.vm, work.guard), (listener, channels), &limits)
        }
    };
    let vm = &mut *work.vm;
    let received = connections.and_then(|connections| {
        let receiver = StreamReceiver { draft: work.draft, workers, limits, page_size };
        receiver.run(connections, || wait_until_sent(vm))
    });
    received.map_err(|error| peer.give_up(work.vm, error))
}

/// Returns the result of a route that received the VM as a stream.
pub(super) fn written(received: &Received) -> Written {
    Written {
        pages_total: received.places.pages_total(),
        pages_data: received.bitmaps.iter().map(|bitmap| bitmap.data_count().0).sum(),
        pages_of_base: 0,
        bytes_read: 0,
        bytes_written: received.counts.written_bytes,
        bytes_rewritten: received.counts.rewritten_bytes,
        io: received.backend.clone(),
        live: None,
    }
}
