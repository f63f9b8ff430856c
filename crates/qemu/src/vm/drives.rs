//! The drives of a running VM: the chain of images that each has, and which drives are empty.

use serde_json::Value;

use super::{IoLimits, Vm, VmError};
use crate::qmp::unexpected;
use crate::raw_window::RawWindow;

/// Deepest chain of images followed: more is a loop or a mistake.
const IMAGE_DEPTH_MAX: usize = 256;

/// How many values of a tree of nodes are looked at.
const NODE_VALUES_MAX: usize = 4096;

/// Filter drivers: QEMU lists them in the chain like images, but they have no image of their own.
pub(crate) const FILTERS: [&str; 5] =
    ["throttle", "copy-on-read", "preallocate", "copy-before-write", "snapshot-access"];

/// The start of the QOM path of a device with an id.
const PERIPHERAL: &str = "/machine/peripheral/";

/// The start of the QOM path of a device without an id.
const PERIPHERAL_ANON: &str = "/machine/peripheral-anon/device[";

/// A drive of a running VM, with a medium or without.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drive {
    /// QEMU's id of the drive, such as `ide1-cd0`; empty for one that was made with `-blockdev`.
    pub id: String,
    /// The id or the QOM path of the device that it is attached to; `None` if it is not attached.
    pub qdev: Option<String>,
    /// The name of the block node on top; `None` for an empty drive.
    pub node: Option<String>,
    /// The medium can be taken out.
    pub removable: bool,
    /// Whether the tray is open; `None` for a drive without a tray.
    pub tray_open: Option<bool>,
    /// The guest cannot write it.
    pub read_only: bool,
    /// Its newest data are in a temporary file, which is lost when QEMU ends (`-snapshot`).
    pub temporary: bool,
    /// It has persistent dirty bitmaps, which QEMU writes into the image when it closes it.
    pub keeps_bitmaps: bool,
    /// The image on top and those below it, top first; no images for an empty drive.
    pub images: Vec<Image>,
    /// The I/O limits in force.
    pub limits: IoLimits,
}

/// An image of a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Image {
    /// Its path as QEMU has it, relative to QEMU's working directory, or a URL. A name without a
    /// path, such as that of a null device, stays in JSON.
    pub path: String,
    /// Its format, e.g. `qcow2`.
    pub format: String,
    /// Its contents are encrypted.
    pub encrypted: bool,
    /// Where it lies within its file, if it is only a part of it.
    pub window: Option<RawWindow>,
    /// The files that it is made of, if it is not one file with a path, such as those of a quorum.
    pub files: Vec<String>,
    /// The image below it by its own header; `None` if it has none there.
    pub backing_file: Option<String>,
    /// The external data file of a qcow2 image, if it has one.
    pub data_file: Option<String>,
}

impl Drive {
    /// Returns the name that a user knows it by: the drive's id, or its device's if it has no id.
    #[must_use]
    pub fn name(&self) -> &str {
        let Some(qdev) = self.qdev.as_deref().filter(|_| self.id.is_empty()) else {
            return &self.id;
        };
        qdev
    }

    /// Returns the image on top; `None` for an empty drive.
    #[must_use]
    pub fn image(&self) -> Option<&Image> {
        self.images.first()
    }

    /// Returns whether the guest can write to a medium in it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        !self.images.is_empty() && !self.read_only
    }
}

/// How a command line identifies a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// By its id.
    Id(String),
    /// By its number among the devices that have no id, in the order in which QEMU made them.
    Number(usize),
    /// One of the machine's flash chips.
    Flash(usize),
}

impl DeviceName {
    /// Reads the `qdev` member of `query-block`; `None` for another device that the machine made.
    ///
    /// QEMU (7.2 to 11.1) gives an id if the drive is attached to the device itself, and a QOM path
    /// if it is attached to a child of the device, as with virtio:
    /// `/machine/peripheral/ID/virtio-backend`.
    #[must_use]
    pub fn of_qdev(qdev: &str) -> Option<DeviceName> {
        if let Some(rest) = qdev.strip_prefix(PERIPHERAL) {
            let id = rest.split('/').next().unwrap_or_default();
            return Some(DeviceName::Id(id.to_owned()));
        }
        if let Some(rest) = qdev.strip_prefix(PERIPHERAL_ANON) {
            return rest.split(']').next()?.parse().ok().map(DeviceName::Number);
        }
        if let Some((_, chip)) = qdev.rsplit_once(".flash") {
            return chip.parse().ok().map(DeviceName::Flash);
        }
        (!qdev.is_empty() && !qdev.starts_with('/')).then(|| DeviceName::Id(qdev.to_owned()))
    }
}

impl Vm {
    /// Returns all drives, empty ones too.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn drives(&mut self) -> Result<Vec<Drive>, VmError> {
        let answer = self.execute("query-block", Value::Null)?;
        let drives = answer.as_array().ok_or_else(|| unexpected("query-block", "list"))?;
        Ok(drives.iter().map(drive).collect())
    }
}

/// Reads one drive.
fn drive(drive: &Value) -> Drive {
    let flag = |value: &Value, key: &str| value.get(key).and_then(Value::as_bool);
    let inserted = drive.get("inserted");
    let mut images = inserted.map_or_else(Vec::new, images);
    if let Some(top) = images.first_mut() {
        top.encrypted |= inserted.and_then(|inserted| flag(inserted, "encrypted")) == Some(true);
    }
    let name = inserted
        .and_then(|inserted| inserted.get("image"))
        .and_then(|image| named(image, "filename"));
    let temporary = match (name, images.first()) {
        (Some(name), Some(top)) => is_temporary(&name, &top.path),
        _ => false,
    };
    let bitmaps = inserted.and_then(|inserted| inserted.get("dirty-bitmaps")?.as_array());
    let is_persistent = |bitmap: &Value| flag(bitmap, "persistent") == Some(true);
    Drive {
        keeps_bitmaps: bitmaps.is_some_and(|bitmaps| bitmaps.iter().any(is_persistent)),
        id: named(drive, "device").unwrap_or_default(),
        qdev: named(drive, "qdev"),
        node: inserted.and_then(|inserted| named(inserted, "node-name")),
        removable: flag(drive, "removable").unwrap_or(false),
        tray_open: flag(drive, "tray_open"),
        read_only: inserted.and_then(|inserted| flag(inserted, "ro")).unwrap_or(false),
        temporary,
        images,
        limits: inserted.map_or_else(IoLimits::default, IoLimits::of_medium),
    }
}

/// Returns the images of a medium, top first.
fn images(inserted: &Value) -> Vec<Image> {
    let below = |image: &Value| image.get("backing-image").cloned();
    let chain = std::iter::successors(inserted.get("image").cloned(), below);
    let mut images: Vec<Image> = chain.take(IMAGE_DEPTH_MAX).map(|value| image(&value)).collect();
    let is_filter = |image: &Image| FILTERS.contains(&image.format.as_str());
    if !images.iter().all(is_filter) {
        images.retain(|image| !is_filter(image));
    }
    if let Some(top) = images.first_mut() {
        if top.format.is_empty() {
            top.format = named(inserted, "drv").unwrap_or_default();
        }
        if top.path.is_empty() {
            top.path = protocol_path(&named(inserted, "file").unwrap_or_default());
        }
    }
    images
}

fn image(image: &Value) -> Image {
    let name = named(image, "filename").unwrap_or_default();
    let format = named(image, "format").unwrap_or_default();
    let specific = image.get("format-specific").and_then(|specific| specific.get("data"));
    let is_encrypted = image.get("encrypted").and_then(Value::as_bool) == Some(true)
        || specific.is_some_and(|data| data.get("encrypt").is_some())
        || format == "luks"
        || name_has_driver(&name, "luks");
    Image {
        path: protocol_path(&name),
        format,
        encrypted: is_encrypted,
        files: files(&name),
        window: json_name(&name).and_then(|node| RawWindow::of(&node)),
        backing_file: named(image, "full-backing-filename").map(|name| protocol_path(&name)),
        data_file: specific
            .and_then(|data| named(data, "data-file"))
            .map(|name| protocol_path(&name)),
    }
}

/// Returns a text member that is not empty.
pub(super) fn named(value: &Value, key: &str) -> Option<String> {
    value.get(key).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
}

/// Reads a name of the form `json:{...}`.
///
/// QEMU writes that form when a plain name would not say everything.
fn json_name(name: &str) -> Option<Value> {
    name.strip_prefix("json:").and_then(|json| serde_json::from_str(json).ok())
}

/// Returns the path or URL at the end of a name that QEMU may have written as `json:{...}`.
///
/// A name without a path, such as that of a null device, stays as it is.
pub(crate) fn protocol_path(name: &str) -> String {
    let Some(parsed) = json_name(name) else { return name.to_owned() };
    let mut nodes = std::iter::successors(Some(&parsed), |node| node.get("file"));
    nodes
        .find_map(|node| node.get("filename").or_else(|| node.get("path"))?.as_str())
        .map_or_else(|| name.to_owned(), str::to_owned)
}

/// Returns the files in a name that has no path of its own.
fn files(name: &str) -> Vec<String> {
    let mut files = Vec::new();
    if protocol_path(name) == name
        && let Some(node) = json_name(name)
    {
        collect_files(&node, &|_| None, &mut files);
    }
    files
}

/// Collects the files of a tree of nodes; `find` returns the node of a name. Looks at no more
/// than [`NODE_VALUES_MAX`] values: a node that refers to itself would have no end.
pub(crate) fn collect_files<'a>(
    node: &'a Value,
    find: &dyn Fn(&str) -> Option<&'a Value>,
    files: &mut Vec<String>,
) {
    let mut next = vec![node];
    for _ in 0..NODE_VALUES_MAX {
        let Some(node) = next.pop() else { return };
        match node {
            Value::Object(members) => {
                for (key, member) in members {
                    match member {
                        Value::String(path) if key == "filename" => files.push(path.clone()),
                        Value::String(name) if key != "node-name" => next.extend(find(name)),
                        member => next.push(member),
                    }
                }
            }
            Value::Array(nodes) => next.extend(nodes),
            _ => {}
        }
    }
}

/// Tells whether a name in JSON has a node of this driver on the way to its file.
///
/// Only the name shows a `luks` node below a `raw` one (QEMU 7.2 to 11.1). QEMU always writes that
/// name in JSON, because the node has a secret.
fn name_has_driver(name: &str, driver: &str) -> bool {
    let Some(parsed) = json_name(name) else { return false };
    let mut nodes = std::iter::successors(Some(&parsed), |node| node.get("file"));
    nodes.any(|node| node.get("driver").and_then(Value::as_str) == Some(driver))
}

/// Tells whether an image is an overlay that QEMU made for `-snapshot`.
///
/// QEMU (blockdev, 10.0) creates it as `vl.XXXXXX` in a directory for temporary files, unlinks it
/// at once, and writes its name in JSON, together with the image below it.
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
    fn a_drive_given_as_blockdev_is_named_by_its_device() {
        // From QEMU 10.0.2: -blockdev raw over file, -device virtio-blk-pci,id=vb.
        let answer = json!({
            "device": "", "qdev": "/machine/peripheral/vb/virtio-backend",
            "inserted": {"ro": false, "node-name": "r0", "drv": "raw", "file": "/var/disk.raw",
                "image": {"filename": "/var/disk.raw", "format": "raw"}},
        });
        let drive = drive(&answer);
        assert_eq!(drive.name(), "/machine/peripheral/vb/virtio-backend");
        assert_eq!(drive.node.as_deref(), Some("r0"));
        let image = drive.image().unwrap();
        assert_eq!((image.path.as_str(), image.format.as_str()), ("/var/disk.raw", "raw"));
        assert!(!drive.temporary && drive.is_writable());
    }

    #[test]
    fn an_empty_drive_has_no_image_and_says_whether_its_tray_is_open() {
        let answer = json!({"device": "ide1-cd0", "removable": true, "tray_open": true});
        let drive = drive(&answer);
        assert_eq!((drive.image(), drive.is_writable()), (None, false));
        assert_eq!((drive.removable, drive.tray_open), (true, Some(true)));
    }

    #[test]
    fn the_overlay_of_snapshot_is_temporary_and_its_image_is_below() {
        // From QEMU 10.0.2: -snapshot -drive file=/var/disk.raw,format=raw.
        let name = concat!(
            r#"json:{"backing": {"driver": "raw", "file": {"driver": "file", "filename": "#,
            r#""/var/disk.raw"}}, "driver": "qcow2", "file": {"driver": "file", "filename": "#,
            r#""/var/tmp/vl.RCRMZ3"}}"#,
        );
        let answer = json!({"device": "virtio0", "inserted": {"ro": false, "drv": "qcow2",
            "image": {"filename": name, "backing-image": {"filename": "/var/disk.raw"}}}});
        let drive = drive(&answer);
        assert!(drive.temporary);
        let paths: Vec<&str> = drive.images.iter().map(|image| image.path.as_str()).collect();
        assert_eq!(paths, ["/var/tmp/vl.RCRMZ3", "/var/disk.raw"]);
    }

    #[test]
    fn a_users_file_of_that_name_is_not_temporary() {
        let answer = json!({"inserted": {"image": {"filename": "/srv/vl.backup"}}});
        assert!(!drive(&answer).temporary);
    }

    #[test]
    fn an_encrypted_image_is_seen_wherever_it_lies_in_the_chain() {
        // From QEMU 10.0.2: raw over luks, luks alone, qcow2 with encrypt.format=luks, and that as
        // the backing image of a clear one.
        let below = concat!(
            r#"json:{"driver": "raw", "file": {"driver": "luks", "file": {"driver": "file", "#,
            r#""filename": "luks2.img"}, "key-secret": "s"}}"#,
        );
        let encrypted = json!({"format": "luks", "ivgen-alg": "plain64"});
        for (image, at) in [
            (json!({"filename": below, "format": "raw"}), 0),
            (json!({"filename": "luks.img", "format": "luks"}), 0),
            (json!({"filename": "a", "format-specific": {"data": {"encrypt": encrypted}}}), 0),
            (json!({"filename": "a", "backing-image": {"filename": "b", "encrypted": true}}), 1),
        ] {
            let drive = drive(&json!({"inserted": {"image": image}}));
            let found: Vec<bool> = drive.images.iter().map(|image| image.encrypted).collect();
            assert_eq!(found.iter().position(|encrypted| *encrypted), Some(at), "{found:?}");
        }
        let clear = json!({"inserted": {"encrypted": false, "image": {"filename": "a"}}});
        assert!(!drive(&clear).images[0].encrypted);
    }

    #[test]
    fn a_part_of_a_file_is_told_from_the_whole() {
        // From QEMU 10.0.2: -drive file=w.raw,format=raw,offset=1048576,size=16777216.
        let name = concat!(
            r#"json:{"offset": "1048576", "driver": "raw", "size": "16777216", "#,
            r#""file": {"driver": "file", "filename": "w.raw"}}"#,
        );
        for (name, is_window) in [(name, true), ("w.raw", false)] {
            let drive = drive(&json!({"inserted": {"image": {"filename": name}}}));
            assert_eq!(
                (drive.images[0].path.as_str(), drive.images[0].window.is_some()),
                ("w.raw", is_window)
            );
        }
    }

    #[test]
    fn a_filter_on_top_is_no_image() {
        // From QEMU 10.0.2: throttle over qcow2.
        let answer = json!({"inserted": {"drv": "throttle", "image": {"format": "throttle",
            "filename": r#"json:{"driver": "throttle", "file": {"filename": "/srv/b.qcow2"}}"#,
            "backing-image": {"filename": "/srv/b.qcow2", "format": "qcow2"}}}});
        let drive = drive(&answer);
        let found: Vec<(&str, &str)> =
            drive.images.iter().map(|image| (image.path.as_str(), image.format.as_str())).collect();
        assert_eq!(found, [("/srv/b.qcow2", "qcow2")]);
    }

    #[test]
    fn a_device_is_known_by_its_id_or_by_its_number() {
        let id = |id: &str| Some(DeviceName::Id(id.to_owned()));
        assert_eq!(DeviceName::of_qdev("cdx"), id("cdx"));
        assert_eq!(DeviceName::of_qdev("/machine/peripheral/vb/virtio-backend"), id("vb"));
        let number = DeviceName::of_qdev("/machine/peripheral-anon/device[12]/virtio-backend");
        assert_eq!(number, Some(DeviceName::Number(12)));
        assert_eq!(DeviceName::of_qdev("/machine/system.flash1"), Some(DeviceName::Flash(1)));
        assert_eq!(DeviceName::of_qdev("/machine/unattached/device[4]"), None);
        assert_eq!(DeviceName::of_qdev(""), None);
    }

    #[test]
    fn a_name_without_a_path_stays_as_it_is() {
        let name = r#"json:{"driver": "null-co", "size": "1M"}"#;
        assert_eq!(protocol_path(name), name);
        assert_eq!(protocol_path("json:{broken"), "json:{broken");
        assert_eq!(protocol_path("nbd://host/export"), "nbd://host/export");
    }
}
