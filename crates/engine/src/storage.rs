//! Transfers in, completions out: what a file looks like to those who save and restore.

use std::fmt;
use std::io;

use crate::direct_io::DataFile;
use crate::ring::Ring;
use crate::threads::Threads;
use crate::transfer::{Completion, Transfer};

/// The deepest queue that is opened; more in flight gains nothing on any device measured.
pub const DEPTH_MAX: usize = 64;

/// Something that transfers can be submitted to and completions reaped from.
///
/// Completions come in any order. Two transfers in flight must not overlap in memory or in the
/// file unless both only read there; see [`direct_io`](crate::direct_io) for the pages of a file.
///
/// Dropping a storage waits for everything in flight, because its memory belongs to the kernel
/// until then.
pub trait Storage: Send + fmt::Debug {
    /// Takes a transfer and its memory; the kernel may start on it at once or at the next call.
    ///
    /// # Errors
    ///
    /// Returns an error if the back end itself is broken. The transfer stays in flight and its
    /// memory is handed back by [`Storage::reap`] as far as that still works. An error of the
    /// transfer is in its completion instead.
    ///
    /// # Panics
    ///
    /// Panics if [`Storage::depth`] transfers are in flight already, or if the transfer makes no
    /// sense: memory outside its buffer, a read into memory that may not be written.
    fn submit(&mut self, transfer: Transfer) -> io::Result<()>;

    /// Waits for a transfer to complete and hands it back, or `None` if nothing is in flight.
    ///
    /// Signals do not end the wait.
    ///
    /// # Errors
    ///
    /// Returns an error if the back end itself is broken.
    fn reap(&mut self) -> io::Result<Option<Completion>>;

    /// Returns how many transfers have been submitted and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Returns how many transfers may be in flight at once.
    fn depth(&self) -> usize;
}

/// How transfers reach the kernel: a wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `io_uring` if it can be had, else threads; [`OpenStorage::backend`] says which.
    Auto,
    /// `io_uring`, or an error.
    IoUring,
    /// Threads that call `pread` and `pwrite`.
    Threads,
}

/// How transfers reach the kernel: what is the case.
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

/// A storage, and what it turned out to be.
#[derive(Debug)]
pub struct OpenStorage {
    /// Where transfers go.
    pub storage: Box<dyn Storage>,
    /// The back end that was taken.
    pub backend: BackendInUse,
}

/// Opens a storage on `file` with at most `depth` transfers in flight.
///
/// `depth` is brought into 1 to [`DEPTH_MAX`]. Several storages may be open on one file.
///
/// # Errors
///
/// Returns the kernel's error if `io_uring` was asked for by name and is not to be had
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
