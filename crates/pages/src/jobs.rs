//! How many threads work at once.

use std::num::NonZeroUsize;
use std::thread;

/// How many threads work at once: 1 to 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jobs(usize);

impl Jobs {
    /// More threads than this gain nothing: two kept every disk that we tried busy.
    pub const MAX: usize = 16;

    /// Returns `count` threads, or `None` if that is not from 1 to [`Jobs::MAX`].
    #[must_use]
    pub fn new(count: usize) -> Option<Jobs> {
        (1..=Jobs::MAX).contains(&count).then_some(Jobs(count))
    }

    /// Returns how many.
    #[must_use]
    pub fn count(self) -> usize {
        self.0
    }
}

impl Default for Jobs {
    /// As many as the host has processors, up to four.
    fn default() -> Jobs {
        Jobs(thread::available_parallelism().map_or(2, NonZeroUsize::get).min(4))
    }
}
