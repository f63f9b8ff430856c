//! A disk whose write rate is limited for the processes of one test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::fixture::Mount;
use crate::require::Missing;

/// For control groups of version 1 and 2: the directory of the block controller, the file that
/// limits writes, and the key that stands between the device's number and the limit.
const CONTROLLERS: [(&str, &str, &str); 2] = [
    ("/sys/fs/cgroup/blkio", "blkio.throttle.write_bps_device", ""),
    ("/sys/fs/cgroup", "io.max", "wbps="),
];

/// An ext4 on a loop device, and a control group whose processes write to it slowly; dropping it
/// removes both.
#[derive(Debug)]
pub struct SlowDisk {
    mount: Mount,
    group: PathBuf,
}

impl SlowDisk {
    /// Makes a file system of `size_mib` MiB that takes at most `mib_per_second` MiB/s.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, a loop device, or a control group for it.
    pub fn ext4(size_mib: u64, mib_per_second: u64) -> Result<SlowDisk, Missing> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mount = Mount::ext4(size_mib)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmfile-test-{}-{number}", std::process::id());
        let find = ["-n", "-o", "MAJ:MIN"];
        let found = Command::new("findmnt").args(find).arg(mount.path()).output();
        let found = found.map_err(|error| Missing::beyond_setup(format!("findmnt: {error}")))?;
        let device = String::from_utf8_lossy(&found.stdout).trim().to_owned();
        let limit = mib_per_second << 20;
        for (controller, file, key) in CONTROLLERS {
            let group = Path::new(controller).join(&name);
            if fs::create_dir(&group).is_err() {
                continue;
            }
            if fs::write(group.join(file), format!("{device} {key}{limit}")).is_ok() {
                return Ok(SlowDisk { mount, group });
            }
            let _ = fs::remove_dir(&group);
        }
        Err(Missing::beyond_setup("no control group that slows a disk down"))
    }

    /// Returns where the file system is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Makes a command that runs `program` in the control group; the caller adds the arguments.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]);
        command.arg(self.group.join("cgroup.procs")).arg(program);
        command
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // A process that has just ended may still be in the group.
        for _ in 0..100 {
            if fs::remove_dir(&self.group).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
