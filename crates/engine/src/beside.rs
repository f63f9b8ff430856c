//! Runs two closures at once: one in a thread of its own, one in the caller's.

use std::io;
use std::mem;
use std::thread;

use crate::crew::Panicked;

/// Runs `aside` in a thread of its own, and `here` meanwhile in this one; returns what both
/// returned. The argument of `here` says whether `aside` has ended.
///
/// # Errors
///
/// Returns the kernel's error if the thread cannot be started, and then neither has run; or
/// [`Panicked`] in an [`io::Error`] if `aside` panicked, after `here` has returned.
pub fn beside<A: Send, B>(
    aside: impl FnOnce() -> A + Send,
    here: impl FnOnce(&dyn Fn() -> bool) -> B,
) -> io::Result<(A, B)> {
    thread::scope(|scope| {
        let aside = thread::Builder::new().spawn_scoped(scope, aside)?;
        let here = here(&|| aside.is_finished());
        match aside.join() {
            Ok(aside) => Ok((aside, here)),
            Err(payload) => {
                // Dropping it could panic again.
                mem::forget(payload);
                Err(Panicked.into())
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_done_and_a_panic_is_an_error() {
        assert_eq!(beside(|| 1, |_| 2).unwrap(), (1, 2));
        let aside = || -> u8 { panic!("the test's own panic") };
        let wait = |is_through: &dyn Fn() -> bool| {
            while !is_through() {
                thread::yield_now();
            }
        };
        let error = beside(aside, wait).unwrap_err();
        assert_eq!(error.to_string(), "a worker thread panicked, which is a bug in vmfile");
    }
}
