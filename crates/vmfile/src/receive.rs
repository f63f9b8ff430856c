//! `vmfile receive`: a migration stream into a file.
//!
//! ```text
//! begin - connect - RAM, as it comes - devices - metadata - prove - publish
//! ```
//!
//! Every page goes to its fixed place in the file, and a page that the sender sends again
//! overwrites it. So the file is no longer than RAM, however long the stream is.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use derive_setters::Setters;
use serde::Serialize;
use vmfile_engine::{Backend, BackendInUse, DirectIo, DirectIoInUse, Existing};
use vmfile_format::PageSize;
use vmfile_format::manifest::VmMeta;
use vmfile_pages::PagesError;
use vmfile_pages::control::Control;
use vmfile_pages::draft::{Draft, SaveFacts};
use vmfile_pages::lane::Workers;
use vmfile_pages::reading::as_text;
use vmfile_qemu::ProcessInfo;
use vmfile_stream::Channels;
use vmfile_stream::error::ChannelsError;
use vmfile_stream::incoming::WaitLimits;
use vmfile_stream::listener::Listener;
use vmfile_stream::multifd::Connections;
use vmfile_stream::receiver::{Received, StreamReceiver};

pub use vmfile_stream::error::ReceiveError;

use crate::new_file::new_file;
use crate::secrets;
use crate::surroundings;

/// Where a stream comes from.
#[derive(Debug)]
pub enum StreamFrom {
    /// An open pipe, socket or file.
    Descriptor(OwnedFd),
    /// The QEMU that connects to a Unix socket, which is made at this path and removed afterwards.
    Listen(PathBuf),
}

/// How a stream is received.
#[derive(Clone, Debug, Setters)]
#[non_exhaustive]
pub struct ReceiveOptions {
    /// Whether pages are written past the page cache.
    pub direct_io: DirectIo,
    /// Which back end does the I/O.
    pub io: Backend,
    /// Whether a file of that name may be replaced.
    pub existing: Existing,
    /// Multifd channels that connect to the socket beside the stream, as many as QEMU's parameter
    /// `multifd-channels` says; `None` if its capability `multifd` is off.
    pub channels: Option<Channels>,
    /// How long the sender may send nothing; `None`: no limit.
    pub stall_timeout: Option<Duration>,
    /// How long the whole stream may take; `None`: no limit.
    pub timeout: Option<Duration>,
    /// Store the secrets on the command line of a QEMU that sends. Otherwise they are left out, and a
    /// restore needs them.
    pub with_secrets: bool,
}

impl Default for ReceiveOptions {
    fn default() -> ReceiveOptions {
        ReceiveOptions {
            direct_io: DirectIo::Preferred,
            io: Backend::Auto,
            existing: Existing::Refuse,
            channels: None,
            stall_timeout: Some(Duration::from_secs(300)),
            timeout: None,
            with_secrets: false,
        }
    }
}

/// What a receive did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ReceiveReport {
    /// The file.
    pub file: PathBuf,
    /// The versioned machine type of the VM.
    pub machine: String,
    /// Whether direct I/O was used; if not, why.
    #[serde(serialize_with = "as_text")]
    pub direct_io: DirectIoInUse,
    /// The back end that was used.
    #[serde(serialize_with = "as_text")]
    pub io: BackendInUse,
    /// How many multifd channels carried pages.
    pub channels: u8,
    /// Pages of all RAM blocks.
    pub pages_total: u64,
    /// Pages that are zero and take no room.
    pub pages_zero: u64,
    /// Bytes of pages that were written; a page that came several times counts each time.
    pub bytes_written: u64,
    /// Bytes of pages that were written again.
    pub bytes_rewritten: u64,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Length of the stream and of its channels, in bytes.
    pub stream_bytes: u64,
    /// How long the receive took, in seconds.
    pub total_seconds: f64,
}

/// Receives a migration stream into a new file at `destination`.
///
/// # Errors
///
/// Returns [`ReceiveError`]; then no file is left under the name, and a QEMU that sends notices the
/// end of its pipe or socket, and lets the guest run on.
pub fn receive(
    from: StreamFrom,
    destination: &Path,
    options: &ReceiveOptions,
    control: &Control<'_>,
) -> Result<ReceiveReport, ReceiveError> {
    let started = Instant::now();
    let unpublished = new_file(destination, options.existing, None)?;
    let draft = Draft::new(unpublished, options.direct_io)?;
    let limits = WaitLimits {
        control,
        process: None,
        stall: options.stall_timeout,
        deadline: options.timeout.map(|timeout| started + timeout),
    };
    let connections = connect(from, options.channels, &limits)?;
    let sender = vmfile_qemu::sender(&connections.stream);
    let width = (options.io, connections.channels.len() + 1);
    let workers = Workers::start(draft.file(), width).map_err(ReceiveError::write_ram)?;
    let page_size = PageSize::KIB_4;
    let receiver = StreamReceiver { draft: &draft, workers, limits, page_size };
    let received = receiver.run(connections, || Ok::<_, ReceiveError>(()))?;
    let mut vm = describe_vm(&received, sender);
    let warnings = if options.with_secrets {
        Vec::new()
    } else {
        secrets::warning(&secrets::leave_out(&mut vm)).into_iter().collect()
    };
    let facts = SaveFacts {
        route: "stream".to_owned(),
        live: None,
        pause_seconds: None,
        saved_at_unix_seconds: None,
        vm,
    };
    draft.finish(&received.places, (&received.bitmaps, &[]), received.tail(), facts)?;
    if control.is_stopped() {
        return Err(PagesError::Stopped.into());
    }
    let direct_io = draft.file().direct().clone();
    draft.prove()?.publish()?;
    let pages_data: u64 = received.bitmaps.iter().map(|bitmap| bitmap.data_count().0).sum();
    let pages_total = received.places.pages_total();
    Ok(ReceiveReport {
        file: destination.to_path_buf(),
        machine: received.configuration.machine,
        direct_io,
        io: received.backend,
        channels: Channels::count_of(options.channels),
        pages_total,
        pages_zero: pages_total - pages_data,
        bytes_written: received.counts.written_bytes,
        bytes_rewritten: received.counts.rewritten_bytes,
        stream_bytes: received.stream_bytes,
        warnings,
        total_seconds: started.elapsed().as_secs_f64(),
    })
}

fn connect(
    from: StreamFrom,
    channels: Option<Channels>,
    limits: &WaitLimits<'_>,
) -> Result<Connections, ReceiveError> {
    match from {
        StreamFrom::Descriptor(fd) if channels.is_none() => Ok(fd.into()),
        StreamFrom::Descriptor(_) => Err(ChannelsError::NoSocket.into()),
        StreamFrom::Listen(path) => {
            Connections::accept(Listener::bind(&path)?, Channels::count_of(channels), limits)
        }
    }
}

/// Describes the VM from the stream, and from the sender's process if that is a QEMU.
fn describe_vm(received: &Received, sender: Option<ProcessInfo>) -> VmMeta {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let words = sender.as_ref().and_then(|sender| {
        sender.arguments.iter().map(|word| word.to_str().map(str::to_owned)).collect()
    });
    VmMeta {
        uuid: received.configuration.uuid.map(uuid_text),
        run_state: received.run_state().unwrap_or("running").to_owned(),
        executable: sender.as_ref().map(|sender| text(&sender.executable)),
        user: sender.as_ref().map(|sender| sender.user),
        surroundings: sender.as_ref().and_then(surroundings::of_process),
        command_line: words.unwrap_or_default(),
        working_directory: sender.as_ref().map(|sender| text(&sender.working_directory)),
        ..VmMeta::of_machine(&received.configuration.machine)
    }
}

/// Writes a uuid in its usual form.
fn uuid_text(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    parts.join("-")
}
