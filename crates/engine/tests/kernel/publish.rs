//! Publishing on a real file system.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use vmfile_engine::{Existing, PublishError, Unpublished, available_space};

use crate::child::Playing;
use crate::host::{self, Mounted};

fn create(path: &Path, existing: Existing) -> Unpublished {
    let file = Unpublished::create_beside(path, existing).unwrap();
    file.file().write_all(b"whole").unwrap();
    file
}

fn count_in(directory: &Path) -> usize {
    fs::read_dir(directory).unwrap().count()
}

#[test]
fn a_published_file_is_whole_private_and_alone() {
    let directory = host::directory();
    let path = directory.path().join("file");
    let file = create(&path, Existing::Refuse);
    assert!(!path.exists());

    file.publish().unwrap();

    assert_eq!(fs::read(&path).unwrap(), b"whole");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(count_in(directory.path()), 1);
}

#[test]
fn dropping_leaves_no_file() {
    let directory = host::directory();
    drop(create(&directory.path().join("file"), Existing::Refuse));
    assert_eq!(count_in(directory.path()), 0);
}

#[test]
fn a_killed_writer_leaves_no_file() {
    let directory = host::directory();
    let path = directory.path().join("file");
    let mut child = Playing::start("writer", path.to_str().unwrap(), None).unwrap();
    assert_eq!(child.words(), "ready");
    if count_in(directory.path()) != 0 {
        println!("skipped: no O_TMPFILE on this file system");
        return;
    }

    child.kill();

    assert_eq!(count_in(directory.path()), 0);
}

#[test]
fn a_taken_name_is_refused_at_once() {
    let directory = host::directory();
    let path = directory.path().join("file");
    fs::write(&path, "theirs").unwrap();
    let error = Unpublished::create_beside(&path, Existing::Refuse).unwrap_err();
    assert!(matches!(error, PublishError::Exists { .. }), "{error}");
}

#[test]
fn a_name_taken_meanwhile_is_not_replaced() {
    let directory = host::directory();
    let path = directory.path().join("file");
    let file = create(&path, Existing::Refuse);
    fs::write(&path, "theirs").unwrap();

    let error = file.publish().unwrap_err();

    assert!(matches!(error, PublishError::Exists { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
    assert_eq!(count_in(directory.path()), 1);
}

#[test]
fn a_file_to_be_replaced_stays_until_the_moment_of_publishing() {
    let directory = host::directory();
    let path = directory.path().join("file");
    fs::write(&path, "old").unwrap();
    let file = create(&path, Existing::Replace);
    assert_eq!(fs::read(&path).unwrap(), b"old");

    file.publish().unwrap();

    assert_eq!(fs::read(&path).unwrap(), b"whole");
    assert_eq!(count_in(directory.path()), 1);
}

#[test]
fn replacing_nothing_is_creating() {
    let directory = host::directory();
    let path = directory.path().join("file");
    create(&path, Existing::Replace).publish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"whole");
}

#[test]
fn replacing_a_link_leaves_its_target_alone() {
    let directory = host::directory();
    let (target, path) = (directory.path().join("target"), directory.path().join("file"));
    fs::write(&target, "target").unwrap();
    symlink(&target, &path).unwrap();

    create(&path, Existing::Replace).publish().unwrap();

    assert_eq!(fs::read(&target).unwrap(), b"target");
    assert!(fs::symlink_metadata(&path).unwrap().is_file());
}

/// `--force` replaced a file that a VM used, and the VM's disk was lost.
#[test]
fn a_file_that_is_in_use_is_refused_at_once_and_at_the_moment_of_naming() {
    let directory = host::directory();
    let (target, path) = (directory.path().join("target"), directory.path().join("file"));
    fs::write(&target, "target").unwrap();
    let find_user = |found: &Path, _: &fs::Metadata| {
        Some(format!("a VM reads {}", found.file_name()?.to_str()?))
    };
    let create =
        |path: &Path| Unpublished::create_unless_used(path, Existing::Replace, Box::new(find_user));

    let error = create(&target).unwrap_err().to_string();
    assert!(error.ends_with("target is in use: a VM reads target"), "{error}");

    let file = create(&path).unwrap();
    symlink(&target, &path).unwrap();
    let error = file.publish().unwrap_err();

    assert!(matches!(error, PublishError::InUse { .. }), "{error}");
    assert_eq!(fs::read_link(&path).unwrap(), target);
    assert_eq!(count_in(directory.path()), 2);
}

/// A save said that it had written the file, and ended the VM, and nothing was under the file's name.
#[test]
fn a_file_whose_directory_was_renamed_meanwhile_gets_no_name() {
    let directory = host::directory();
    let (place, moved) = (directory.path().join("place"), directory.path().join("moved"));
    for is_made_anew in [false, true] {
        fs::create_dir(&place).unwrap();
        let file = create(&place.join("file"), Existing::Refuse);
        fs::rename(&place, &moved).unwrap();
        if is_made_anew {
            fs::create_dir(&place).unwrap();
        }
        let error = file.publish().unwrap_err();
        assert!(matches!(error, PublishError::Moved { .. }), "{error}");
        assert_eq!(count_in(&moved), 0);
        fs::remove_dir(&moved).unwrap();
    }
}

#[test]
fn what_is_not_a_file_is_never_replaced() {
    let directory = host::directory();
    let path = directory.path().join("directory");
    fs::create_dir(&path).unwrap();
    for path in [path.as_path(), Path::new("/dev/null")] {
        let error = Unpublished::create_beside(path, Existing::Replace).unwrap_err();
        assert!(matches!(error, PublishError::NotAFile { .. }), "{error}");
    }
}

#[test]
fn a_missing_directory_is_told_from_one_that_is_a_file() {
    let directory = host::directory();
    let error = Unpublished::create_beside(&directory.path().join("a/b"), Existing::Refuse);
    assert!(matches!(error, Err(PublishError::NoDirectory { .. })), "{error:?}");

    fs::write(directory.path().join("a"), "").unwrap();
    let error = Unpublished::create_beside(&directory.path().join("a/b"), Existing::Refuse);
    assert!(matches!(error, Err(PublishError::NotADirectory { .. })), "{error:?}");
}

#[test]
fn a_path_without_a_file_name_is_refused() {
    for path in ["/", "..", "a/..", "", "name/"] {
        let error = Unpublished::create_beside(Path::new(path), Existing::Refuse);
        assert!(matches!(error, Err(PublishError::NoName { .. })), "{path}: {error:?}");
    }
}

#[test]
fn available_space_is_what_a_file_system_can_still_take() {
    let mounted = match Mounted::tmpfs(1 << 20) {
        Ok(mounted) => mounted,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let file = fs::File::open(mounted.path()).unwrap();
    assert_eq!(available_space(&file).unwrap(), 1 << 20);
    fs::write(mounted.path().join("file"), vec![1; 1 << 19]).unwrap();
    assert_eq!(available_space(file.as_fd()).unwrap(), 1 << 19);
}
