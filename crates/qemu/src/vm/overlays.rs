//! Overlays: from one moment on the guest writes to new images, and the old ones stay unchanged.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Vm, VmError};
use crate::qmp::unexpected;

/// The prefix of the node name of every overlay that vmfile makes.
pub(crate) const OVERLAY_PREFIX: &str = "vmf-";

/// How often the state of a merge is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A qcow2 image that vmfile puts on top of a disk's image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The block node that is below it.
    below: String,
    /// Its own block node, with a unique name.
    node: String,
    file: PathBuf,
}

impl Overlay {
    /// Describes an overlay of the block node `below`, in `file`; creates nothing.
    #[must_use]
    pub fn new(below: &str, file: &Path) -> Overlay {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // QEMU (10.0) allows at most 31 characters.
        let node = format!("{OVERLAY_PREFIX}{since:x}-{:x}-{number:x}", std::process::id());
        Overlay { below: below.to_owned(), node, file: file.to_path_buf() }
    }

    /// Returns the name of its block node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Returns the name of the block node that is below it.
    #[must_use]
    pub fn below(&self) -> &str {
        &self.below
    }

    /// Returns the image.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }
}

impl Vm {
    /// Puts all of `overlays` on top of their disks in one transaction.
    ///
    /// QEMU creates the images, each with the disk's image as its backing file. If the guest is
    /// stopped, the disks below are of the same moment as its memory.
    ///
    /// # Errors
    ///
    /// QEMU's error; no disk has changed then.
    pub fn take_overlays(&mut self, overlays: &[Overlay]) -> Result<(), VmError> {
        let action = |overlay: &Overlay| {
            json!({ "type": "blockdev-snapshot-sync", "data": {
                "node-name": overlay.below,
                "snapshot-node-name": overlay.node,
                "snapshot-file": overlay.file,
                "format": "qcow2",
                "mode": "absolute-paths",
            }})
        };
        let actions: Vec<Value> = overlays.iter().map(action).collect();
        Ok(self.execute("transaction", json!({ "actions": actions })).map(drop)?)
    }

    /// Commits an overlay into the image below it, which the disk then uses again.
    ///
    /// The guest may run meanwhile. The overlay's file stays.
    ///
    /// # Errors
    ///
    /// QEMU's error, or [`VmError::NotMerged`] if the job fails or takes longer than `timeout`. The
    /// disk then keeps its overlay.
    pub fn merge_overlay(&mut self, overlay: &Overlay, timeout: Duration) -> Result<(), VmError> {
        let deadline = Instant::now() + timeout;
        let job = overlay.node.as_str();
        let arguments = json!({ "job-id": job, "device": job, "base-node": overlay.below });
        self.execute("block-commit", arguments)?;
        let mut is_told = false;
        while let Some(is_ready) = self.block_job(job)? {
            if is_ready && !is_told {
                self.execute("block-job-complete", json!({ "device": job }))?;
                is_told = true;
            }
            if Instant::now() >= deadline {
                let _ = self.execute("block-job-cancel", json!({ "device": job, "force": true }));
                break;
            }
            thread::sleep(POLL_INTERVAL);
        }
        // QEMU drops a failed job from the list just like a successful one. The disk shows which it
        // was.
        let is_on_top = |node: Option<&str>| node == Some(job);
        if self.drives()?.iter().any(|drive| is_on_top(drive.node.as_deref())) {
            return Err(VmError::NotMerged { overlay: overlay.file.clone() });
        }
        Ok(())
    }

    /// Returns whether a job is ready for `block-job-complete`; `None` if there is no such job.
    fn block_job(&mut self, name: &str) -> Result<Option<bool>, VmError> {
        let answer = self.execute("query-block-jobs", Value::Null)?;
        let jobs = answer.as_array().ok_or_else(|| unexpected("query-block-jobs", "list"))?;
        let job = jobs.iter().find(|job| job.get("device").and_then(Value::as_str) == Some(name));
        let is_ready = |job: &Value| job.get("ready").and_then(Value::as_bool).unwrap_or(false);
        Ok(job.map(is_ready))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_names_of_their_own_that_qemu_takes() {
        let overlays = [0, 1].map(|_| Overlay::new("#block123", Path::new("/srv/a.qcow2")));
        assert_ne!(overlays[0].node, overlays[1].node);
        for overlay in overlays {
            assert!(overlay.node.len() <= 31, "{}", overlay.node);
        }
    }
}
