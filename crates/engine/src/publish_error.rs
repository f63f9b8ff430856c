//! Why a file could not be created or published.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a file could not be created or published.
#[derive(Debug)]
#[non_exhaustive]
pub enum PublishError {
    /// The path does not end in a file name.
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// The directory of the file does not exist.
    NoDirectory {
        /// The directory.
        directory: PathBuf,
    },
    /// The parent of the path is not a directory.
    NotADirectory {
        /// The path that should be one.
        directory: PathBuf,
    },
    /// The directory of the file was renamed or removed since the file was begun.
    Moved {
        /// The directory's path.
        directory: PathBuf,
    },
    /// The name is taken and must not be replaced.
    Exists {
        /// The name.
        path: PathBuf,
    },
    /// The name is taken by something that is not a file.
    NotAFile {
        /// The name.
        path: PathBuf,
    },
    /// The name leads to a file that is in use.
    InUse {
        /// The name.
        path: PathBuf,
        /// What uses it.
        user: String,
    },
    /// The file is whole and has its name, but a power failure may still take the name away.
    NotDurable {
        /// The name.
        path: PathBuf,
        /// What the kernel said of the directory.
        source: io::Error,
    },
    /// The kernel returned an error.
    Io {
        /// The name that the file has or would have.
        path: PathBuf,
        /// What vmfile tried to do with it, as a verb.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PublishError {
    pub(crate) fn io(path: &Path, step: &'static str, source: io::Error) -> PublishError {
        PublishError::Io { path: path.into(), step, source }
    }
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PublishError::NoName { path } => write!(f, "{} names no file", path.display()),
            PublishError::NoDirectory { directory } => {
                write!(f, "no directory {}", directory.display())
            }
            PublishError::NotADirectory { directory } => {
                write!(f, "{} is not a directory", directory.display())
            }
            PublishError::Moved { directory } => {
                write!(f, "the directory {} was renamed or removed", directory.display())
            }
            PublishError::Exists { path } => write!(f, "{} exists", path.display()),
            PublishError::NotAFile { path } => {
                write!(f, "{} exists and is not a regular file", path.display())
            }
            PublishError::InUse { path, user } => {
                write!(f, "{} is in use: {user}", path.display())
            }
            PublishError::NotDurable { path, .. } => {
                write!(f, "{} is whole, but its directory cannot be synced", path.display())
            }
            PublishError::Io { path, step, .. } => write!(f, "cannot {step} {}", path.display()),
        }
    }
}

impl Error for PublishError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            PublishError::Io { source, .. } | PublishError::NotDurable { source, .. } => {
                Some(source)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_reads_well() {
        let path = PathBuf::from("a/b");
        let source = io::Error::from_raw_os_error(libc::EIO);
        for (error, words) in [
            (PublishError::NoName { path: path.clone() }, "a/b names no file"),
            (PublishError::NoDirectory { directory: path.clone() }, "no directory a/b"),
            (PublishError::NotADirectory { directory: path.clone() }, "a/b is not a directory"),
            (
                PublishError::Moved { directory: path.clone() },
                "the directory a/b was renamed or removed",
            ),
            (PublishError::Exists { path: path.clone() }, "a/b exists"),
            (
                PublishError::InUse { path: path.clone(), user: "somebody reads it".to_owned() },
                "a/b is in use: somebody reads it",
            ),
            (PublishError::NotAFile { path: path.clone() }, "a/b exists and is not a regular file"),
            (
                PublishError::NotDurable {
                    path: path.clone(),
                    source: io::Error::from_raw_os_error(libc::EIO),
                },
                "a/b is whole, but its directory cannot be synced",
            ),
            (PublishError::Io { path, step: "sync", source }, "cannot sync a/b"),
        ] {
            assert_eq!(error.to_string(), words);
        }
    }
}
