//! What a save records of a disk image, and how a restore finds out that the image has changed.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use vmfile_format::manifest::{FileMeta, ImageMeta};
use vmfile_format::qcow2::{QCOW2_HEADER_LEN_MAX, Qcow2Header};
use vmfile_qemu::ProcessInfo;

/// The format whose header is compared.
const QCOW2: &str = "qcow2";

/// What QEMU may still write to an image after vmfile has looked at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Nothing: the image is closed, or open for reading only.
    None,
    /// QEMU has the image open for writing, and writes what some formats need when it closes it.
    Writes,
    /// QEMU writes dirty bitmaps into the image when it closes it.
    WritesBitmaps,
}

/// Returns what the kernel and its header say of an image; `found` was opened with `O_PATH`.
///
/// # Errors
///
/// What the kernel says, or that it is neither a regular file nor a block device.
pub(crate) fn look_at(found: &File, format: &str, usage: Use) -> io::Result<FileMeta> {
    let metadata = found.metadata()?;
    let is_block_device = metadata.file_type().is_block_device();
    if !metadata.is_file() && !is_block_device {
        return Err(io::Error::other("it is neither a regular file nor a block device"));
    }
    let mut facts = FileMeta {
        bytes: Some(metadata.len()),
        modified_unix_seconds: Some(metadata.mtime()),
        modified_nanoseconds: u32::try_from(metadata.mtime_nsec()).ok(),
        device: metadata.dev(),
        inode: Some(metadata.ino()),
        qcow2_header: None,
    };
    if is_block_device {
        // The device node is made anew at every start of the host, and says nothing of the
        // contents.
        let length = ProcessInfo::open_found(found)?.seek(SeekFrom::End(0))?;
        facts.bytes = Some(length);
        (facts.modified_unix_seconds, facts.modified_nanoseconds) = (None, None);
        facts.inode = None;
    }
    if format == QCOW2 {
        let header = header(found)?;
        let changes = match usage {
            Use::None => false,
            Use::Writes => header.changes_when_closed,
            Use::WritesBitmaps => true,
        };
        if changes {
            (facts.modified_unix_seconds, facts.modified_nanoseconds) = (None, None);
            facts.bytes = None;
        } else {
            facts.qcow2_header = Some(format!("{:032x}", header.hash));
        }
    }
    Ok(facts)
}

/// Returns the image below that the header of an image names, as it is written there: `Some(None)`
/// if it names none, and `None` for formats whose headers vmfile does not read.
///
/// # Errors
///
/// What the kernel says, or that it is no qcow2 image.
pub(crate) fn named_below(path: &Path, format: &str) -> io::Result<Option<Option<String>>> {
    match format {
        QCOW2 => Ok(Some(header(&find(path)?)?.backing_file)),
        "raw" => Ok(Some(None)),
        _ => Ok(None),
    }
}

/// Reads the header of a qcow2 image.
fn header(found: &File) -> io::Result<Qcow2Header> {
    let mut bytes = Vec::new();
    ProcessInfo::open_found(found)?.take(QCOW2_HEADER_LEN_MAX as u64).read_to_end(&mut bytes)?;
    Qcow2Header::decode(&bytes).map_err(io::Error::other)
}

/// Finds a file without opening it.
///
/// # Errors
///
/// What the kernel says.
pub(crate) fn find(path: &Path) -> io::Result<File> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// A difference between an image and what was recorded of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) what: &'static str,
    pub(crate) found: String,
    pub(crate) expected: String,
}

/// Compares an image with what the manifest says of it; `path` is where it lies now.
///
/// Opens the image only if `may_open` says so: otherwise its header, or the length of a device, is
/// not compared.
///
/// # Errors
///
/// What the kernel says if it cannot be looked at.
pub(crate) fn compare(image: &ImageMeta, path: &Path, may_open: bool) -> io::Result<Vec<Change>> {
    let Some(expected) = &image.file else { return Ok(Vec::new()) };
    let reads_header = may_open && expected.qcow2_header.is_some();
    let format = if reads_header { image.format.as_str() } else { "" };
    let file = find(path)?;
    if !may_open && file.metadata()?.file_type().is_block_device() {
        // Only the length of a device is recorded, and reading it would need the device open.
        return Ok(Vec::new());
    }
    let found = look_at(&file, format, Use::None)?;
    let mut changes = Vec::new();
    let mut differ = |what, found: Option<String>, expected: Option<String>| {
        if let (Some(found), Some(expected)) = (found, expected)
            && found != expected
        {
            changes.push(Change { what, found, expected });
        }
    };
    let bytes = |file: &FileMeta| file.bytes.map(|bytes| format!("{bytes} bytes"));
    differ("length", bytes(&found), bytes(expected));
    differ("time of the last change", modified(&found), modified(expected));
    let inode = |file: &FileMeta| file.inode.map(|inode| inode.to_string());
    differ("inode", inode(&found), inode(expected));
    differ("qcow2 header", state(&file, &found, reads_header), expected.qcow2_header.clone());
    Ok(changes)
}

/// Returns the hash of the header, and whether the header says that the image is dirty or corrupt.
fn state(file: &File, facts: &FileMeta, may_open: bool) -> Option<String> {
    let hash = facts.qcow2_header.clone()?;
    let header = header(file).ok().filter(|_| may_open)?;
    let words = [(header.is_dirty, " (not closed)"), (header.is_corrupt, " (marked as corrupt)")];
    Some(words.iter().filter(|(is, _)| *is).fold(hash, |hash, (_, words)| hash + words))
}

fn modified(file: &FileMeta) -> Option<String> {
    let nanoseconds = file.modified_nanoseconds.unwrap_or(0);
    let seconds = file.modified_unix_seconds?;
    Some(format!("{seconds}.{nanoseconds:09} s after 1970"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn noted(path: &Path, format: &str) -> ImageMeta {
        let file = look_at(&find(path).unwrap(), format, Use::None).unwrap();
        ImageMeta { format: format.to_owned(), file: Some(file), ..ImageMeta::default() }
    }

    fn what_changed(image: &ImageMeta, path: &Path) -> Vec<&'static str> {
        compare(image, path, true).unwrap().into_iter().map(|change| change.what).collect()
    }

    #[test]
    fn each_kind_of_change_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        fs::write(&path, b"1234").unwrap();
        let image = noted(&path, "raw");
        assert!(what_changed(&image, &path).is_empty());
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(1)).unwrap();
        assert_eq!(what_changed(&image, &path), ["time of the last change"]);
        file.set_len(5).unwrap();
        assert!(what_changed(&image, &path).contains(&"length"));
        fs::copy(&path, directory.path().join("b")).unwrap();
        fs::rename(directory.path().join("b"), &path).unwrap();
        assert!(what_changed(&image, &path).contains(&"inode"));
        assert_eq!(
            compare(&image, &directory.path().join("c"), true).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn what_is_no_file_is_not_opened() {
        // Opening a FIFO without a writer would wait for ever; so would a terminal.
        let directory = tempfile::tempdir().unwrap();
        assert!(look_at(&find(directory.path()).unwrap(), "qcow2", Use::None).is_err());
        assert!(look_at(&find(Path::new("/dev/null")).unwrap(), "qcow2", Use::None).is_err());
    }
}
