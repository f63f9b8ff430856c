//! Whether the command line in a file may be run: the author of the file chose it, and the program.
//!
//! As git, ssh and sudo do: what another user could have written is not run.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::geteuid;
use vmfile_format::manifest::VmMeta;
use vmfile_pages::snapshot::Snapshot;

use crate::restore_error::RestoreError;

/// Refuses to run the command line in `snapshot` if another user than this one and root may have written
/// the file or one below it, the program, or the command line that the VM had when it was saved.
///
/// What the command line says is not looked at: its author chose that too.
///
/// # Errors
///
/// [`RestoreError::Untrusted`] says why.
pub(crate) fn check(
    snapshot: &Snapshot,
    meta: &VmMeta,
    program: &Path,
) -> Result<(), RestoreError> {
    let untrusted = |reason| Err(RestoreError::Untrusted { reason });
    if let Some(reason) = why_not(snapshot).map_err(RestoreError::File)? {
        return untrusted(reason);
    }
    let user = geteuid().as_raw();
    // A program that is not there is reported when it is started.
    if let Some(reason) = program.metadata().ok().and_then(|file| written_by_others(&file, user)) {
        return untrusted(format!("the program {} {reason}", program.display()));
    }
    // A process can write its own command line.
    match meta.user {
        Some(ran_as) if ran_as != user && ran_as != 0 => {
            let now = if user == 0 { "root".to_owned() } else { format!("user {user}") };
            untrusted(format!(
                "the VM ran as user {ran_as}, and would run as {now} now: run vmfile as that user"
            ))
        }
        _ => Ok(()),
    }
}

/// Says which file of the chain another user than this one and root may have written, and who.
pub(crate) fn why_not(snapshot: &Snapshot) -> io::Result<Option<String>> {
    for file in snapshot.chain() {
        if let Some(reason) = why_not_alone(file)? {
            return Ok(Some(reason));
        }
    }
    Ok(None)
}

/// As [`why_not`], of this file without those below it.
pub(crate) fn why_not_alone(file: &Snapshot) -> io::Result<Option<String>> {
    let reason = written_by_others(&file.file().metadata()?, geteuid().as_raw());
    Ok(reason.map(|reason| format!("{} {reason}", file.path().display())))
}

/// Says who but `user` and root may have written a file.
fn written_by_others(file: &Metadata, user: u32) -> Option<String> {
    if file.uid() != user && file.uid() != 0 {
        return Some(format!("belongs to user {}", file.uid()));
    }
    let mode = file.mode() & 0o7777;
    (mode & 0o022 != 0).then(|| format!("may be written by others (mode {mode:04o})"))
}
