//! `vmfile send`: a file as a migration stream that any QEMU accepts.
//!
//! ```text
//! verify all but pages - bitmaps and device state - header - pages as they are read - device state
//! ```
//!
//! Each page is compared with its hash before it is sent. If one differs, the stream ends before
//! it, and QEMU refuses the stream.
//!
//! QEMU answers nothing over the stream: only QEMU itself reports whether it accepted it. Pages lie
//! at fixed places in the file, so vmfile reads them ahead, past the page cache, and sends them
//! from the buffers that it read them into.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use derive_setters::Setters;
use rustix::io::Errno;
use serde::Serialize;
use vmfile_engine::{Backend, BackendInUse, DirectIo, DirectIoInUse};
use vmfile_format::RamBlock;
use vmfile_pages::PagesError;
use vmfile_pages::control::Control;
use vmfile_pages::reading::{Verified, as_text, open_for_reading};
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::{Feature, QemuVersion, unix_socket};
use vmfile_stream::Channels;
use vmfile_stream::channel_writer::write_channels;
use vmfile_stream::contents::{LARGE_BLOCK_LEN, Pages, StreamContents};
use vmfile_stream::outlet::Outlet;
use vmfile_stream::stream_writer::{Parts, Source, write_stream};

pub use vmfile_stream::error::SendError;

/// Where a stream goes.
#[derive(Debug)]
pub enum SendTo {
    /// Into a pipe, a socket or a file. Writing to a pipe whose reader is gone raises SIGPIPE,
    /// which a Rust program ignores by default.
    Descriptor(OwnedFd),
    /// To a Unix socket on which QEMU listens.
    Connect(PathBuf),
}

/// How a stream is sent.
#[derive(Clone, Debug, Setters)]
#[non_exhaustive]
pub struct SendOptions {
    /// Whether pages are read past the page cache. `Preferred` decides by what the cache holds.
    pub direct_io: DirectIo,
    /// Which back end does the I/O.
    pub io: Backend,
    /// How many multifd channels there are besides the stream: what the destination's parameter
    /// `multifd-channels` says. They need [`SendTo::Connect`].
    pub channels: Option<Channels>,
    /// The destination's RAM is all zero: zero pages of blocks of 4 MiB and more are not sent.
    pub assume_zeroed: bool,
}

impl Default for SendOptions {
    fn default() -> SendOptions {
        let (direct_io, io) = (DirectIo::Preferred, Backend::Auto);
        SendOptions { direct_io, io, channels: None, assume_zeroed: false }
    }
}

/// What was sent.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SendReport {
    /// The file.
    pub file: PathBuf,
    /// How many multifd channels there were besides the stream.
    pub channels: u8,
    /// Pages of all RAM blocks.
    pub pages_total: u64,
    /// Pages that were sent with their bytes.
    pub pages_data: u64,
    /// Zero pages that were sent as such.
    pub pages_zero: u64,
    /// The length of the stream and of what the channels carried, in bytes.
    pub bytes_sent: u64,
    /// Whether the file was compared with its checksums and each page with its hash; if not, why.
    pub verified: Verified,
    /// Whether direct I/O was used; if not, why.
    #[serde(serialize_with = "as_text")]
    pub direct_io: DirectIoInUse,
    /// The back end that was used.
    #[serde(serialize_with = "as_text")]
    pub io: BackendInUse,
    /// How long it took, in seconds.
    pub total_seconds: f64,
}

/// Sends `snapshot` as a migration stream.
///
/// # Errors
///
/// Returns [`SendError`]. What was sent until then is of no use.
pub fn send(
    snapshot: &Snapshot,
    to: SendTo,
    options: &SendOptions,
    control: &Control<'_>,
) -> Result<SendReport, SendError> {
    let started = Instant::now();
    if options.channels.is_some() && matches!(to, SendTo::Descriptor(_)) {
        return Err(SendError::NoSocket);
    }
    snapshot.verify_parts()?;
    let contents = StreamContents::new(snapshot, |block| pages(block, options))?;
    let opened = open_for_reading(contents.layers.main(), options.direct_io);
    let (file, direct_io) = opened.map_err(PagesError::reading("guest RAM from the file"))?;
    let source = Source { file, io: options.io };
    let (io, bytes_sent) = match (to, options.channels) {
        (SendTo::Descriptor(descriptor), _) => send_one(&contents, &source, descriptor, control)?,
        (SendTo::Connect(path), None) => {
            send_one(&contents, &source, connect(&path, control)?, control)?
        }
        (SendTo::Connect(path), Some(channels)) => {
            let parts = parts(&contents.configuration().machine)?;
            let connect = || connect(&path, control);
            write_channels(&contents, &source, &connect, (channels, parts), control)?
        }
    };
    let blocks = &snapshot.structure().blocks;
    Ok(SendReport {
        file: snapshot.path().to_path_buf(),
        channels: Channels::count_of(options.channels),
        pages_total: blocks.iter().map(|placed| placed.block.page_count().0).sum(),
        pages_data: contents.data().0,
        pages_zero: contents.zero_pages(),
        bytes_sent,
        verified: Verified::of(snapshot),
        direct_io,
        io,
        total_seconds: started.elapsed().as_secs_f64(),
    })
}

/// Sends all by one stream; returns the back end and how many bytes were sent.
fn send_one(
    contents: &StreamContents<'_>,
    source: &Source,
    descriptor: OwnedFd,
    control: &Control<'_>,
) -> Result<(BackendInUse, u64), SendError> {
    let is_stopped = || control.is_stopped();
    let mut outlet = Outlet::new(descriptor, &is_stopped).map_err(SendError::Descriptor)?;
    let io = write_stream(contents, source, &mut outlet, control)?;
    Ok((io, outlet.sent().load(Ordering::Relaxed)))
}

/// Says which pages of a block are sent.
fn pages(block: &RamBlock, options: &SendOptions) -> Pages {
    if options.assume_zeroed && block.used_length() >= LARGE_BLOCK_LEN {
        Pages::Data
    } else {
        Pages::All
    }
}

/// Says how the parts of "ram" end for this machine type.
fn parts(machine: &str) -> Result<Parts, SendError> {
    let version = machine.rsplit('-').next().and_then(|version| version.parse().ok());
    match version.map(|version: QemuVersion| version.has(Feature::MultifdFlush)) {
        Some(true) => Ok(Parts::Flushing),
        Some(false) => Ok(Parts::Counted),
        None => Err(SendError::MachineVersion { machine: machine.to_owned() }),
    }
}

/// How long QEMU may take until it has room for one more connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait between two tries while QEMU has no room for one more connection.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

fn connect(path: &Path, control: &Control<'_>) -> Result<OwnedFd, SendError> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    loop {
        match unix_socket::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {}
            Err(errno) => {
                return Err(SendError::Connect { path: path.to_path_buf(), source: errno.into() });
            }
        }
        if control.is_stopped() {
            return Err(PagesError::Stopped.into());
        }
        thread::sleep(RETRY_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_type_says_how_parts_end() {
        assert!(matches!(parts("pc-i440fx-7.2"), Ok(Parts::Counted)));
        assert!(matches!(parts("pc-q35-8.0"), Ok(Parts::Counted)));
        assert!(matches!(parts("pc-q35-8.1"), Ok(Parts::Flushing)));
        assert!(matches!(parts("virt-10.0"), Ok(Parts::Flushing)));
        let error = parts("pc-q35-rhel9.4.0").unwrap_err().to_string();
        assert_eq!(error, "machine type \"pc-q35-rhel9.4.0\" does not end with a version of QEMU");
    }
}
