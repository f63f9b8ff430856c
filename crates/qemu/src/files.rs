//! Which QEMU of this host uses a file.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::below::files_below;
use crate::proc;

/// A QEMU that uses a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileUser {
    /// Its process.
    pub pid: u32,
    /// How it uses the file.
    pub uses: FileUse,
}

/// How a QEMU uses a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileUse {
    /// It has a descriptor of the file.
    Open,
    /// It has a descriptor of a block device that lies on the file, such as a loop device.
    Below,
    /// It has mapped the file.
    Mapped,
    /// Its command line has the file's path: QEMU closes a kernel or a firmware after it has read
    /// it.
    Named,
}

impl fmt::Display for FileUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pid = self.pid;
        match self.uses {
            FileUse::Open => write!(f, "the QEMU of process {pid} has it open"),
            FileUse::Below => {
                write!(f, "the QEMU of process {pid} has a block device open that lies on it")
            }
            FileUse::Mapped => write!(f, "the QEMU of process {pid} has mapped it"),
            FileUse::Named => write!(f, "the QEMU of process {pid} was started with it"),
        }
    }
}

/// Returns a QEMU that uses the file that `metadata` describes, under any path. `vm` is the process
/// of a VM, which counts as a QEMU whatever the name of its program.
///
/// The descriptors of another user's QEMU cannot be seen; its command line can.
#[must_use]
pub fn user_of_file(metadata: &Metadata, vm: Option<u32>) -> Option<FileUser> {
    let others = proc::pids().unwrap_or_default().into_iter();
    let others = others.filter(|&pid| Some(pid) != vm && proc::is_qemu(pid));
    vm.into_iter().chain(others).find_map(|pid| {
        let uses = use_by(pid, metadata)?;
        Some(FileUser { pid, uses })
    })
}

fn use_by(pid: u32, metadata: &Metadata) -> Option<FileUse> {
    let is_it = |path: &Path| {
        fs::metadata(path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (metadata.dev(), metadata.ino()))
    };
    let process = PathBuf::from(format!("/proc/{pid}"));
    // A descriptor may be closed, or the process end, meanwhile: then it does not use the file.
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let descriptors: Vec<PathBuf> = descriptors.map(|entry| entry.path()).collect();
    if descriptors.iter().any(|path| is_it(path)) {
        return Some(FileUse::Open);
    }
    let below = descriptors.iter().filter_map(|path| fs::metadata(path).ok());
    if below.flat_map(|open| files_below(&open)).any(|path| is_it(&path)) {
        return Some(FileUse::Below);
    }
    let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
    if maps.lines().any(|line| mapped_file(line) == Some((metadata.dev(), metadata.ino()))) {
        return Some(FileUse::Mapped);
    }
    let words = proc::arguments(pid).unwrap_or_default();
    let named = paths_in(&words).into_iter().filter_map(|path| {
        let relative = path.strip_prefix("/").map(Path::to_path_buf);
        // `/proc/self` is another process for QEMU than for this one, and what is in `/dev` is not
        // a file.
        let is_special = path.starts_with("/proc") || path.starts_with("/dev");
        let below = if path.is_absolute() { "root" } else { "cwd" };
        (!is_special).then(|| process.join(below).join(relative.unwrap_or(path)))
    });
    named.into_iter().any(|path| is_it(&path)).then_some(FileUse::Named)
}

/// Returns the device and the inode of the file in a line of `/proc/PID/maps`:
/// `START-END PERMISSIONS OFFSET MAJOR:MINOR INODE PATH`.
fn mapped_file(line: &str) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace().skip(3);
    let (major, minor) = words.next()?.split_once(':')?;
    let number = |digits| u32::from_str_radix(digits, 16).ok();
    let inode = words.next()?.parse().ok().filter(|&inode| inode != 0)?;
    Some((rustix::fs::makedev(number(major)?, number(minor)?), inode))
}

/// Returns everything in a command line that may be a path: words, and what stands in them between
/// commas, equals signs and the quotes of JSON. The value of `-incoming` is left out: QEMU has read
/// that file once, and it is often written anew.
fn paths_in(words: &[OsString]) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let mut is_incoming = false;
    // The first is the program.
    for word in words.iter().skip(1) {
        let is_skipped = std::mem::replace(&mut is_incoming, is_option(word, "incoming"));
        if is_skipped {
            continue;
        }
        let bytes = word.as_bytes();
        // A comma in a value is written twice.
        let single = replace(bytes, b",,", b"\0");
        for part in single.split(|byte| matches!(byte, b',' | b'"')) {
            let part = replace(part, b"\0", b",");
            paths.push(part.clone());
            let equals = part.iter().enumerate().filter(|(_, byte)| **byte == b'=');
            paths.extend(equals.map(|(index, _)| part[index + 1..].to_vec()));
        }
        paths.push(bytes.to_vec());
    }
    let without_file =
        |path: Vec<u8>| path.strip_prefix(b"file:").map(<[u8]>::to_vec).unwrap_or(path);
    let paths = paths.into_iter().map(without_file).filter(|path| !path.is_empty());
    paths.map(|path| PathBuf::from(OsString::from_vec(path))).collect()
}

fn is_option(word: &OsStr, name: &str) -> bool {
    let word = word.as_bytes();
    let word = word.strip_prefix(b"-").unwrap_or(word);
    word.strip_prefix(b"-").unwrap_or(word) == name.as_bytes()
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, after)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(from) {
            replaced.extend_from_slice(to);
            rest = after;
        } else {
            replaced.push(*first);
            rest = after;
        }
    }
    replaced
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_in_every_spelling() {
        let line = "qemu -drive file=/a,if=none -drive file=json:{\"filename\":\"/b\"} -hda /c \
             -drive driver=qcow2,file.driver=file,file.filename=/d,,e --kernel file:/f \
             -incoming file:/not -object memory-backend-file,id=m,mem-path=g=h";
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let paths = paths_in(&words);
        for path in ["/a", "/b", "/c", "/d,e", "/f", "g=h", "h"] {
            assert!(paths.contains(&PathBuf::from(path)), "{path}: {paths:?}");
        }
        assert!(!paths.iter().any(|path| path.ends_with("not")), "{paths:?}");
    }

    #[test]
    fn a_line_of_maps_names_its_file() {
        let line = "7f0-7f1 r--p 00001000 fe:01 1234                       /lib/x y (deleted)";
        assert_eq!(mapped_file(line), Some((rustix::fs::makedev(0xfe, 1), 1234)));
        assert_eq!(mapped_file("7f0-7f1 rw-p 00000000 00:00 0 "), None);
        assert_eq!(mapped_file(""), None);
    }

    #[test]
    fn a_process_is_found_by_its_descriptor_whatever_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "text").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(user_of_file(&metadata, Some(std::process::id())), None);
        let file = fs::File::open(&path).unwrap();
        let user = user_of_file(&metadata, Some(std::process::id())).unwrap();
        assert_eq!(user.uses, FileUse::Open);
        drop(file);
    }
}
