//! Finds images that have changed since the VM was saved: its memory does not fit them any more.

use std::io;
use std::path::{Path, PathBuf};

use vmfile_format::manifest::{DiskMeta, ImageMeta, VmMeta};

use super::RestoreOptions;
use crate::image_facts;
use crate::image_path::{is_file, is_same_file};
use crate::restore_error::{ImageChange, RestoreError};

/// Compares every image that the file names with what it was when the VM was saved; returns
/// warnings.
pub(super) fn check_all(
    vm: &VmMeta,
    directory: &Path,
    options: &RestoreOptions,
) -> Result<Vec<String>, RestoreError> {
    let mut seen = Seen::default();
    for disk in &vm.disks {
        for image in images_of(disk) {
            seen.compare(disk, image, &directory.join(&image.path), true);
        }
    }
    seen.judge(vm, options)
}

/// Does the same for the images that the user's command line or a QEMU that waits names; `named`
/// are the top images of the drives.
///
/// An image that only the file names is not opened. If the file says that it lies below one of
/// `named`, it is compared by what the kernel says of it.
pub(super) fn check_named(
    vm: &VmMeta,
    directory: &Path,
    named: &[PathBuf],
    options: &RestoreOptions,
) -> Result<Vec<String>, RestoreError> {
    let mut seen = Seen::default();
    let is_named = |path: &str| {
        let path = directory.join(path);
        is_file(path.to_str().unwrap_or_default()) && named.iter().any(|n| is_same_file(n, &path))
    };
    for disk in vm.disks.iter().filter(|disk| is_file(&disk.path)) {
        if is_named(&disk.path) {
            for (index, image) in images_of(disk).enumerate() {
                let path = directory.join(&image.path);
                if index == 0 && image.path != disk.path {
                    seen.changes.push(ImageChange {
                        device: disk.device.clone(),
                        image: path,
                        what: "image",
                        found: "the file describes another than the disk's".to_owned(),
                        expected: disk.path.clone(),
                    });
                } else {
                    seen.compare(disk, image, &path, is_named(&image.path));
                }
            }
            continue;
        }
        let is_of_another = |path: &String| vm.disks.iter().any(|other| other.path == *path);
        let mut below = disk.backing_files.iter().filter(|path| !is_of_another(path));
        match below.find(|path| is_named(path)) {
            Some(older) => seen.changes.push(ImageChange {
                device: disk.device.clone(),
                image: directory.join(older),
                what: "image",
                found: "an older state of the disk".to_owned(),
                expected: disk.path.clone(),
            }),
            None => seen.warnings.push(format!(
                "disk {:?} had the image {} when the VM was saved, which is not named now",
                disk.device, disk.path
            )),
        }
    }
    seen.judge(vm, options)
}

/// The changes and warnings found so far.
#[derive(Default)]
struct Seen {
    changes: Vec<ImageChange>,
    warnings: Vec<String>,
}

impl Seen {
    fn compare(&mut self, disk: &DiskMeta, image: &ImageMeta, path: &Path, may_open: bool) {
        let change = |what, found, expected| ImageChange {
            device: disk.device.clone(),
            image: path.to_path_buf(),
            what,
            found,
            expected,
        };
        match image_facts::compare(image, path, may_open) {
            Ok(changes) => self.changes.extend(
                changes
                    .into_iter()
                    .map(|differs| change(differs.what, differs.found, differs.expected)),
            ),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => self
                .warnings
                .push(format!("it is not known whether {} has changed: {error}", path.display())),
            Err(error) => self.changes.push(change(
                "file",
                error.to_string(),
                "the image that the VM had".to_owned(),
            )),
        }
    }

    /// Refuses changes unless the caller allows them; returns the warnings.
    fn judge(mut self, vm: &VmMeta, options: &RestoreOptions) -> Result<Vec<String>, RestoreError> {
        if !self.changes.is_empty() && !options.disks_changed_ok {
            return Err(RestoreError::DisksChanged { changes: self.changes });
        }
        self.warnings.extend(self.changes.iter().map(ToString::to_string));
        let is_unknown = |image: &ImageMeta| is_file(&image.path) && image.file.is_none();
        let is_old = |disk: &DiskMeta| disk.images.is_empty() && is_file(&disk.path);
        if vm.disks.iter().any(is_old) {
            self.warnings.push(
                "the file does not say what its disk images were: that they have not changed since \
                 could not be checked"
                    .to_owned(),
            );
        } else if vm.disks.iter().flat_map(images_of).any(is_unknown) {
            self.warnings.push(
                "not all disk images could be looked at when the VM was saved: that they have not \
                 changed since could not be checked"
                    .to_owned(),
            );
        }
        Ok(self.warnings)
    }
}

fn images_of(disk: &DiskMeta) -> impl Iterator<Item = &ImageMeta> {
    disk.images.iter()
}
