//! The route `stream`: RAM and device state from QEMU's own migration stream.
//!
//! It needs no right but the monitor's, and every QEMU has it. QEMU's capabilities and parameters are
//! changed for it and put back as they were.

use super::RouteUsed;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use vmfile_pages::draft::Draft;
use vmfile_pages::lane::Workers;
use vmfile_qemu::{Feature, PUT_BACK_TIMEOUT, StreamSettings, Vm, VmError};
use vmfile_stream::Channels;
use vmfile_stream::incoming::WaitLimits;
use vmfile_stream::listener::{Listener, SocketPlace};
use vmfile_stream::receiver::{Received, StreamReceiver};

use super::sending::{Peer, peer_process, sent};
use super::{SaveOptions, Work, Written};
use crate::error::SaveError;

/// How long QEMU may be silent: a VM that is stopped has nothing to wait for.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// A VM that can send itself, and the settings it had.
#[derive(Debug)]
pub(super) struct StreamRoute {
    before: StreamSettings,
    /// How many connections beside the stream pages go by.
    channels: Option<Channels>,
    /// Where QEMU makes these connections; `None` once there is a socket, or without channels.
    place: Option<SocketPlace>,
    /// The socket there; `None` until then, and once it was used.
    listener: Option<Listener>,
    /// A thread for each connection, started while the VM runs; `None` once they were used.
    workers: Option<Workers>,
}

impl StreamRoute {
    /// Asks for the settings, which must be put back.
    pub(super) fn prepare(
        vm: &mut Vm,
        options: &SaveOptions,
        draft: &Draft,
    ) -> Result<StreamRoute, SaveError> {
        let channels = options.channels;
        let before = vm.stream_settings()?;
        let process = vm.pid().ok();
        let place = channels.map(|_| SocketPlace::new(process));
        let width = (options.io, usize::from(Channels::count_of(channels)) + 1);
        let workers = Some(Workers::start(draft.file(), width).map_err(SaveError::Workers)?);
        Ok(StreamRoute { before, channels, place, listener: None, workers })
    }

    /// Returns the migration settings as they were.
    pub(super) fn settings(&self) -> &StreamSettings {
        &self.before
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

    /// Lets QEMU send the paused VM, writes what comes, and then what belongs around it.
    pub(super) fn write(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let (ours, changed) = self.change_settings(work);
        let channels = self.channels.zip(self.listener.take());
        let received = changed.map_err(SaveError::from).and_then(|()| {
            let workers = self.workers.take().expect("a route writes once");
            receive(work, channels, workers)
        });
        // What was changed before something failed is put back, too.
        let put_back = work
            .vm
            .unstoppable(PUT_BACK_TIMEOUT, |vm| vm.change_stream_settings(&ours, &self.before));
        let mut received = received?;
        put_back?;
        // QEMU writes "paused": the VM was paused for the save.
        if !received.set_run_state(&work.meta.run_state) {
            return Err(SaveError::NoRunState);
        }
        super::describe::record(work)?;
        let facts = work.facts(RouteUsed::Stream, work.seconds_paused(), false);
        work.draft.finish(&received.places, &received.bitmaps, received.tail(), facts)?;
        Ok(written(&received))
    }
}

impl StreamRoute {
    /// Changes QEMU's settings; returns those that it may have now, whatever came of it.
    ///
    /// A VM that stays paused is sent as a background snapshot, where QEMU can: it is then paused as
    /// before, and can be saved once more.
    fn change_settings(&self, work: &mut Work<'_>) -> (StreamSettings, Result<(), VmError>) {
        if work.stays_paused() {
            match self.change_for_a_snapshot(work.vm) {
                Ok(ours) => return (ours, Ok(())),
                Err(reason) => work.warn_of_postmigrate(&reason),
            }
        }
        let ours = match self.channels {
            None => self.before.plain(),
            Some(channels) => self.before.multifd(channels.count()),
        };
        let changed = work.vm.change_stream_settings(&self.before, &ours);
        (ours, changed)
    }

    /// Changes QEMU's settings to those of a background snapshot, or says why they were not changed.
    fn change_for_a_snapshot(&self, vm: &mut Vm) -> Result<StreamSettings, String> {
        let version = vm.version().map_err(|error| error.to_string())?;
        if !version.has(Feature::PausedSnapshot) {
            return Err(format!("QEMU {version} lets the guest run after a background snapshot"));
        }
        if self.channels.is_some() {
            return Err("QEMU takes no background snapshot by channels".to_owned());
        }
        let ours = self.before.background_snapshot();
        let ours = ours.ok_or_else(|| "this QEMU has no background-snapshot".to_owned())?;
        let changed = vm.change_stream_settings(&self.before, &ours);
        changed.map(|()| ours).map_err(|error| error.to_string())
    }
}

/// Receives the VM; whatever comes of it, QEMU is not sending any more.
fn receive(
    work: &mut Work<'_>,
    channels: Option<(Channels, Listener)>,
    workers: Workers,
) -> Result<Received, SaveError> {
    let process = peer_process(work.vm);
    let limits =
        WaitLimits { control: work.control, process, stall: Some(STALL_TIMEOUT), deadline: None };
    let mut peer = Peer::default();
    let connections = match channels {
        None => {
            let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
            work.vm.send_stream(theirs.into()).map(|()| ours.into()).map_err(SaveError::from)
        }
        Some((channels, listener)) => {
            peer.connect((work.vm, work.guard), (listener, channels), &limits)
        }
    };
    let vm = &mut *work.vm;
    let received = connections.and_then(|connections| {
        let receiver = StreamReceiver { draft: work.draft, workers, limits };
        receiver.run(connections, || sent(vm))
    });
    received.map_err(|error| peer.give_up(work.vm, error))
}

/// Returns what a route says that received the VM by its stream.
pub(super) fn written(received: &Received) -> Written {
    Written {
        pages_total: received.places.pages_total(),
        pages_data: received.bitmaps.iter().map(|bitmap| bitmap.data_count().0).sum(),
        bytes_written: received.counts.written_bytes,
        bytes_rewritten: received.counts.rewritten_bytes,
        io: received.backend.clone(),
        live: None,
    }
}
