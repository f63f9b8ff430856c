//! What the metadata say of the VM's drives: their images, and what shows that an image has
//! changed.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// A drive with a medium: the disk images that the VM uses there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMeta {
    /// The device or node.
    pub device: String,
    /// The image's path, or what QEMU calls it.
    pub path: String,
    /// `qcow2`, `raw`, ...
    pub format: String,
    /// The images below it, nearest first.
    #[serde(default)]
    pub backing_files: Vec<String>,
    /// Whether the VM may not write to it.
    pub read_only: bool,
    /// The overlay on it that the VM went on with: since then this image belongs to the saved file.
    #[serde(default)]
    pub overlay: Option<String>,
    /// QEMU's id of the drive; `None` where it had none, and in files of older versions.
    #[serde(default)]
    pub id: Option<String>,
    /// The device that has the drive: its id or its QOM path.
    #[serde(default)]
    pub qdev: Option<String>,
    /// Whether the medium can be taken out.
    #[serde(default)]
    pub removable: bool,
    /// Whether the tray is open; `None` for a drive without a tray.
    #[serde(default)]
    pub tray_open: Option<bool>,
    /// The image and those below it, top first; nothing in files of older versions.
    #[serde(default)]
    pub images: Vec<ImageMeta>,
    /// Its I/O limits; `None` in files of older versions.
    #[serde(default)]
    pub io_limits: Option<IoLimitsMeta>,
}

/// I/O limits of a drive, which are no part of the guest's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimitsMeta {
    /// QEMU's names of the limits, as its command `block_set_io_throttle` takes them, with their
    /// values; nothing if there were none.
    pub values: BTreeMap<String, u64>,
    /// The group of drives that share them.
    pub group: Option<String>,
}

/// A drive without a medium.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmptyDriveMeta {
    /// QEMU's id of the drive, where it has one.
    pub id: Option<String>,
    /// The device that has the drive: its id or its QOM path.
    pub qdev: Option<String>,
    /// Whether the tray is open; `None` for a drive without a tray.
    pub tray_open: Option<bool>,
}

/// An image of a drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMeta {
    /// Its path, or what QEMU calls it.
    pub path: String,
    /// `qcow2`, `raw`, ...
    pub format: String,
    /// Whether its contents are encrypted.
    pub encrypted: bool,
    /// Whether it is the data file of the qcow2 image before it.
    pub is_data_file: bool,
    /// The file as it was; `None` if it could not be examined.
    pub file: Option<FileMeta>,
}

/// A file as it was when the VM was saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMeta {
    /// Its length in bytes; `None` where QEMU changes it when it closes the image.
    pub bytes: Option<u64>,
    /// When it was last written, in seconds since 1970-01-01 UTC; `None` as for `bytes`, and for a
    /// block device.
    pub modified_unix_seconds: Option<i64>,
    /// The nanoseconds of that second.
    pub modified_nanoseconds: Option<u32>,
    /// The device number of its file system, which may change when the host is started again:
    /// vmfile does not compare it.
    pub device: u64,
    /// Its inode; `None` for a block device.
    pub inode: Option<u64>,
    /// The hash of a qcow2 image's header ([`Qcow2Header::hash`](crate::qcow2::Qcow2Header::hash)),
    /// as 32 lower-case hexadecimal digits; `None` for other formats, and as for `bytes`.
    pub qcow2_header: Option<String>,
}
