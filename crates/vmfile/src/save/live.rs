//! A guest that runs while it is saved, by QEMU's stream.
//!
//! `background-snapshot`: QEMU stops the guest for some milliseconds, write-protects its memory and
//! sends every page once, as it was then. Where that cannot be, `pre-copy`: pages that the guest
//! changes are sent again, until few are left; the guest stands still while those are sent.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmfile_qemu::{RunState, StreamSettings, Vm, VmError};

use super::stream::{sent, why_not, written};
use super::{Live, LiveDone, Work, Written};
use crate::draft::Facts;
use crate::error::SaveError;
use crate::receive::ReceiveError;
use crate::source::stream::Patience;
use crate::stream_receiver::{Received, StreamReceiver};

/// How long QEMU may be silent: longer than any look at all of a large guest's memory.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// A VM that can send itself while its guest runs, and the settings it had.
#[derive(Debug)]
pub(super) struct LiveRoute {
    before: StreamSettings,
    live: Live,
}

/// How the guest is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Method {
    BackgroundSnapshot,
    PreCopy {
        /// Why not the other.
        reason: String,
    },
}

impl LiveRoute {
    /// Asks for the settings, which must be put back.
    pub(super) fn prepare(vm: &mut Vm, live: Live) -> Result<LiveRoute, SaveError> {
        Ok(LiveRoute { before: vm.stream_settings()?, live })
    }

    /// Lets QEMU send the guest, writes what comes, and then what belongs around it.
    pub(super) fn write(&self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let (method, ours) = self.choose(work.vm)?;
        let received = self.receive(work, &method);
        let runs = let_run(work.vm);
        let put_back = work.vm.change_stream_settings(&ours, &self.before);
        let mut received = match (received, runs) {
            (Ok(received), Ok(())) => received,
            (Err(error), Ok(())) => return Err(error),
            (Ok(_), Err(source)) => return Err(source.into()),
            (Err(cause), Err(source)) => {
                return Err(SaveError::LeftPaused { cause: Box::new(cause), source });
            }
        };
        put_back?;
        if !received.set_run_state(&work.meta.run_state) {
            return Err(SaveError::NoRunState);
        }
        let pause_seconds = work.vm.pause_seen().unwrap_or_default().as_secs_f64();
        let facts = Facts {
            route: "stream",
            live: Some(true),
            pause_seconds: Some(pause_seconds),
            vm: work.meta.clone(),
        };
        work.draft.finish(&received.places, &received.bitmaps, received.tail(), facts)?;
        let method = match method {
            Method::BackgroundSnapshot => "background-snapshot".to_owned(),
            Method::PreCopy { reason } => format!("pre-copy ({reason})"),
        };
        Ok(Written { live: Some(LiveDone { method, pause_seconds }), ..written(&received) })
    }

    /// Chooses how, by trying: QEMU refuses the capability where the memory does not allow it.
    fn choose(&self, vm: &mut Vm) -> Result<(Method, StreamSettings), SaveError> {
        let reason = match self.before.background_snapshot() {
            None => "this QEMU has no background-snapshot".to_owned(),
            Some(ours) => match vm.change_stream_settings(&self.before, &ours) {
                Ok(()) => return Ok((Method::BackgroundSnapshot, ours)),
                Err(VmError::Qmp(error)) if error.is_refused() => error.to_string(),
                Err(error) => return Err(error.into()),
            },
        };
        let ours = self.before.pre_copy(self.live.pause_max);
        vm.change_stream_settings(&self.before, &ours)?;
        Ok((Method::PreCopy { reason }, ours))
    }

    fn receive(&self, work: &mut Work<'_>, method: &Method) -> Result<Received, SaveError> {
        let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
        // From here on only the pause of this save is among the events.
        let _ = work.vm.pause_seen();
        work.vm.send_stream(theirs.into())?;
        let patience = Patience {
            control: work.control,
            stall: Some(STALL_TIMEOUT),
            deadline: Some(Instant::now() + self.live.timeout),
        };
        let receiver = StreamReceiver { draft: work.draft, io: work.options.io, patience };
        let vm = &mut *work.vm;
        let at_end = || {
            sent(vm)?;
            // The file will have all of it: the guest need not wait for the disk.
            if matches!(method, Method::PreCopy { .. }) { Ok(vm.cont()?) } else { Ok(()) }
        };
        receiver.run(ours.into(), at_end).map_err(|error| match error {
            SaveError::Receive(ReceiveError::TimedOut { .. }) => {
                let timeout = self.live.timeout;
                why_not(work.vm, SaveError::NotConverged { timeout })
            }
            error => why_not(work.vm, error),
        })
    }
}

/// Sees to it that the guest runs, however the sending ended: QEMU lets it run on by itself if it
/// was cancelled in time.
fn let_run(vm: &mut Vm) -> Result<(), VmError> {
    if vm.run_state()? == RunState::Running { Ok(()) } else { vm.cont() }
}
