//! Whether the command line in a file may be run: the author of the file chose it, and the program.
//!
//! As git, ssh and sudo do: what another user could have written is not run.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::geteuid;
use vmfile_format::manifest::VmMeta;
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::CommandLine;

use crate::restore_error::RestoreError;

/// Refuses to run the command line in `snapshot` if another user may have written the file or the
/// program, or if the VM would have rights that it did not have.
///
/// # Errors
///
/// [`RestoreError::Untrusted`] says why.
pub(super) fn check(
    snapshot: &Snapshot,
    meta: &VmMeta,
    (program, line): (&Path, &CommandLine),
) -> Result<(), RestoreError> {
    let user = geteuid().as_raw();
    let untrusted = |reason| Err(RestoreError::Untrusted { reason });
    let file = snapshot.file().metadata().map_err(RestoreError::File)?;
    if let Some(reason) = written_by_others(&file, user) {
        return untrusted(format!("{} {reason}", snapshot.path().display()));
    }
    // A program that is not there is reported when it is started.
    if let Some(reason) = program.metadata().ok().and_then(|file| written_by_others(&file, user)) {
        return untrusted(format!("the program {} {reason}", program.display()));
    }
    match meta.user {
        Some(ran_as) if user == 0 && ran_as != 0 && !line.becomes_another_user() => {
            untrusted(format!(
                "the VM ran as user {ran_as}, and would run as root now: run vmfile as that user"
            ))
        }
        _ => Ok(()),
    }
}

/// Says who but `user` and root may have written a file.
fn written_by_others(file: &Metadata, user: u32) -> Option<String> {
    if file.uid() != user && file.uid() != 0 {
        return Some(format!("belongs to user {}", file.uid()));
    }
    let mode = file.mode() & 0o7777;
    (mode & 0o022 != 0).then(|| format!("may be written by others (mode {mode:04o})"))
}
