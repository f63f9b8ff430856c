//! The files that QEMU read when it was started: configuration files, kernels, and the like.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::Duration;

use vmfile_format::manifest::ChangeMeta;
use vmfile_qemu::{CommandLine, ProcessInfo};

/// Longest configuration file that is read, in bytes; QEMU's own examples have ten thousand.
const CONFIG_LEN_MAX: u64 = 1 << 20;

/// How much later than QEMU's start a file may have been written and still be the one that QEMU read:
/// the kernel's times are not more exact.
const START_TOLERANCE: Duration = Duration::from_secs(2);

/// Reads a configuration file that QEMU was started with.
pub(super) fn read(process: &ProcessInfo, path: &Path) -> io::Result<String> {
    let found = process.find(path)?;
    let metadata = found.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if metadata.len() > CONFIG_LEN_MAX {
        let (found, most) = (metadata.len(), CONFIG_LEN_MAX);
        return Err(io::Error::other(format!("it has {found} bytes, and {most} are read at most")));
    }
    // Opens the file that was found, even if the path leads to another file by now.
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    let mut text = String::new();
    file.take(CONFIG_LEN_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Names the files that QEMU read at its start and that a restore would not find as they were:
/// configuration files that were written since, and others that are gone.
pub(super) fn changed(process: &ProcessInfo) -> Vec<ChangeMeta> {
    let Ok(line) = CommandLine::from_process(&process.arguments) else { return Vec::new() };
    let mut changes = Vec::new();
    for path in line.config_files() {
        if was_written_since(process, &path) {
            changes.push(change(
                format!("-readconfig {}", path.display()),
                "written after QEMU had read it",
                "as QEMU read it",
                "what QEMU read is not known any more",
            ));
        }
    }
    for (option, path) in line.input_files() {
        let is_gone = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
        if process.find(&path).err().is_some_and(is_gone) {
            changes.push(change(
                format!("-{option} {}", path.display()),
                "not found",
                "a file",
                "a restore needs the file, and looks for a relative name in QEMU's directory",
            ));
        }
    }
    changes
}

fn change(what: String, found: &str, expected: &str, obstacle: &str) -> ChangeMeta {
    ChangeMeta {
        what,
        found: found.to_owned(),
        expected: expected.to_owned(),
        leave_out: Vec::new(),
        pins: Vec::new(),
        add: Vec::new(),
        obstacle: Some(obstacle.to_owned()),
    }
}

fn was_written_since(process: &ProcessInfo, path: &Path) -> bool {
    let Some(started) = process.started else { return false };
    let written = process.find(path).and_then(|file| file.metadata()?.modified());
    written.is_ok_and(|written| written > started + START_TOLERANCE)
}
