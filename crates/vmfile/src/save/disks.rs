//! The disks of the saved moment: the images stay as they are, and the guest writes to overlays.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use vmfile_format::manifest::{DiskMeta, VmMeta};
use vmfile_qemu::{Drive, Overlay, Vm, VmError};

use crate::error::SaveError;
use crate::image_facts;
use crate::image_path::{is_file, is_same_file};

/// How long QEMU may take to merge the overlay of a failed save, which holds what the guest wrote
/// meanwhile.
const MERGE_TIMEOUT: Duration = Duration::from_secs(60);

/// The formats of images that can have an overlay.
const FORMATS: [&str; 2] = ["qcow2", "raw"];

/// A disk whose image belongs to the saved file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SavedDisk {
    /// The device or node.
    pub device: String,
    /// The image, which stays as it was at the saved moment.
    pub image: String,
    /// The image on top of it, to which the guest writes since then.
    pub overlay: String,
    /// How many images the guest reads through: the overlay, the image, and all below.
    pub depth: usize,
}

/// The overlays of a save.
#[derive(Debug, Default)]
pub(super) struct Disks {
    overlays: Vec<Overlay>,
    is_frozen: bool,
}

impl Disks {
    /// Chooses a path for the overlay of every disk that the guest can write, and records it in
    /// `meta`.
    pub(super) fn plan(found: &[Drive], meta: &mut VmMeta) -> Result<Disks, SaveError> {
        let mut overlays: Vec<Overlay> = Vec::new();
        let with_medium = found.iter().filter(|drive| drive.image().is_some());
        for (drive, noted) in with_medium.zip(&mut meta.disks) {
            if !drive.is_writable() {
                continue;
            }
            let device = || drive.name().to_owned();
            let refuse = |reason: String| SaveError::Disk { device: device(), reason };
            let node = drive.node.as_ref().ok_or_else(|| refuse("it has no node".to_owned()))?;
            let image = image_of(drive, meta.working_directory.as_deref()).map_err(refuse)?;
            let is_free = |file: &Path| {
                is_unused(file) && overlays.iter().all(|overlay| overlay.file() != file)
            };
            let file = overlay_names(&image).find(|file| is_free(file));
            let file = file.expect("there are more names than files");
            let text = |path: &Path| {
                let text = path.to_str().map(str::to_owned);
                text.ok_or_else(|| refuse("its path is not UTF-8".to_owned()))
            };
            noted.path = text(&image)?;
            noted.overlay = Some(text(&file)?);
            overlays.push(Overlay::new(node, &file));
        }
        Ok(Disks { overlays, is_frozen: false })
    }

    /// Returns the overlays, planned or already made.
    pub(super) fn overlays(&self) -> &[Overlay] {
        &self.overlays
    }

    /// Whether there is anything to freeze.
    pub(super) fn is_empty(&self) -> bool {
        self.overlays.is_empty()
    }

    /// Makes the guest write to the overlays, so that the images stay as they are. The guest must
    /// be stopped.
    pub(super) fn freeze(&mut self, vm: &mut Vm) -> Result<(), VmError> {
        if !self.overlays.is_empty() {
            if let Err(error) = vm.take_overlays(&self.overlays) {
                if error.is_refused() {
                    self.remove_files();
                }
                return Err(error);
            }
            self.is_frozen = true;
        }
        Ok(())
    }

    /// Removes what QEMU made before it refused the transaction: it takes the overlays that were
    /// made off the disks, and leaves their files (7.2 to 11.1). Nothing had these names before.
    fn remove_files(&self) {
        for overlay in &self.overlays {
            // Most were not made.
            let _ = fs::remove_file(overlay.file());
        }
    }

    /// Merges the overlays back into the images, after a save that failed.
    pub(super) fn thaw(&mut self, vm: &mut Vm) -> Result<(), VmError> {
        if !std::mem::take(&mut self.is_frozen) {
            return Ok(());
        }
        let mut result = Ok(());
        for overlay in &self.overlays {
            let merged =
                vm.unstoppable(MERGE_TIMEOUT, |vm| vm.merge_overlay(overlay, MERGE_TIMEOUT));
            match merged {
                // QEMU has closed the overlay, and its data is in the image below.
                Ok(()) => drop(fs::remove_file(overlay.file())),
                Err(error) => result = Err(error),
            }
        }
        result
    }
}

/// Returns the disks whose images belong to the file.
pub(super) fn saved_disks(meta: &VmMeta) -> Vec<SavedDisk> {
    let saved = |disk: &DiskMeta| {
        let (device, image) = (disk.device.clone(), disk.path.clone());
        let depth = disk.backing_files.len() + 2;
        Some(SavedDisk { device, image, overlay: disk.overlay.clone()?, depth })
    };
    meta.disks.iter().filter_map(saved).collect()
}

/// With this many images or more, a report warns: QEMU looks for a cluster in one image after the
/// other, and each of them takes memory.
const DEPTH_WARNED: usize = 16;

/// Warns of disks with many images on top of one another.
pub(super) fn deep_disks(saved: &[SavedDisk]) -> impl Iterator<Item = String> + '_ {
    saved.iter().filter(|disk| disk.depth >= DEPTH_WARNED).map(|disk| {
        let SavedDisk { device, depth, .. } = disk;
        format!(
            "disk {device:?} has {depth} images on top of one another: `qemu-img commit` or \
             `block-commit` makes fewer of them, once no saved file needs them"
        )
    })
}

/// Returns the path of a disk's image, or why it cannot have an overlay.
fn image_of(drive: &Drive, directory: Option<&str>) -> Result<PathBuf, String> {
    let top = drive.image().ok_or("it is empty")?;
    if !FORMATS.contains(&top.format.as_str()) {
        return Err(format!("its format is {:?}, expected qcow2 or raw", top.format));
    }
    if top.window.is_some() {
        return Err("it is a part of its file (raw's offset or size)".to_owned());
    }
    let image = Path::new(&top.path);
    // QEMU (10.0) writes the image's path unchanged into the overlay, and resolves a relative path
    // there against the overlay's own directory.
    if image.is_relative() && image.parent() != Some(Path::new("")) {
        return Err(format!("its path {:?} is relative: name it by an absolute path", top.path));
    }
    let image = directory.map_or(image.to_path_buf(), |directory| Path::new(directory).join(image));
    match fs::metadata(&image) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(format!("{} is not a regular file", image.display())),
        Err(error) => return Err(format!("{}: {error}", image.display())),
    }
    compare_chain(drive, &image, directory)?;
    Ok(image)
}

/// Compares the images below with those that the images' headers name.
///
/// A restore makes an overlay of the image, and QEMU finds the images below by the headers. The
/// command line or `blockdev-add` may have put other images there.
fn compare_chain(drive: &Drive, image: &Path, directory: Option<&str>) -> Result<(), String> {
    let mut path = image.to_path_buf();
    for (index, image) in drive.images.iter().enumerate() {
        let named = match image_facts::named_below(&path, &image.format) {
            Ok(Some(named)) => named.filter(|named| !named.is_empty()),
            Ok(None) => return Ok(()),
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        let found = drive.images.get(index + 1).map(|image| &image.path);
        let below = match (&named, found) {
            (None, None) => return Ok(()),
            // QEMU reports a URL in a form of its own: the two cannot be compared.
            (Some(named), Some(found)) if !is_file(named) && !is_file(found) => return Ok(()),
            (Some(named), Some(_)) if named.starts_with("json:") => return Ok(()),
            (Some(named), Some(found)) if is_file(named) && is_file(found) => {
                let beside = path.parent().unwrap_or(Path::new("")).join(named);
                let found = directory.map_or(PathBuf::from(found), |d| Path::new(d).join(found));
                is_same_file(&beside, &found).then_some(found)
            }
            _ => None,
        };
        let text = |name: Option<&String>| name.map_or("no image".to_owned(), Clone::clone);
        path = below.ok_or_else(|| {
            format!(
                "{} names {} below it, and the VM has {} there: an overlay would be of another disk; \
                 `qemu-img rebase -u` writes another name into an image that is not in use",
                path.display(),
                text(named.as_ref()),
                text(found),
            )
        })?;
    }
    Ok(())
}

/// The text between the stem of the first image and the number of an overlay.
const OVERLAY_MARK: &str = ".vmfile-";

/// Longest stem kept, in bytes: a file name has at most 255, and the mark and the number follow.
const STEM_LEN_MAX: usize = 200;

/// Returns names for overlays beside `image`: `disk.vmfile-1.qcow2`, `disk.vmfile-2.qcow2`, ...
///
/// An overlay of an overlay is named after the first image as well: a name made from the previous
/// one would grow too long for the file system.
pub(crate) fn overlay_names(image: &Path) -> impl Iterator<Item = PathBuf> {
    let stem = image.file_stem().unwrap_or_default().as_bytes();
    let first = match stem.windows(OVERLAY_MARK.len()).rposition(|w| w == OVERLAY_MARK.as_bytes()) {
        Some(mark) if is_number(&stem[mark + OVERLAY_MARK.len()..]) => &stem[..mark],
        _ => stem,
    };
    let first = OsStr::from_bytes(&first[..first.len().min(STEM_LEN_MAX)]).to_owned();
    (1_u64..).map(move |number| {
        let mut name = first.clone();
        name.push(format!("{OVERLAY_MARK}{number}.qcow2"));
        image.with_file_name(name)
    })
}

fn is_number(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(u8::is_ascii_digit)
}

/// Tells whether nothing has this name, not even a symbolic link that leads nowhere.
fn is_unused(file: &Path) -> bool {
    fs::symlink_metadata(file).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(image: &str) -> PathBuf {
        overlay_names(Path::new(image)).next().unwrap()
    }

    #[test]
    fn an_overlay_lies_beside_its_image_and_is_named_after_the_first() {
        let mut names = overlay_names(Path::new("/srv/web.qcow2"));
        assert_eq!(names.next().unwrap(), Path::new("/srv/web.vmfile-1.qcow2"));
        assert_eq!(names.next().unwrap(), Path::new("/srv/web.vmfile-2.qcow2"));
        assert_eq!(first("/srv/web.vmfile-31.qcow2"), Path::new("/srv/web.vmfile-1.qcow2"));
        // The user's own names stay whole.
        let odd = "/srv/web.vmfile-x.qcow2";
        assert_eq!(first(odd), Path::new("/srv/web.vmfile-x.vmfile-1.qcow2"));
    }

    /// `save --with-disks` once failed from about the 13th save on: names grew by one word each
    /// time.
    #[test]
    fn a_name_stays_short_however_often_a_vm_is_saved() {
        let mut image = PathBuf::from(format!("/srv/{}.qcow2", "x".repeat(240)));
        for _ in 0..50 {
            let name = overlay_names(&image).nth(12);
            image = name.unwrap();
            assert!(image.file_name().unwrap().len() < 255, "{}", image.display());
        }
    }
}
