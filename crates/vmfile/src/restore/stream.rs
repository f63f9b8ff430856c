//! A stream into the QEMU that waits, over a pair of sockets.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmfile_engine::beside;
use vmfile_pages::PagesError;
use vmfile_pages::control::{Control, Progress};
use vmfile_qemu::{LoadError, Vm};
use vmfile_stream::contents::Contents;
use vmfile_stream::outlet::Outlet;
use vmfile_stream::stream_writer::{Source, write_short_stream, write_stream};

use crate::restore_error::RestoreError;

/// How long QEMU may take no byte of the stream, nor say that it is done: the device state is
/// milliseconds of work.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a load may take that goes on: there is no reason to end it.
const LOAD_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// Sends `contents` to QEMU and waits until QEMU has loaded it. They are few where no `source` says
/// how they are read.
pub(super) fn send_to(
    vm: &mut Vm,
    contents: &Contents<'_>,
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
    // The outlet goes with the thread: a stream that breaks off must end for QEMU too.
    let write = move || match source {
        Some(source) => write_stream(contents, source, &mut outlet, &inner).map(drop),
        None => write_short_stream(contents, &mut outlet, &inner),
    };
    let both = beside(write, |_| {
        let stall = Stall::new(&sent);
        let deadline = Instant::now() + LOAD_TIMEOUT;
        let loaded = vm.wait_loaded(deadline, &|| control.is_stopped() || stall.is_too_long());
        // A QEMU that has failed takes no more of the stream.
        over.store(loaded.is_err(), Ordering::Relaxed);
        loaded
    });
    let (written, loaded) = both.map_err(RestoreError::Stream)?;
    match (loaded, written) {
        // QEMU saw the stream end early, for our reason.
        (Err(_), Err(error)) if error.is_about_the_file() => Err(error.into()),
        (Err(LoadError::Cancelled), _) if control.is_stopped() => Err(PagesError::Stopped.into()),
        (Err(LoadError::Cancelled), _) => Err(refused(LoadError::TimedOut)),
        (Err(source), _) => Err(refused(source)),
        (Ok(()), written) => Ok(written?),
    }
}

/// Watches a count that should grow.
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
