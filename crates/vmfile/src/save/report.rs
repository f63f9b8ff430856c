//! What a save did.

use std::fmt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};
use vmfile_engine::{BackendInUse, DirectIoInUse};
use vmfile_pages::reading::as_text;

use super::{Change, SavedDisk};

/// How RAM was taken.
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

/// How a guest was saved that ran.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LiveMethod {
    /// QEMU wrote each page once, before the guest changed it.
    BackgroundSnapshot,
    /// QEMU sent again what the guest had changed, and paused it for the rest.
    PreCopy {
        /// Why it was not a background snapshot.
        reason: String,
    },
}

impl fmt::Display for LiveMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LiveMethod::BackgroundSnapshot => write!(f, "background-snapshot"),
            LiveMethod::PreCopy { reason } => write!(f, "pre-copy ({reason})"),
        }
    }
}

impl Serialize for LiveMethod {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        as_text(self, serializer)
    }
}

/// What a save did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SaveReport {
    /// The file.
    pub file: PathBuf,
    /// How RAM was taken.
    pub route: RouteUsed,
    /// Why it was that route.
    pub route_reason: String,
    /// Whether the guest ran meanwhile.
    pub live: bool,
    /// How; `None` if it stood still.
    pub live_method: Option<LiveMethod>,
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
    /// Bytes of pages that were written, those that came again as often as they came.
    pub bytes_written: u64,
    /// Bytes of pages that were written again, because the guest had changed them.
    pub bytes_rewritten: u64,
    /// The disks that belong to the file, and where the guest writes since.
    pub disks: Vec<SavedDisk>,
    /// What of the VM is not as its command line would make it.
    pub changes: Vec<Change>,
    /// What the user should know although the file is whole, a sentence each.
    pub warnings: Vec<String>,
    /// How long the guest stood still, in seconds: to the end of the save, where it did not run on.
    pub pause_seconds: f64,
    /// How long it all took, in seconds.
    pub total_seconds: f64,
}
