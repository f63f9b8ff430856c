//! Restores into a command line that the user gave, or into a waiting QEMU: the file must not
//! choose the images.

use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use vmfile::restore::RestoreOptions;
use vmfile::save::SaveOptions;
use vmfile::{ImageChange, RestoreError};
use vmfile_testing::verbs::{restore_given, rewrite_manifest};
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, make_image, requires};

use crate::{Scene, changed_ok, disk, images, with_disks};

/// A guest whose command line has `image` as its disk `d0`.
fn line_on(image: &str) -> GuestConfig {
    let drive = format!("file={image},format=qcow2,id=d0");
    Guest::boot_sector(Ram::private(64)).arguments(["-drive", &drive])
}

/// D35: a manifest could name the user's image among `backing_files` and any path of the host as
/// `path`. The QEMU of the user's command line then opened that path read-write; with an overlay,
/// qemu-img made a file beside it.
#[test]
fn a_file_chooses_no_image_for_a_command_line_that_the_user_gave() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let (guest, saved) = scene.saved(&qemu, &SaveOptions::default())?;
    let victims = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let victim = victims.path().join("victim");
    fs::write(&victim, vec![1_u8; 1 << 20])?;
    let own = scene.path("top.qcow2").display().to_string();
    let target = victim.display().to_string();
    let json =
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{target}"}}}}"#);
    for path in [target.as_str(), &json, "nbd:unix:/nowhere", "nbd://localhost/x", "/dev/tty"] {
        for overlay in [None, Some("x".to_owned())] {
            rewrite_manifest(&saved.file, |vm| {
                let disk = disk(vm);
                disk.path = path.to_owned();
                disk.format = "raw".to_owned();
                disk.backing_files = vec![own.clone()];
                disk.overlay = overlay.clone();
                disk.images.clear();
            })?;
            for options in [RestoreOptions::default(), changed_ok()] {
                let mut restored =
                    match restore_given(&scene.config.prepare(&qemu)?, &saved.file, &options) {
                        Ok(restored) => restored,
                        Err(error) => {
                            let refused = matches!(error, RestoreError::DisksChanged { .. });
                            assert!(refused && !options.disks_changed_ok, "{path}: {error}");
                            continue;
                        }
                    };
                let found = images(&mut restored)?;
                assert_eq!(found, [scene.path("top.qcow2"), scene.path("base.qcow2")], "{path}");
                assert!(restored.report.disks.is_empty(), "{path}");
            }
        }
    }
    assert_eq!(fs::read_dir(victims.path())?.count(), 1, "nothing was made there");
    assert!(fs::read(&victim)? == vec![1_u8; 1 << 20]);
    drop(guest);
    Ok(())
}

/// D35: if an image belongs to the file, the restore puts an overlay on the image that the command
/// line names, in the format that the line gives. Otherwise a raw image that begins like qcow2
/// could choose its backing file.
#[test]
fn the_format_of_an_image_is_what_the_users_line_says() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let (_guest, saved) = scene.saved(&qemu, &with_disks())?;
    rewrite_manifest(&saved.file, |vm| disk(vm).format = "raw".to_owned())?;
    let options = RestoreOptions::default();
    let mut restored = restore_given(&scene.config.prepare(&qemu)?, &saved.file, &options)?;
    let found = images(&mut restored)?;
    let top = scene.path("top.qcow2");
    let overlay =
        restored.report.disks.iter().find(|disk| disk.image == top).ok_or("no overlay")?;
    assert_eq!(found, [overlay.overlay.clone(), top.clone(), scene.path("base.qcow2")]);
    let drive = format!("file={},id=d0", top.display());
    let silent = Guest::boot_sector(Ram::private(64)).arguments(["-drive", &drive]);
    let error =
        restore_given(&silent.prepare(&qemu)?, &saved.file, &options).expect_err("no format");
    assert!(matches!(error, RestoreError::FormatNotSaid { .. }), "{error}");
    Ok(())
}

/// D35: the command line names a backing file of the image that the VM had. That is an older state
/// of the disk, which does not fit the saved memory, and the file must not replace it by the newer
/// image.
#[test]
fn an_older_state_of_a_disk_is_refused_on_a_command_line_that_the_user_gave() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let (_guest, saved) = scene.saved(&qemu, &SaveOptions::default())?;
    let base = scene.path("base.qcow2");
    let older = line_on(&base.display().to_string());
    let options = RestoreOptions::default();
    let error = restore_given(&older.prepare(&qemu)?, &saved.file, &options).expect_err("older");
    assert!(matches!(error, RestoreError::DisksChanged { .. }), "{error}");
    assert!(error.to_string().contains("older state"), "{error}");
    let mut restored = restore_given(&older.prepare(&qemu)?, &saved.file, &changed_ok())?;
    assert_eq!(images(&mut restored)?, std::slice::from_ref(&base));
    assert!(restored.report.warnings.iter().any(|warning| warning.contains("older state")));
    drop(restored);
    // The user may choose an unrelated image; the report names it.
    fs::copy(scene.path("top.qcow2"), scene.path("copy.qcow2"))?;
    let copy = line_on(&scene.path("copy.qcow2").display().to_string());
    let restored = restore_given(&copy.prepare(&qemu)?, &saved.file, &options)?;
    let named =
        restored.report.warnings.iter().any(|w| w.contains("d0") && w.contains("not named"));
    assert!(named, "{:?}", restored.report.warnings);
    Ok(())
}

/// A waiting QEMU has its images open already: the restore compares them too.
#[test]
fn the_images_of_a_qemu_that_waits_are_compared() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let (_guest, saved) = scene.saved(&qemu, &SaveOptions::default())?;
    let image = File::options().write(true).open(scene.path("base.qcow2"))?;
    image.set_modified(SystemTime::now() + Duration::from_secs(5))?;
    let waiting = scene.config.incoming(&qemu, "defer")?;
    for (options, is_refused) in [(RestoreOptions::default(), true), (changed_ok(), false)] {
        match saved.restore_into(&waiting, &options) {
            Ok(restored) if !is_refused => assert!(!restored.report.warnings.is_empty()),
            Err(error) if is_refused => {
                let error = error.downcast::<RestoreError>()?;
                assert!(matches!(*error, RestoreError::DisksChanged { .. }), "{error}");
            }
            other => panic!("{:?}", other.map(|restored| restored.report)),
        }
    }
    Ok(())
}

/// A waiting QEMU that had an image of the file open was restored, and its guest wrote into the
/// frozen image.
#[test]
fn a_qemu_that_waits_does_not_write_into_an_image_of_the_file() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let (_guest, saved) = scene.saved(&qemu, &with_disks())?;
    // Only `d0` keeps its overlay: otherwise the disk with the boot sector would be refused too.
    rewrite_manifest(&saved.file, |vm| {
        for disk in vm.disks.iter_mut().filter(|disk| disk.device != "d0") {
            disk.overlay = None;
        }
    })?;
    let restore = |config: &GuestConfig| {
        saved.restore_into(&config.incoming(&qemu, "defer")?, &RestoreOptions::default())
    };
    let top = scene.path("top.qcow2");
    let before = fs::read(&top)?;
    let error = restore(&scene.config).expect_err("the image belongs to the file");
    let error = error.downcast::<RestoreError>()?;
    let RestoreError::ImageOfFile { device, image } = &*error else { panic!("{error}") };
    assert_eq!((device.as_str(), image), ("d0", &top));
    assert!(fs::read(&top)? == before);
    // Below a new overlay, the image of the file is only read.
    let over = scene.path("over.qcow2");
    let below = ["-f", "qcow2", "-F", "qcow2", "-b", top.to_str().ok_or("UTF-8")?];
    make_image(&over, &below, 4)?;
    let mut warnings = restore(&line_on(&over.display().to_string()))?.report.warnings;
    warnings.retain(|warning| !warning.contains("not named"));
    assert_eq!(warnings, [""; 0]);
    Ok(())
}

/// A manifest could name any file as the first image of a disk: the restore opened that file and
/// put its first bytes into the error.
#[test]
fn a_file_has_no_image_opened_that_a_command_line_does_not_name() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let (_guest, saved) = scene.saved(&qemu, &SaveOptions::default())?;
    let victim = scene.path("victim");
    fs::write(&victim, "root:secret")?;
    rewrite_manifest(&saved.file, |vm| {
        for image in vm.disks.iter_mut().filter_map(|disk| disk.images.first_mut()) {
            image.path = victim.display().to_string();
        }
    })?;
    let options = RestoreOptions::default();
    let error =
        restore_given(&scene.config.prepare(&qemu)?, &saved.file, &options).expect_err("forged");
    let RestoreError::DisksChanged { changes } = &error else { panic!("{error}") };
    let is_forged = |change: &ImageChange| change.what == "image";
    assert!(!changes.is_empty() && changes.iter().all(is_forged), "{error}");
    assert!(!error.to_string().contains("root"), "{error}");
    Ok(())
}
