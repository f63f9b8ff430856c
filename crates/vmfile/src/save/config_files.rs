//! The files that QEMU read when it was started: configuration files, kernels, and the like; its program,
//! and the directory in which it was started.

use std::io::{self, Read as _};
use std::path::Path;
use std::time::Duration;

use vmfile_qemu::{CommandLine, Difference, ProcessInfo, Remedy};

/// Longest configuration file that is read, in bytes; QEMU's own examples have ten thousand.
const CONFIG_LEN_MAX: u64 = 1 << 20;

/// How much later than QEMU's start a file may have been written and still be the one that QEMU
/// read: the kernel's times are not more exact.
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
    let mut text = String::new();
    ProcessInfo::open_found(&found)?.take(CONFIG_LEN_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Names the files that QEMU read at its start and that a restore would not find as they were:
/// configuration files that were written since, and others that are gone. So are its program and its
/// directory named if they are gone.
pub(super) fn changed(process: &ProcessInfo) -> Vec<Difference> {
    let Ok(line) = CommandLine::from_process(&process.arguments) else { return Vec::new() };
    let mut changes: Vec<Difference> = gone(process).collect();
    for path in line.config_files() {
        if was_written_since(process, &path) {
            let what = format!("-readconfig {}", path.display());
            let remedy = Remedy::Missing("what QEMU read is not known any more".to_owned());
            let found = "written after QEMU had read it";
            changes.push(Difference::new(what, found, "as QEMU read it", remedy));
        }
    }
    for (option, path) in line.input_files() {
        let is_gone = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
        if process.find(&path).err().is_some_and(is_gone) {
            let what = format!("-{option} {}", path.display());
            let reason =
                "a restore needs the file, and looks for a relative name in QEMU's directory";
            let remedy = Remedy::Missing(reason.to_owned());
            changes.push(Difference::new(what, "not found", "a file", remedy));
        }
    }
    changes
}

/// Names what was removed of that which a restore starts QEMU with: the program and the directory.
fn gone(process: &ProcessInfo) -> impl Iterator<Item = Difference> {
    let directory = process.is_directory_gone().then(|| {
        let what = format!("working directory {}", process.working_directory.display());
        let reason = "a restore starts QEMU in this directory".to_owned();
        Difference::new(what, "removed", "a directory", Remedy::Missing(reason))
    });
    let program = process.is_program_gone().then(|| {
        let what = format!("program {}", process.executable.display());
        let reason = "a restore runs this program".to_owned();
        Difference::new(what, "removed", "a program", Remedy::Missing(reason))
    });
    directory.into_iter().chain(program)
}

fn was_written_since(process: &ProcessInfo, path: &Path) -> bool {
    let Some(started) = process.started() else { return false };
    let written = process.find(path).and_then(|file| file.metadata()?.modified());
    written.is_ok_and(|written| written > started + START_TOLERANCE)
}
