//! Checks whether the QEMU that was started has the images that the VM had.

use std::path::Path;

use vmfile_format::manifest::{DiskMeta, VmMeta};
use vmfile_qemu::{Drive, IoLimits, Vm, VmError};

use super::RestoredDisk;
use crate::image_path::{is_file, is_same_file};
use crate::restore_error::{Mismatch, RestoreError};

/// Compares the drives of a QEMU that was started with the saved command line with those in the
/// file. Each chain of images that the VM had, with the new overlay on top if there is one, must be
/// in a drive, and no other drive may have a medium. A chain whose drive had an id must be in the
/// drive with this id.
///
/// A file that was received does not say which drives the VM had, so nothing is compared.
///
/// Returns the drives that have other I/O limits than the VM's had, with the VM's.
pub(super) fn compare_drives<'a>(
    vm: &VmMeta,
    overlays: &[RestoredDisk],
    found: &'a [Drive],
) -> Result<Vec<(&'a Drive, IoLimits)>, RestoreError> {
    if vm.parts.is_none() {
        return Ok(Vec::new());
    }
    let mut to_limit = Vec::new();
    let directory = vm.working_directory.as_deref().map_or(Path::new("."), Path::new);
    let mut differ = Vec::new();
    let mut left: Vec<&Drive> = found.iter().filter(|drive| !drive.images.is_empty()).collect();
    for disk in &vm.disks {
        let expected = expected(disk, directory, overlays);
        let has_it = |drive: &&Drive| is_chain(drive, directory, &expected);
        let id = disk.id.as_deref().unwrap_or_default();
        let by_id = left.iter().position(|drive| !id.is_empty() && drive.id == id);
        let place = by_id.or_else(|| left.iter().position(has_it));
        let drive = place.map(|place| left.remove(place));
        let limits = disk.io_limits.clone();
        let limits = limits.map(|limits| IoLimits::new(limits.values, limits.group));
        to_limit.extend(drive.zip(limits).filter(|(drive, limits)| drive.limits != *limits));
        if !drive.as_ref().is_some_and(has_it) {
            differ.push(Mismatch {
                what: format!("drive {:?}", disk.device),
                file: on_top_of_each_other(&expected),
                vm: drive.map_or_else(|| "no drive with these images".to_owned(), images_of),
            });
        }
    }
    differ.extend(left.into_iter().map(|drive| Mismatch {
        what: format!("drive {:?}", drive.name()),
        file: "no medium".to_owned(),
        vm: images_of(drive),
    }));
    if differ.is_empty() { Ok(to_limit) } else { Err(RestoreError::Incompatible { differ }) }
}

/// Gives drives the I/O limits that they had. Returns one sentence for each that QEMU refuses.
pub(super) fn limit_drives(
    vm: &mut Vm,
    limits: &[(&Drive, IoLimits)],
) -> Result<Vec<String>, RestoreError> {
    let mut warnings = Vec::new();
    for (drive, limits) in limits {
        match vm.limit_drive(drive, limits) {
            Err(VmError::Qmp(error)) if error.is_refused() => {
                let name = drive.name();
                warnings.push(format!("drive {name:?} has not the I/O limits it had: {error}"));
            }
            told => told?,
        }
    }
    Ok(warnings)
}

/// Returns the images that the drive must have, the top first.
fn expected(disk: &DiskMeta, directory: &Path, overlays: &[RestoredDisk]) -> Vec<String> {
    let image = directory.join(&disk.path);
    let new = overlays.iter().find(|new| disk.overlay.is_some() && new.image == image);
    let new = new.map(|new| new.overlay.display().to_string());
    new.into_iter().chain([disk.path.clone()]).chain(disk.backing_files.iter().cloned()).collect()
}

fn images_of(drive: &Drive) -> String {
    let paths: Vec<String> = drive.images.iter().map(|image| image.path.clone()).collect();
    on_top_of_each_other(&paths)
}

fn on_top_of_each_other(images: &[String]) -> String {
    images.join(" on ")
}

fn is_chain(drive: &Drive, directory: &Path, expected: &[String]) -> bool {
    let is_same = |(found, expected): (&str, &String)| {
        if is_file(found) && is_file(expected) {
            is_same_file(&directory.join(found), &directory.join(expected))
        } else {
            // A URL, or something that has no path.
            found == expected
        }
    };
    let found = drive.images.iter().map(|image| image.path.as_str());
    drive.images.len() == expected.len() && found.zip(expected).all(is_same)
}
