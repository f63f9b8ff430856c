//! Our ends of the connections over which QEMU sends a VM, and how vmfile ends the migration.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use vmfile_qemu::{Outgoing, Vm, VmError, is_process_stopped};
use vmfile_stream::Channels;
use vmfile_stream::error::HeldError;
use vmfile_stream::incoming::{PeerProcess, WaitLimits};
use vmfile_stream::listener::Listener;
use vmfile_stream::multifd::Connections;

use crate::error::{SaveError, UserfaultError};
use crate::guard::Guard;
use crate::receive::ReceiveError;

/// How long QEMU may take to notice that its stream has ended, and to end the migration.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// How long QEMU may take to make all its connections: it has only to call `connect`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait for the next connection before QEMU's state is queried again.
const ASK_INTERVAL: Duration = Duration::from_millis(20);

/// How long [`Peer::drain`] waits for data before it checks for new connections and for its end.
const DRAIN_INTERVAL: Duration = Duration::from_millis(20);

/// Returns the process that sends, if it is known.
pub(super) fn peer_process(vm: &mut Vm) -> Option<PeerProcess> {
    let pid = vm.pid().ok()?;
    Some(PeerProcess { pid, is_stopped: is_process_stopped })
}

/// Our ends of the connections of a QEMU that sends by several channels.
///
/// They stay open and are read until QEMU has ended the migration, even after the receiver has
/// failed. Tried with up to 8 channels at random moments:
///
/// - When the ends close while QEMU sends, 10.0.2 crashes (SIGSEGV, 1 of 40).
/// - When QEMU is told to stop while it connects, 10.0.2 aborts (`yank_unregister_instance`, 2 of
///   18) or stays in `setup` or `cancelling` for ever.
/// - When QEMU is told to stop while an end is open that is not read, 10.0.2 and 11.1 stop
///   answering (6 of 100): the thread that sends waits for room, and holds the lock that the answer
///   needs.
/// - When all connections are accepted and read, and QEMU is told to stop after `setup`, all of
///   7.2, 10.0.2 and 11.1 end as they should (100 tries each).
#[derive(Debug, Default)]
pub(super) struct Peer {
    listener: Option<Listener>,
    held: Vec<OwnedFd>,
    /// QEMU has refused to send: a migration that is under way is another client's.
    is_refused: bool,
}

impl Peer {
    /// Takes the only end of a stream.
    pub(super) fn of(end: OwnedFd) -> Peer {
        Peer { listener: None, held: vec![end], is_refused: false }
    }

    /// Notes that QEMU has refused to send, if it has: then there is no migration to end.
    pub(super) fn unless_refused(self, error: &VmError) -> Peer {
        Peer { is_refused: error.is_refused(), ..self }
    }

    /// Has QEMU send the VM into `stream`.
    pub(super) fn begin(&mut self, vm: &mut Vm, stream: OwnedFd) -> Result<(), SaveError> {
        let sent = vm.send_stream(stream);
        self.is_refused = sent.as_ref().is_err_and(VmError::is_refused);
        Ok(sent?)
    }

    /// Cancels a migration that is not to complete. Returns `done`, or the error to report.
    pub(super) fn cancel<T>(self, vm: &mut Vm, done: Result<T, SaveError>) -> Result<T, SaveError> {
        match done {
            Err(error) => Err(self.give_up(vm, error)),
            Ok(done) => match self.end(vm)? {
                Outgoing::Active | Outgoing::Held => Err(does_not_stop()),
                _ => Ok(done),
            },
        }
    }

    /// Accepts all connections, and reads and discards their data, until `is_over` is set.
    pub(super) fn drain(mut self, is_over: &AtomicBool) {
        let mut piece = vec![0; 1 << 20];
        while !is_over.load(Ordering::Relaxed) {
            while let Some(Ok(Some(new))) = self.listener.as_ref().map(Listener::accept_waiting) {
                self.held.push(new);
            }
            let interval = Timespec::try_from(DRAIN_INTERVAL).expect("a short time");
            let mut ends: Vec<PollFd<'_>> =
                self.held.iter().map(|end| PollFd::new(end, PollFlags::IN)).collect();
            // If it fails, the reads below fail too.
            let _ = poll(&mut ends, Some(&interval));
            drop(ends);
            // Closes an end whose stream has ended: QEMU has closed its own.
            self.held.retain(|end| {
                let read = recv(end, &mut piece[..], RecvFlags::DONTWAIT);
                !matches!(read, Ok((_, 0)))
                    && matches!(read, Ok(_) | Err(Errno::AGAIN | Errno::INTR))
            });
        }
    }

    /// Has QEMU send the VM to a socket, and waits for the connections of the stream and of
    /// `channels`.
    pub(super) fn connect(
        &mut self,
        (vm, guard): (&mut Vm, &Guard),
        (listener, channels): (Listener, Channels),
        limits: &WaitLimits<'_>,
    ) -> Result<Connections, SaveError> {
        let channels = channels.count().get();
        let listener = &*self.listener.insert(listener);
        guard.keep_listening(listener.as_fd())?;
        let sent = vm.send_to_socket(listener.path_of_sender());
        self.is_refused = sent.as_ref().is_err_and(VmError::is_refused);
        sent?;
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let mut accepted = Vec::new();
        while accepted.len() <= usize::from(channels) {
            if let Some(connection) = listener.accept_waiting()? {
                guard.keep_open(connection.as_fd())?;
                self.held.push(connection.try_clone().map_err(SaveError::Socket)?);
                accepted.push(connection);
                continue;
            }
            let because = match vm.outgoing()? {
                Outgoing::Active | Outgoing::Held if Instant::now() < deadline => None,
                Outgoing::Active | Outgoing::Held => {
                    let (found, expected) = (accepted.len(), channels + 1);
                    Some(format!(
                        "{found} of {expected} connections came within {CONNECT_TIMEOUT:?}"
                    ))
                }
                Outgoing::Failed(reason) => Some(reason),
                other => return Err(migration_error(other)),
            };
            if let Some(reason) = because {
                let socket = listener.path_of_sender().to_owned();
                return Err(SaveError::NotConnected { socket, reason });
            }
            listener.wait(ASK_INTERVAL)?;
        }
        let listener = self.listener.take().expect("it was put there");
        Ok(Connections::sort(accepted, listener, channels, limits)?)
    }

    /// Ends the migration after `error`, and returns the error to report: QEMU's, if QEMU failed
    /// first.
    pub(super) fn give_up(self, vm: &mut Vm, error: SaveError) -> SaveError {
        if self.is_refused {
            return error;
        }
        self.drained(|| Ended::now(vm)).reason(error)
    }

    fn end(self, vm: &mut Vm) -> Result<Outgoing, VmError> {
        self.drained(|| vm.end_sending(END_TIMEOUT))
    }

    /// Runs `ask` while the ends are read: otherwise QEMU may hold the lock that its answers need while
    /// it waits for room.
    fn drained<T>(self, ask: impl FnOnce() -> T) -> T {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            // If no thread can be started, the ends close here.
            let drain = thread::Builder::new().spawn_scoped(scope, || self.drain(&is_over));
            let answer = ask();
            is_over.store(true, Ordering::Relaxed);
            drop(drain);
            answer
        })
    }
}

/// How a migration was when a save gave it up, and how it ended then.
#[derive(Debug)]
pub(super) struct Ended {
    before: Result<Outgoing, VmError>,
    after: Result<Outgoing, VmError>,
}

impl Ended {
    /// Ends the migration. Our ends of its connections are read meanwhile.
    pub(super) fn now(vm: &mut Vm) -> Ended {
        let before = vm.unstoppable(END_TIMEOUT, Vm::outgoing);
        Ended { before, after: vm.end_sending(END_TIMEOUT) }
    }

    /// Returns the error to report, if the save gave the migration up because of `error`: QEMU's, if
    /// QEMU failed first.
    pub(super) fn reason(self, error: SaveError) -> SaveError {
        let is_cut = matches!(
            &error,
            SaveError::Receive(ReceiveError::Stream(_) | ReceiveError::Channel { .. })
                | SaveError::Userfault(UserfaultError::Held(
                    HeldError::Ended | HeldError::Cut | HeldError::Read(_)
                ))
        );
        let is_ended = matches!(&error, SaveError::Userfault(UserfaultError::Held(HeldError::Cut)));
        // If QEMU fails by itself after the first question, it has stopped sending as well.
        match (self.before, self.after) {
            (_, Ok(Outgoing::Active | Outgoing::Held)) => does_not_stop(),
            // Then nothing else that failed is the cause.
            (Ok(Outgoing::Cancelled), _) if !error.is_stopped() => {
                migration_error(Outgoing::Cancelled)
            }
            (Ok(Outgoing::Failed(reason)), _) | (_, Ok(Outgoing::Failed(reason))) if is_cut => {
                SaveError::Migration { reason }
            }
            // What is under way now is a migration of that client.
            (Ok(Outgoing::Active | Outgoing::Held), _) if is_ended => {
                migration_error(Outgoing::Cancelled)
            }
            (Err(gone), _) if is_cut => gone.into(),
            _ => error,
        }
    }
}

/// Waits until QEMU reports completion, after its last byte has arrived.
pub(super) fn wait_until_sent(vm: &mut Vm) -> Result<(), SaveError> {
    match vm.wait_sent(END_TIMEOUT)? {
        Outgoing::Completed => Ok(()),
        other => Err(migration_error(other)),
    }
}

fn does_not_stop() -> SaveError {
    SaveError::Migration { reason: "it does not stop".to_owned() }
}

/// Returns the error for a migration that QEMU has not completed.
pub(super) fn migration_error(outgoing: Outgoing) -> SaveError {
    let reason = match outgoing {
        Outgoing::Failed(reason) => reason,
        Outgoing::Cancelled => "another client of QEMU cancelled it".to_owned(),
        _ => "it does not end".to_owned(),
    };
    SaveError::Migration { reason }
}

#[cfg(test)]
mod tests {
    use vmfile_pages::PagesError;

    use super::*;

    /// The error of a live save whose migration another client had cancelled named a page that could not
    /// be read.
    #[test]
    fn a_migration_that_another_client_cancelled_is_the_cause() {
        let ended = || Ended { before: Ok(Outgoing::Cancelled), after: Ok(Outgoing::Cancelled) };
        let reason = ended().reason(SaveError::NoRunState);
        assert!(reason.to_string().contains("another client"), "{reason}");
        // The caller stopped the save, whatever else happened.
        let reason = ended().reason(SaveError::Pages(PagesError::Stopped));
        assert!(reason.is_stopped(), "{reason}");
        let failed = Ended { before: Ok(Outgoing::Active), after: Ok(Outgoing::Cancelled) };
        assert!(matches!(failed.reason(SaveError::NoRunState), SaveError::NoRunState));
    }
}
