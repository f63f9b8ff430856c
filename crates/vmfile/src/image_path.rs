//! Paths of images: whether a name is a path, and whether two paths lead to one file.

use std::fs;
use std::path::{Component, Path, PathBuf};

use vmfile_qemu::FileId;

/// Tells whether an image is a file of this host, rather than a URL or something without a path.
///
/// QEMU (7.2 to 11.1) takes a name with a colon before its first slash for a URL.
pub(crate) fn is_file(path: &str) -> bool {
    let before_slash = path.split('/').next().unwrap_or_default();
    !path.is_empty() && !before_slash.contains(':')
}

/// Tells whether two paths lead to one file: they are written the same, or the kernel finds the
/// same file by both.
pub(crate) fn is_same_file(a: &Path, b: &Path) -> bool {
    if normalized(a) == normalized(b) {
        return true;
    }
    let id = |path: &Path| fs::metadata(path).map(|metadata| FileId::of(&metadata)).ok();
    id(a).is_some_and(|a| Some(a) == id(b))
}

/// Returns a path without `.`, `..` and doubled slashes; symbolic links stay.
fn normalized(path: &Path) -> PathBuf {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                parts.pop();
            }
            Component::CurDir => {}
            part => parts.push(part),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn one_file_is_known_by_any_of_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        fs::write(&a, b"").unwrap();
        symlink(&a, &b).unwrap();
        assert!(is_same_file(&a, &b));
        assert!(is_same_file(&a, &directory.path().join("x/../a")));
        fs::remove_file(&b).unwrap();
        fs::write(&b, b"").unwrap();
        assert!(!is_same_file(&a, &b));
        assert!(!is_same_file(&a, &directory.path().join("none")));
    }

    #[test]
    fn urls_are_no_files() {
        for path in ["/srv/a:b.qcow2", "a.qcow2", "./a:b", "dir/x"] {
            assert!(is_file(path), "{path}");
        }
        for path in ["nbd://host/x", "json:{}", "rbd:pool/image", "fat:rw:/srv", ""] {
            assert!(!is_file(path), "{path}");
        }
    }
}
