//! What a save did.

use std::path::PathBuf;

use serde::Serialize;

use super::{Change, SavedDisk};

/// What a save did.
#[derive(Clone, Debug, Serialize)]
pub struct SaveReport {
    /// The file.
    pub file: PathBuf,
    /// How RAM was taken: `direct`, `stream` or `native`.
    pub route: &'static str,
    /// Why it was that route.
    pub route_reason: String,
    /// Whether the guest ran meanwhile.
    pub live: bool,
    /// How: `background-snapshot` or `pre-copy`; and why not the first. `None` if it stood still.
    pub live_method: Option<String>,
    /// Whether direct I/O was used; if not, why.
    pub direct_io: String,
    /// The back end that was used.
    pub io: String,
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
