//! `vmfile convert`: between files with fixed places and files that are streams.
//!
//! ```text
//! look at the source - begin - send it, or receive it, or both at once - publish
//! ```
//!
//! The device sections are the same bytes in both. The source is verified as it is read, so that
//! bytes that do not match their hash never get a new hash.

use std::fmt;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use derive_setters::Setters;
use serde::Serialize;
use vmfile_engine::beside;
use vmfile_engine::{Backend, DirectIo, Existing, PublishError};
use vmfile_format::stream::decoder::{EVENT_LEN_MAX, Event, StreamDecoder};
use vmfile_pages::PagesError;
use vmfile_pages::control::Control;
use vmfile_pages::draft::Draft;
use vmfile_pages::reading::Verified;
use vmfile_pages::snapshot::{Snapshot, SnapshotError};

use crate::new_file::new_file;
use crate::receive::{ReceiveError, ReceiveOptions, StreamFrom, receive};
use crate::send::{SendError, SendOptions, SendReport, SendTo, send};
use crate::whole::{Whole, write_whole};

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Every page at a fixed place: a vmfile, or a file that QEMU wrote with mapped-ram.
    MappedRam,
    /// A migration stream, as `exec:cat` and `file:` without mapped-ram write it.
    Stream,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::MappedRam => "mapped-ram",
            Format::Stream => "stream",
        })
    }
}

/// How a file is converted.
#[derive(Clone, Debug, Setters)]
#[non_exhaustive]
pub struct ConvertOptions {
    /// Whether pages go past the page cache.
    pub direct_io: DirectIo,
    /// Which back end does the I/O.
    pub io: Backend,
    /// Whether a file of that name may be replaced.
    pub existing: Existing,
}

impl Default for ConvertOptions {
    fn default() -> ConvertOptions {
        let (direct_io, io) = (DirectIo::Preferred, Backend::Auto);
        ConvertOptions { direct_io, io, existing: Existing::Refuse }
    }
}

/// What a conversion did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ConvertReport {
    /// The new file.
    pub file: PathBuf,
    /// The format of the source: `mapped-ram` or `stream`.
    pub from: Format,
    /// The format of the new file.
    pub to: Format,
    /// Pages of all RAM blocks.
    pub pages_total: u64,
    /// Pages that hold data.
    pub pages_data: u64,
    /// Whether the source was compared with its checksums and each page with its hash; if not, why.
    pub verified: Verified,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// How long it took, in seconds.
    pub total_seconds: f64,
}

/// Why a file was not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The source could not be read or is damaged, the new file could not be written, or the caller
    /// stopped the conversion.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The source already has the format of the new file.
    #[error("{path} is a {what} already", path = path.display())]
    Already {
        /// The source.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The destination is the source, or a file below it.
    #[error("{path} is the source, or below it, and would be replaced", path = path.display())]
    IsSource {
        /// The destination.
        path: PathBuf,
    },
    /// A file or a pair of sockets could not be used.
    #[error("{what}")]
    Io {
        /// What vmfile tried to do.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The source could not be sent as a stream.
    #[error(transparent)]
    Send(SendError),
    /// The stream could not be written at fixed places.
    #[error(transparent)]
    Receive(ReceiveError),
}

impl From<PublishError> for ConvertError {
    fn from(error: PublishError) -> ConvertError {
        ConvertError::Pages(error.into())
    }
}

impl From<SnapshotError> for ConvertError {
    fn from(error: SnapshotError) -> ConvertError {
        ConvertError::Pages(error.into())
    }
}

impl From<SendError> for ConvertError {
    fn from(error: SendError) -> ConvertError {
        match error {
            SendError::Pages(error) => ConvertError::Pages(error),
            error => ConvertError::Send(error),
        }
    }
}

impl From<ReceiveError> for ConvertError {
    fn from(error: ReceiveError) -> ConvertError {
        match error {
            ReceiveError::Pages(error) => ConvertError::Pages(error),
            error => ConvertError::Receive(error),
        }
    }
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> ConvertError {
    move |source| ConvertError::Io { what, source }
}

/// Converts the file at `source`, which begins at its byte `start`, to a new file of the format
/// `to`.
///
/// A mapped-ram file that QEMU wrote can be converted to mapped-ram: it becomes a vmfile, with its
/// pages checked and without stale bytes. So can a thin file, which becomes one that needs no other, and
/// one of an older version, whose page hashes get a key. Any other vmfile is one already.
///
/// The new file belongs to the caller. It holds no command line if another user may have written that in
/// the source: nothing would tell it from one that the caller has written.
///
/// # Errors
///
/// Returns [`ConvertError`]; then there is no new file.
pub fn convert(
    (source, start): (&Path, u64),
    destination: &Path,
    to: Format,
    options: &ConvertOptions,
    control: &Control<'_>,
) -> Result<ConvertReport, ConvertError> {
    let started = Instant::now();
    let (from, converted) = match (Snapshot::open(source, start), to) {
        (Ok(snapshot), Format::Stream) => {
            (Format::MappedRam, to_stream(&snapshot, destination, options, control)?)
        }
        (Ok(snapshot), Format::MappedRam) if snapshot.base().is_some() || is_old(&snapshot) => {
            (Format::MappedRam, to_whole(&snapshot, destination, options, control)?)
        }
        (Ok(snapshot), Format::MappedRam) if snapshot.manifest().is_some() => {
            return Err(already(source, "vmfile"));
        }
        (Ok(snapshot), Format::MappedRam) => {
            (Format::MappedRam, to_vmfile(&snapshot, destination, options, control)?)
        }
        (Err(SnapshotError::Format { source: why, .. }), _) => {
            match (open_stream(source, start)?, to) {
                (Some(_), Format::Stream) => return Err(already(source, "stream")),
                (Some(file), Format::MappedRam) => {
                    (Format::Stream, from_stream(file, destination, options, control)?)
                }
                (None, _) => {
                    let path = source.to_path_buf();
                    return Err(SnapshotError::Format { path, source: why }.into());
                }
            }
        }
        (Err(error), _) => return Err(error.into()),
    };
    Ok(ConvertReport {
        file: destination.to_path_buf(),
        from,
        to,
        pages_total: converted.pages_total,
        pages_data: converted.pages_data,
        verified: converted.verified,
        warnings: converted.warnings,
        total_seconds: started.elapsed().as_secs_f64(),
    })
}

/// Refuses a destination that is the source, or a file below it: those are needed.
fn refuse_own(snapshot: &Snapshot, destination: &Path) -> Result<(), ConvertError> {
    if snapshot.chain().any(|file| file.is_at(destination)) {
        return Err(ConvertError::IsSource { path: destination.to_path_buf() });
    }
    Ok(())
}

/// Whether an older version of vmfile wrote the file: its page hashes have no key.
fn is_old(snapshot: &Snapshot) -> bool {
    snapshot.manifest().is_some_and(|manifest| manifest.meta.page_hash_seed == 0)
}

fn already(source: &Path, what: &'static str) -> ConvertError {
    ConvertError::Already { path: source.to_path_buf(), what }
}

/// Opens the file at its byte `start`, if a stream without mapped-ram begins there.
fn open_stream(source: &Path, start: u64) -> Result<Option<File>, ConvertError> {
    let what = "look at the beginning of the source";
    let mut file = File::open(source).map_err(io(what))?;
    file.seek(SeekFrom::Start(start)).map_err(io(what))?;
    let mut head = Vec::new();
    file.by_ref().take(EVENT_LEN_MAX as u64).read_to_end(&mut head).map_err(io(what))?;
    file.seek(SeekFrom::Start(start)).map_err(io(what))?;
    let first = StreamDecoder::new().next(&head).ok().and_then(|step| step.event);
    Ok(matches!(first, Some(Event::Configuration(_))).then_some(file))
}

/// What was converted.
struct Converted {
    pages_total: u64,
    pages_data: u64,
    verified: Verified,
    warnings: Vec<String>,
}

/// Writes the VM as a stream.
fn to_stream(
    snapshot: &Snapshot,
    destination: &Path,
    options: &ConvertOptions,
    control: &Control<'_>,
) -> Result<Converted, ConvertError> {
    refuse_own(snapshot, destination)?;
    let unpublished = new_file(destination, options.existing, None)?;
    let file = unpublished.file().try_clone().map_err(io("open the new file once more"))?;
    let sent = send(snapshot, SendTo::Descriptor(file.into()), &send_options(options), control)?;
    unpublished.publish()?;
    let SendReport { pages_total, pages_data, verified, .. } = sent;
    Ok(Converted { pages_total, pages_data, verified, warnings: Vec::new() })
}

/// Writes a vmfile anew, with all pages of the files below it.
fn to_whole(
    snapshot: &Snapshot,
    destination: &Path,
    options: &ConvertOptions,
    control: &Control<'_>,
) -> Result<Converted, ConvertError> {
    refuse_own(snapshot, destination)?;
    let unpublished = new_file(destination, options.existing, None)?;
    let draft = Draft::new(unpublished, options.direct_io)?;
    let whole = write_whole(&draft, snapshot, options.io, control)?;
    draft.prove()?.publish()?;
    let Whole { pages_total, pages_data, left_out } = whole;
    let warning = left_out.map(|reason| {
        format!(
            "the new file holds no command line, because another user may have written that: {reason}; a \
             restore needs one after `--`"
        )
    });
    let (verified, warnings) = (Verified::of(snapshot), warning.into_iter().collect());
    Ok(Converted { pages_total, pages_data, verified, warnings })
}

/// Writes a stream at fixed places.
fn from_stream(
    file: File,
    destination: &Path,
    options: &ConvertOptions,
    control: &Control<'_>,
) -> Result<Converted, ConvertError> {
    let from = StreamFrom::Descriptor(file.into());
    let received = receive(from, destination, &receive_options(options), control)?;
    Ok(Converted {
        pages_total: received.pages_total,
        pages_data: received.pages_total - received.pages_zero,
        verified: Verified::Stream,
        warnings: received.warnings,
    })
}

/// Sends the VM to a receiver in this process: what arrives is checked, hashed, and without stale
/// bytes.
fn to_vmfile(
    snapshot: &Snapshot,
    destination: &Path,
    options: &ConvertOptions,
    control: &Control<'_>,
) -> Result<Converted, ConvertError> {
    let (ours, theirs) = UnixStream::pair().map_err(io("make a pair of sockets"))?;
    // Only the receiver reports progress.
    let quiet = control.quiet();
    let to = SendTo::Descriptor(ours.into());
    let from = StreamFrom::Descriptor(theirs.into());
    let both = beside(
        move || send(snapshot, to, &send_options(options), &quiet),
        |_| receive(from, destination, &receive_options(options), control),
    );
    let (sent, received) = both.map_err(io("send the VM to ourselves"))?;
    match (sent, received) {
        // The receiver's error is the cause.
        (Ok(_) | Err(SendError::PeerClosed { .. }), Err(error)) => Err(error.into()),
        (Err(error), _) => Err(error.into()),
        (Ok(sent), Ok(received)) => Ok(Converted {
            pages_total: received.pages_total,
            pages_data: received.pages_total - received.pages_zero,
            verified: sent.verified,
            warnings: received.warnings,
        }),
    }
}

fn send_options(options: &ConvertOptions) -> SendOptions {
    let ConvertOptions { direct_io, io, .. } = *options;
    SendOptions { direct_io, io, ..SendOptions::default() }
}

fn receive_options(options: &ConvertOptions) -> ReceiveOptions {
    let ConvertOptions { direct_io, io, existing } = *options;
    ReceiveOptions { direct_io, io, existing, ..ReceiveOptions::default() }
}
