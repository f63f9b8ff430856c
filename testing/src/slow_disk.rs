//! A disk whose write rate is limited for the processes of one test.

use std::path::Path;
use std::process::Command;

use crate::control_group::ControlGroup;
use crate::fixture::Mount;
use crate::require::Missing;

/// An ext4 on a loop device, and a control group whose processes write to it slowly; dropping it
/// removes both.
#[derive(Debug)]
pub struct SlowDisk {
    mount: Mount,
    group: ControlGroup,
}

impl SlowDisk {
    /// Makes a file system of `size_mib` MiB that takes at most `mib_per_second` MiB/s.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, a loop device, or a control group for it.
    pub fn ext4(size_mib: u64, mib_per_second: u64) -> Result<SlowDisk, Missing> {
        let mount = Mount::ext4(size_mib)?;
        let find = ["-n", "-o", "MAJ:MIN"];
        let found = Command::new("findmnt").args(find).arg(mount.path()).output();
        let found = found.map_err(|error| Missing::beyond_setup(format!("findmnt: {error}")))?;
        let device = String::from_utf8_lossy(&found.stdout).trim().to_owned();
        let limit = mib_per_second << 20;
        let group = ControlGroup::limited([
            (
                "/sys/fs/cgroup/blkio",
                "blkio.throttle.write_bps_device",
                format!("{device} {limit}"),
            ),
            ("/sys/fs/cgroup", "io.max", format!("{device} wbps={limit}")),
        ]);
        let group = group
            .ok_or_else(|| Missing::beyond_setup("no control group that slows a disk down"))?;
        Ok(SlowDisk { mount, group })
    }

    /// Returns where the file system is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Makes a command that runs `program` in the control group; the caller adds the arguments.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        self.group.command(program)
    }
}
