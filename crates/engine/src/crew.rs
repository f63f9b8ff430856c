//! Threads that are started first and get their work later.
//!
//! Threads are started when a failure does no harm yet. What they work on need not exist then, and
//! may later be borrowed from the caller's stack.

#![expect(unsafe_code, reason = "lends a borrowed job to threads that outlive the borrow")]

use std::fmt;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

/// What every thread of a crew runs, with the thread's number, from 0.
type Job<'a> = dyn Fn(usize) + Sync + 'a;

/// A number of threads that wait for a job.
///
/// Dropping a crew ends its threads.
#[derive(Debug)]
pub struct Crew {
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    /// `None` only inside `drop`, which ends the thread that way.
    jobs: Option<SyncSender<&'static Job<'static>>>,
    /// How each job ended in the thread; closed when the thread has ended.
    done: Receiver<Outcome>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Returned,
    Panicked,
}

/// A thread of a crew panicked, so its part of the job was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Panicked;

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a worker thread panicked, which is a bug in vmfile")
    }
}

impl std::error::Error for Panicked {}

impl From<Panicked> for io::Error {
    fn from(panicked: Panicked) -> io::Error {
        io::Error::other(panicked)
    }
}

impl Crew {
    /// Starts `count` threads.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error if a thread cannot be started; those before it have ended then.
    pub fn start(count: usize) -> io::Result<Crew> {
        let mut crew = Crew { members: Vec::with_capacity(count) };
        for number in 0..count {
            let (jobs, orders) = mpsc::sync_channel(1);
            let (say, done) = mpsc::sync_channel(1);
            let thread = thread::Builder::new()
                .name(format!("vmfile-{number}"))
                .spawn(move || serve(number, &orders, &say))?;
            crew.members.push(Member { jobs: Some(jobs), done, thread: Some(thread) });
        }
        Ok(crew)
    }

    /// Returns how many threads there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// Runs `job` once in every thread, and waits until all threads have finished it.
    ///
    /// # Errors
    ///
    /// Returns [`Panicked`] if the job panicked in a thread; the other threads have finished it.
    pub fn run<'a>(&mut self, job: &'a Job<'a>) -> Result<(), Panicked> {
        // SAFETY:
        // - Only the lifetime changes. The reference is used by the threads alone, from `send`
        //   below until each has said that it is through, or has ended and with it closed its
        //   channel.
        // - This function returns after that has been received from every thread that may have the
        //   reference, and nothing in between can panic or return.
        let job: &'static Job<'static> = unsafe { mem::transmute::<&'a Job<'a>, _>(job) };
        for member in &self.members {
            let jobs = member.jobs.as_ref().expect("taken only by drop");
            // This fails if the thread has ended, and then `recv` below fails too.
            let _ = jobs.send(job);
        }
        let mut result = Ok(());
        for member in &self.members {
            if member.done.recv() != Ok(Outcome::Returned) {
                result = Err(Panicked);
            }
        }
        result
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for member in &mut self.members {
            member.jobs = None;
        }
        for thread in self.members.iter_mut().filter_map(|member| member.thread.take()) {
            // Its panics were reported by `run`.
            let _ = thread.join();
        }
    }
}

fn serve(number: usize, orders: &Receiver<&'static Job<'static>>, say: &SyncSender<Outcome>) {
    while let Ok(job) = orders.recv() {
        // Only the caller sees what the job left half done, and `run` reports the panic to it.
        let outcome = match catch_unwind(AssertUnwindSafe(|| job(number))) {
            Ok(()) => Outcome::Returned,
            Err(payload) => {
                // Dropping it could panic again.
                mem::forget(payload);
                Outcome::Panicked
            }
        };
        if say.send(outcome).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_thread_does_a_borrowed_job_once() {
        let mut crew = Crew::start(3).unwrap();
        for _ in 0..2 {
            let counts = [const { AtomicUsize::new(0) }; 3];
            crew.run(&|number| {
                counts[number].fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
            assert_eq!(counts.map(AtomicUsize::into_inner), [1; 3]);
        }
    }

    #[test]
    fn a_panic_in_one_thread_is_an_error_after_the_others_are_through() {
        let mut crew = Crew::start(2).unwrap();
        let through = AtomicUsize::new(0);
        let result = crew.run(&|number| {
            assert_ne!(number, 0, "the test's own panic");
            through.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(result, Err(Panicked));
        assert_eq!(through.load(Ordering::Relaxed), 1);
        assert_eq!(crew.run(&|_| {}), Ok(()), "the threads serve on");
    }

    #[test]
    fn a_crew_without_work_ends() {
        drop(Crew::start(2).unwrap());
    }
}
