//! Reports to the user what is being measured.

use std::fmt;

/// Reports each line to the caller's function.
pub(crate) struct Progress<'a>(pub(crate) &'a dyn Fn(&str));

impl Progress<'_> {
    pub(crate) fn say(&self, words: &str) {
        (self.0)(words);
    }

    /// Reports which way of which round is next.
    pub(crate) fn step(&self, round: u32, rounds: u32, way: &str) {
        if round == 0 {
            self.say(&format!("warm-up: {way}"));
        } else {
            self.say(&format!("round {round} of {rounds}: {way}"));
        }
    }
}

impl fmt::Debug for Progress<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").finish_non_exhaustive()
    }
}
