//! The ends of rounds, at which the stream and all channels wait for one another.
//!
//! In one round the sender sends each page at most once, by the stream or by one channel; in the
//! next round it may send the page again. No connection begins the next round before all
//! connections have written this one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use vmfile_engine::Panicked;

use crate::error::ChannelsError;
use crate::error::ReceiveError;
use crate::incoming::{Activity, STOP_INTERVAL, WaitLimits};

/// Where the connections of one receive wait for one another.
///
/// When one of them fails, the others stop waiting.
#[derive(Debug)]
pub struct Rounds<'a> {
    limits: WaitLimits<'a>,
    activity: Activity,
    channels: usize,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Meeting {
    /// Rounds that have ended.
    rounds: u64,
    /// Connections that have reached the end of this round.
    arrived: usize,
    /// Whether the stream has ended.
    stream_ended: bool,
    /// Whether a channel has ended.
    channel_ended: bool,
    /// The first failure.
    failure: Option<ReceiveError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Connection {
    Stream,
    Channel,
}

impl<'a> Rounds<'a> {
    /// Prepares for a stream and `channels` channels.
    pub fn new(limits: WaitLimits<'a>, channels: usize) -> Rounds<'a> {
        let (meeting, changed) = (Mutex::default(), Condvar::new());
        Rounds { limits, activity: Activity::default(), channels, meeting, changed }
    }

    /// Returns the limits of all waits, and the activity that the connections share.
    pub fn limits(&self) -> (&WaitLimits<'a>, &Activity) {
        (&self.limits, &self.activity)
    }

    /// Waits at the SYNC of a channel, which has been read up to `offset`.
    pub fn channel_syncs(&self, offset: u64) -> Result<(), ReceiveError> {
        self.meet(Connection::Channel, offset)
    }

    /// Notes that a channel has ended.
    pub fn channel_ends(&self) {
        self.lock().channel_ended = true;
        self.changed.notify_all();
    }

    /// Notes that the stream has ended, and with it the last round.
    pub fn stream_ends(&self) {
        self.lock().stream_ended = true;
        self.changed.notify_all();
    }

    /// Runs the part of one connection; if it fails or panics, the others stop waiting.
    pub fn take_part<T>(&self, part: impl FnOnce() -> Result<T, ReceiveError>) -> Option<T> {
        let _panics = FailOnPanic(self);
        part().map_err(|error| self.fail(error)).ok()
    }

    /// Ends the work of all connections; the first error is kept.
    pub fn fail(&self, error: ReceiveError) {
        self.lock().failure.get_or_insert(error);
        self.activity.give_up();
        self.changed.notify_all();
    }

    /// Returns what failed first, if anything did.
    pub fn into_result(self) -> Result<(), ReceiveError> {
        let meeting = self.meeting.into_inner().unwrap_or_else(PoisonError::into_inner);
        meeting.failure.map_or(Ok(()), Err)
    }

    fn meet(&self, connection: Connection, offset: u64) -> Result<(), ReceiveError> {
        self.activity.note();
        let mut meeting = self.lock();
        meeting.arrived += 1;
        if meeting.arrived == self.channels + 1 {
            meeting.arrived = 0;
            meeting.rounds += 1;
            self.changed.notify_all();
            return Ok(());
        }
        let rounds = meeting.rounds;
        while meeting.rounds == rounds && !meeting.stream_ended {
            if connection == Connection::Stream && meeting.channel_ended {
                return Err(ChannelsError::Ended.into());
            }
            let waited = self.limits.check(&self.activity);
            waited.map_err(|error| ReceiveError::waited(error, offset))?;
            let woken = self.changed.wait_timeout(meeting, STOP_INTERVAL);
            meeting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the work of all connections when it is dropped by a panic.
struct FailOnPanic<'a>(&'a Rounds<'a>);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(ReceiveError::write_ram(Panicked.into()));
        }
    }
}

/// The stream's part in the rounds.
#[derive(Debug)]
pub struct StreamRounds<'a> {
    rounds: &'a Rounds<'a>,
    ends: RoundEnds,
}

/// What ends a round in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RoundEnds {
    /// Nothing has ended yet.
    Unknown,
    /// By MULTIFD_FLUSH: machine types of QEMU 8.1 and later.
    Flush,
    /// With each part of "ram": older machine types.
    Part,
}

impl<'a> StreamRounds<'a> {
    /// Returns the stream's part, before the first round.
    #[must_use]
    pub fn new(rounds: &'a Rounds<'a>) -> StreamRounds<'a> {
        StreamRounds { rounds, ends: RoundEnds::Unknown }
    }

    /// Waits for the channels at a MULTIFD_FLUSH. The caller has written all earlier pages of the
    /// stream.
    pub fn flush(&mut self, offset: u64) -> Result<(), ReceiveError> {
        if self.rounds.channels == 0 {
            return Err(ChannelsError::Unexpected.into());
        }
        if self.ends == RoundEnds::Unknown {
            self.ends = RoundEnds::Flush;
        }
        self.rounds.meet(Connection::Stream, offset)
    }

    /// Waits for the channels at the end of a part of "ram", unless MULTIFD_FLUSH ends the rounds.
    /// The caller has written all earlier pages of the stream.
    pub fn part_ends(&mut self, offset: u64) -> Result<(), ReceiveError> {
        if self.ends == RoundEnds::Unknown {
            self.ends = RoundEnds::Part;
        }
        if self.ends == RoundEnds::Flush || self.rounds.channels == 0 {
            return Ok(());
        }
        self.rounds.meet(Connection::Stream, offset)
    }

    /// Returns how many channels there are.
    pub fn channels(&self) -> usize {
        self.rounds.channels
    }
}
