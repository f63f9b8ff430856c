//! What a save did.

use std::fmt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};
use vmfile_engine::{BackendInUse, DirectIoInUse};
use vmfile_pages::protected_ram::Faults;
use vmfile_pages::reading::as_text;

use super::{BaseUsed, Change, SavedDisk};

/// How RAM got from the VM into the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RouteUsed {
    /// From the memory of QEMU's process.
    Direct,
    /// From the migration stream.
    Stream,
    /// By QEMU itself.
    Native,
}

impl RouteUsed {
    /// Returns the word for it in a manifest: `direct`, `stream` or `native`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            RouteUsed::Direct => "direct",
            RouteUsed::Stream => "stream",
            RouteUsed::Native => "native",
        }
    }
}

impl fmt::Display for RouteUsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for RouteUsed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        as_text(self, serializer)
    }
}

/// How a running guest was saved.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LiveMethod {
    /// vmfile read each page from the memory of QEMU's process before the guest changed it.
    Userfault,
    /// vmfile copied the memory aside while the guest stood still.
    Aside {
        /// Why it was not by userfault.
        reason: String,
    },
    /// QEMU sent each page once, before the guest changed it.
    BackgroundSnapshot {
        /// Why it was not by userfault.
        reason: String,
    },
    /// QEMU sent again what the guest had changed, and paused it for the rest.
    PreCopy {
        /// Why it was not a background snapshot.
        reason: String,
    },
}

impl LiveMethod {
    /// Returns the route by which this method saves.
    pub(super) fn route(&self) -> RouteUsed {
        match self {
            LiveMethod::Userfault | LiveMethod::Aside { .. } => RouteUsed::Direct,
            LiveMethod::BackgroundSnapshot { .. } | LiveMethod::PreCopy { .. } => RouteUsed::Stream,
        }
    }
}

impl fmt::Display for LiveMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LiveMethod::Userfault => write!(f, "userfault"),
            LiveMethod::Aside { reason } => write!(f, "aside ({reason})"),
            LiveMethod::BackgroundSnapshot { reason } => {
                write!(f, "background-snapshot ({reason})")
            }
            LiveMethod::PreCopy { reason } => write!(f, "pre-copy ({reason})"),
        }
    }
}

impl Serialize for LiveMethod {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        as_text(self, serializer)
    }
}

/// How the guest had to wait for a save from its memory: by userfault, when it wrote to what was not
/// read yet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GuestWaits {
    /// How often.
    pub count: u64,
    /// How long in all, in seconds; the vCPUs may wait at the same time.
    pub total_seconds: f64,
    /// The longest one, in seconds.
    pub longest_seconds: f64,
    /// Bytes that were copied aside, so that the guest need not wait for the disk.
    pub aside_bytes: u64,
}

impl GuestWaits {
    /// The guest did not wait, and this much was copied while it stood still.
    pub(super) fn none(aside_bytes: u64) -> GuestWaits {
        GuestWaits { count: 0, total_seconds: 0.0, longest_seconds: 0.0, aside_bytes }
    }
}

impl From<Faults> for GuestWaits {
    fn from(faults: Faults) -> GuestWaits {
        GuestWaits {
            count: faults.count,
            total_seconds: faults.waited.as_secs_f64(),
            longest_seconds: faults.longest.as_secs_f64(),
            aside_bytes: faults.aside_bytes,
        }
    }
}

/// What a save did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SaveReport {
    /// The file.
    pub file: PathBuf,
    /// The file's identity, by which a file that needs it finds it.
    pub id: String,
    /// The base that was asked for, and whether it was used.
    pub base: Option<BaseUsed>,
    /// How RAM got from the VM into the file.
    pub route: RouteUsed,
    /// Why it was that route.
    pub route_reason: String,
    /// Whether the guest ran meanwhile.
    pub live: bool,
    /// How the running guest was saved; `None` if it stood still.
    pub live_method: Option<LiveMethod>,
    /// How the running guest had to wait; `None` unless vmfile read its memory.
    pub guest_waits: Option<GuestWaits>,
    /// Whether direct I/O was used; if not, why.
    #[serde(serialize_with = "as_text")]
    pub direct_io: DirectIoInUse,
    /// The back end that was used.
    #[serde(serialize_with = "as_text")]
    pub io: BackendInUse,
    /// Pages of all RAM blocks.
    pub pages_total: u64,
    /// Pages that are zero and take no room.
    pub pages_zero: u64,
    /// Bytes of pages that were written; a page that QEMU sent several times counts each time.
    pub bytes_written: u64,
    /// Bytes of pages that were written again, because the guest had changed them.
    pub bytes_rewritten: u64,
    /// The disks whose images belong to the file, and the overlays to which the guest writes now.
    pub disks: Vec<SavedDisk>,
    /// Parts of the VM that are not as its command line would make them.
    pub changes: Vec<Change>,
    /// Warnings for the user, a sentence each; the file is whole in spite of them.
    pub warnings: Vec<String>,
    /// How long the guest stood still, in seconds; until the end of the save if it was not resumed.
    pub pause_seconds: f64,
    /// How long the save took, in seconds.
    pub total_seconds: f64,
}
