//! The disks: named, so that the user keeps them; never part of a save.

use serde_json::Value;

use super::{Vm, VmError};
use crate::qmp::unexpected;

/// Deepest chain of images followed: more is a loop or a mistake.
const IMAGE_DEPTH_MAX: usize = 64;

/// One disk of a running VM that has a medium.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Disk {
    /// The drive's id, or the QOM path of the device where it has none.
    pub device: String,
    /// The name of the block node on top.
    pub node: Option<String>,
    /// The image on top of the chain: a path or a URL.
    pub file: String,
    /// Its format, e.g. `qcow2`.
    pub format: String,
    /// The images below it, nearest first.
    pub backing_files: Vec<String>,
    /// The guest cannot write it.
    pub read_only: bool,
    /// Its newest data lie in a temporary file that goes with this QEMU (`-snapshot`).
    pub temporary: bool,
}

impl Vm {
    /// Returns the disks that have a medium.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn disks(&mut self) -> Result<Vec<Disk>, VmError> {
        let answer = self.execute("query-block", Value::Null)?;
        let drives = answer.as_array().ok_or_else(|| unexpected("query-block", "list"))?;
        Ok(drives.iter().filter_map(disk).collect())
    }
}

/// Reads one drive; `None` when it is empty.
fn disk(drive: &Value) -> Option<Disk> {
    let inserted = drive.get("inserted")?;
    let image = inserted.get("image");
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let named = |value: &Value, key| text(value.get(key)).filter(|text| !text.is_empty());
    let file = image
        .and_then(|image| named(image, "filename"))
        .or_else(|| named(inserted, "file"))
        .unwrap_or_default();
    let path = protocol_path(&file);
    Some(Disk {
        device: named(drive, "device").or_else(|| named(drive, "qdev")).unwrap_or_default(),
        node: named(inserted, "node-name"),
        format: named(inserted, "drv").unwrap_or_default(),
        backing_files: backing_files(image),
        read_only: inserted.get("ro").and_then(Value::as_bool).unwrap_or(false),
        temporary: is_temporary(&file, &path),
        file: path,
    })
}

/// Follows the chain of images below `image`.
fn backing_files(image: Option<&Value>) -> Vec<String> {
    let below = |image: &Value| image.get("backing-image").cloned();
    let chain = std::iter::successors(image.and_then(below), below);
    chain
        .take(IMAGE_DEPTH_MAX)
        .filter_map(|image| image.get("filename")?.as_str().map(protocol_path))
        .collect()
}

/// Returns the path or URL at the end of a name that QEMU writes as `json:{...}`.
///
/// QEMU writes that form when a plain name would not say everything. A name without a path, such
/// as that of a null device, stays as it is.
fn protocol_path(name: &str) -> String {
    let parsed = name.strip_prefix("json:").and_then(|json| serde_json::from_str(json).ok());
    let Some(parsed) = parsed else { return name.to_owned() };
    let parsed: Value = parsed;
    let mut nodes = std::iter::successors(Some(&parsed), |node| node.get("file"));
    nodes
        .find_map(|node| node.get("filename").or_else(|| node.get("path"))?.as_str())
        .map_or_else(|| name.to_owned(), str::to_owned)
}

/// Tells whether an image is an overlay that QEMU made for `-snapshot`.
///
/// QEMU (blockdev, 10.0) makes it as `vl.XXXXXX` in a directory for temporary files, unlinks it at
/// once, and names it in JSON together with the image below, for no other way would say so.
fn is_temporary(name: &str, path: &str) -> bool {
    let file_name = path.rsplit('/').next().unwrap_or_default();
    let random = file_name.strip_prefix("vl.");
    name.starts_with("json:")
        && random.is_some_and(|random| {
            random.len() == 6 && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_disk_given_as_blockdev_is_named_by_its_device() {
        // From QEMU 10.0.2: -blockdev raw over file, -device virtio-blk-pci,id=vb.
        let drive = json!({
            "device": "", "qdev": "/machine/peripheral/vb/virtio-backend",
            "inserted": {"ro": false, "node-name": "r0", "drv": "raw", "file": "/var/disk.raw",
                "image": {"filename": "/var/disk.raw", "format": "raw"}},
        });
        let disk = disk(&drive).unwrap();
        assert_eq!(disk.device, "/machine/peripheral/vb/virtio-backend");
        assert_eq!(disk.node.as_deref(), Some("r0"));
        assert_eq!(disk.file, "/var/disk.raw");
        assert_eq!(disk.format, "raw");
        assert!(!disk.temporary && !disk.read_only);
    }

    #[test]
    fn an_empty_drive_is_no_disk() {
        assert_eq!(disk(&json!({"device": "floppy0", "removable": true})), None);
    }

    #[test]
    fn the_overlay_of_snapshot_is_temporary_and_its_image_is_below() {
        // From QEMU 10.0.2: -snapshot -drive file=/var/disk.raw,format=raw.
        let name = concat!(
            r#"json:{"backing": {"driver": "raw", "file": {"driver": "file", "filename": "#,
            r#""/var/disk.raw"}}, "driver": "qcow2", "file": {"driver": "file", "filename": "#,
            r#""/var/tmp/vl.RCRMZ3"}}"#,
        );
        let drive = json!({"device": "virtio0", "inserted": {"ro": false, "drv": "qcow2",
            "image": {"filename": name, "backing-image": {"filename": "/var/disk.raw"}}}});
        let disk = disk(&drive).unwrap();
        assert!(disk.temporary);
        assert_eq!(disk.file, "/var/tmp/vl.RCRMZ3");
        assert_eq!(disk.backing_files, ["/var/disk.raw"]);
    }

    #[test]
    fn a_users_file_of_that_name_is_not_temporary() {
        let drive = json!({"inserted": {"image": {"filename": "/srv/vl.backup"}}});
        assert!(!disk(&drive).unwrap().temporary);
    }

    #[test]
    fn a_name_without_a_path_stays_as_it_is() {
        let name = r#"json:{"driver": "null-co", "size": "1M"}"#;
        assert_eq!(protocol_path(name), name);
        assert_eq!(protocol_path("json:{broken"), "json:{broken");
        assert_eq!(protocol_path("nbd://host/export"), "nbd://host/export");
    }
}
