//! Takes rights away from this process before it reads a file that anybody may have written.

use std::io;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, Ruleset, RulesetAttr as _, RulesetError, RulesetStatus,
    Scope,
};

/// From now on this thread, and each that it starts, may not write to any file that it opens, make, move or
/// remove one, run a program, use TCP, or send a signal to another process. Returns whether the kernel
/// enforces that, as far as it can: Landlock is in Linux since 5.13, TCP since 6.7, signals since 6.12.
///
/// # Errors
///
/// The kernel's error.
pub(crate) fn to_reading() -> io::Result<bool> {
    restrict().map_err(io::Error::other)
}

fn restrict() -> Result<bool, RulesetError> {
    let writes = AccessFs::from_write(ABI::V4) | AccessFs::Execute;
    let rules = Ruleset::default().handle_access(writes)?;
    let rules =
        rules.handle_access(AccessNet::from_all(ABI::V4))?.scope(Scope::from_all(ABI::V6))?;
    Ok(rules.create()?.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::io::ErrorKind;
    use std::process::Command;
    use std::thread;

    use super::*;

    #[test]
    fn who_may_only_read_cannot_write_remove_or_run_anything() {
        let directory = tempfile::tempdir().unwrap();
        let (file, other) = (directory.path().join("file"), directory.path().join("other"));
        fs::write(&file, "data").unwrap();
        let confined = || {
            if !to_reading().unwrap() {
                println!("not tested: this kernel has no Landlock");
                return;
            }
            let is_refused = |error: io::Error| {
                assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
            };
            assert_eq!(fs::read_to_string(&file).unwrap(), "data");
            is_refused(OpenOptions::new().write(true).open(&file).unwrap_err());
            is_refused(File::create_new(&other).unwrap_err());
            is_refused(fs::remove_file(&file).unwrap_err());
            is_refused(fs::rename(&file, &other).unwrap_err());
            is_refused(Command::new("/bin/true").spawn().unwrap_err());
        };
        thread::scope(|scope| scope.spawn(confined).join()).unwrap();
        // Only that thread has lost its rights.
        fs::remove_file(&file).unwrap();
    }
}
