//! Does the QEMU that was started have the images that the VM had?

use std::path::{Path, PathBuf};

use vmfile_format::manifest::{DiskMeta, VmMeta};
use vmfile_qemu::Drive;

use super::RestoredDisk;
use super::changed_images::is_same_file;
use crate::restore_error::{Mismatch, RestoreError};
use crate::save::is_file;

/// Compares what QEMU says of its drives with the file, whose command line it was started with:
/// every image that the VM had, or its new overlay, is on top of a drive, and no other image is. A
/// drive that has an id has its own image.
pub(super) fn compare_drives(
    vm: &VmMeta,
    overlays: &[RestoredDisk],
    found: &[Drive],
) -> Result<(), RestoreError> {
    let directory = vm.working_directory.as_deref().map_or(Path::new("."), Path::new);
    let mut differ = Vec::new();
    let mut left: Vec<&Drive> = found.iter().filter(|drive| !drive.images.is_empty()).collect();
    for disk in &vm.disks {
        let expected = expected(disk, directory, overlays);
        let has_it = |drive: &&Drive| is_on_top(drive, directory, &expected);
        let id = disk.id.as_deref().unwrap_or_default();
        let by_id = left.iter().position(|drive| !id.is_empty() && drive.id == id);
        let place = by_id.or_else(|| left.iter().position(has_it));
        let drive = place.map(|place| left.remove(place));
        if drive.as_ref().is_some_and(has_it) {
            continue;
        }
        let found = drive.and_then(Drive::image).map(|image| image.path.clone());
        differ.push(Mismatch {
            what: format!("drive {:?}", disk.device),
            file: expected.display().to_string(),
            vm: found.unwrap_or_else(|| "no drive with this image".to_owned()),
        });
    }
    differ.extend(left.into_iter().map(|drive| Mismatch {
        what: format!("drive {:?}", drive.name()),
        file: "no medium".to_owned(),
        vm: drive.image().map(|image| image.path.clone()).unwrap_or_default(),
    }));
    if differ.is_empty() { Ok(()) } else { Err(RestoreError::Incompatible { differ }) }
}

/// Returns the image that is to be on top of the drive.
fn expected(disk: &DiskMeta, directory: &Path, overlays: &[RestoredDisk]) -> PathBuf {
    let image = directory.join(&disk.path);
    let new = overlays.iter().find(|new| disk.overlay.is_some() && new.image == image);
    match new {
        Some(new) => new.overlay.clone(),
        None if is_file(&disk.path) => image,
        // A URL, or something that has no path.
        None => PathBuf::from(&disk.path),
    }
}

fn is_on_top(drive: &Drive, directory: &Path, expected: &Path) -> bool {
    let Some(image) = drive.image() else { return false };
    if is_file(&image.path) {
        is_same_file(&directory.join(&image.path), expected)
    } else {
        Path::new(&image.path) == expected
    }
}
