//! Checks whether the QEMU that was started has the images that the VM had.

use std::path::Path;

use vmfile_format::manifest::{DiskMeta, VmMeta};
use vmfile_qemu::image_format::is_same_format;
use vmfile_qemu::{Drive, Image, IoLimits, Vm, redact_image};

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
        if let Some(drive) = drive.filter(|drive| is_protected_otherwise(drive, disk)) {
            let told = |read_only| if read_only { "read-only" } else { "writable" }.to_owned();
            differ.push(Mismatch {
                what: format!("drive {:?}", disk.device),
                file: told(disk.read_only),
                vm: told(drive.read_only),
            });
        }
        if !drive.as_ref().is_some_and(has_it) {
            differ.push(Mismatch {
                what: format!("drive {:?}", disk.device),
                file: on_top_of_each_other(expected.iter().map(|image| {
                    (image.path.as_str(), image.format.as_deref().unwrap_or_default())
                })),
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
            Err(error) if error.is_refused() => {
                let name = drive.name();
                warnings.push(format!("drive {name:?} has not the I/O limits it had: {error}"));
            }
            told => told?,
        }
    }
    Ok(warnings)
}

/// An image that a drive must have.
struct Expected {
    path: String,
    /// Its format; `None` if the file does not say.
    format: Option<String>,
}

/// Returns the images that the drive must have, the top first.
fn expected(disk: &DiskMeta, directory: &Path, overlays: &[RestoredDisk]) -> Vec<Expected> {
    let image = directory.join(&disk.path);
    let new = overlays.iter().find(|new| disk.overlay.is_some() && new.image == image);
    let new = new.map(|new| Expected {
        path: new.overlay.display().to_string(),
        format: Some("qcow2".to_owned()),
    });
    let mut formats = disk.images.iter().filter(|image| !image.is_data_file);
    let paths = [&disk.path].into_iter().chain(&disk.backing_files);
    let images = paths.map(|path| Expected {
        path: path.clone(),
        format: formats.next().map(|image| image.format.clone()),
    });
    new.into_iter().chain(images).collect()
}

/// Tells whether the guest can write to the drive although it could not, or the other way round.
fn is_protected_otherwise(drive: &Drive, disk: &DiskMeta) -> bool {
    disk.overlay.is_none() && drive.read_only != disk.read_only
}

fn images_of(drive: &Drive) -> String {
    let images = drive.images.iter();
    on_top_of_each_other(images.map(|image| (image.path.as_str(), image.format.as_str())))
}

fn on_top_of_each_other<'a>(images: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let named = |(path, format): (&str, &str)| {
        let path = redact_image(path);
        if format.is_empty() { path.into_owned() } else { format!("{path} ({format})") }
    };
    images.map(named).collect::<Vec<_>>().join(" on ")
}

fn is_chain(drive: &Drive, directory: &Path, expected: &[Expected]) -> bool {
    let is_same = |(found, expected): (&Image, &Expected)| {
        let is_file = is_file(&found.path) && is_file(&expected.path);
        let has_path = if is_file {
            is_same_file(&directory.join(&found.path), &directory.join(&expected.path))
        } else {
            // A URL, or something that has no path. The file may not have its password.
            redact_image(&found.path) == redact_image(&expected.path)
        };
        let format = expected.format.as_ref();
        has_path && format.is_none_or(|format| is_same_format(format, &found.format))
    };
    drive.images.len() == expected.len() && drive.images.iter().zip(expected).all(is_same)
}
