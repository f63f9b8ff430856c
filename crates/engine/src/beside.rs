//! Two things at once: one in a thread of its own, one here.

use std::io;
use std::mem;
use std::thread;

use crate::crew::Panicked;

/// Does `aside` in a thread of its own while `here` runs, which can ask whether `aside` is through;
/// returns what both returned.
///
/// # Errors
///
/// Returns the kernel's error if there is no thread to be had, and then neither has run; and an error if
/// `aside` panicked, after `here` has returned.
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
