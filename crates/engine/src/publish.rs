//! Gives a finished file its name, so that a name never leads to part of a file.
//!
//! The file is written without a name (`O_TMPFILE`) or, where the file system cannot do that,
//! under the name `.NAME.XXXXXX.partial` beside its place. [`Unpublished::make_durable`] makes it
//! durable; [`Durable::publish`] names it and makes the name durable.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use crate::locks::is_locked;
pub use crate::publish_error::PublishError;

/// Only the owner reads and writes: the file holds everything that was in memory.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// The longest file name Linux accepts, in bytes.
const NAME_LEN_MAX: usize = 255;

/// How many temporary names are tried. There are 2^36, so that a second try hardly ever happens.
const ATTEMPTS_MAX: usize = 16;

/// What to do if the name is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Refuse, both at the start and at the moment of naming.
    Refuse,
    /// Replace it, if it is a regular file or a symbolic link (the link itself, not its target).
    Replace,
}

/// Says what uses the file at a path, as a text for an error; `None` if the file may lose its name.
pub type FindUser = Box<dyn Fn(&Path, &Metadata) -> Option<String> + Send + Sync>;

/// A file that has no name yet, or only a temporary one.
///
/// Dropping it leaves no file behind. Killing the process leaves none either where the file system
/// has `O_TMPFILE` (ext4, XFS, btrfs and tmpfs do).
pub struct Unpublished {
    file: File,
    directory: OwnedFd,
    path: PathBuf,
    name: OsString,
    existing: Existing,
    find_user: Option<FindUser>,
    /// The name to remove if the file is not published.
    temporary: Option<OsString>,
}

impl Unpublished {
    /// Creates an empty file, mode 0600, that will be named `path`.
    ///
    /// # Errors
    ///
    /// Returns [`PublishError`] if the directory does not exist or is something else, if the name
    /// is taken and must not or cannot be replaced, or if the kernel returns an error.
    pub fn create_beside(path: &Path, existing: Existing) -> Result<Unpublished, PublishError> {
        Unpublished::create(path, existing, CreateAs::NamelessIfPossible)
    }

    /// Does the same, unless the name leads to a file that is in use: one for which `find_user`
    /// returns a user, or that another program has locked. Both are checked now, and again at the
    /// moment of naming, if the path leads to a file, also by a symbolic link.
    ///
    /// # Errors
    ///
    /// Returns [`PublishError::InUse`] for such a file, whatever `existing` says, and otherwise
    /// what [`Unpublished::create_beside`] returns.
    pub fn create_unless_used(
        path: &Path,
        existing: Existing,
        find_user: FindUser,
    ) -> Result<Unpublished, PublishError> {
        refuse_if_used(path, &find_user)?;
        let mut unpublished = Unpublished::create_beside(path, existing)?;
        unpublished.find_user = Some(find_user);
        Ok(unpublished)
    }

    fn create(
        path: &Path,
        existing: Existing,
        create_as: CreateAs,
    ) -> Result<Unpublished, PublishError> {
        let failed = |step| move |errno: Errno| PublishError::io(path, step, errno.into());
        let name = path.file_name().ok_or_else(|| PublishError::NoName { path: path.into() })?;
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(PublishError::NoName { path: path.into() });
        }
        let directory = open_directory(path)?;
        refuse_if_taken(&directory, path, name, existing)?;
        let nameless = match create_as {
            CreateAs::NamelessIfPossible => {
                create_nameless(&directory).map_err(failed("create"))?
            }
            #[cfg(test)]
            CreateAs::Named => None,
        };
        let (file, temporary) = match nameless {
            Some(file) => (file, None),
            None => {
                let (file, temporary) = create_named(&directory, name).map_err(failed("create"))?;
                (file, Some(temporary))
            }
        };
        let file = Unpublished {
            file: file.into(),
            directory,
            path: path.into(),
            name: name.into(),
            existing,
            find_user: None,
            temporary,
        };
        // The umask may have taken bits away.
        rustix::fs::fchmod(&file.file, MODE).map_err(failed("set the mode of"))?;
        Ok(file)
    }

    /// Makes the file durable, gives it its name, makes the name durable, and returns the file.
    ///
    /// # Errors
    ///
    /// As [`Unpublished::make_durable`] and [`Durable::publish`].
    pub fn publish(self) -> Result<File, PublishError> {
        self.make_durable()?.publish()
    }

    /// Makes the file durable. It still has no name.
    ///
    /// # Errors
    ///
    /// Returns [`PublishError::Io`] if the kernel cannot write the file to the disk.
    pub fn make_durable(self) -> Result<Durable, PublishError> {
        let synced = self.file.sync_all();
        synced.map_err(|error| PublishError::io(&self.path, "sync", error))?;
        Ok(Durable { unpublished: self })
    }

    /// Returns the file, open for reading and writing.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the path of the file's temporary name; `None` if the file has no name at all.
    #[must_use]
    pub fn temporary_path(&self) -> Option<PathBuf> {
        self.temporary.as_ref().map(|name| self.path.with_file_name(name))
    }

    /// Returns the name that the file will have.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn name_if_free(&mut self) -> Result<(), Errno> {
        let Some(temporary) = &self.temporary else {
            return link_nameless(&self.file, &self.directory, &self.name);
        };
        let directory = &self.directory;
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(directory, temporary, directory, &self.name, flags) {
            Ok(()) => self.temporary = None,
            // The file system does not know the flag (NFS, for one). A link never replaces either;
            // the temporary name is then removed by `drop`.
            Err(Errno::INVAL | Errno::NOSYS) => {
                let flags = AtFlags::empty();
                rustix::fs::linkat(directory, temporary, directory, &self.name, flags)?;
            }
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    fn name_or_replace(&mut self) -> Result<(), Errno> {
        if self.temporary.is_none() {
            // A nameless file can only be linked, and a link does not replace.
            let (directory, file) = (&self.directory, &self.file);
            let temporary = with_temporary_name(&self.name, |temporary| {
                link_nameless(file, directory, temporary)
            });
            self.temporary = Some(temporary?.1);
        }
        let temporary = self.temporary.as_ref().expect("set above");
        rustix::fs::renameat(&self.directory, temporary, &self.directory, &self.name)?;
        self.temporary = None;
        Ok(())
    }
}

/// A file that is on the disk and has no name yet. Dropping it leaves no file behind.
#[derive(Debug)]
pub struct Durable {
    unpublished: Unpublished,
}

impl Durable {
    /// Gives the file its name, makes the name durable, and returns the file.
    ///
    /// # Errors
    ///
    /// Returns [`PublishError`], and no name appears, if the file cannot be named. Only with
    /// [`PublishError::NotDurable`] the file has its name.
    pub fn publish(self) -> Result<File, PublishError> {
        let Durable { mut unpublished } = self;
        let path = unpublished.path.clone();
        // Everything else that can fail comes before the naming.
        let file = unpublished.file.try_clone();
        let file = file.map_err(|error| PublishError::io(&path, "duplicate", error))?;
        if let Some(find_user) = &unpublished.find_user {
            refuse_if_used(&path, find_user)?;
        }
        refuse_if_moved(&unpublished.directory, &path)?;
        let named = match unpublished.existing {
            Existing::Refuse => unpublished.name_if_free(),
            Existing::Replace => unpublished.name_or_replace(),
        };
        named.map_err(|errno| match errno {
            Errno::EXIST => PublishError::Exists { path: path.clone() },
            errno => PublishError::io(&path, "name", errno.into()),
        })?;
        let synced = rustix::fs::fsync(&unpublished.directory);
        synced.map_err(|errno| PublishError::NotDurable { path, source: errno.into() })?;
        Ok(file)
    }

    /// Returns the file, open for reading and writing.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.unpublished.file
    }

    /// Returns the name that the file will have.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.unpublished.path
    }
}

impl AsFd for Unpublished {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // An error cannot be reported from here; the name says what the file is.
            let _ = rustix::fs::unlinkat(&self.directory, temporary, AtFlags::empty());
        }
    }
}

impl fmt::Debug for Unpublished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unpublished { file, path, existing, temporary, .. } = self;
        let mut debug = f.debug_struct("Unpublished");
        debug.field("file", file).field("path", path).field("existing", existing);
        debug.field("temporary", temporary).finish_non_exhaustive()
    }
}

/// How the file is kept until it is published.
#[derive(Clone, Copy, Debug)]
enum CreateAs {
    NamelessIfPossible,
    /// For tests, where the file system has nameless files.
    #[cfg(test)]
    Named,
}

/// Returns the directory of a file.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Refuses if the path of the directory no longer leads to it, because it was renamed or removed: `path` would
/// not lead to the file.
fn refuse_if_moved(directory: &OwnedFd, path: &Path) -> Result<(), PublishError> {
    let known = rustix::fs::fstat(directory);
    let known =
        known.map_err(|errno| PublishError::io(path, "look at the directory of", errno.into()))?;
    let place = directory_of(path);
    match rustix::fs::stat(place) {
        Ok(found) if (found.st_dev, found.st_ino) == (known.st_dev, known.st_ino) => Ok(()),
        _ => Err(PublishError::Moved { directory: place.into() }),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, PublishError> {
    let directory = directory_of(path);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => PublishError::NoDirectory { directory: directory.into() },
        Errno::NOTDIR => PublishError::NotADirectory { directory: directory.into() },
        errno => PublishError::io(path, "open the directory of", errno.into()),
    })
}

fn refuse_if_taken(
    directory: &OwnedFd,
    path: &Path,
    name: &OsStr,
    existing: Existing,
) -> Result<(), PublishError> {
    let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(PublishError::io(path, "look for", errno.into())),
    };
    match (existing, FileType::from_raw_mode(stat.st_mode)) {
        (Existing::Replace, FileType::RegularFile | FileType::Symlink) => Ok(()),
        (Existing::Refuse, FileType::RegularFile | FileType::Symlink | FileType::Directory) => {
            Err(PublishError::Exists { path: path.into() })
        }
        // A rename would put a file in the place of, say, /dev/null.
        _ => Err(PublishError::NotAFile { path: path.into() }),
    }
}

/// Refuses a name that leads to a file which is in use.
fn refuse_if_used(path: &Path, find_user: &FindUser) -> Result<(), PublishError> {
    // If this fails, creating or naming the file reports what is wrong.
    let Ok(metadata) = fs::metadata(path) else { return Ok(()) };
    let user = find_user(path, &metadata).or_else(|| {
        let words = "another program has locked it";
        is_locked_file(path, &metadata).then(|| words.to_owned())
    });
    match user {
        Some(user) => Err(PublishError::InUse { path: path.into(), user }),
        None => Ok(()),
    }
}

/// Returns whether another program has locked a file; `false` if this process may not open it, or
/// if the file system has no locks.
fn is_locked_file(path: &Path, metadata: &Metadata) -> bool {
    if !metadata.is_file() {
        return false;
    }
    File::open(path).and_then(|file| is_locked(&file)).unwrap_or(false)
}

/// Creates a file without a name, or returns `None` where the file system has none.
fn create_nameless(directory: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, ".", flags, MODE) {
        Ok(file) => Ok(Some(file)),
        // A file system without nameless files returns EOPNOTSUPP. A kernel before 3.11 sees only a
        // directory opened for writing, and returns EISDIR.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn create_named(directory: &OwnedFd, name: &OsStr) -> Result<(OwnedFd, OsString), Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    with_temporary_name(name, |temporary| rustix::fs::openat(directory, temporary, flags, MODE))
}

/// Links a file without a name to `name`, which must be free.
fn link_nameless(file: &File, directory: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    // Linking by descriptor alone (AT_EMPTY_PATH) takes a capability before Linux 6.10; the way
    // through /proc, which open(2) describes, takes none.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, path, directory, name, AtFlags::SYMLINK_FOLLOW) {
        // No /proc here.
        Err(Errno::NOENT) => rustix::fs::linkat(file, "", directory, name, AtFlags::EMPTY_PATH),
        result => result,
    }
}

/// Calls `make` with fresh temporary names until one is free.
fn with_temporary_name<T>(
    name: &OsStr,
    mut make: impl FnMut(&OsStr) -> Result<T, Errno>,
) -> Result<(T, OsString), Errno> {
    for _ in 0..ATTEMPTS_MAX {
        let temporary = temporary_name(name)?;
        match make(&temporary) {
            Ok(made) => return Ok((made, temporary)),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::EXIST)
}

/// Returns `.NAME.XXXXXX.partial` with six random characters, shortened to fit a file name.
fn temporary_name(name: &OsStr) -> Result<OsString, Errno> {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    const SUFFIX: &[u8] = b".partial";
    let mut random = [0_u8; 6];
    rustix::rand::getrandom(&mut random, GetRandomFlags::empty())?;
    let name_len = name.len().min(NAME_LEN_MAX - 2 - random.len() - SUFFIX.len());
    let mut temporary = vec![b'.'];
    temporary.extend_from_slice(&name.as_bytes()[..name_len]);
    temporary.push(b'.');
    temporary.extend(random.iter().map(|byte| LETTERS[usize::from(byte % 64)]));
    temporary.extend_from_slice(SUFFIX);
    Ok(OsStr::from_bytes(&temporary).to_owned())
}

/// Returns how many bytes this process may still write to the file system of `file`.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn available_space(file: impl AsFd) -> io::Result<u64> {
    let stat = rustix::fs::fstatvfs(file)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names_in(directory: &Path) -> Vec<OsString> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_temporary_name_is_hidden_and_says_what_it_is() {
        let name = temporary_name(OsStr::new("vm.vmf")).unwrap().into_string().unwrap();
        assert!(name.starts_with(".vm.vmf."), "{name}");
        assert!(name.ends_with(".partial"), "{name}");
        assert_eq!(name.len(), ".vm.vmf.XXXXXX.partial".len());
    }

    #[test]
    fn a_temporary_name_of_the_longest_name_is_a_name() {
        let name = temporary_name(OsStr::new(&"n".repeat(NAME_LEN_MAX))).unwrap();
        assert_eq!(name.len(), NAME_LEN_MAX);
    }

    #[test]
    fn a_named_temporary_becomes_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = Unpublished::create(&path, Existing::Refuse, CreateAs::Named).unwrap();
        file.file().write_all(b"whole").unwrap();
        assert!(!path.exists());
        let mode = file.file().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);

        file.publish().unwrap();

        assert_eq!(names_in(directory.path()), ["file"]);
        assert_eq!(fs::read(&path).unwrap(), b"whole");
    }

    #[test]
    fn a_named_temporary_is_removed_when_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = Unpublished::create(&path, Existing::Refuse, CreateAs::Named).unwrap();
        assert_eq!(names_in(directory.path()).len(), 1);

        drop(file);

        assert!(names_in(directory.path()).is_empty());
    }

    #[test]
    fn a_named_temporary_never_replaces_what_appeared_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = Unpublished::create(&path, Existing::Refuse, CreateAs::Named).unwrap();
        fs::write(&path, "theirs").unwrap();

        let error = file.publish().unwrap_err();

        assert!(matches!(error, PublishError::Exists { .. }), "{error}");
        assert_eq!(names_in(directory.path()), ["file"]);
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
    }
}
