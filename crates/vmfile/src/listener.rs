//! A Unix socket that senders connect to.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::receive::ReceiveError;
use crate::source::stream::{Patience, Pulse};

/// Where a socket gets a directory of its own: a short path, and one that QEMU sees as well.
const SOCKETS: &str = "/tmp";

/// A socket with a name; dropping it removes the name.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// The directory that was made for it.
    directory: Option<PathBuf>,
}

impl Listener {
    /// Listens at `path`, where nothing may be yet.
    pub(crate) fn bind(path: &Path) -> Result<Listener, ReceiveError> {
        let error = |source| ReceiveError::Listen { path: path.to_path_buf(), source };
        let listener = UnixListener::bind(path).map_err(error)?;
        Ok(Listener { listener, path: path.to_path_buf(), directory: None })
    }

    /// Listens in a directory of its own, which only this user and the user `uid` can enter.
    pub(crate) fn bind_for(uid: Option<u32>) -> Result<Listener, ReceiveError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Short: a socket's path has at most 107 bytes.
        let name = format!("vmfile-{}-{number}", std::process::id());
        let directory = Path::new(SOCKETS).join(name);
        let error = |source| ReceiveError::Listen { path: directory.clone(), source };
        // It fails if anything is there, so that nobody can have put it there before.
        DirBuilder::new().mode(0o700).create(&directory).map_err(error)?;
        let bound = Listener::bind(&directory.join("stream")).and_then(|mut listener| {
            listener.directory = Some(directory.clone());
            if let Some(uid) = uid {
                hand_over(&listener.path, uid).map_err(error)?;
                hand_over(&directory, uid).map_err(error)?;
            }
            Ok(listener)
        });
        bound.inspect_err(|_| drop(fs::remove_dir(&directory)))
    }

    /// Returns the path of the socket.
    pub(crate) fn path(&self) -> &Path {
        &self.path
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
        let _ = fs::remove_file(&self.path);
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Gives a file to a user, if it is not that user's already.
fn hand_over(path: &Path, uid: u32) -> io::Result<()> {
    if uid == rustix::process::geteuid().as_raw() { Ok(()) } else { chown(path, Some(uid), None) }
}
