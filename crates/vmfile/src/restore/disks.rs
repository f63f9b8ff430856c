//! The disks of a restored VM: an image that belongs to the file gets an overlay, to which the
//! guest writes.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Access, access};
use serde::Serialize;
use vmfile_format::manifest::{DiskMeta, VmMeta};
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::image_format::gives_format;
use vmfile_qemu::{CommandLine, Drive, LineDrive, Medium, output_of};

use super::RestoreOptions;
use super::changed_images;
use crate::image_path::{is_file, is_same_file};
use crate::restore_error::RestoreError;
use crate::save::overlay_names;

/// QEMU's program that makes images.
const QEMU_IMG: &str = "qemu-img";

/// A disk of a restored VM whose image belongs to the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoredDisk {
    /// The image, which stays as it is.
    pub image: PathBuf,
    /// The new image on top of it, to which the guest writes.
    pub overlay: PathBuf,
}

/// Overlays that were made. Dropping this removes them, unless [`NewOverlays::keep`] was called.
#[derive(Debug, Default)]
pub(super) struct NewOverlays(Vec<RestoredDisk>);

impl NewOverlays {
    /// Returns the overlays and their images.
    pub(super) fn list(&self) -> &[RestoredDisk] {
        &self.0
    }

    /// Returns the files of the overlays.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.0.iter().map(|disk| disk.overlay.clone()).collect()
    }

    /// Does not remove the overlays: the VM runs with them.
    pub(super) fn keep(mut self) -> Vec<RestoredDisk> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for NewOverlays {
    fn drop(&mut self) {
        for disk in &self.0 {
            // Nothing was written to it.
            let _ = fs::remove_file(&disk.overlay);
        }
    }
}

/// The overlays made for a VM, and what was found out about its images.
#[derive(Debug, Default)]
pub(super) struct Images {
    pub(super) overlays: NewOverlays,
    /// Warnings for the user.
    pub(super) warnings: Vec<String>,
}

/// What is known when a QEMU is started: the file, the program and the directory.
#[derive(Clone, Copy)]
pub(super) struct Start<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) executable: &'a Path,
    pub(super) directory: &'a Path,
    pub(super) options: &'a RestoreOptions,
}

/// Changes the saved line so that it names the images that the VM had when it was saved, or a new
/// overlay if the image belongs to the file. A drive that had no medium gets none.
pub(super) fn place_saved(
    start: Start<'_>,
    line: &mut CommandLine,
) -> Result<Images, RestoreError> {
    let mut images = Images::default();
    let Some(manifest) = start.snapshot.manifest() else { return Ok(images) };
    let vm = &manifest.meta.vm;
    images.warnings = changed_images::check_all(vm, start.directory, start.options)?;
    for disk in &vm.disks {
        place_disk(start, line, (disk, &vm.disks), &mut images.overlays)?;
    }
    for empty in &vm.empty_drives {
        let id = empty.id.as_deref().unwrap_or_default();
        let drives = line.drives();
        let found = drives.iter().find(|drive| drive.is_named(id, empty.qdev.as_deref()));
        if let Some(drive) = found.filter(|drive| !drive.images.is_empty()) {
            line.take_medium_out(drive)?;
        }
    }
    Ok(images)
}

/// Puts the image of one disk into its drive on the line.
fn place_disk(
    start: Start<'_>,
    line: &mut CommandLine,
    (disk, disks): (&DiskMeta, &[DiskMeta]),
    overlays: &mut NewOverlays,
) -> Result<(), RestoreError> {
    // A URL, or an image without a path, stays as it is on the line.
    let image = start.directory.join(&disk.path);
    let is_file = is_file(&disk.path);
    let drives = line.drives();
    let named = drives.iter().find(|drive| is_place(disk, drive));
    let place = named.or_else(|| by_image(start.directory, &drives, disk, disks));
    let named_path = |drive: &LineDrive| drive.images.first()?.path.as_ref().map(PathBuf::from);
    let now = place.and_then(named_path).map(|path| start.directory.join(path));
    let is_there = if is_file {
        now.as_ref().is_some_and(|now| is_same_file(now, &image))
    } else {
        now.is_some_and(|now| now == image) || place.is_some_and(|place| !place.images.is_empty())
    };
    let is_alone = place.is_some_and(|drive| drive.images.len() == 1);
    let has_format = !is_file || place.is_some_and(|place| has_format(place, disk, &image));
    let has_protection = !is_file || place.is_some_and(|place| has_protection(place, disk, &image));
    let is_as_it_was = is_there && has_format && has_protection;
    if disk.overlay.is_none() && is_as_it_was && (is_alone || has_chain(start, place, disk)) {
        return Ok(());
    }
    if !is_file {
        return Err(RestoreError::DiskNotNamed { device: disk.device.clone(), image });
    }
    let is_protection_lost = !is_there && disk.removable || is_there && !has_protection;
    let mut medium = Medium {
        is_device: fs::metadata(&image).is_ok_and(|image| image.file_type().is_block_device()),
        path: image.clone(),
        format: disk.format.clone(),
        read_only: is_protection_lost.then_some(disk.read_only),
    };
    if disk.overlay.is_some() {
        let overlay = make_overlay(start, &image, &disk.format)?;
        overlays.0.push(RestoredDisk { image: image.clone(), overlay: overlay.clone() });
        (medium.path, medium.format, medium.is_device) = (overlay, "qcow2".to_owned(), false);
    }
    match (place, &disk.id) {
        (Some(place), _) => line.put_medium(place, &medium)?,
        (None, Some(id)) if disk.removable && line.add_medium(id, &medium).is_ok() => {}
        (None, _) => {
            return Err(RestoreError::DiskNotNamed { device: disk.device.clone(), image });
        }
    }
    Ok(())
}

/// Tells whether `drive` on the line is the drive of `disk`.
fn is_place(disk: &DiskMeta, drive: &LineDrive) -> bool {
    if disk.id.is_some() || disk.qdev.is_some() {
        return drive.is_named(disk.id.as_deref().unwrap_or_default(), disk.qdev.as_deref());
    }
    // In files of older vmfile versions, `device` is either the id or the qdev path.
    drive.is_named(&disk.device, None) || drive.is_named("", Some(&disk.device))
}

/// Tells whether the line gives the drive's image the format that it had.
fn has_format(place: &LineDrive, disk: &DiskMeta, image: &Path) -> bool {
    let on_line = place.images.first().and_then(|image| image.format.as_deref());
    gives_format(on_line, &disk.format, || File::open(image).ok())
}

/// Tells whether a QEMU that is started with the line can write to the drive's image if and only if
/// the VM could. A drive that is read-only although the line does not say so may have an image that
/// QEMU could not open for writing: then it will be so again.
fn has_protection(place: &LineDrive, disk: &DiskMeta, image: &Path) -> bool {
    if place.is_cdrom {
        return true;
    }
    let can_write = || access(image, Access::WRITE_OK).is_ok();
    place.read_only == disk.read_only || disk.read_only && !can_write()
}

/// Finds the only drive on the line that names an image of `disk`: vmfile does not know the names
/// of the drives of every machine type.
fn by_image<'a>(
    directory: &Path,
    drives: &'a [LineDrive],
    disk: &DiskMeta,
    disks: &[DiskMeta],
) -> Option<&'a LineDrive> {
    let chain = std::iter::once(&disk.path).chain(&disk.backing_files);
    let chain: Vec<PathBuf> = chain.map(|path| directory.join(path)).collect();
    let is_of_disk = |drive: &&LineDrive| {
        let path = drive.images.first().and_then(|image| image.path.as_ref());
        path.is_some_and(|path| {
            let path = directory.join(path);
            chain.iter().any(|image| is_same_file(&path, image))
        })
    };
    let is_free = |drive: &&LineDrive| disks.iter().all(|disk| !is_place(disk, drive));
    let mut found = drives.iter().filter(is_free).filter(is_of_disk);
    found.next().filter(|_| found.next().is_none())
}

/// Tells whether the line names the images below in the order in which the VM had them.
fn has_chain(start: Start<'_>, place: Option<&LineDrive>, disk: &DiskMeta) -> bool {
    let named = place.map_or(&[][..], |drive| drive.images.as_slice()).iter().skip(1);
    let mut below = disk.backing_files.iter();
    named.into_iter().all(|image| match (&image.path, below.next()) {
        (Some(path), Some(expected)) => {
            is_same_file(&start.directory.join(path), &start.directory.join(expected))
        }
        _ => false,
    })
}

/// Compares the images that the user's command line names with what the file says of them, and puts
/// overlays on those that belong to the file.
///
/// Nothing from the file gets into the line: the overlay lies beside the image that the line names,
/// and has the format that the line says for this image.
pub(super) fn place_given(
    start: Start<'_>,
    line: &mut CommandLine,
) -> Result<Images, RestoreError> {
    let mut images = Images::default();
    let Some(manifest) = start.snapshot.manifest() else { return Ok(images) };
    let vm = &manifest.meta.vm;
    let saved_in = vm.working_directory.as_ref().map_or(start.directory, Path::new);
    let path_of = |drive: &LineDrive| {
        let path = drive.images.first()?.path.as_deref().filter(|path| is_file(path))?;
        std::path::absolute(start.directory.join(path)).ok()
    };
    let named: Vec<PathBuf> = line.drives().iter().filter_map(path_of).collect();
    images.warnings = changed_images::check_named(vm, saved_in, &named, start.options)?;
    for disk in vm.disks.iter().filter(|disk| disk.overlay.is_some() && is_file(&disk.path)) {
        let belongs = saved_in.join(&disk.path);
        let is_of_file = |drive: &&LineDrive| {
            !drive.read_only && path_of(drive).is_some_and(|path| is_same_file(&path, &belongs))
        };
        let drives = line.drives();
        let Some(drive) = drives.iter().find(is_of_file) else { continue };
        let image = path_of(drive).expect("the drive was found by it");
        let format = drive.images.first().and_then(|image| image.format.clone());
        let Some(format) = format else {
            let option = drive.option.clone().unwrap_or_default();
            return Err(RestoreError::FormatNotSaid { option, image });
        };
        // "file" is a node that the device uses directly, without a format: raw bytes.
        let format = if format == "file" { "raw".to_owned() } else { format };
        let overlay = make_overlay(start, &image, &format)?;
        images.overlays.0.push(RestoredDisk { image, overlay: overlay.clone() });
        let format = "qcow2".to_owned();
        let medium = Medium { path: overlay, format, is_device: false, read_only: None };
        line.put_medium(drive, &medium)?;
    }
    Ok(images)
}

/// Refuses a QEMU that waits if the top image of a drive belongs to the file: the guest would write
/// to it, and vmfile puts no overlay on an image that QEMU has open. `here` is QEMU's working
/// directory.
pub(super) fn refuse_own(
    vm: &VmMeta,
    saved_in: &Path,
    here: &Path,
    drives: &[Drive],
) -> Result<(), RestoreError> {
    let belongs = vm.disks.iter().filter(|disk| disk.overlay.is_some() && is_file(&disk.path));
    let belongs: Vec<PathBuf> = belongs.map(|disk| saved_in.join(&disk.path)).collect();
    // With `-snapshot`, the guest writes to a temporary file of QEMU.
    for drive in drives.iter().filter(|drive| drive.is_writable() && !drive.temporary) {
        let top = drive.image().filter(|image| is_file(&image.path));
        let Some(image) = top.map(|image| here.join(&image.path)) else { continue };
        if belongs.iter().any(|own| is_same_file(own, &image)) {
            return Err(RestoreError::ImageOfFile { device: drive.name().to_owned(), image });
        }
    }
    Ok(())
}

/// Makes an empty overlay beside `image`, under a name that no other file has.
fn make_overlay(start: Start<'_>, image: &Path, format: &str) -> Result<PathBuf, RestoreError> {
    let failed = |source| RestoreError::Overlay { image: image.to_path_buf(), source };
    let mut names = overlay_names(image);
    let overlay = loop {
        let name = names.next().expect("there are more names than files");
        match File::options().write(true).create_new(true).open(&name) {
            Ok(_) => break name,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
    };
    let beside = start.executable.with_file_name(QEMU_IMG);
    let program = if beside.is_file() { beside } else { PathBuf::from(QEMU_IMG) };
    let mut command = Command::new(program);
    command.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]).arg(image).arg(&overlay);
    let made = output_of(&mut command).and_then(|output| {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if output.status.success() { Ok(()) } else { Err(io::Error::other(words)) }
    });
    made.map(|()| overlay.clone()).map_err(|error| {
        let _ = fs::remove_file(&overlay);
        if error.kind() == io::ErrorKind::NotFound {
            RestoreError::NoQemuImg
        } else {
            failed(error)
        }
    })
}
