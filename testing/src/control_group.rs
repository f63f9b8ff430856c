//! Limits of the kernel for the processes of one test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use crate::require::Missing;

/// A limit, as version 1 and version 2 of control groups have it: the directory of the controller, the
/// file, and what is written there.
pub(crate) type Limit = (&'static str, &'static str, String);

/// A control group; dropping it removes it.
#[derive(Debug)]
pub struct ControlGroup {
    group: PathBuf,
}

impl ControlGroup {
    /// Makes a group whose processes have at most `mib` MiB of memory, the page cache that they fill
    /// included: the kernel frees that first, and kills one of them if that is not enough.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, or such a limit.
    pub fn with_memory(mib: u64) -> Result<ControlGroup, Missing> {
        let bytes = (mib << 20).to_string();
        ControlGroup::limited([
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", bytes.clone()),
            ("/sys/fs/cgroup", "memory.max", bytes),
        ])
        .ok_or_else(|| Missing::beyond_setup("no control group that limits memory"))
    }

    /// Makes a group with the first of these limits that there is.
    pub(crate) fn limited(limits: impl IntoIterator<Item = Limit>) -> Option<ControlGroup> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmfile-test-{}-{number}", std::process::id());
        limits.into_iter().find_map(|(controller, file, limit)| {
            let group = Path::new(controller).join(&name);
            fs::create_dir(&group).ok()?;
            let made = ControlGroup { group };
            // Where there is no such controller, this is a directory like any other.
            let is_group = made.group.join("cgroup.procs").exists();
            (is_group && fs::write(made.group.join(file), limit).is_ok()).then_some(made)
        })
    }

    /// Makes a command that runs `program` in the group; the caller adds the arguments.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]);
        command.arg(self.group.join("cgroup.procs")).arg(program);
        command
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // A process that has just ended may still be in the group.
        for _ in 0..100 {
            if fs::remove_dir(&self.group).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
