//! Why a VM was not saved.

use std::error::Error;
use std::fmt;
use std::io;
use std::iter;
use std::path::PathBuf;
use std::time::Duration;

use vmfile_engine::PublishError;
use vmfile_format::FormatError;
use vmfile_pages::PagesError;
pub use vmfile_pages::base::BaseError;
use vmfile_pages::process_ram::ProcessRamError;
use vmfile_pages::snapshot::SnapshotError;
use vmfile_qemu::{Blocker, CommandLineError, VmError};
use vmfile_stream::error::HeldError;

use crate::change::Change;
use crate::guard::GuardError;
use crate::receive::ReceiveError;

/// Why a VM was not saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// QEMU refused, or could not be reached.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The pages could not be moved from RAM to the file, or the caller stopped the save.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The guardian process, which undoes the save if this process ends, could not be started or
    /// has ended.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// QEMU ended in the middle of the save.
    #[error("QEMU ended while the VM was saved; before that: {cause}")]
    QemuGone {
        /// The error that the save met first.
        cause: Box<SaveError>,
        /// The monitor's error.
        source: VmError,
    },
    /// The connection to QEMU's monitor broke in the middle of the save, but QEMU still runs.
    #[error("the connection to QEMU's monitor broke; by a new one the VM is as it was: {cause}")]
    CutOff {
        /// The error that the save met first.
        cause: Box<SaveError>,
    },
    /// The VM is in a state in which it cannot be saved.
    #[error("the VM is in run state {found:?}, expected running or paused")]
    RunState {
        /// QEMU's name for the state.
        found: String,
    },
    /// The guest sleeps, or fell asleep while it was being saved, and this way to save would end QEMU.
    #[error("the guest sleeps (ACPI S3), and cannot be saved in this way: {reason}")]
    Sleeps {
        /// Why not.
        reason: String,
    },
    /// A guest was to run while it is saved, and stood still before the moment that the file would hold.
    #[error(
        "another client of QEMU, or the guest itself, stopped the guest while it was being saved: it is \
         {found}, and stays so"
    )]
    StoppedMeanwhile {
        /// QEMU's name for the state.
        found: String,
    },
    /// Something in the VM forbids a save.
    #[error("this VM cannot be saved: {}", joined(blockers))]
    Blocked {
        /// Everything that forbids it, each with what to do about it.
        blockers: Vec<Blocker>,
    },
    /// The save would end the VM, and a QEMU started with its command line would be another VM.
    #[error("the VM is not what its command line would make: {}", joined(changes))]
    Changed {
        /// The changes, each with what a restore does about it.
        changes: Vec<Change>,
    },
    /// The VM would end, and with it what QEMU does beside running the guest.
    #[error("the VM would end, and with it: {}", activities.join("; "))]
    Activities {
        /// Block jobs and exports.
        activities: Vec<String>,
    },
    /// The VM would end, and QEMU does not say whether its disks are durable.
    #[error("the VM would end, and its disks may not be durable: {}", reasons.join("; "))]
    NotConfirmed {
        /// One for each disk.
        reasons: Vec<String>,
    },
    /// Another client of QEMU changed the VM after its save began.
    #[error("the VM was changed while it was being saved: {what} came, went or changed")]
    ChangedMeanwhile {
        /// The part that changed.
        what: String,
    },
    /// QEMU does not report the address of a RAM block.
    #[error("QEMU prints no address of RAM block {block:?}")]
    NoAddress {
        /// The block.
        block: String,
    },
    /// A RAM block cannot be stored in a file.
    #[error("RAM block {block:?}: {reason}")]
    Block {
        /// The block.
        block: String,
        /// Why.
        reason: String,
    },
    /// The RAM of the process cannot be reached.
    #[error(transparent)]
    Process(#[from] ProcessRamError),
    /// The file system has not enough room.
    #[error("the file needs {needed_bytes} bytes, the file system has {available_bytes} free")]
    NoSpace {
        /// Bytes that the file may need.
        needed_bytes: u64,
        /// Bytes that are free.
        available_bytes: u64,
    },
    /// What QEMU wrote as device state is not understood.
    #[error("the device state that QEMU wrote")]
    DeviceState(#[source] FormatError),
    /// The device state does not say whether the VM runs.
    #[error("the device state has no section \"globalstate\" to say whether the VM runs")]
    NoRunState,
    /// A word of the command line cannot be written into the manifest. It is not printed: it may
    /// be a secret.
    #[error("word {index} of the VM's command line, the value of {option:?}, is not UTF-8")]
    NotText {
        /// Which, counted from 0, the program's name.
        index: usize,
        /// The option before it; empty if there is none.
        option: String,
    },
    /// What the command line names cannot be written into the manifest.
    #[error("the VM's command line cannot be kept")]
    Options(#[source] CommandLineError),
    /// Threads, rings or memory for the save could not be set up.
    #[error("take threads and memory for the save")]
    Workers(#[source] io::Error),
    /// This QEMU is too old for the route `native`.
    #[error("the route native needs QEMU {needed} or later, found {found}")]
    QemuTooOld {
        /// The version of this QEMU.
        found: String,
        /// The first version that can.
        needed: String,
    },
    /// Direct I/O was required, but is not possible.
    #[error("direct I/O is not possible: {reason}")]
    NoDirectIo {
        /// Why.
        reason: String,
    },
    /// The file cannot be opened for QEMU.
    #[error("open the file for QEMU")]
    Reopen(#[source] io::Error),
    /// The file that QEMU wrote is not understood, or cannot be read.
    #[error("the file that QEMU wrote")]
    Written(#[source] SnapshotError),
    /// A pair of sockets could not be made.
    #[error("make a pair of sockets")]
    Socket(#[source] io::Error),
    /// The guest could not be saved by userfault while it ran.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// The file that was named as the base cannot be one.
    #[error("the base cannot be used")]
    Base(#[from] BaseError),
    /// The base would be replaced by the file that needs it.
    #[error("{path} is the base, or below it, and would be replaced", path = path.display())]
    BaseIsDestination {
        /// The destination.
        path: PathBuf,
    },
    /// The base is a file of another VM.
    #[error("{path} is a file of another VM: {what}", path = path.display())]
    BaseOfAnotherVm {
        /// The base.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// Only a save that reads the memory of QEMU's process can keep pages of a base.
    #[error("a save with a base reads the memory of QEMU's process, and cannot here: {reason}")]
    BaseNeedsMemory {
        /// Why it cannot.
        reason: String,
    },
    /// The path of the new file is not UTF-8: QEMU and thin files keep it as text.
    #[error("{path} is not UTF-8", path = path.display())]
    PathNotText {
        /// The path.
        path: PathBuf,
    },
    /// The caller chose a thin file, and no base.
    #[error("a thin file needs a base")]
    ThinWithoutBase,
    /// QEMU did not make the connections over which it should send the VM.
    #[error("QEMU did not connect to {socket}: {reason}", socket = socket.display())]
    NotConnected {
        /// The path of the socket, as QEMU got it.
        socket: PathBuf,
        /// QEMU's message if it gave one.
        reason: String,
    },
    /// QEMU did not send the VM.
    #[error("QEMU's migration: {reason}")]
    Migration {
        /// QEMU's message if it gave one.
        reason: String,
    },
    /// The caller chose a live save, and the route `native`, which pauses the guest.
    #[error("the route native cannot save a guest that runs")]
    NotLive,
    /// The caller chose the route `direct`, which cannot save this guest.
    #[error("the route direct cannot save this VM: {reason}")]
    NotDirect {
        /// Why not.
        reason: String,
    },
    /// The caller chose channels, and the route `direct`, which has none.
    #[error("the route direct has no channels")]
    NoChannels,
    /// The guest wrote faster than it was saved.
    #[error(
        "the guest was not saved within {timeout:?}: it changes its memory faster than it is sent"
    )]
    NotConverged {
        /// How long the save tried.
        timeout: Duration,
    },
    /// What QEMU sent could not be received.
    #[error(transparent)]
    Receive(ReceiveError),
    /// A disk cannot get an overlay.
    #[error("disk {device:?} cannot be kept with the file: {reason}")]
    Disk {
        /// The device.
        device: String,
        /// Why.
        reason: String,
    },
    /// A restore would not find an image that the VM uses.
    #[error("disk {device:?}: a restore would not find {image} again: {reason}", image = image.display())]
    ImageLost {
        /// The device.
        device: String,
        /// The image, as QEMU names it.
        image: PathBuf,
        /// Why.
        reason: String,
    },
    /// What QEMU has open could not be listed.
    #[error("list the files that QEMU has open")]
    OpenFiles {
        /// What the kernel said.
        source: io::Error,
    },
    /// A drive got other images while the VM was saved.
    #[error("disk {device:?} changed during the save: found {found:?}, expected {expected:?}")]
    DiskChanged {
        /// The device.
        device: String,
        /// Its images, top first; nothing for an empty drive.
        found: String,
        /// What they were when the save began.
        expected: String,
    },
    /// The guest would write to its disks after the saved moment, and then the save would end it.
    #[error(
        "the guest writes to {} after the saved moment, and would be ended: no restore could use \
         those disks",
        devices.join(", ")
    )]
    DisksGoOn {
        /// The disks.
        devices: Vec<String>,
    },
    /// The save failed, and a disk has an overlay that it did not have before.
    #[error("{cause}; and an overlay is left on a disk")]
    LeftOverlays {
        /// Why the save failed.
        cause: Box<SaveError>,
        /// Why the overlay could not be merged.
        source: VmError,
    },
    /// The save failed, and the VM could not be resumed.
    #[error("{cause}; and the VM is left paused")]
    LeftPaused {
        /// Why the save failed.
        cause: Box<SaveError>,
        /// Why the VM could not be resumed.
        source: VmError,
    },
    /// The file is whole, but QEMU could not be told to resume the guest or to end.
    #[error("{file} is whole, but {}", left(source), file = file.display())]
    Release {
        /// The file.
        file: PathBuf,
        /// Why.
        source: VmError,
    },
}

/// Why a running guest could not be saved by userfault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserfaultError {
    /// The caller chose the route `direct`, or a base, and this guest's memory cannot be read while it
    /// runs.
    #[error("the memory of this guest cannot be read while it runs: {reason}")]
    NotPossible {
        /// Why.
        reason: String,
    },
    /// The userfaultfd by which QEMU protects the guest's memory could not be used.
    #[error("use the userfaultfd by which QEMU protects the guest's memory")]
    Kernel(#[source] io::Error),
    /// QEMU began a background snapshot and has no userfaultfd.
    #[error("QEMU has no userfaultfd in a background snapshot")]
    Missing,
    /// QEMU's stream could not be held at its first page.
    #[error("hold QEMU's stream at its first page")]
    Held(#[source] HeldError),
    /// QEMU did not carry out vmfile's commands while vmfile kept its stream waiting.
    #[error(
        "QEMU did not answer within {limit:?} in a background snapshot: its main loop may wait for a \
         command of another client"
    )]
    Stuck {
        /// How long it may take.
        limit: Duration,
    },
    /// QEMU sent a page, and let the guest change it, after vmfile took QEMU to wait.
    #[error("QEMU sent pages while it was taken to wait")]
    Overtaken,
}

fn joined<T: fmt::Display>(items: &[T]) -> String {
    let texts: Vec<String> = items.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

impl SaveError {
    /// Whether the caller stopped the save, in the middle of its work or while it waited for QEMU.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self, SaveError::Pages(PagesError::Stopped))
            || matches!(self, SaveError::Vm(error) if error.is_stopped())
    }

    /// Whether a VM that ran before is left paused.
    #[must_use]
    pub fn leaves_paused(&self) -> bool {
        match self {
            SaveError::Release { source, .. } => !source.is_closed(),
            SaveError::LeftPaused { .. } | SaveError::Vm(VmError::LeftPaused { .. }) => true,
            _ => false,
        }
    }

    /// Returns what the user can do about what forbids the save, each remedy once.
    #[must_use]
    pub fn remedies(&self) -> Vec<&'static str> {
        let SaveError::Blocked { blockers } = self else { return Vec::new() };
        let mut remedies = Vec::new();
        for remedy in blockers.iter().map(Blocker::remedy) {
            if !remedies.contains(&remedy) {
                remedies.push(remedy);
            }
        }
        remedies
    }

    /// Wraps this error in one that says that QEMU has ended.
    pub(crate) fn with_qemu_gone(self, source: VmError) -> SaveError {
        SaveError::QemuGone { cause: Box::new(self), source }
    }

    /// Wraps this error in one that says that the connection broke, but QEMU still runs.
    pub(crate) fn cut_off(self) -> SaveError {
        match self {
            SaveError::QemuGone { cause, .. } => SaveError::CutOff { cause },
            other => SaveError::CutOff { cause: Box::new(other) },
        }
    }
}

/// Returns what became of a VM that was not released because of `error`.
fn left(error: &VmError) -> &'static str {
    if error.is_closed() {
        "QEMU ended before it was told what to do"
    } else {
        "the VM is left paused"
    }
}

impl From<PublishError> for SaveError {
    fn from(error: PublishError) -> SaveError {
        SaveError::Pages(error.into())
    }
}

impl From<HeldError> for SaveError {
    fn from(error: HeldError) -> SaveError {
        match error {
            HeldError::Stopped => SaveError::Pages(PagesError::Stopped),
            error => SaveError::Userfault(UserfaultError::Held(error)),
        }
    }
}

impl From<ReceiveError> for SaveError {
    fn from(error: ReceiveError) -> SaveError {
        match error {
            ReceiveError::Pages(error) => SaveError::Pages(error),
            error => SaveError::Receive(error),
        }
    }
}

/// Returns the texts of an error and of what caused it, in one line.
pub(crate) fn with_sources(error: &(dyn Error + 'static)) -> String {
    let all = iter::successors(Some(error), |&error| error.source());
    let mut words: Vec<String> = all.map(ToString::to_string).collect();
    words.dedup();
    words.join(": ")
}
