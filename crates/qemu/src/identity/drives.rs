//! Compares the images in the drives with those that the command line puts there.
//!
//! Files are compared as QEMU's process finds them, so that links, `..` and several names of one
//! file make no difference.

use std::os::fd::AsFd as _;
use std::path::{Component, Path, PathBuf};

use super::difference::{Difference, Remedy};
use crate::command_line::{LineDrive, LineImage};
use crate::image_format::gives_format;
use crate::raw_window::RawWindow;
use crate::vm::{Drive, FileId, Image, OVERLAY_PREFIX, ProcessInfo};

/// Compares drives with those of a command line.
///
/// Returns what differs, and a sentence for each drive that is in an overlay of an earlier save.
pub(super) fn compare(
    found: &[Drive],
    line: &[LineDrive],
    process: &ProcessInfo,
    is_there: impl Fn(&LineDrive) -> bool,
) -> (Vec<Difference>, Vec<String>) {
    let files = Files { process };
    let (mut differences, mut notes) = (Vec::new(), Vec::new());
    let mut left: Vec<&LineDrive> = line.iter().collect();
    let mut unknown = Vec::new();
    for drive in found {
        match left.iter().position(|on_line| on_line.makes(drive)) {
            Some(at) => {
                let on_line = left.remove(at);
                match files.compare(drive, &on_line.images) {
                    Found::Same => {}
                    Found::InOurOverlay => notes.extend(note(drive)),
                    Found::Other(difference) => differences.push(difference),
                }
            }
            None if drive.images.is_empty() || drive.qdev.is_none() => {}
            None => unknown.push(drive),
        }
    }
    // A drive that no option names as QEMU does is recognized by its image.
    for drive in unknown {
        let found = left.iter().enumerate().find_map(|(at, on_line)| {
            match files.compare(drive, &on_line.images) {
                Found::Other(_) => None,
                same => Some((at, same)),
            }
        });
        match found {
            Some((at, found)) => {
                left.remove(at);
                notes.extend(note(drive).filter(|_| matches!(found, Found::InOurOverlay)));
            }
            None => differences.extend(files.difference(drive, &[])),
        }
    }
    for gone in left.into_iter().filter(|on_line| on_line.device.is_some() && is_there(on_line)) {
        let (Some(id), Some(image)) = (&gone.id, gone.images.first()) else { continue };
        let reason = "its device is there and its drive was taken away".to_owned();
        differences.push(Difference::new(
            format!("drive {id}"),
            "taken away from its device",
            &name_on_line(image),
            Remedy::Missing(reason),
        ));
    }
    (differences, notes)
}

fn is_in_our_overlay(drive: &Drive) -> bool {
    drive.node.as_deref().is_some_and(|node| node.starts_with(OVERLAY_PREFIX))
}

fn note(drive: &Drive) -> Option<String> {
    let image = drive.image()?;
    let (name, path) = (drive.name(), &image.path);
    Some(format!("drive {name} is in {path}, the overlay of an earlier save"))
}

fn name_on_line(image: &LineImage) -> String {
    image.path.clone().unwrap_or_else(|| "an image without a path".to_owned())
}

/// Finds files as QEMU's process does.
struct Files<'a> {
    process: &'a ProcessInfo,
}

/// What a drive has, beside what a command line names for it.
enum Found {
    Same,
    /// What the line names lies below the overlay of an earlier save.
    InOurOverlay,
    Other(Difference),
}

impl Files<'_> {
    fn compare(&self, drive: &Drive, expected: &[LineImage]) -> Found {
        if is_in_our_overlay(drive) && self.is_below(drive, expected) {
            return Found::InOurOverlay;
        }
        self.difference(drive, expected).map_or(Found::Same, Found::Other)
    }

    /// Returns what differs between a drive and the images that a command line names for it.
    fn difference(&self, drive: &Drive, expected: &[LineImage]) -> Option<Difference> {
        let named_below = expected.len().saturating_sub(1);
        let top = match (drive.images.first(), expected.first()) {
            (None, None) => return None,
            (Some(found), None) => (found.path.clone(), "no medium".to_owned()),
            (None, Some(image)) => ("no medium".to_owned(), name_on_line(image)),
            (Some(_), Some(_)) => {
                let mut pairs = drive.images.iter().zip(expected);
                let is_short = drive.images.len() < expected.len();
                match pairs.find(|(found, image)| !self.is_same(found, image)) {
                    Some((found, image)) => self.apart(found, image),
                    None if is_short => {
                        let images = format!("{} images", drive.images.len());
                        (images, format!("{} images on top of each other", expected.len()))
                    }
                    None => return self.chain_of_its_own(drive, named_below),
                }
            }
        };
        let of_its_own = self.chain_of_its_own(drive, 0);
        if of_its_own.is_some() {
            return of_its_own;
        }
        let what = format!("drive {}", drive.name());
        let window = drive.images.iter().find(|image| image.window.is_some());
        let Some(window) = window else {
            return Some(Difference::new(what, &top.0, &top.1, Remedy::add(Vec::new())));
        };
        let found = format!("a part of {}", window.path);
        let reason = "a restore names whole files only".to_owned();
        Some(Difference::new(what, &found, &top.1, Remedy::Missing(reason)))
    }

    /// Finds an image that is on top of another one than its own header says, and of which the line
    /// does not say so: it names `named_below` images below the top.
    fn chain_of_its_own(&self, drive: &Drive, named_below: usize) -> Option<Difference> {
        let mut pairs = drive.images.iter().zip(drive.images.iter().skip(1)).skip(named_below);
        let (top, below) = pairs.find(|(top, below)| {
            let in_header = top.backing_file.as_deref();
            is_file_path(&below.path)
                && !in_header.is_some_and(|named| self.is_same_file(named, &below.path))
        })?;
        let in_header = top.backing_file.as_deref().unwrap_or("no other image");
        Some(Difference::new(
            format!("drive {}", drive.name()),
            &format!("{} on {}", top.path, below.path),
            &format!("{} on {in_header}, by its header,", top.path),
            Remedy::Missing("a restore opens what the header names".to_owned()),
        ))
    }

    /// Tells whether the image that the line names lies below the drive's top image.
    fn is_below(&self, drive: &Drive, expected: &[LineImage]) -> bool {
        let Some(expected) = expected.first() else { return false };
        drive.images.iter().skip(1).any(|found| self.is_same(found, expected))
    }

    /// Names an image of the VM and one of the line so that a reader sees the difference.
    fn apart(&self, found: &Image, on_line: &LineImage) -> (String, String) {
        let named = name_on_line(on_line);
        if !self.is_same_file(&found.path, &named) {
            return (found.path.clone(), named);
        }
        if found.window != on_line.window {
            let part = |window: Option<RawWindow>| match window {
                Some(RawWindow { offset, size: Some(size) }) => {
                    format!("{size} bytes of {named} from byte {offset}")
                }
                Some(RawWindow { offset, size: None }) => format!("{named} from byte {offset}"),
                None => format!("all of {named}"),
            };
            return (part(found.window), part(on_line.window));
        }
        let format = on_line.format.as_deref().unwrap_or("the format that QEMU finds in it");
        (format!("{} as {}", found.path, found.format), format!("{named} as {format}"))
    }

    fn is_same(&self, found: &Image, expected: &LineImage) -> bool {
        let written = expected.path.as_deref();
        let named = written.filter(|path| is_file_path(path));
        match (is_file_path(&found.path), named) {
            // Several files, as of a quorum.
            (false, None) if !found.files.is_empty() => self.are_same_files(found, expected),
            // URLs are not compared: QEMU writes a URL in its own way, and a command line in any.
            (false, None) => true,
            (true, Some(_)) if found.window != expected.window => false,
            (true, Some(named)) => {
                let find = || self.process.find(Path::new(named)).ok();
                gives_format(expected.format.as_deref(), &found.format, find)
                    && self.is_same_file(&found.path, named)
            }
            _ => false,
        }
    }

    fn are_same_files(&self, found: &Image, expected: &LineImage) -> bool {
        let is_in = |path: &String, files: &[String]| {
            files.iter().any(|file| self.is_same_file(path, file))
        };
        found.files.iter().all(|path| is_in(path, &expected.files))
            && expected.files.iter().all(|path| is_in(path, &found.files))
    }

    fn is_same_file(&self, path: &str, other: &str) -> bool {
        self.normal(path) == self.normal(other)
            || self.id(path).is_some_and(|id| Some(id) == self.id(other))
    }

    fn id(&self, path: &str) -> Option<FileId> {
        let file = self.process.find(Path::new(path)).ok()?;
        let stat = rustix::fs::fstat(file.as_fd()).ok()?;
        Some(FileId { device: stat.st_dev, inode: stat.st_ino })
    }

    /// Returns an absolute path without `.`; `..` stays, since a link may come before it.
    fn normal(&self, path: &str) -> PathBuf {
        let whole = self.process.working_directory.join(path);
        whole.components().filter(|part| *part != Component::CurDir).collect()
    }
}

/// Tells whether QEMU takes a name for a path: one with a colon before the first slash names a
/// protocol (7.2 to 11.1).
fn is_file_path(name: &str) -> bool {
    let first = name.split('/').next().unwrap_or_default();
    !first.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_protocol_is_no_path() {
        for name in ["/srv/a:b", "disk.raw", "./a:b", "../x"] {
            assert!(is_file_path(name), "{name}");
        }
        for name in ["nbd://host/x", "json:{}", "fat:rw:/srv", "nbd:unix:/x"] {
            assert!(!is_file_path(name), "{name}");
        }
    }
}
