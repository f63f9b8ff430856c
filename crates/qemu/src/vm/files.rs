//! Files as QEMU's process sees them: in its own root directory and mount namespace.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use super::ProcessInfo;
use crate::proc;

/// Identifies a file on this host, while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// The device of its file system.
    pub device: u64,
    /// Its inode there.
    pub inode: u64,
}

impl FileId {
    /// Returns the id of the file that `metadata` describes.
    #[must_use]
    pub fn of(metadata: &fs::Metadata) -> FileId {
        FileId { device: metadata.dev(), inode: metadata.ino() }
    }
}

impl ProcessInfo {
    /// Resolves `path` as this process would, without opening the file: the result is an `O_PATH`
    /// descriptor.
    ///
    /// # Errors
    ///
    /// The kernel's error; only root and the user who owns the process may look.
    pub fn find(&self, path: &Path) -> io::Result<File> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let Ok(inside) = path.strip_prefix("/") else {
            let current = format!("/proc/{}/cwd", self.pid);
            if proc::current_directory(self.pid).is_ok_and(|now| now != self.working_directory) {
                // A daemon has left the directory to which its relative paths refer.
                return self.find(&Path::new("/").join(&self.working_directory).join(path));
            }
            // A relative path is resolved from the working directory. An absolute symbolic link on
            // the way would lead into our own root directory; the caller notices, as it compares
            // inodes.
            return Ok(openat(CWD, Path::new(&current).join(path), flags, Mode::empty())?.into());
        };
        let root = format!("/proc/{}/root", self.pid);
        let root = openat(CWD, root, flags | OFlags::DIRECTORY, Mode::empty())?;
        let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
        match openat2(&root, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            Ok(file) => Ok(file.into()),
            // Linux before 5.6, and sandboxes that know no openat2.
            Err(Errno::NOSYS | Errno::PERM) => {
                Ok(openat(&root, inside, flags, Mode::empty())?.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Tells whether the directory was removed to which relative paths of this process refer.
    #[must_use]
    pub fn is_directory_gone(&self) -> bool {
        let is_current =
            proc::current_directory(self.pid).ok().as_ref() == Some(&self.working_directory);
        is_current && proc::is_removed(self.pid, "cwd")
    }

    /// Tells whether the program that this process runs was removed, and none has taken its place.
    #[must_use]
    pub fn is_program_gone(&self) -> bool {
        let is_gone = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
        // The process may have another root directory by now.
        proc::is_removed(self.pid, "exe")
            && !self.executable.exists()
            && self.find(&self.executable).err().is_some_and(is_gone)
    }

    /// Opens what [`ProcessInfo::find`] found for reading, even if its path leads to another file
    /// by now.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn open_found(found: &File) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", found.as_raw_fd());
        // It may be a device, and opening one must not block.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(openat(CWD, path, flags, Mode::empty())?.into())
    }

    /// Returns the regular files and the block devices that this process has open.
    ///
    /// # Errors
    ///
    /// The kernel's error; only root and the user who owns the process may look.
    pub fn open_files(&self) -> io::Result<HashSet<FileId>> {
        let mut files = HashSet::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid))? {
            // A descriptor may be closed while we look.
            let Ok(metadata) = fs::metadata(entry?.path()) else { continue };
            if metadata.is_file() || metadata.file_type().is_block_device() {
                files.insert(FileId::of(&metadata));
            }
        }
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::path::PathBuf;

    use super::*;

    fn ourselves() -> ProcessInfo {
        ProcessInfo {
            pid: std::process::id(),
            executable: PathBuf::new(),
            user: 0,
            arguments: Vec::new(),
            working_directory: env::current_dir().unwrap(),
        }
    }

    #[test]
    fn an_open_file_is_found_by_its_path_and_a_deleted_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let file = File::create_new(&path).unwrap();
        let id = FileId::of(&file.metadata().unwrap());
        let process = ourselves();
        assert_eq!(FileId::of(&process.find(&path).unwrap().metadata().unwrap()), id);
        assert!(process.open_files().unwrap().contains(&id));
        fs::remove_file(&path).unwrap();
        assert_eq!(process.find(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(process.open_files().unwrap().contains(&id));
        drop(file);
    }

    #[test]
    fn a_relative_path_begins_in_the_working_directory() {
        let found = ourselves().find(Path::new("Cargo.toml")).unwrap().metadata().unwrap();
        assert_eq!(FileId::of(&found), FileId::of(&fs::metadata("Cargo.toml").unwrap()));
        assert!(ourselves().find(Path::new("/")).unwrap().metadata().unwrap().is_dir());
    }

    /// The kernel adds ` (deleted)` to the name of a directory that was removed, and a directory may be called
    /// so.
    #[test]
    fn a_directory_that_was_removed_is_told_from_one_with_an_odd_name() {
        let directory = tempfile::tempdir().unwrap();
        for (name, is_removed) in [("here (deleted)", false), ("cw", true)] {
            let path = directory.path().join(name);
            fs::create_dir(&path).unwrap();
            let mut command = std::process::Command::new("sleep");
            let mut child = command.arg("60").current_dir(&path).spawn().unwrap();
            if is_removed {
                fs::remove_dir(&path).unwrap();
                fs::create_dir(directory.path().join("cw (deleted)")).unwrap();
            }
            let found = proc::working_directory(child.id()).unwrap();
            let process =
                ProcessInfo { pid: child.id(), working_directory: found.clone(), ..ourselves() };
            let is_gone = process.is_directory_gone();
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!((found, is_gone), (path, is_removed));
        }
    }
}
