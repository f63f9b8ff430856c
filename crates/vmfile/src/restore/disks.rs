//! The disks of the saved moment: images that belong to the file get overlays, for the VM to write to.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;
use vmfile_format::manifest::DiskMeta;
use vmfile_qemu::{CommandLine, NewImage};

use crate::restore_error::RestoreError;
use crate::save::overlay_names;
use crate::snapshot::Snapshot;

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

/// Overlays that were made; they are removed on drop, unless they are kept.
#[derive(Debug, Default)]
pub(super) struct NewOverlays(Vec<RestoredDisk>);

impl NewOverlays {
    /// Returns their files.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.0.iter().map(|disk| disk.overlay.clone()).collect()
    }

    /// Leaves them: the VM runs with them.
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

/// Makes `line` name the images that the VM is to have: an overlay where the image belongs to the
/// file, and the newest where the VM has left the one it was started with.
///
/// `is_saved` tells the command line that was saved, which names every disk, from one that the user
/// gave, who may have chosen others.
pub(super) fn choose_images(
    snapshot: &Snapshot,
    line: &mut CommandLine,
    (executable, directory): (&Path, &Path),
    is_saved: bool,
) -> Result<NewOverlays, RestoreError> {
    let mut made = NewOverlays::default();
    let Some(manifest) = snapshot.manifest() else { return Ok(made) };
    let disks = &manifest.meta.vm.disks;
    let saved_in = manifest.meta.vm.working_directory.as_ref().map_or(directory, Path::new);
    for disk in disks.iter().filter(|disk| !disk.read_only) {
        let image = saved_in.join(&disk.path);
        let Some(old) = find(line, disk, disks, (saved_in, directory))? else {
            if is_saved && disk.overlay.is_some() {
                return Err(RestoreError::DiskNotNamed { image });
            }
            continue;
        };
        let (new, format) = if disk.overlay.is_some() {
            let overlay = make_overlay(executable, (&image, &disk.format))?;
            made.0.push(RestoredDisk { image, overlay: overlay.clone() });
            (overlay, "qcow2".to_owned())
        } else {
            (image, disk.format.clone())
        };
        if new != old {
            line.replace_image(&NewImage { old, new, format }, directory)?;
        }
    }
    Ok(made)
}

/// Finds under which path `line` names a disk: its image, or one below it, with which the VM was
/// started before it got an overlay.
fn find(
    line: &CommandLine,
    disk: &DiskMeta,
    disks: &[DiskMeta],
    (saved_in, directory): (&Path, &Path),
) -> Result<Option<PathBuf>, RestoreError> {
    let is_of_another = |path: &Path| {
        let path_of = |other: &DiskMeta| saved_in.join(&other.path) == path;
        disks.iter().any(|other| other.device != disk.device && path_of(other))
    };
    let below = disk.backing_files.iter().map(|file| saved_in.join(file));
    let below = below.filter(|path| !is_of_another(path));
    for old in std::iter::once(saved_in.join(&disk.path)).chain(below) {
        let probe = NewImage { old: old.clone(), new: old.clone(), format: disk.format.clone() };
        if line.clone().replace_image(&probe, directory)? > 0 {
            return Ok(Some(old));
        }
    }
    Ok(None)
}

/// Makes an empty overlay beside `image`, under a name that nobody else has.
fn make_overlay(
    executable: &Path,
    (image, format): (&Path, &str),
) -> Result<PathBuf, RestoreError> {
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
    let beside = executable.with_file_name(QEMU_IMG);
    let program = if beside.is_file() { beside } else { PathBuf::from(QEMU_IMG) };
    let mut command = Command::new(program);
    command.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]).arg(image).arg(&overlay);
    let output = command.stdin(Stdio::null()).output();
    let made = output.and_then(|output| {
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
