//! The images of a VM's drives. A save refuses those that a restore would not find again, and
//! records what the others are at the saved moment.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use vmfile_format::manifest::{
    DiskMeta, EmptyDriveMeta, FileMeta, ImageMeta, IoLimitsMeta, VmMeta,
};
use vmfile_qemu::{Drive, FileId, Image, IoLimits, ProcessInfo, Vm, redact_image};

use super::{After, SaveOptions};
use crate::error::{SaveError, with_sources};
use crate::image_facts::{self, Use};
use crate::image_path::is_file;

/// The driver that makes one image of several.
const QUORUM: &str = "quorum";

/// Paths that mean another file in each process.
const DESCRIPTORS: [&str; 3] = ["/dev/fdset/", "/dev/fd/", "/proc/self/fd/"];

/// Describes the drives for the manifest, without looking at their files.
pub(super) fn describe(drives: &[Drive], meta: &mut VmMeta) {
    let id = |drive: &Drive| Some(drive.id.clone()).filter(|id| !id.is_empty());
    for drive in drives {
        let Some((top, below)) = drive.images.split_first() else {
            let (id, qdev, tray_open) = (id(drive), drive.qdev.clone(), drive.tray_open);
            meta.empty_drives.push(EmptyDriveMeta { id, qdev, tray_open });
            continue;
        };
        meta.disks.push(DiskMeta {
            device: drive.name().to_owned(),
            path: top.path.clone(),
            format: top.format.clone(),
            backing_files: below.iter().map(|image| image.path.clone()).collect(),
            read_only: drive.read_only,
            overlay: None,
            id: id(drive),
            qdev: drive.qdev.clone(),
            removable: drive.removable,
            tray_open: drive.tray_open,
            images: drive.images.iter().flat_map(image_meta).collect(),
            io_limits: Some(io_limits(&drive.limits)),
        });
    }
}

fn io_limits(limits: &IoLimits) -> IoLimitsMeta {
    IoLimitsMeta { values: limits.values.clone(), group: limits.group.clone() }
}

/// Describes an image and, if it has one, its separate data file.
fn image_meta(image: &Image) -> Vec<ImageMeta> {
    let own = ImageMeta {
        path: image.path.clone(),
        format: image.format.clone(),
        encrypted: image.encrypted,
        is_data_file: false,
        file: None,
    };
    let data = image.data_file.as_ref().map(|path| ImageMeta {
        path: path.clone(),
        format: "raw".to_owned(),
        is_data_file: true,
        ..own.clone()
    });
    [own].into_iter().chain(data).collect()
}

/// Looks at every image while the VM runs, and refuses those that a restore could not bring back.
///
/// Returns warnings about what is not refused.
pub(super) fn look(
    vm: &mut Vm,
    meta: &mut VmMeta,
    options: &SaveOptions,
    was_running: bool,
) -> Result<Vec<String>, SaveError> {
    refuse_encrypted(meta, options)?;
    let mut warnings = disks_that_go_on(meta, options, was_running)?;
    let process = match vm.process() {
        Ok(process) => process,
        Err(error) if error.is_out_of_reach() => {
            if meta.disks.iter().any(|disk| disk.images.iter().any(|image| is_file(&image.path))) {
                let error = with_sources(&error);
                warnings.push(format!("disk images could not be looked at: {error}"));
            }
            return Ok(warnings);
        }
        Err(error) => return Err(error.into()),
    };
    let open = process.open_files().map_err(|source| SaveError::OpenFiles { source })?;
    let directory = meta.working_directory.clone().map(PathBuf::from).unwrap_or_default();
    for disk in &mut meta.disks {
        let belongs = options.with_disks && !disk.read_only;
        if disk.images.iter().any(|image| image.path.starts_with("json:") && image.format == QUORUM)
        {
            warnings.push(format!(
                "disk {:?}: the file does not say what the images of its quorum were, so that no \
                 restore notices a change",
                disk.device
            ));
        }
        for image in disk.images.iter_mut().filter(|image| is_file(&image.path)) {
            match find_again(&process, &open, &directory, image) {
                Ok(facts) => image.file = Some(facts),
                Err(Unseen::Lost(reason)) => {
                    let (device, image) = (disk.device.clone(), PathBuf::from(&image.path));
                    let lost = SaveError::ImageLost { device, image, reason };
                    if options.after == After::Quit || belongs {
                        return Err(lost);
                    }
                    warnings.push(lost.to_string());
                }
                Err(Unseen::Unknown(error)) => warnings.push(format!(
                    "disk {:?}: it is not recorded what {} is, so a restore will not notice a \
                     change: {error}",
                    disk.device, image.path
                )),
            }
        }
    }
    Ok(warnings)
}

/// Records what the images are now, and refuses a drive whose medium changed since [`look`].
///
/// Call it right before the manifest is written, when the guest's last writes are in the images:
/// QEMU may write to a qcow2 image when it releases it.
pub(super) fn record(vm: &mut Vm, meta: &mut VmMeta) -> Result<(), SaveError> {
    let drives = vm.drives()?;
    let process = match vm.process() {
        Ok(process) => Some(process),
        Err(error) if error.is_out_of_reach() => None,
        Err(error) => return Err(error.into()),
    };
    for disk in &mut meta.disks {
        let is_same = |drive: &&Drive| drive.name() == disk.device;
        let drive = drives.iter().find(is_same);
        let images = drive.map_or(&[][..], |drive| drive.images.as_slice());
        // Skips the overlay that this save has put on top.
        let images = match (images.split_first(), &disk.overlay) {
            (Some((top, below)), Some(overlay)) if top.path == *overlay => below,
            _ => images,
        };
        let found: Vec<&str> = images.iter().map(|image| image.path.as_str()).collect();
        let below = disk.images.iter().filter(|image| !image.is_data_file);
        let expected: Vec<&str> = below.map(|image| image.path.as_str()).collect();
        if found != expected {
            let [found, expected] = [found, expected].map(|paths| {
                let paths: Vec<_> = paths.into_iter().map(redact_image).collect();
                paths.join(", ")
            });
            return Err(SaveError::DiskChanged { device: disk.device.clone(), found, expected });
        }
        disk.io_limits = drive.map(|drive| io_limits(&drive.limits));
        let Some(process) = &process else { continue };
        let is_written = !disk.read_only;
        for (index, image) in disk.images.iter_mut().enumerate().filter(|(_, i)| i.file.is_some()) {
            let usage = match drive {
                Some(drive) if is_written && index == 0 && disk.overlay.is_none() => {
                    if drive.keeps_bitmaps { Use::WritesBitmaps } else { Use::Writes }
                }
                _ => Use::None,
            };
            let looked = process.find(Path::new(&image.path));
            let looked = looked.and_then(|f| image_facts::look_at(&f, &image.format, usage));
            image.file = Some(looked.map_err(|error| SaveError::ImageLost {
                device: disk.device.clone(),
                image: PathBuf::from(&image.path),
                reason: error.to_string(),
            })?);
        }
    }
    for drive in drives.iter().filter(|drive| drive.image().is_some()) {
        if !meta.disks.iter().any(|disk| disk.device == drive.name()) {
            return Err(SaveError::DiskChanged {
                device: drive.name().to_owned(),
                found: drive
                    .image()
                    .map_or_else(String::new, |image| redact_image(&image.path).into_owned()),
                expected: String::new(),
            });
        }
    }
    Ok(())
}

/// Why it could not be recorded what an image is.
enum Unseen {
    /// A restore would not find it.
    Lost(String),
    /// The image may be there, but vmfile cannot look at it.
    Unknown(io::Error),
}

/// Looks at an image as QEMU sees it, and finds out whether a restore will find the same one.
fn find_again(
    process: &ProcessInfo,
    open: &HashSet<FileId>,
    directory: &Path,
    image: &ImageMeta,
) -> Result<FileMeta, Unseen> {
    let path = Path::new(&image.path);
    let lost = |reason: &str| Err(Unseen::Lost(reason.to_owned()));
    if DESCRIPTORS.iter().any(|prefix| image.path.starts_with(prefix)) {
        return lost("it is a descriptor that QEMU was given");
    }
    let found = match process.find(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return lost("there is no file of that name any more");
        }
        Err(error) => return Err(Unseen::Unknown(error)),
    };
    let metadata = found.metadata().map_err(Unseen::Unknown)?;
    let id = FileId::of(&metadata);
    if !open.contains(&id) {
        return lost("the file of that name is not the one that QEMU has open");
    }
    match fs::metadata(directory.join(path)).map(|metadata| FileId::of(&metadata)) {
        Ok(ours) if ours == id => {}
        Ok(_) => {
            return lost("QEMU sees another file there: it has another root directory");
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return lost("only QEMU sees a file there: it has another root directory");
        }
        Err(error) => return Err(Unseen::Unknown(error)),
    }
    image_facts::look_at(&found, &image.format, Use::None).map_err(Unseen::Unknown)
}

/// Refuses overlays of encrypted images: they would hold the guest's data in clear text.
fn refuse_encrypted(meta: &VmMeta, options: &SaveOptions) -> Result<(), SaveError> {
    if !options.with_disks {
        return Ok(());
    }
    for disk in meta.disks.iter().filter(|disk| !disk.read_only) {
        if let Some(image) = disk.images.iter().find(|image| image.encrypted) {
            let what = "is encrypted, and an overlay of it would not be";
            let reason = format!("{} {what}", image.path);
            return Err(SaveError::Disk { device: disk.device.clone(), reason });
        }
    }
    Ok(())
}

/// Finds disks that the guest writes to after the saved moment. Refuses them if the VM ends after
/// the save, and otherwise returns a warning.
fn disks_that_go_on(
    meta: &VmMeta,
    options: &SaveOptions,
    was_running: bool,
) -> Result<Vec<String>, SaveError> {
    let goes_on = was_running && (options.live.is_some() || options.after == After::Resume);
    let written = meta.disks.iter().filter(|disk| !disk.read_only);
    let devices: Vec<String> = written.map(|disk| disk.device.clone()).collect();
    if options.with_disks || !goes_on || devices.is_empty() {
        return Ok(Vec::new());
    }
    if options.after == After::Quit {
        return Err(SaveError::DisksGoOn { devices });
    }
    Ok(vec![format!(
        "the guest goes on writing to {}, and this file needs them as they were: keep a copy of that \
         moment, or save with --with-disks",
        devices.join(", ")
    )])
}
