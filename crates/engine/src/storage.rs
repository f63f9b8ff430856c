//! The interface of both back ends: transfers in, completions out.

use std::fmt;
use std::io;

use crate::transfer::{Completion, Transfer};

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
