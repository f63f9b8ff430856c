//! What this kernel can do, as a value.

use std::fmt;
use std::io;

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::{pagemap, residency, ring};

/// Whether the kernel offers a feature, and if not, why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// It does.
    Yes,
    /// It does not.
    No {
        /// The kernel's error number, if the kernel returned one.
        errno: Option<i32>,
        /// The error in words.
        reason: String,
    },
}

impl Support {
    /// Says whether the kernel offers the feature.
    #[must_use]
    pub fn is_yes(&self) -> bool {
        *self == Support::Yes
    }
}

impl From<io::Result<()>> for Support {
    fn from(result: io::Result<()>) -> Support {
        match result {
            Ok(()) => Support::Yes,
            Err(error) => Support::No { errno: error.raw_os_error(), reason: error.to_string() },
        }
    }
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Support::Yes => f.write_str("yes"),
            Support::No { reason, .. } => write!(f, "no ({reason})"),
        }
    }
}

/// What the running kernel offers to this process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelProbe {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// `io_uring` (Linux 5.6 for what is used), which sysctl or seccomp may forbid.
    pub io_uring: Support,
    /// The `PAGEMAP_SCAN` ioctl (Linux 6.7).
    pub pagemap_scan: Support,
    /// `cachestat(2)` (Linux 6.5).
    pub cachestat: Support,
    /// `STATX_DIOALIGN` (Linux 6.1), for the running program's own file: the answer depends on the
    /// file system too. For another file, see [`DataFile::direct`](crate::DataFile::direct).
    pub statx_dioalign: Support,
}

impl KernelProbe {
    /// Tries each feature once, without side effects.
    #[must_use]
    pub fn run() -> KernelProbe {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        KernelProbe {
            release,
            io_uring: ring::probe().into(),
            pagemap_scan: pagemap::probe().into(),
            cachestat: residency::probe().into(),
            statx_dioalign: probe_statx_dioalign().into(),
        }
    }
}

fn probe_statx_dioalign() -> io::Result<()> {
    let wanted = StatxFlags::DIOALIGN;
    let stat = rustix::fs::statx(CWD, "/proc/self/exe", AtFlags::empty(), wanted)?;
    if stat.stx_mask & wanted.bits() != 0 {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "not reported by kernel or file system"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_number_and_words() {
        let support = Support::from(Err(io::Error::from_raw_os_error(libc::ENOSYS)));
        assert!(!support.is_yes());
        assert_eq!(support.to_string(), "no (Function not implemented (os error 38))");
    }

    #[test]
    fn the_probe_knows_the_kernel_it_runs_on() {
        let probe = KernelProbe::run();
        assert!(probe.release.starts_with(|first: char| first.is_ascii_digit()));
        println!("{probe:?}");
    }
}
