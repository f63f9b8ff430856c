//! Why a VM was not restored.

use std::fmt;
use std::io;
use std::path::PathBuf;

use vmfile_pages::PagesError;
use vmfile_pages::process_ram::ProcessRamError;
use vmfile_pages::snapshot::SnapshotError;
use vmfile_qemu::{CommandLineError, LaunchError, QemuVersion, QmpError, VmError};

use crate::guard::GuardError;
use crate::send::SendError;

/// Why a VM was not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The file could not be read or is damaged, its pages could not be brought into RAM, or the
    /// caller stopped the restore.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The file could not be opened once more.
    #[error("open the file once more")]
    File(#[source] io::Error),
    /// The caller wants the pages verified, but the file has no hashes of them.
    #[error("QEMU wrote {path}: its pages have no hashes to verify them by", path = path.display())]
    NoHashes {
        /// The file.
        path: PathBuf,
    },
    /// QEMU refused, or could not be reached.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// QEMU ended in the middle of the restore.
    #[error("QEMU ended while the VM was restored{}; before that: {cause}", said(stderr))]
    QemuGone {
        /// The error that the restore met first.
        cause: Box<RestoreError>,
        /// The end of QEMU's standard error; empty if it went elsewhere.
        stderr: String,
        /// The monitor's error.
        source: QmpError,
    },
    /// QEMU did not take the device state.
    #[error("load the device state{}", said(stderr))]
    DeviceState {
        /// What QEMU answered.
        source: vmfile_qemu::LoadError,
        /// The end of its standard error.
        stderr: String,
    },
    /// The device state does not say whether the VM runs.
    #[error("the file's device state has no section \"globalstate\"")]
    NoRunState,
    /// QEMU before 9.0 cannot take a guest that sleeps.
    #[error("the guest sleeps (ACPI S3), and QEMU {found} cannot take it: 9.0 and later can")]
    Sleeps {
        /// The version of the QEMU that was to take it.
        found: QemuVersion,
    },
    /// The command line in the file is not run.
    #[error("the command line in the file is not run: {reason}")]
    Untrusted {
        /// Why not.
        reason: String,
    },
    /// The command line cannot be used.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// QEMU did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The command line after `--` is empty.
    #[error("the command line of QEMU is empty")]
    NoCommand,
    /// The file holds no command line: for example, because QEMU itself wrote the file.
    #[error("the file holds no command line")]
    NoSavedCommand,
    /// The file does not hold the secrets of the command line.
    #[error("the file does not hold secrets of the command line: {}", missing.join(", "))]
    SecretsLeftOut {
        /// Where they were, by option and key.
        missing: Vec<String>,
    },
    /// A secret was given for an object that the saved command line does not have.
    #[error("the saved command line has no secret object {id:?}")]
    NoSuchSecret {
        /// The id that was given.
        id: String,
    },
    /// The saved command line has parts that belonged to the process that started the VM.
    #[error("the saved command line cannot be started again: {}", what.join("; "))]
    CannotRecreate {
        /// The options at fault.
        what: Vec<String>,
    },
    /// The VM had parts that no command-line option can make.
    #[error("the VM cannot be made again: {}", what.join("; "))]
    CannotRemake {
        /// Each part, and why.
        what: Vec<String>,
    },
    /// The saved command line has no place for the image of a disk.
    #[error("the saved command line has no place for {image}, the image of disk {device:?}", image = image.display())]
    DiskNotNamed {
        /// The device.
        device: String,
        /// The image.
        image: PathBuf,
    },
    /// Images are not what they were when the VM was saved.
    #[error("disks have changed since the VM was saved: {}", joined(changes))]
    DisksChanged {
        /// Everything that differs.
        changes: Vec<ImageChange>,
    },
    /// The guest of a QEMU that waits would write into an image that belongs to the file.
    #[error("drive {device:?} of the QEMU that waits writes to {image}, which belongs to the file; \
             expected an overlay of it", image = image.display())]
    ImageOfFile {
        /// The drive.
        device: String,
        /// The image.
        image: PathBuf,
    },
    /// An overlay is needed on top of an image whose format the command line does not say.
    #[error("{option} does not say the format of {image}, which gets an overlay", image = image.display())]
    FormatNotSaid {
        /// The option as written; nothing for a bare image.
        option: String,
        /// The image.
        image: PathBuf,
    },
    /// No overlay could be made on top of an image that belongs to the file.
    #[error("make an overlay of {image}", image = image.display())]
    Overlay {
        /// The image.
        image: PathBuf,
        /// What the kernel or `qemu-img` said.
        source: io::Error,
    },
    /// The program that makes overlays was not found.
    #[error("qemu-img is neither beside QEMU nor in PATH")]
    NoQemuImg,
    /// A socket that the new QEMU would take over is in use.
    #[error("socket {socket} of the command line is in use", socket = socket.display())]
    SocketInUse {
        /// The socket.
        socket: PathBuf,
    },
    /// The caller wants RAM mapped, but that is not possible.
    #[error("RAM cannot be mapped from the file: {reason}")]
    CannotMap {
        /// Why.
        reason: String,
    },
    /// The caller wants RAM loaded, but QEMU does not say where its memory lies.
    #[error("RAM cannot be loaded from the file: {reason}")]
    CannotLoad {
        /// Why.
        reason: String,
    },
    /// The QEMU that was given does not wait for a VM.
    #[error("QEMU is in run state {found:?}, expected inmigrate")]
    NotWaiting {
        /// QEMU's name for the state.
        found: String,
    },
    /// The file is of another VM than the one that QEMU was started with.
    #[error("the file does not fit the VM: {}", joined(differ))]
    Incompatible {
        /// Everything that differs.
        differ: Vec<Mismatch>,
    },
    /// The RAM of the new process cannot be reached.
    #[error(transparent)]
    Process(#[from] ProcessRamError),
    /// The guardian process, which ends the new QEMU if this process ends, could not be started or
    /// has ended.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The stream to QEMU could not be set up.
    #[error("set up the stream to QEMU: two sockets and a thread")]
    Stream(#[source] io::Error),
    /// The stream to QEMU broke.
    #[error("send the VM to QEMU")]
    Send(#[source] SendError),
    /// QEMU was told to let the guest run, and has not answered. It was not ended, because the
    /// guest may run.
    #[error("QEMU{} was told to let the guest run and has not answered; it was not ended, for the \
             guest may run", of(*pid))]
    Unanswered {
        /// QEMU's process.
        pid: Option<u32>,
        /// The monitor's error, which says how long vmfile waited.
        source: QmpError,
    },
}

impl From<SnapshotError> for RestoreError {
    fn from(error: SnapshotError) -> RestoreError {
        RestoreError::Pages(error.into())
    }
}

/// A difference between an image of a disk and what it was when the VM was saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageChange {
    /// The device.
    pub device: String,
    /// The image.
    pub image: PathBuf,
    /// The property that differs.
    pub what: &'static str,
    /// What it is now.
    pub found: String,
    /// What it was.
    pub expected: String,
}

impl fmt::Display for ImageChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ImageChange { device, image, what, found, expected } = self;
        let image = image.display();
        write!(f, "disk {device:?}, {image}: {what}: found {found}, expected {expected}")
    }
}

/// Something that differs between the file and the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What differs.
    pub what: String,
    /// What the file says.
    pub file: String,
    /// What the VM has.
    pub vm: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} in the file, {} in this VM", self.what, self.file, self.vm)
    }
}

fn of(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" of process {pid}")).unwrap_or_default()
}

fn said(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!("; QEMU said: {stderr}") }
}

fn joined<T: fmt::Display>(items: &[T]) -> String {
    let texts: Vec<String> = items.iter().map(ToString::to_string).collect();
    texts.join("; ")
}
