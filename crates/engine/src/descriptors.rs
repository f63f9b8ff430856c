//! The descriptors that another process has open.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Dir, Mode, OFlags};
use rustix::process::PidfdGetfdFlags;

use crate::process_memory::ProcessMemory;

impl ProcessMemory {
    /// Returns a duplicate of descriptor `number` of the process.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error: `ENOSYS` before Linux 5.6.
    pub fn descriptor(&self, number: i32) -> io::Result<OwnedFd> {
        let flags = PidfdGetfdFlags::empty();
        Ok(rustix::process::pidfd_getfd(self.pidfd(), number, flags)?)
    }

    /// Returns a duplicate of the descriptor by which the process has the socket with this inode number
    /// open.
    ///
    /// # Errors
    ///
    /// As [`ProcessMemory::descriptor`]; [`io::ErrorKind::NotFound`] if it has none.
    pub fn socket(&self, inode: u64) -> io::Result<OwnedFd> {
        let numbers = self.descriptors(format!("socket:[{inode}]").as_bytes())?;
        let number = numbers.first().ok_or(io::ErrorKind::NotFound)?;
        self.descriptor(*number)
    }

    /// Returns the numbers of the descriptors whose link in `/proc/PID/fd` is `link`.
    pub(crate) fn descriptors(&self, link: &[u8]) -> io::Result<BTreeSet<i32>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(self.directory(), "fd", flags, Mode::empty())?;
        let mut found = BTreeSet::new();
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            // `.` and `..` are no links, and a descriptor may be closed meanwhile.
            let Ok(target) = rustix::fs::readlinkat(&directory, name, Vec::new()) else { continue };
            if target.as_bytes() == link {
                found.extend(name.to_str().ok().and_then(|name| name.parse::<i32>().ok()));
            }
        }
        Ok(found)
    }
}
