//! Images that changed, that a restore will not find, or that the file and not the user chose: they
//! are refused before the guest is paused, or before a QEMU is started.

mod given_line;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::json;
use tempfile::TempDir;
use vmfile::RestoreError;
use vmfile::error::SaveError;
use vmfile::restore::{RestoreOptions, Restored};
use vmfile::save::{After, Live, Route, SaveOptions};
use vmfile_format::manifest::{DiskMeta, VmMeta};
use vmfile_testing::verbs::{restore_given, rewrite_manifest};
use vmfile_testing::{
    Guest, GuestConfig, Qemu, Ram, Release, Saved, TestResult, make_image, requires, root,
};

/// A guest on a qcow2 disk with a backing file, in a directory that all its VMs share.
///
/// The disk is not virtio: the firmware leaves virtio's rings in memory that this guest fills, and
/// QEMU refuses the device state if a ring is invalid.
struct Scene {
    files: TempDir,
    config: GuestConfig,
}

impl Scene {
    fn new() -> TestResult<Scene> {
        let files = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let path = |name: &str| files.path().join(name);
        make_image(&path("base.qcow2"), &["-f", "qcow2"], 4)?;
        let base = path("base.qcow2");
        let below = ["-f", "qcow2", "-F", "qcow2", "-b", base.to_str().ok_or("UTF-8")?];
        make_image(&path("top.qcow2"), &below, 4)?;
        let drive = format!("file={},format=qcow2,id=d0", path("top.qcow2").display());
        let config = Guest::boot_sector(Ram::private(64)).arguments(["-drive", &drive]);
        Ok(Scene { files, config })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Saves the guest and ends its VM; returns the ended guest, which keeps the directory of its
    /// sockets, and the file.
    fn saved(&self, qemu: &Qemu, options: &SaveOptions) -> TestResult<(Guest, Saved)> {
        let mut guest = self.config.boot_to(qemu, 1)?;
        let saved = guest.save_and_end(options)?;
        Ok((guest, saved))
    }
}

/// The manifest's entry of the disk of a scene.
fn disk(vm: &mut VmMeta) -> &mut DiskMeta {
    vm.disks.iter_mut().find(|disk| disk.device == "d0").expect("the disk is in the file")
}

fn changed_ok() -> RestoreOptions {
    RestoreOptions::default().disks_changed_ok(true)
}

fn with_disks() -> SaveOptions {
    SaveOptions::default().with_disks(true).after(After::Resume)
}

/// The images of the disk of a restored VM, top first.
fn images(restored: &mut Restored) -> TestResult<Vec<PathBuf>> {
    let drives = restored.qemu.as_mut().ok_or("a QEMU was started")?.vm().drives()?;
    let drive = drives.iter().find(|drive| drive.id == "d0").ok_or("no disk")?;
    Ok(drive.images.iter().map(|image| PathBuf::from(&image.path)).collect())
}

/// A change of an image: the difference that the error must name, the image, and the change itself.
type Happening = (&'static str, &'static str, fn(&Path) -> TestResult);

/// A3: a restore did not notice that a disk had changed after the save. A guest whose memory does
/// not fit its disk corrupts the disk. Backing files count as well.
#[test]
fn images_that_changed_since_the_save_are_refused_by_name() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let grow: fn(&Path) -> TestResult = |path| {
        let file = File::options().write(true).open(path)?;
        let length = file.metadata()?.len();
        let modified = file.metadata()?.modified()?;
        file.set_len(length + 512)?;
        Ok(file.set_modified(modified)?)
    };
    let touch: fn(&Path) -> TestResult = |path| {
        let file = File::options().write(true).open(path)?;
        Ok(file.set_modified(SystemTime::now() + Duration::from_secs(5))?)
    };
    // As `cp -a` of a backup does: same bytes, same time, another inode.
    let replace: fn(&Path) -> TestResult = |path| {
        let copy = path.with_extension("copy");
        let modified = fs::metadata(path)?.modified()?;
        fs::copy(path, &copy)?;
        File::options().write(true).open(&copy)?.set_modified(modified)?;
        Ok(fs::rename(&copy, path)?)
    };
    // As a tool that sets the time back does: only the disk size in the header differs.
    let resize: fn(&Path) -> TestResult = |path| {
        let file = File::options().write(true).read(true).open(path)?;
        let modified = file.metadata()?.modified()?;
        let mut size = [0; 8];
        file.read_exact_at(&mut size, 24)?;
        file.write_all_at(&(u64::from_be_bytes(size) + 65536).to_be_bytes(), 24)?;
        Ok(file.set_modified(modified)?)
    };
    let remove: fn(&Path) -> TestResult = |path| Ok(fs::remove_file(path)?);
    let happenings: [Happening; 6] = [
        ("length", "top.qcow2", grow),
        ("time of the last change", "top.qcow2", touch),
        ("inode", "top.qcow2", replace),
        ("qcow2 header", "top.qcow2", resize),
        ("time of the last change", "base.qcow2", touch),
        ("file", "base.qcow2", remove),
    ];
    for (what, name, happen) in happenings {
        let scene = Scene::new()?;
        let (_guest, saved) = scene.saved(&qemu, &SaveOptions::default())?;
        happen(&scene.path(name))?;
        let options = RestoreOptions::default();
        let prepared = scene.config.prepare(&qemu)?;
        let given = restore_given(&prepared, &saved.file, &options);
        for result in [saved.restore_saved(&options), given] {
            let error = result.expect_err(what);
            let RestoreError::DisksChanged { changes } = &error else { panic!("{what}: {error}") };
            let image = scene.path(name);
            let found =
                changes.iter().any(|c| c.what == what && c.image == image && c.device == "d0");
            assert!(found, "{what}: {error}");
        }
        if what != "file" {
            let restored = saved.restore_saved(&changed_ok())?;
            let warned = restored.report.warnings.iter().any(|warning| warning.contains(what));
            assert!(warned, "{what}: {:?}", restored.report.warnings);
        }
    }
    Ok(())
}

/// No false alarm: an unchanged image is never reported as changed, after a save by any route.
#[test]
fn images_that_did_not_change_are_not_said_to_have_changed() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let distribution = requires!(Qemu::of(Release::Distribution));
    let newest = requires!(Qemu::of(Release::Newest));
    for (qemu, route) in [
        (&distribution, Route::Direct),
        (&distribution, Route::Stream),
        (&distribution, Route::Native),
        (&oldest, Route::Stream),
        (&newest, Route::Direct),
    ] {
        for lazy in [false, true] {
            let scene = Scene::new()?;
            if lazy {
                let mut command = Command::new("qemu-img");
                command.args(["amend", "-o", "lazy_refcounts=on"]).arg(scene.path("top.qcow2"));
                assert!(command.status()?.success());
            }
            let options = SaveOptions::default().route(route);
            let (_guest, saved) = scene.saved(qemu, &options)?;
            let restored = saved.restore_saved(&RestoreOptions::default())?;
            assert_eq!(restored.report.warnings, [""; 0], "{route:?}");
        }
    }
    Ok(())
}

/// A guest that writes to its disk up to the last moment: QEMU must write its caches to the image
/// before the save records the state of the image.
#[test]
fn a_busy_disk_is_not_said_to_have_changed_after_its_vm_was_saved() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    for (route, more) in [(Route::Direct, ""), (Route::Stream, ""), (Route::Direct, "bitmap")] {
        let config = Guest::linux(Ram::private(256)).disk(16).busy();
        let mut guest = config.boot(&qemu)?;
        if more == "bitmap" {
            let bitmap = json!({ "node": "disk0", "name": "b", "persistent": true });
            guest.qmp("block-dirty-bitmap-add", bitmap)?;
        }
        guest.wait_for_count(2)?;
        let saved = guest.save_and_end(&SaveOptions::default().route(route))?;
        let restored = saved.restore_saved(&RestoreOptions::default())?;
        assert_eq!(restored.report.warnings, [""; 0], "{route:?} {more}");
    }
    Ok(())
}

/// Files of older versions do not record the state of their images; they are restored with one
/// warning.
#[test]
fn a_file_that_does_not_say_what_its_images_were_is_restored_with_a_warning() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let (_guest, saved) = scene.saved(&qemu, &SaveOptions::default())?;
    rewrite_manifest(&saved.file, |vm| {
        for disk in &mut vm.disks {
            *disk = DiskMeta {
                device: disk.device.clone(),
                path: disk.path.clone(),
                format: disk.format.clone(),
                backing_files: disk.backing_files.clone(),
                read_only: disk.read_only,
                overlay: disk.overlay.clone(),
                ..DiskMeta::default()
            };
        }
    })?;
    let restored = saved.restore_saved(&RestoreOptions::default())?;
    let [warning] = &*restored.report.warnings else { panic!("{:?}", restored.report.warnings) };
    assert!(warning.contains("does not say what its disk images were"), "{warning}");
    Ok(())
}

/// A4: the guest wrote to its disks after the saved moment, and then the VM was ended: a restore of
/// such a file can only corrupt the disks.
#[test]
fn a_live_save_that_ends_the_vm_needs_its_disks() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let mut guest = scene.config.boot_to(&qemu, 1)?;
    let live = Some(Live::default());
    let error = guest.save_fails(&SaveOptions::default().live(live))?;
    let SaveError::DisksGoOn { devices } = &error else { panic!("{error}") };
    assert!(devices.contains(&"d0".to_owned()), "{devices:?}");
    assert_eq!(guest.status()?, "running");

    for options in [
        SaveOptions::default().live(live).after(After::Resume),
        SaveOptions::default().after(After::Resume),
    ] {
        let report = guest.save(&options)?.report;
        let [warning] = &*report.warnings else { panic!("{:?}", report.warnings) };
        assert!(warning.contains("d0") && warning.contains("--with-disks"), "{warning}");
    }
    for options in [with_disks(), SaveOptions::default().live(live).with_disks(true)] {
        let report = guest.save(&options)?.report;
        let goes_on = report.warnings.iter().any(|warning| warning.contains("goes on writing"));
        assert!(!goes_on, "{:?}", report.warnings);
    }
    Ok(())
}

/// A5: the overlay of an encrypted image was not encrypted: a word that the guest wrote was found
/// in it.
#[test]
fn an_encrypted_image_gets_no_overlay_in_clear_text() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let files = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let secret = ["--object", "secret,id=s,data=abc"];
    let keys = "key-secret=s,iter-time=10";
    let (luks, qcow2) = (files.path().join("luks"), files.path().join("enc.qcow2"));
    make_image(&luks, &[secret[0], secret[1], "-f", "luks", "-o", keys], 4)?;
    let keys = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    make_image(&qcow2, &[secret[0], secret[1], "-f", "qcow2", "-o", keys], 4)?;
    let over = format!(
        "raw,node-name=n,file.driver=luks,file.key-secret=s,file.file.driver=file,\
         file.file.filename={}",
        luks.display()
    );
    for words in [
        vec![
            "-drive".to_owned(),
            format!("file={},format=luks,key-secret=s,if=virtio", luks.display()),
        ],
        vec![
            "-drive".to_owned(),
            format!("file={},format=qcow2,encrypt.key-secret=s,if=virtio", qcow2.display()),
        ],
        vec![
            "-blockdev".to_owned(),
            over,
            "-device".to_owned(),
            "virtio-blk-pci,drive=n".to_owned(),
        ],
    ] {
        let config = Guest::boot_sector(Ram::private(64));
        let config = config.arguments(["-object", secret[1]]).arguments(&words);
        let mut guest = config.boot_to(&qemu, 1)?;
        let before = fs::read_dir(files.path())?.count();
        let error = guest.save_fails(&with_disks())?;
        assert!(matches!(error, SaveError::Disk { .. }), "{error}");
        assert!(error.to_string().contains("is encrypted"), "{error}");
        assert_eq!(guest.status()?, "running");
        assert_eq!(fs::read_dir(files.path())?.count(), before, "no overlay, no file");
    }
    Ok(())
}

/// A6: the path of an image now leads to another file, or to none: a restore would not find the
/// image.
#[test]
fn an_image_that_was_deleted_or_replaced_is_refused_where_the_vm_would_end() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    for is_replaced in [false, true] {
        let scene = Scene::new()?;
        let mut guest = scene.config.boot_to(&qemu, 1)?;
        let image = scene.path("top.qcow2");
        fs::rename(&image, scene.path("away"))?;
        if is_replaced {
            fs::copy(scene.path("away"), &image)?;
        }
        let error = guest.save_fails(&SaveOptions::default())?;
        let SaveError::ImageLost { device, image: lost, .. } = &error else { panic!("{error}") };
        assert_eq!((device.as_str(), lost), ("d0", &image), "{error}");
        assert_eq!(guest.status()?, "running");
        // A VM that goes on keeps its image open, so this save only warns.
        let report = guest.save(&SaveOptions::default().after(After::Pause))?.report;
        let named = report.warnings.iter().any(|w| w.contains("top.qcow2") && w.contains("again"));
        assert!(named, "{:?}", report.warnings);
    }
    Ok(())
}

/// A6: another QEMU cannot open an image that this one was given as a descriptor.
#[test]
fn an_image_in_an_fd_set_is_refused_where_the_vm_would_end() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let mut guest = scene.config.boot_to(&qemu, 1)?;
    // QEMU opens its own descriptor once more, which has the same effect as one that it was given.
    let node = json!({ "driver": "qcow2", "node-name": "n",
        "file": { "driver": "file", "filename": format!("/proc/self/fd/{}", fd_of(&guest)?),
            "locking": "off" }, "read-only": true });
    guest.qmp("blockdev-add", node)?;
    guest.qmp("device_add", json!({ "driver": "virtio-blk-pci", "drive": "n", "id": "hot" }))?;
    let error = guest.save_fails(&SaveOptions::default().changed_ok(true))?;
    assert!(matches!(error, SaveError::ImageLost { .. }), "{error}");
    assert!(error.to_string().contains("descriptor"), "{error}");
    assert_eq!(guest.status()?, "running");
    Ok(())
}

/// The number of QEMU's descriptor of the base image.
fn fd_of(guest: &Guest) -> TestResult<String> {
    for entry in fs::read_dir(format!("/proc/{}/fd", guest.pid()?))? {
        let entry = entry?;
        if fs::read_link(entry.path()).is_ok_and(|path| path.ends_with("base.qcow2")) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Err("QEMU does not have the image open".into())
}

/// A6: QEMU runs in another mount namespace, as in a container. The same path is another file
/// outside, and a restore outside opened that file without a warning.
#[test]
fn an_image_in_another_mount_namespace_is_refused_where_the_vm_would_end() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    requires!(root());
    let scene = Scene::new()?;
    // Inside, another directory is mounted over the images; the program under test stays outside.
    let inside = scene.path("inside");
    fs::create_dir(&inside)?;
    for name in ["base.qcow2", "top.qcow2"] {
        fs::copy(scene.path(name), inside.join(name))?;
    }
    let prepared = scene.config.prepare(&qemu)?;
    let command = prepared.command_line();
    let (images, over) = (scene.files.path(), &inside);
    let script = format!("mount --bind {} {} && exec \"$@\"", over.display(), images.display());
    let mut child = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh"])
        .args(&command)
        .spawn()?;
    let mut guest = prepared.attach()?;
    guest.wait_for_count(1)?;
    let error = guest.save_fails(&SaveOptions::default())?;
    assert!(matches!(error, SaveError::ImageLost { .. }), "{error}");
    assert!(error.to_string().contains("another root"), "{error}");
    assert_eq!(guest.status()?, "running");
    guest.qmp("quit", json!({}))?;
    child.wait()?;
    Ok(())
}

/// vmfile does not recognize a QEMU whose program has another name, and whose monitor is on no
/// option, so the file holds no command line. The save ended the VM without a warning about that.
#[test]
fn a_save_says_that_the_file_will_hold_no_command_line() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let scene = Scene::new()?;
    let prepared = scene.config.prepare(&qemu)?;
    let command = prepared.command_line();
    let program = scene.path("myvm");
    fs::copy(qemu.executable()?, &program)?;
    let (config, monitor) = (scene.path("vm.conf"), scene.path("monitor"));
    let socket = format!(
        "[chardev \"x\"]\n  backend = \"socket\"\n  path = \"{}\"\n  server = \"on\"\n  \
         wait = \"off\"\n[mon \"m\"]\n  mode = \"control\"\n  chardev = \"x\"\n",
        monitor.display()
    );
    fs::write(&config, socket)?;
    let mut more = Command::new(&program);
    let mut child = more.args(&command[1..]).arg("-readconfig").arg(&config).spawn()?;
    let guest = prepared.attach()?;
    guest.wait_for_count(1)?;
    let file = scene.path("vm.vmf");
    let mut vm = vmfile::Vm::connect(&monitor)?;
    let (options, control) = (SaveOptions::default(), vmfile::Control::none());
    let report = vmfile::save::save(&mut vm, &file, &options, &control)?;
    child.wait()?;
    let said = report.warnings.iter().any(|warning| warning.contains("holds no command line"));
    assert!(said, "{:?}", report.warnings);
    let snapshot = vmfile::Snapshot::open(&file, 0)?;
    let saved = vmfile::restore::Destination::Saved;
    let restored = vmfile::restore::restore(&snapshot, saved, &RestoreOptions::default(), &control);
    let error = restored.expect_err("no command line");
    assert!(matches!(error, RestoreError::NoSavedCommand), "{error}");
    Ok(())
}
