//! What lies below a block device: the file of a loop device, the devices of a mapped one.

use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// How deep a stack of devices is followed: a deeper one is a mistake.
const DEPTH_MAX: usize = 16;

/// Returns the files on which the bytes of a block device lie; none for anything else.
///
/// A VM that writes to `/dev/loop0` writes to the loop device's file, which only the kernel has
/// open.
pub(crate) fn files_below(device: &Metadata) -> Vec<PathBuf> {
    let mut files = Vec::new();
    if device.file_type().is_block_device() {
        let number = device.rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let entry = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        add_files(&entry, DEPTH_MAX, &mut files);
    }
    files
}

/// Adds the files below the device that `/sys` describes in `entry`, and below its slaves, of which
/// a device of dm or md is made.
fn add_files(entry: &Path, depth: usize, files: &mut Vec<PathBuf>) {
    let Some(depth) = depth.checked_sub(1) else { return };
    // A partition's directory lies in that of its disk, which has these files. The kernel follows
    // the link `entry` before it takes `..`.
    for disk in [entry.to_path_buf(), entry.join("..")] {
        if let Ok(mut name) = fs::read(disk.join("loop/backing_file")) {
            name.truncate(name.trim_ascii_end().len());
            files.push(PathBuf::from(std::ffi::OsString::from_vec(name)));
        }
        let slaves = fs::read_dir(disk.join("slaves")).into_iter().flatten().flatten();
        for slave in slaves {
            add_files(&slave.path(), depth, files);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Below `/sys`: a loop device with a partition, and a device of dm that is made of it.
    #[test]
    fn the_file_is_found_below_partitions_and_mapped_devices() {
        let sys = tempfile::tempdir().unwrap();
        let path = |name: &str| sys.path().join(name);
        for directory in ["block/loop1/loop", "block/loop1/loop1p1", "block/dm-0/slaves", "dev"] {
            fs::create_dir_all(path(directory)).unwrap();
        }
        fs::write(path("block/loop1/loop/backing_file"), "/images/a b.raw\n").unwrap();
        symlink("../block/loop1", path("dev/7:1")).unwrap();
        symlink("../block/loop1/loop1p1", path("dev/259:0")).unwrap();
        symlink("../block/dm-0", path("dev/252:0")).unwrap();
        symlink("../../loop1/loop1p1", path("block/dm-0/slaves/loop1p1")).unwrap();
        for entry in ["dev/7:1", "dev/259:0", "dev/252:0"] {
            let mut files = Vec::new();
            add_files(&path(entry), DEPTH_MAX, &mut files);
            assert_eq!(files, [PathBuf::from("/images/a b.raw")], "{entry}");
        }
        let mut files = Vec::new();
        add_files(&path("dev/8:0"), DEPTH_MAX, &mut files);
        assert!(files.is_empty(), "{files:?}");
    }

    #[test]
    fn nothing_is_below_what_is_no_block_device() {
        assert!(files_below(&fs::metadata("/dev/null").unwrap()).is_empty());
        assert!(files_below(&fs::metadata("/").unwrap()).is_empty());
    }
}
