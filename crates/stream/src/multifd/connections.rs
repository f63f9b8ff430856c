//! The connections of one sender: the stream and its channels.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::ioctl_fionbio;
use vmfile_format::FormatError;
use vmfile_format::error::FormatErrorKind;
use vmfile_format::stream;
use vmfile_format::stream::multifd::{INIT_LEN, Init};

use super::channel::read_all;
use crate::error::{ChannelsError, ReceiveError};
use crate::incoming::{Activity, WaitLimits};
use crate::listener::Listener;

/// How many of the first bytes tell a stream from a channel.
const MAGIC_LEN: usize = 4;

/// The connections of one sender.
#[derive(Debug)]
pub struct Connections {
    /// The stream.
    pub stream: OwnedFd,
    /// The first bytes of the stream, which have been read already.
    pub begun: Vec<u8>,
    /// The channels in the order of their numbers. Their init packets have been read, and reading
    /// does not block.
    pub channels: Vec<OwnedFd>,
    /// The socket that they came to; further connections to it are an error.
    pub listener: Option<Listener>,
}

impl From<OwnedFd> for Connections {
    /// A stream without channels.
    fn from(stream: OwnedFd) -> Connections {
        Connections { stream, begun: Vec::new(), channels: Vec::new(), listener: None }
    }
}

impl From<UnixStream> for Connections {
    /// A stream without channels.
    fn from(stream: UnixStream) -> Connections {
        Connections::from(OwnedFd::from(stream))
    }
}

/// What a connection begins with.
enum Begin {
    Stream(Vec<u8>),
    Channel(Init),
}

impl Connections {
    /// Waits for a stream and `channels` channels.
    pub fn accept(
        listener: Listener,
        channels: u8,
        limits: &WaitLimits<'_>,
    ) -> Result<Connections, ReceiveError> {
        if channels == 0 {
            let stream = listener.accept(limits)?;
            return Ok(Connections { listener: Some(listener), ..stream.into() });
        }
        let accepted = accept_all(&listener, usize::from(channels) + 1, limits)?;
        Connections::sort(accepted, listener, channels, limits)
    }

    /// Tells the stream and its channels apart by their first bytes.
    pub fn sort(
        accepted: Vec<OwnedFd>,
        listener: Listener,
        channels: u8,
        limits: &WaitLimits<'_>,
    ) -> Result<Connections, ReceiveError> {
        let mut streams = Vec::new();
        let mut places: Vec<Option<OwnedFd>> = (0..channels).map(|_| None).collect();
        let mut uuid = None;
        for connection in accepted {
            match begin(&connection, limits)? {
                Begin::Stream(begun) => streams.push((connection, begun)),
                Begin::Channel(init) => {
                    let channel = init.channel;
                    if *uuid.get_or_insert(init.uuid) != init.uuid {
                        return Err(ChannelsError::OtherVm { channel }.into());
                    }
                    let number = ChannelsError::Number { channel, channels };
                    let place = places.get_mut(usize::from(channel)).ok_or(number)?;
                    if place.replace(connection).is_some() {
                        return Err(ChannelsError::Twice { channel }.into());
                    }
                }
            }
        }
        let found = streams.len();
        let channels: Option<Vec<OwnedFd>> = places.into_iter().collect();
        match (streams.pop(), channels) {
            (Some((stream, begun)), Some(channels)) => {
                Ok(Connections { stream, begun, channels, listener: Some(listener) })
            }
            _ => Err(ChannelsError::Streams { found }.into()),
        }
    }
}

fn accept_all(
    listener: &Listener,
    expected: usize,
    limits: &WaitLimits<'_>,
) -> Result<Vec<OwnedFd>, ReceiveError> {
    let mut accepted = Vec::new();
    while accepted.len() < expected {
        match listener.accept(limits) {
            Ok(connection) => accepted.push(connection),
            Err(ReceiveError::Stalled { .. }) if !accepted.is_empty() => {
                return Err(ChannelsError::Missing { found: accepted.len(), expected }.into());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(accepted)
}

/// Reads the first bytes of a connection: the magic number of a stream, the init packet of a
/// channel.
fn begin(connection: &OwnedFd, limits: &WaitLimits<'_>) -> Result<Begin, ReceiveError> {
    let activity = Activity::default();
    let read = |field: &'static str, into: &mut [u8]| {
        let needed = into.len();
        let mut slices = [IoSliceMut::new(into)];
        let found = read_all(connection.as_fd(), &mut slices, limits, &activity)
            .map_err(|error| ReceiveError::waited(error, 0))?;
        if found < needed {
            let (needed, found) = (needed as u64, found as u64);
            let kind = FormatErrorKind::Ends { field, needed, found };
            return Err(ReceiveError::Stream(FormatError { offset: 0, kind }));
        }
        Ok(())
    };
    ioctl_fionbio(connection, true)
        .map_err(|errno| ReceiveError::Read { offset: 0, source: errno.into() })?;
    let mut bytes = [0; INIT_LEN];
    read("first bytes of a connection", &mut bytes[..MAGIC_LEN])?;
    if bytes[..MAGIC_LEN] == stream::MAGIC.to_be_bytes() {
        return Ok(Begin::Stream(bytes[..MAGIC_LEN].to_vec()));
    }
    // A connection that is neither is refused without waiting for more of its bytes.
    if bytes[..MAGIC_LEN] != stream::multifd::MAGIC.to_be_bytes() {
        return Init::decode(&bytes).map(Begin::Channel).map_err(ReceiveError::Stream);
    }
    read("init packet of a multifd channel", &mut bytes[MAGIC_LEN..])?;
    Init::decode(&bytes).map(Begin::Channel).map_err(ReceiveError::Stream)
}
