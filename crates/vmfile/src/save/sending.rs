//! Our ends of the connections by which QEMU sends a VM, and how a sending is ended.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use vmfile_qemu::{Outgoing, Vm, VmError, is_process_stopped};
use vmfile_stream::Channels;
use vmfile_stream::incoming::{PeerProcess, WaitLimits};
use vmfile_stream::listener::Listener;
use vmfile_stream::multifd::Connections;

use crate::error::SaveError;
use crate::guard::Guard;
use crate::receive::ReceiveError;

/// How long QEMU may take to see that its stream has ended, and to end a sending.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// How long QEMU may take to make all its connections: it has only to call `connect`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How often QEMU is asked how it is while it makes its connections.
const ASK_INTERVAL: Duration = Duration::from_millis(20);

/// How long it takes at most until the drain sees that it is over, or that a connection has come.
const DRAIN_INTERVAL: Duration = Duration::from_millis(20);

/// Returns the process that sends, where it is known.
pub(super) fn peer_process(vm: &mut Vm) -> Option<PeerProcess> {
    let pid = vm.pid().ok()?;
    Some(PeerProcess { pid, is_stopped: is_process_stopped })
}

/// Our ends of the connections of a QEMU that sends by several channels.
///
/// They stay open and are read until QEMU has ended the sending, whatever became of those who
/// received. Tried with up to 8 channels at random moments:
///
/// - When the ends close while QEMU sends, 10.0.2 crashes (SIGSEGV, 1 of 40).
/// - When it is told to stop while it connects, 10.0.2 aborts (`yank_unregister_instance`, 2 of 18) or
///   stays in `setup` or `cancelling` for ever.
/// - When it is told to stop while an end is open that is not read, 10.0.2 and 11.1 stop answering
///   (6 of 100): the thread that sends waits for room, and holds the lock that the answer needs.
/// - When all connections are taken and read, QEMU is past `setup` and is then told to stop, all of
///   7.2, 10.0.2 and 11.1 ended as they should (100 tries each).
#[derive(Debug, Default)]
pub(super) struct Peer {
    listener: Option<Listener>,
    held: Vec<OwnedFd>,
}

impl Peer {
    /// Reads all that comes, and takes all who connect, until `is_over`.
    fn drain(mut self, is_over: &AtomicBool) {
        let mut piece = vec![0; 1 << 20];
        while !is_over.load(Ordering::Relaxed) {
            while let Some(Ok(Some(new))) = self.listener.as_ref().map(Listener::accept_waiting) {
                self.held.push(new);
            }
            let interval = Timespec::try_from(DRAIN_INTERVAL).expect("a short time");
            let mut ends: Vec<PollFd<'_>> =
                self.held.iter().map(|end| PollFd::new(end, PollFlags::IN)).collect();
            // Where it fails the reads below say so, too.
            let _ = poll(&mut ends, Some(&interval));
            drop(ends);
            // An end at which nothing more comes is closed: QEMU has closed its own.
            self.held.retain(|end| {
                let read = recv(end, &mut piece[..], RecvFlags::DONTWAIT);
                !matches!(read, Ok((_, 0)))
                    && matches!(read, Ok(_) | Err(Errno::AGAIN | Errno::INTR))
            });
        }
    }

    /// Lets QEMU send the VM to a socket, and waits for the stream and `channels` beside it.
    pub(super) fn connect(
        &mut self,
        (vm, guard): (&mut Vm, &Guard),
        (listener, channels): (Listener, Channels),
        limits: &WaitLimits<'_>,
    ) -> Result<Connections, SaveError> {
        let channels = channels.count().get();
        let listener = &*self.listener.insert(listener);
        guard.keep_listening(listener.as_fd())?;
        vm.send_to_socket(listener.path_of_sender())?;
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
                other => return Err(not_sent(other)),
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

    /// Ends the sending after `error`, and says what was the reason: QEMU's, where QEMU gave up first.
    pub(super) fn give_up(self, vm: &mut Vm, error: SaveError) -> SaveError {
        let is_cut = matches!(
            &error,
            SaveError::Receive(ReceiveError::Stream(_) | ReceiveError::Channel { .. })
        );
        let gave_up = match vm.unstoppable(END_TIMEOUT, Vm::outgoing) {
            Ok(Outgoing::Failed(reason)) if is_cut => Some(SaveError::Migration { reason }),
            Err(gone) if is_cut => Some(gone.into()),
            _ => None,
        };
        // A QEMU that fails on its own meanwhile has stopped sending as well.
        match self.end(vm) {
            Ok(Outgoing::Active | Outgoing::Held) => {
                SaveError::Migration { reason: "it does not stop".to_owned() }
            }
            _ => gave_up.unwrap_or(error),
        }
    }

    fn end(self, vm: &mut Vm) -> Result<Outgoing, VmError> {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            // Where there is no thread to be had, the ends close here.
            let drain = thread::Builder::new().spawn_scoped(scope, || self.drain(&is_over));
            let ended = vm.end_sending(END_TIMEOUT);
            is_over.store(true, Ordering::Relaxed);
            drop(drain);
            ended
        })
    }
}

/// The last byte has come: waits until QEMU says that it was.
pub(super) fn sent(vm: &mut Vm) -> Result<(), SaveError> {
    match vm.wait_sent(END_TIMEOUT)? {
        Outgoing::Completed => Ok(()),
        other => Err(not_sent(other)),
    }
}

/// Says why QEMU has not sent the VM.
pub(super) fn not_sent(outgoing: Outgoing) -> SaveError {
    let reason = match outgoing {
        Outgoing::Failed(reason) => reason,
        Outgoing::Cancelled => "another client of QEMU cancelled it".to_owned(),
        _ => "it does not end".to_owned(),
    };
    SaveError::Migration { reason }
}
