//! What moves the bytes: `io_uring` or threads.

use std::fmt;
use std::io;

use crate::direct_io::DataFile;
use crate::ring::Ring;
use crate::storage::Storage;
use crate::threads::Threads;

/// The deepest queue that is opened; more in flight gains nothing on any device measured.
pub const DEPTH_MAX: usize = 64;

/// How transfers are to reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `io_uring` if the kernel allows it, else threads; [`OpenStorage::backend`] says which.
    Auto,
    /// `io_uring`, or an error.
    IoUring,
    /// Threads that call `pread` and `pwrite`.
    Threads,
}

/// How transfers of an open storage reach the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendInUse {
    /// `io_uring`.
    IoUring,
    /// Threads that call `pread` and `pwrite`.
    Threads {
        /// Why not `io_uring`, if that was preferred.
        reason: Option<String>,
    },
}

impl fmt::Display for BackendInUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendInUse::IoUring => write!(f, "io_uring"),
            BackendInUse::Threads { reason: None } => write!(f, "threads"),
            BackendInUse::Threads { reason: Some(reason) } => write!(f, "threads ({reason})"),
        }
    }
}

/// A storage, and the back end that it uses.
#[derive(Debug)]
pub struct OpenStorage {
    /// Where transfers go.
    pub storage: Box<dyn Storage>,
    /// The back end in use.
    pub backend: BackendInUse,
}

/// Opens a storage on `file` with at most `depth` transfers in flight.
///
/// `depth` is clamped to 1 to [`DEPTH_MAX`]. Several storages may be open on one file.
///
/// # Errors
///
/// Returns the kernel's error if `backend` is [`Backend::IoUring`] and the kernel refuses it
/// (`ENOSYS`: not built in; `EPERM`: `kernel.io_uring_disabled` or a seccomp filter), or if no
/// thread could be started.
pub fn open_storage(file: &DataFile, backend: Backend, depth: usize) -> io::Result<OpenStorage> {
    let depth = depth.clamp(1, DEPTH_MAX);
    let reason = match backend {
        Backend::Threads => None,
        Backend::Auto | Backend::IoUring => match Ring::new(file.clone(), depth) {
            Ok(ring) => {
                let storage = Box::new(ring);
                return Ok(OpenStorage { storage, backend: BackendInUse::IoUring });
            }
            Err(error) if backend == Backend::IoUring => return Err(error),
            Err(error) => Some(format!("io_uring: {error}")),
        },
    };
    let storage = Box::new(Threads::new(file, depth)?);
    Ok(OpenStorage { storage, backend: BackendInUse::Threads { reason } })
}
