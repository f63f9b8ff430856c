//! A Unix socket that senders connect to.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::receive::ReceiveError;
use crate::source::stream::{Patience, Pulse};

/// A socket with a name; dropping it removes the name.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, where nothing may be yet.
    pub(crate) fn bind(path: &Path) -> Result<Listener, ReceiveError> {
        let error = |source| ReceiveError::Listen { path: path.to_path_buf(), source };
        let listener = UnixListener::bind(path).map_err(error)?;
        Ok(Listener { listener, path: path.to_path_buf() })
    }

    /// Waits for the next connection.
    pub(crate) fn accept(&self, patience: &Patience<'_>) -> Result<OwnedFd, ReceiveError> {
        let error = |source| ReceiveError::Listen { path: self.path.clone(), source };
        let waited = patience.wait(self.listener.as_fd(), &Pulse::new());
        waited.map_err(|error| ReceiveError::waited(error, 0))?;
        let (connection, _) = self.listener.accept().map_err(error)?;
        Ok(connection.into())
    }

    /// Returns whether somebody has connected and was not accepted.
    pub(crate) fn is_awaited(&self) -> Result<bool, ReceiveError> {
        let now = Timespec::default();
        let ready = poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&now));
        let error = |source| ReceiveError::Listen { path: self.path.clone(), source };
        ready.map(|count| count > 0).map_err(|errno| error(errno.into()))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}
