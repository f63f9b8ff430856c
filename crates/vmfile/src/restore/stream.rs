//! Sends a stream to the QEMU that waits, over a pair of sockets.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmfile_engine::beside;
use vmfile_pages::PagesError;
use vmfile_pages::control::{Control, Progress};
use vmfile_qemu::{LoadError, Vm};
use vmfile_stream::contents::StreamContents;
use vmfile_stream::outlet::Outlet;
use vmfile_stream::stream_writer::{Source, write_short_stream, write_stream};

use crate::restore_error::RestoreError;

/// How long QEMU may neither read from the stream nor report that it is done: loading the device
/// state takes milliseconds.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a load may take while it makes progress: there is no reason to end it.
const LOAD_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// Sends `contents` to QEMU and waits until QEMU has loaded them. Without a `source`, from which
/// pages are read, the contents must be small.
pub(super) fn send_to(
    vm: &mut Vm,
    contents: &StreamContents<'_>,
    source: Option<&Source>,
    control: &Control<'_>,
    report: &(dyn Fn(Progress) + Sync),
) -> Result<(), RestoreError> {
    let refused = |source: LoadError| RestoreError::DeviceState { source, stderr: String::new() };
    let (ours, theirs) = UnixStream::pair().map_err(RestoreError::Stream)?;
    vm.load_stream(theirs.into()).map_err(refused)?;
    let over = Arc::new(AtomicBool::new(false));
    let is_over = || over.load(Ordering::Relaxed);
    let mut outlet = Outlet::new(ours.into(), &is_over).map_err(RestoreError::Stream)?;
    let sent = outlet.sent();
    let inner = Control::new(&over, report);
    // The closure owns the outlet, so that QEMU sees the stream end if the thread fails.
    let write = move || match source {
        Some(source) => write_stream(contents, source, &mut outlet, &inner).map(drop),
        None => write_short_stream(contents, &mut outlet, &inner),
    };
    let both = beside(write, |_| {
        let stall = Stall::new(&sent);
        let deadline = Instant::now() + LOAD_TIMEOUT;
        let loaded = vm.wait_loaded(deadline, &|| control.is_stopped() || stall.is_too_long());
        // If QEMU has failed, it reads no more of the stream.
        over.store(loaded.is_err(), Ordering::Relaxed);
        loaded
    });
    let (written, loaded) = both.map_err(RestoreError::Stream)?;
    match (loaded, written) {
        // QEMU failed because we ended the stream early.
        (Err(_), Err(error)) if error.is_about_the_file() => Err(error.into()),
        (Err(LoadError::Cancelled), _) if control.is_stopped() => Err(PagesError::Stopped.into()),
        (Err(LoadError::Cancelled), _) => Err(refused(LoadError::TimedOut)),
        (Err(source), _) => Err(refused(source)),
        (Ok(()), written) => Ok(written?),
    }
}

/// Watches whether a count still grows.
struct Stall<'a> {
    started: Instant,
    sent: &'a AtomicU64,
    /// The count when it was last seen to grow, and when that was, in milliseconds.
    last: (AtomicU64, AtomicU64),
}

impl Stall<'_> {
    fn new(sent: &AtomicU64) -> Stall<'_> {
        Stall { started: Instant::now(), sent, last: Default::default() }
    }

    fn is_too_long(&self) -> bool {
        let sent = self.sent.load(Ordering::Relaxed);
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        if self.last.0.swap(sent, Ordering::Relaxed) != sent {
            self.last.1.store(now, Ordering::Relaxed);
        }
        let since = Duration::from_millis(now - self.last.1.load(Ordering::Relaxed));
        since > STALL_TIMEOUT
    }
}
