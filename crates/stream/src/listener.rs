//! A Unix socket that senders connect to.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt as _, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, unlinkat};
use rustix::io::Errno;

use crate::error::ReceiveError;
use crate::incoming::{Activity, WaitLimits};

/// The name of a socket in its own directory.
const SOCKET: &str = "stream";

/// A socket with a name; dropping it removes the name.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Its path for the sender, which may have another root directory.
    path_of_sender: PathBuf,
    /// The directory that was made for it: its open parent, and its name there. A path through
    /// `/proc` to QEMU's root directory is gone once QEMU has ended.
    directory: Option<(OwnedFd, PathBuf)>,
}

/// Where [`SocketPlace::listen`] will make a directory with a socket: in `/tmp`, for a short path.
/// Nothing is there yet.
#[derive(Debug)]
pub struct SocketPlace {
    /// The directory `/tmp` of the sender.
    parent: PathBuf,
    name: PathBuf,
    /// The process that will connect.
    sender: Option<u32>,
}

impl Listener {
    /// Listens at `path`, which must not exist yet.
    pub fn bind(path: &Path) -> Result<Listener, ReceiveError> {
        let error = |source| ReceiveError::Listen { path: path.to_path_buf(), source };
        let listener = UnixListener::bind(path).map_err(error)?;
        let path = path.to_path_buf();
        Ok(Listener { listener, path_of_sender: path.clone(), path, directory: None })
    }

    /// Returns the path of the socket for the sender.
    pub fn path_of_sender(&self) -> &Path {
        &self.path_of_sender
    }

    /// Waits at most `timeout` for a connection; returns whether one waits to be accepted.
    pub fn wait(&self, timeout: Duration) -> Result<bool, ReceiveError> {
        let timeout = Timespec::try_from(timeout).expect("a short time");
        match poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => Ok(count > 0),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => {
                Err(ReceiveError::Listen { path: self.path.clone(), source: errno.into() })
            }
        }
    }

    /// Accepts a connection if one waits; returns `None` if none does.
    pub fn accept_waiting(&self) -> Result<Option<OwnedFd>, ReceiveError> {
        if !self.wait(Duration::ZERO)? {
            return Ok(None);
        }
        let error = |source| ReceiveError::Listen { path: self.path.clone(), source };
        let (connection, _) = self.listener.accept().map_err(error)?;
        Ok(Some(connection.into()))
    }

    /// Waits for the next connection, and accepts it.
    pub fn accept(&self, limits: &WaitLimits<'_>) -> Result<OwnedFd, ReceiveError> {
        let error = |source| ReceiveError::Listen { path: self.path.clone(), source };
        let waited = limits.wait(self.listener.as_fd(), &Activity::default());
        waited.map_err(|error| ReceiveError::waited(error, 0))?;
        let (connection, _) = self.listener.accept().map_err(error)?;
        Ok(connection.into())
    }

    /// Returns whether a connection waits to be accepted.
    pub fn is_awaited(&self) -> Result<bool, ReceiveError> {
        self.wait(Duration::ZERO)
    }
}

impl SocketPlace {
    /// Chooses a directory that process `pid` can reach, also in a container or under another root
    /// directory. If there is no `pid`, or this process may not look there, it is in this process's
    /// `/tmp`.
    pub fn new(pid: Option<u32>) -> SocketPlace {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Short: a socket's path has at most 107 bytes.
        let name = format!("vmfile-{}-{number}", std::process::id());
        let root = pid.map(root_of).filter(|root| root.join("tmp").is_dir());
        let root = root.unwrap_or_else(|| PathBuf::from("/"));
        SocketPlace { parent: root.join("tmp"), name: name.into(), sender: pid }
    }

    /// Returns the paths that [`SocketPlace::listen`] makes: the socket's and its directory's.
    pub fn paths(&self) -> [PathBuf; 2] {
        let directory = self.parent.join(&self.name);
        [directory.join(SOCKET), directory]
    }

    /// Makes the directory, which only this user and the sender's user can enter, and listens
    /// there.
    pub fn listen(self) -> Result<Listener, ReceiveError> {
        let [path, directory] = self.paths();
        let error = |source| ReceiveError::Listen { path: directory.clone(), source };
        let parent = File::open(&self.parent).map_err(error)?;
        // This fails if the path exists, so that no other user can have prepared it.
        DirBuilder::new().mode(0o700).create(&directory).map_err(error)?;
        let bound = Listener::bind(&path).and_then(|mut listener| {
            listener.path_of_sender = Path::new("/tmp").join(&self.name).join(SOCKET);
            listener.directory = Some((parent.into(), self.name));
            if let Some(uid) = self.sender.and_then(find_user) {
                for path in [&path, &directory] {
                    hand_over(path, uid).map_err(|source| error(not_handed_over(uid, &source)))?;
                }
            }
            Ok(listener)
        });
        bound.inspect_err(|_| drop(fs::remove_dir(&directory)))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Another process may have removed it already.
        match &self.directory {
            None => drop(fs::remove_file(&self.path)),
            Some((parent, name)) => {
                let _ = unlinkat(parent, name.join(SOCKET), AtFlags::empty());
                let _ = unlinkat(parent, name, AtFlags::REMOVEDIR);
            }
        }
    }
}

/// Returns the root directory of process `pid`, as a path that this process can use: `/` if both
/// have the same root, since that path outlives the process.
fn root_of(pid: u32) -> PathBuf {
    let of_process = PathBuf::from(format!("/proc/{pid}/root"));
    let place = |root: &Path| fs::metadata(root).map(|root| (root.dev(), root.ino())).ok();
    let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let is_ours =
        place(&of_process) == place(Path::new("/")) && mounts(&pid.to_string()) == mounts("self");
    if is_ours { PathBuf::from("/") } else { of_process }
}

/// Returns the user that a process runs as; `None` if `/proc` does not tell.
fn find_user(pid: u32) -> Option<u32> {
    Some(fs::metadata(format!("/proc/{pid}")).ok()?.uid())
}

/// Gives a file to a user, unless that is this process's own user.
fn hand_over(path: &Path, uid: u32) -> io::Result<()> {
    if uid == rustix::process::geteuid().as_raw() { Ok(()) } else { chown(path, Some(uid), None) }
}

/// Says what a kernel's error of [`hand_over`] was about: only root may give a file away.
fn not_handed_over(uid: u32, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("give it to user {uid}, who runs QEMU: {error}"))
}
