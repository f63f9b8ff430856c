//! How a caller stops a verb that is running, and how the verb reports its progress.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// How far the long part of a verb is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are done.
    pub done_bytes: u64,
    /// Bytes to do, as far as is known.
    pub total_bytes: u64,
}

/// The caller's stop flag and progress function for a running verb.
pub struct Control<'a> {
    stop: &'a Arc<AtomicBool>,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl<'a> Control<'a> {
    /// Returns a control. Once `stop` is set, the verb ends at its next step and leaves everything
    /// as it was before. Several threads call `progress` from time to time.
    pub fn new(stop: &'a Arc<AtomicBool>, progress: &'a (dyn Fn(Progress) + Sync)) -> Control<'a> {
        Control { stop, progress }
    }

    /// Returns a control that never stops the verb and ignores its progress.
    #[must_use]
    pub fn none() -> Control<'static> {
        static NEVER: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
        Control { stop: &NEVER, progress: &|_| {} }
    }

    /// Returns a control that stops when this one does, and ignores progress.
    #[must_use]
    pub fn quiet(&self) -> Control<'a> {
        Control { stop: self.stop, progress: &|_| {} }
    }

    /// Returns a control that stops when this one does, and reports to `progress`.
    #[must_use]
    pub fn with_progress<'b>(&self, progress: &'b (dyn Fn(Progress) + Sync)) -> Control<'b>
    where
        'a: 'b,
    {
        Control { stop: self.stop, progress }
    }

    /// Returns the flag that the caller sets to end the verb.
    #[must_use]
    pub fn stop_flag(&self) -> &Arc<AtomicBool> {
        self.stop
    }

    /// Whether the caller wants the verb to end.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Reports to the caller how far the verb is.
    pub fn report(&self, progress: Progress) {
        (self.progress)(progress);
    }
}

/// Adds up what several threads have done, and reports the sum to the caller.
#[derive(Debug)]
pub struct Meter<'a> {
    control: &'a Control<'a>,
    done_bytes: AtomicU64,
    total_bytes: u64,
}

impl<'a> Meter<'a> {
    /// Begins at nothing done of `total_bytes`.
    #[must_use]
    pub fn new(control: &'a Control<'a>, total_bytes: u64) -> Meter<'a> {
        Meter { control, done_bytes: AtomicU64::new(0), total_bytes }
    }

    /// Notes that `bytes` more are done.
    pub fn add(&self, bytes: u64) {
        let done_bytes = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // A running guest sends some pages more than once, so more bytes arrive than it has RAM.
        let done_bytes = done_bytes.min(self.total_bytes);
        self.control.report(Progress { done_bytes, total_bytes: self.total_bytes });
    }

    /// Reports that everything is done; needed where `total_bytes` was an upper bound.
    pub fn finish(&self) {
        if self.done_bytes.load(Ordering::Relaxed) < self.total_bytes {
            let (done_bytes, total_bytes) = (self.total_bytes, self.total_bytes);
            self.control.report(Progress { done_bytes, total_bytes });
        }
    }
}

impl fmt::Debug for Control<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("stop", self.stop).finish_non_exhaustive()
    }
}
