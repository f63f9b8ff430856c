//! Why a stream was not received, or not sent.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use vmfile_engine::PublishError;
use vmfile_format::FormatError;
use vmfile_pages::{PagesError, SnapshotError};

use crate::incoming::WaitError;

/// Why a stream could not be held at its first page.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeldError {
    /// The caller stopped it.
    #[error("stopped")]
    Stopped,
    /// The sender closed its end before the first page.
    #[error("the stream ended before its first page")]
    Ended,
    /// The stream has no page, or so few that the sender does not wait for room.
    #[error("the stream came to the device state before its sender had to wait")]
    NoPages,
    /// No page came.
    #[error("no page came within {0:?}")]
    TimedOut(Duration),
    /// Pages came, but the sender does not wait for room.
    #[error("the sender did not fill the socket within {0:?}")]
    NotFull(Duration),
    /// The sender ended the stream although it had not sent everything.
    #[error("QEMU ended its migration before everything was copied")]
    Cut,
    /// The kernel returned an error.
    #[error("read the stream")]
    Read(#[source] io::Error),
    /// The bytes are not a stream.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// Why the connections are not one stream and the expected channels of one sender.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelsError {
    /// The caller expects channels, but gave one descriptor instead of a socket to connect to.
    #[error("channels need a socket to connect to; there is one descriptor")]
    NoSocket,
    /// The sender uses channels, and the caller expects none.
    #[error("the sender uses multifd channels, and none are expected")]
    Unexpected,
    /// Fewer connections came than the stream and its channels.
    #[error("{found} of {expected} connections came: the stream and its multifd channels")]
    Missing {
        /// How many came.
        found: usize,
        /// How many were expected.
        expected: usize,
    },
    /// Further connections came.
    #[error("more connections came than the stream and {channels} multifd channels")]
    More {
        /// How many channels were expected.
        channels: usize,
    },
    /// Two channels have one number.
    #[error("two multifd channels have the number {channel}")]
    Twice {
        /// The number.
        channel: u8,
    },
    /// A channel's number is too large.
    #[error("a multifd channel has the number {channel}, of {channels} from 0 on")]
    Number {
        /// The number.
        channel: u8,
        /// How many channels were expected.
        channels: u8,
    },
    /// A channel belongs to another VM.
    #[error("multifd channel {channel} has another uuid than the one before it")]
    OtherVm {
        /// The channel's number.
        channel: u8,
    },
    /// No connection, or more than one, begins as a stream.
    #[error("{found} of the connections begin as a stream, expected 1")]
    Streams {
        /// How many.
        found: usize,
    },
    /// A channel ended before its round did.
    #[error("a multifd channel ended inside a round")]
    Ended,
}

/// Why a stream was not received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The pages could not be written to the file, or the caller stopped it.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The socket cannot be made.
    #[error("listen at {path}", path = path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connections are not one stream and the expected channels of one sender.
    #[error(transparent)]
    Channels(#[from] ChannelsError),
    /// The data of a multifd channel are invalid, or could not be read.
    #[error("multifd channel {channel}")]
    Channel {
        /// The channel's number.
        channel: u8,
        /// What happened there.
        source: Box<ReceiveError>,
    },
    /// The stream is invalid, or uses a feature that vmfile does not support.
    #[error("the stream")]
    Stream(#[source] FormatError),
    /// The stream could not be read.
    #[error("read the stream at offset {offset:#x}")]
    Read {
        /// How far it was read, in bytes.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The sender is silent.
    #[error("no byte came for {after:?}, at offset {offset:#x} of the stream")]
    Stalled {
        /// How far the stream was read, in bytes.
        offset: u64,
        /// How long the receiver waited.
        after: Duration,
    },
    /// The sender's process is stopped, by SIGSTOP or a debugger.
    #[error("QEMU's process {pid} is stopped, by SIGSTOP or a debugger, and sends nothing")]
    ProcessStopped {
        /// The process.
        pid: u32,
    },
    /// The deadline passed before the stream ended.
    #[error("the stream has not ended in time; it was read up to offset {offset:#x}")]
    TimedOut {
        /// How far it was read, in bytes.
        offset: u64,
    },
}

impl From<PublishError> for ReceiveError {
    fn from(error: PublishError) -> ReceiveError {
        ReceiveError::Pages(error.into())
    }
}

impl ReceiveError {
    /// Converts the reason why a wait ended, at `offset` of the stream.
    pub fn waited(error: WaitError, offset: u64) -> ReceiveError {
        match error {
            WaitError::Io(source) => ReceiveError::Read { offset, source },
            WaitError::Stalled(after) => ReceiveError::Stalled { offset, after },
            WaitError::ProcessStopped(pid) => ReceiveError::ProcessStopped { pid },
            WaitError::TimedOut => ReceiveError::TimedOut { offset },
            // A connection that stopped because another one failed does not report its own error:
            // the first failure is the cause.
            WaitError::Stopped | WaitError::GivenUp => PagesError::Stopped.into(),
        }
    }

    /// Adds the channel's number to an error about a channel's data or about reading them.
    pub fn of_channel(self, channel: u8) -> ReceiveError {
        match self {
            ReceiveError::Stream(_) | ReceiveError::Read { .. } => {
                ReceiveError::Channel { channel, source: Box::new(self) }
            }
            error => error,
        }
    }

    /// Returns the error for pages that could not be written to the file.
    #[must_use]
    pub fn write_ram(source: io::Error) -> ReceiveError {
        PagesError::WriteFile { what: "guest RAM", source }.into()
    }
}

/// Why a stream was not sent, or not all of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The file could not be read or is damaged, or the caller stopped it.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// A thread could not be started, or panicked.
    #[error("send by a thread of its own")]
    Thread(#[source] io::Error),
    /// The caller expects channels, but gave one descriptor instead of a socket to connect to.
    #[error("channels need a socket to connect to; there is one descriptor")]
    NoSocket,
    /// When QEMU waits for its channels depends on the version in the machine type, and this
    /// machine type has none.
    #[error("machine type {machine:?} does not end with a version of QEMU")]
    MachineVersion {
        /// The machine type.
        machine: String,
    },
    /// No process listens at the socket, or it may not be used.
    #[error("connect to {path}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not tell what kind of file the descriptor is.
    #[error("look at the descriptor of the stream")]
    Descriptor(#[source] io::Error),
    /// The reader closed its end before the stream ended, as a QEMU does that refuses it.
    #[error("the reader closed its end at offset {offset:#x} of the stream")]
    PeerClosed {
        /// How much was sent, in bytes.
        offset: u64,
    },
    /// The stream could not be written.
    #[error("write at offset {offset:#x} of the stream")]
    Write {
        /// How much was sent, in bytes.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

impl SendError {
    /// Says whether the file was at fault, and not the reader of the stream.
    pub fn is_about_the_file(&self) -> bool {
        matches!(self, SendError::Pages(error) if !error.is_stopped())
    }
}

impl From<SnapshotError> for SendError {
    fn from(error: SnapshotError) -> SendError {
        SendError::Pages(error.into())
    }
}

/// Returns the error for pages that could not be read from the file.
pub(crate) fn reading(source: io::Error) -> PagesError {
    PagesError::ReadFile { what: "guest RAM from the file", source }
}
