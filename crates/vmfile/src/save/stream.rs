//! The route `stream`: RAM and device state from QEMU's own migration stream.
//!
//! It needs no right but the monitor's, and every QEMU has it. QEMU's capabilities and parameters are
//! changed for it and put back as they were.

use std::fs;
use std::num::NonZeroU8;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmfile_qemu::{Outgoing, PUT_BACK_TIMEOUT, StreamSettings, Vm};

use super::{SaveOptions, Work, Written};
use crate::error::SaveError;
use crate::listener::Listener;
use crate::multifd::{CHANNELS_MAX, ChannelsError, Connections};
use crate::receive::ReceiveError;
use crate::source::stream::Patience;
use crate::stream_receiver::{Received, StreamReceiver};

/// How long QEMU may be silent: a VM that is stopped has nothing to wait for.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How long QEMU may take to see that its stream has ended.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// A VM that can send itself, and the settings it had.
#[derive(Debug)]
pub(super) struct StreamRoute {
    before: StreamSettings,
    /// How many connections beside the stream pages go by, and where QEMU makes them.
    channels: Option<(NonZeroU8, Listener)>,
}

impl StreamRoute {
    /// Asks for the settings, which must be put back.
    pub(super) fn prepare(vm: &mut Vm, options: &SaveOptions) -> Result<StreamRoute, SaveError> {
        let channels = options.channels;
        let found = channels.map_or(0, |channels| channels.get().into());
        if found > CHANNELS_MAX {
            return Err(ReceiveError::from(ChannelsError::TooMany { found }).into());
        }
        let before = vm.stream_settings()?;
        let user = user_of(vm);
        let listen = |channels| Ok::<_, SaveError>((channels, Listener::bind_for(user)?));
        Ok(StreamRoute { before, channels: channels.map(listen).transpose()? })
    }

    /// Returns the migration settings as they were.
    pub(super) fn settings(&self) -> &StreamSettings {
        &self.before
    }

    /// Returns the socket that QEMU connects to, and its directory.
    pub(super) fn sockets(&self) -> Vec<PathBuf> {
        let path = self.channels.as_ref().map(|(_, listener)| listener.path());
        path.into_iter().flat_map(|path| path.ancestors().take(2)).map(Path::to_path_buf).collect()
    }

    /// Lets QEMU send the paused VM, writes what comes, and then what belongs around it.
    pub(super) fn write(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let ours = match &self.channels {
            None => self.before.plain(),
            Some((channels, _)) => self.before.multifd(*channels),
        };
        let channels = self.channels.take();
        let changed = work.vm.change_stream_settings(&self.before, &ours);
        let received = changed.map_err(SaveError::from).and_then(|()| receive(work, channels));
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
        let facts = work.facts("stream", work.seconds_paused(), false);
        work.draft.finish(&received.places, &received.bitmaps, received.tail(), facts)?;
        Ok(written(&received))
    }
}

/// Receives the VM; whatever comes of it, QEMU is not sending any more.
fn receive(
    work: &mut Work<'_>,
    channels: Option<(NonZeroU8, Listener)>,
) -> Result<Received, SaveError> {
    let patience = Patience { control: work.control, stall: Some(STALL_TIMEOUT), deadline: None };
    let connections = match channels {
        None => {
            let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
            work.vm.send_stream(theirs.into())?;
            ours.into()
        }
        Some((channels, listener)) => {
            work.vm.send_to_socket(listener.path())?;
            let accepted = Connections::accept(listener, channels.get().into(), &patience);
            accepted.map_err(|error| why_not(work.vm, error.into()))?
        }
    };
    let receiver = StreamReceiver { draft: work.draft, io: work.options.io, patience };
    let vm = &mut *work.vm;
    receiver.run(connections, || sent(vm)).map_err(|error| why_not(work.vm, error))
}

/// Returns the user as whom QEMU runs, as far as that is known.
fn user_of(vm: &mut Vm) -> Option<u32> {
    let pid = vm.pid().ok()?;
    Some(fs::metadata(format!("/proc/{pid}")).ok()?.uid())
}

/// Returns what a route says that received the VM by its stream.
pub(super) fn written(received: &Received) -> Written {
    Written {
        pages_total: received.places.pages_total(),
        pages_data: received.bitmaps.iter().map(|bitmap| bitmap.data_count().0).sum(),
        bytes_written: received.counts.written_bytes,
        bytes_rewritten: received.counts.rewritten_bytes,
        io: received.backend.to_string(),
        live: None,
    }
}

/// The last byte has come: waits until QEMU says that it was.
pub(super) fn sent(vm: &mut Vm) -> Result<(), SaveError> {
    match vm.wait_sent(END_TIMEOUT)? {
        Outgoing::Completed => Ok(()),
        other => Err(not_sent(other)),
    }
}

/// Ends the sending after `error`, and says what was the reason: QEMU's, where QEMU gave up first.
pub(super) fn why_not(vm: &mut Vm, error: SaveError) -> SaveError {
    let is_cut = matches!(&error, SaveError::Receive(ReceiveError::Stream(_)));
    if let (true, Ok(Outgoing::Failed(reason))) = (is_cut, vm.outgoing()) {
        return SaveError::Migration { reason };
    }
    // A QEMU that fails on its own meanwhile has stopped sending as well.
    match vm.cancel_sending(END_TIMEOUT) {
        Ok(Outgoing::Active | Outgoing::Held) => {
            SaveError::Migration { reason: "it does not stop".to_owned() }
        }
        _ => error,
    }
}

/// Says why QEMU has not sent the VM.
pub(super) fn not_sent(outgoing: Outgoing) -> SaveError {
    let reason = match outgoing {
        Outgoing::Failed(reason) => reason,
        Outgoing::Cancelled => "somebody cancelled it".to_owned(),
        _ => "it does not end".to_owned(),
    };
    SaveError::Migration { reason }
}
