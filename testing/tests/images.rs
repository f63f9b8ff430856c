//! Images of a VM: however the command line is written, its images, those in the file and those of
//! the restored VM are the ones that the running VM has.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmfile::restore::{RestoreOptions, Restored};
use vmfile::save::{After, SaveOptions};
use vmfile::{RestoreError, Vm};
use vmfile_qemu::{CommandLine, Drive};
use vmfile_testing::verbs::rewrite_manifest;
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, make_image, requires};

/// Makes an empty raw image.
fn raw(path: &Path) -> TestResult {
    Ok(fs::File::create_new(path)?.set_len(4 << 20)?)
}

/// A boot-sector guest with `more` arguments.
fn guest(more: &[impl AsRef<OsStr>]) -> GuestConfig {
    Guest::boot_sector(Ram::private(64)).arguments(more.iter().map(AsRef::as_ref))
}

/// Compares the drives that the command line of a running VM makes with those that QEMU reports.
fn line_and_vm_agree(qemu: &Qemu, more: &[String], expected: usize) -> TestResult {
    let guest = guest(more).boot(qemu)?;
    let mut vm = Vm::connect(&guest.qmp_path())?;
    let process = vm.process()?;
    let mut line = CommandLine::from_process(&process.arguments)?;
    line.expand_config(true, |path| fs::read_to_string(path))?;
    let made = line.drives();
    let found = vm.drives()?;
    assert_eq!(made.len(), expected, "{more:?}: {made:?}");
    for drive in &found {
        let [line] = &*made.iter().filter(|line| line.makes(drive)).collect::<Vec<_>>() else {
            panic!("{more:?}: {drive:?} is not one of {made:?}");
        };
        let path = line.images.first().map(|image| image.path.clone());
        let has = drive.image().map(|image| Some(image.path.clone()));
        assert_eq!(path, has, "{more:?}");
        if let Some(format) = line.images.first().and_then(|image| image.format.as_ref()) {
            assert_eq!(Some(format), drive.image().map(|image| &image.format), "{more:?}");
        }
        if drive.image().is_some() && drive.removable == line.is_cdrom {
            assert_eq!(line.read_only || line.is_cdrom, drive.read_only, "{more:?}");
        }
    }
    assert_eq!(found.len(), expected, "{more:?}: {found:?}");
    Ok(())
}

/// vmfile looked for images on a command line only as `file=PATH`. Images in other spellings were
/// not found, and the VM came back on the images that the line named.
fn every_spelling(qemu: &Qemu) -> TestResult {
    let files = tempfile::tempdir()?;
    let path = |name: &str| files.path().join(name).display().to_string();
    for name in ["a", "b", "c"] {
        raw(&files.path().join(name))?;
    }
    let (a, b, c) = (path("a"), path("b"), path("c"));
    let json = format!(r#"{{"driver":"raw","file":{{"driver":"file","filename":"{a}"}}}}"#);
    let named = format!("json:{}", json.replace(',', ",,"));
    let node = json.replacen('{', r#"{"node-name":"n","#, 1);
    let config = path("vm.conf");
    let text = format!(
        "[drive \"d0\"]\n  file = \"{a}\"\n  format = \"raw\"\n  if = \"none\"\n\n[device]\n  \
         driver = \"virtio-blk-pci\"\n  drive = \"d0\"\n"
    );
    fs::write(&config, text)?;
    let file = |path: &str| format!("file={path},format=raw");
    let blk = "virtio-blk-pci,drive=n";
    // Each count includes ide0-hd0, which has the boot sector.
    for (words, drives) in [
        (vec!["-drive".into(), format!("{},if=virtio", file(&a))], 2),
        (vec!["-drive".into(), file(&a), "-drive".into(), file(&b)], 3),
        (vec!["-hdb".into(), a.clone(), "-hdd".into(), b.clone(), "-cdrom".into(), c.clone()], 4),
        (vec!["-fda".into(), a.clone(), "-drive".into(), "media=cdrom".into()], 3),
        (vec!["-drive".into(), format!("file={named},if=virtio")], 2),
        (vec!["-drive".into(), format!("driver=raw,file.filename={a},if=virtio,id=mine")], 2),
        (vec!["-blockdev".into(), node, "-device".into(), blk.into()], 2),
        (
            vec![
                "-blockdev".into(),
                format!("raw,node-name=n,file.driver=file,file.filename={a}"),
                "-device".into(),
                format!("{blk},id=x"),
            ],
            2,
        ),
        (
            vec![
                "-blockdev".into(),
                format!("file,node-name=f,filename={a}"),
                "-blockdev".into(),
                "raw,node-name=n,file=f".into(),
                "-device".into(),
                r#"{"driver":"virtio-blk-pci","drive":"n"}"#.into(),
                "-device".into(),
                "virtio-scsi-pci".into(),
                "-device".into(),
                "scsi-cd".into(),
                "-drive".into(),
                format!("{},if=virtio", file(&b)),
                "-device".into(),
                "floppy".into(),
            ],
            5,
        ),
        (vec!["-readconfig".into(), config], 2),
        (
            vec![
                "-machine".into(),
                "q35".into(),
                "-drive".into(),
                file(&b),
                "-cdrom".into(),
                c.clone(),
            ],
            3,
        ),
    ] {
        line_and_vm_agree(qemu, &words, drives)?;
    }
    Ok(())
}

#[test]
fn every_spelling_of_an_image_is_found_on_the_command_line() -> TestResult {
    every_spelling(&requires!(Qemu::of(Release::Distribution)))
}

#[test]
fn every_spelling_of_an_image_is_found_on_the_command_line_of_the_oldest() -> TestResult {
    every_spelling(&requires!(Qemu::of(Release::Oldest)))
}

#[test]
fn every_spelling_of_an_image_is_found_on_the_command_line_of_the_newest() -> TestResult {
    every_spelling(&requires!(Qemu::of(Release::Newest)))
}

/// A1: a VM that was started with `-readconfig` came back with the contents that the file had at
/// the restore, and its drives were not on the saved line.
#[test]
fn a_configuration_file_is_in_the_saved_line_and_not_needed_any_more() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let files = tempfile::tempdir()?;
    let image = files.path().join("data.raw");
    raw(&image)?;
    let config = files.path().join("vm.conf");
    let text = format!(
        "[drive \"d0\"]\n  file = \"{}\"\n  format = \"raw\"\n  if = \"ide\"\n",
        image.display()
    );
    fs::write(&config, text)?;
    let mut guest = guest(&["-readconfig", &config.display().to_string()]).boot_to(&qemu, 1)?;
    let saved = guest.save_and_end(&SaveOptions::default())?;
    fs::remove_file(&config)?;
    let mut restored = saved.restore_saved(&RestoreOptions::default())?;
    let drives = restored.qemu.as_mut().ok_or("a QEMU was started")?.vm().drives()?;
    let drive = drives.iter().find(|drive| drive.id == "d0").ok_or("no drive d0")?;
    assert_eq!(drive.image().map(|image| Path::new(&image.path)), Some(&*image));
    Ok(())
}

/// A directory of images.
struct Files(TempDir);

impl Files {
    fn new() -> TestResult<Files> {
        Ok(Files(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Makes a qcow2 image of 4 MiB, on top of another if there is one.
    fn qcow2(&self, name: &str, below: Option<&str>) -> TestResult<String> {
        let below = below.map(|below| self.text(below));
        let mut options = vec!["-f", "qcow2"];
        options.extend(below.iter().flat_map(|below| ["-F", "qcow2", "-b", below]));
        make_image(&self.path(name), &options, 4)?;
        Ok(self.text(name))
    }
}

/// The drive under test: the first that is not the drive of the boot sector.
fn drive_of(vm: &mut Vm) -> TestResult<Drive> {
    let drives = vm.drives()?;
    let mut drives = drives
        .into_iter()
        .filter(|drive| drive.images.last().is_none_or(|image| !image.path.ends_with("boot.img")));
    Ok(drives.next().ok_or("no drive")?)
}

fn paths(drive: &Drive) -> Vec<&str> {
    drive.images.iter().map(|image| image.path.as_str()).collect()
}

/// Saves although the VM differs from its command line.
fn changed_ok() -> SaveOptions {
    SaveOptions::default().changed_ok(true)
}

/// The drive under test of a restored VM.
fn restored_drive(restored: &mut Restored) -> TestResult<Drive> {
    drive_of(restored.qemu.as_mut().ok_or("a QEMU was started")?.vm())
}

/// Runs a block job to its end.
fn run_job(guest: &mut Guest, command: &str, arguments: Value) -> TestResult {
    let id = arguments["job-id"].as_str().unwrap_or_default().to_owned();
    guest.qmp(command, arguments)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let jobs = guest.qmp("query-block-jobs", json!({}))?;
        let Some(job) = jobs.as_array().and_then(|jobs| jobs.first()) else { return Ok(()) };
        if job["ready"] == true {
            // QEMU refuses this for a job that is completing already.
            let _ = guest.qmp("block-job-complete", json!({ "device": id }));
        }
        assert!(Instant::now() < deadline, "{job}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The ways to write one disk on a qcow2 image, each with its device.
fn spellings(image: &str) -> Vec<Vec<String>> {
    let text = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let json = format!(r#"{{"driver":"qcow2","file":{{"driver":"file","filename":"{image}"}}}}"#);
    let named = json.replace(',', ",,");
    // Not virtio: the firmware leaves virtio's rings in memory that this guest fills, and QEMU
    // refuses the device state if a ring is invalid.
    let device = "ide-hd,drive=n,id=disk,bus=ide.1";
    vec![
        text(&["-drive", &format!("file={image},format=qcow2,id=n")]),
        text(&["-drive", &format!("file=json:{named},if=none,id=n"), "-device", device]),
        text(&["-drive", &format!("driver=qcow2,file.filename={image}")]),
        text(&["-hdb", image]),
        text(&[
            "-blockdev",
            &json.replacen('{', r#"{"node-name":"n","#, 1),
            "-device",
            r#"{"driver":"ide-hd","drive":"n","bus":"ide.1"}"#,
        ]),
        text(&[
            "-blockdev",
            &format!("file,node-name=f,filename={image}"),
            "-blockdev",
            "qcow2,node-name=n,file=f",
            "-device",
            device,
        ]),
    ]
}

/// A1: after a completed `drive-mirror`, the VM runs on the new image. The saved line named the old
/// one, so the restored VM ran on that and lost everything that was written since.
#[test]
fn a_vm_that_was_mirrored_to_another_image_comes_back_on_that_one() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    for number in 0..6 {
        let files = Files::new()?;
        let old = files.qcow2("old.qcow2", None)?;
        let words = spellings(&old).swap_remove(number);
        let mut guest = guest(&words).boot_to(&qemu, 1)?;
        let node = drive_of(&mut Vm::connect(&guest.qmp_path())?)?.node.ok_or("no node")?;
        let new = files.text("new.qcow2");
        let mirror = json!({ "job-id": "j", "device": node, "target": new, "sync": "full" });
        run_job(&mut guest, "drive-mirror", mirror)?;
        let saved = guest.save_and_end(&changed_ok())?;
        let mut restored = saved.restore_saved(&RestoreOptions::default())?;
        assert_eq!(paths(&restored_drive(&mut restored)?), [&new], "{words:?}");
        assert_eq!(restored.report.warnings, [""; 0], "{words:?}");
    }
    Ok(())
}

/// A1: after an active `block-commit` the VM runs on the base; the saved line named the overlay,
/// whose contents are outdated from then on.
#[test]
fn a_vm_whose_overlay_was_committed_comes_back_on_the_base() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    for number in 0..6 {
        let files = Files::new()?;
        let base = files.qcow2("base.qcow2", None)?;
        let top = files.qcow2("top.qcow2", Some("base.qcow2"))?;
        let words = spellings(&top).swap_remove(number);
        let mut guest = guest(&words).boot_to(&qemu, 1)?;
        let node = drive_of(&mut Vm::connect(&guest.qmp_path())?)?.node.ok_or("no node")?;
        run_job(&mut guest, "block-commit", json!({ "job-id": "j", "device": node }))?;
        let saved = guest.save_and_end(&changed_ok())?;
        let mut restored = saved.restore_saved(&RestoreOptions::default())?;
        assert_eq!(paths(&restored_drive(&mut restored)?), [&base], "{words:?}");
    }
    Ok(())
}

/// A1: `save --with-disks --after resume` of a drive that was not written as `file=PATH`. The
/// restore did not find the drive on the line and went on: QEMU opened the frozen image read-write,
/// which made the file useless.
#[test]
fn the_image_of_a_file_is_below_an_overlay_however_the_drive_is_written() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    for number in 0..6 {
        let files = Files::new()?;
        let image = files.qcow2("a.qcow2", None)?;
        let words = spellings(&image).swap_remove(number);
        let mut guest = guest(&words).boot_to(&qemu, 1)?;
        let options = SaveOptions::default().with_disks(true).after(After::Resume);
        let saved = guest.save_and_end(&options)?;
        let frozen = fs::read(&image)?;
        for _ in 0..2 {
            let mut restored = saved.restore_saved(&RestoreOptions::default())?;
            let drive = restored_drive(&mut restored)?;
            let [overlay, below] = &*paths(&drive) else { panic!("{words:?}: {drive:?}") };
            assert_eq!(*below, image, "{words:?}");
            let made = restored.report.disks.iter().any(|disk| disk.overlay == Path::new(overlay));
            assert!(made, "{words:?}: {:?}", restored.report.disks);
        }
        assert!(fs::read(&image)? == frozen, "{words:?}: the image stays as it was");
    }
    Ok(())
}

/// A1: a path through a symbolic link, or with `..`, names the same image.
#[test]
fn another_name_of_an_image_is_the_same_image() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    for linked in [false, true] {
        let files = Files::new()?;
        let image = files.qcow2("a.qcow2", None)?;
        let name = if linked {
            symlink(&image, files.path("link.qcow2"))?;
            files.text("link.qcow2")
        } else {
            fs::create_dir(files.path("sub"))?;
            files.text("sub/../a.qcow2")
        };
        let drive = format!("file={name},format=qcow2");
        let mut guest = guest(&["-drive", &drive]).boot_to(&qemu, 1)?;
        let saved = guest.save_and_end(&SaveOptions::default())?;
        let mut restored = saved.restore_saved(&RestoreOptions::default())?;
        let drive = restored_drive(&mut restored)?;
        let path = drive.image().ok_or("no image")?.path.clone();
        assert_eq!(fs::canonicalize(path)?, fs::canonicalize(&image)?);
    }
    Ok(())
}

/// A change of a drive, and the state that it leads to: its image, and whether its tray is open.
struct Change {
    commands: Vec<(&'static str, Value)>,
    image: Option<String>,
    tray_open: Option<bool>,
}

/// A1: after a CD was changed or ejected, the restored VM had the old one in the drive, and the
/// tray as the line makes it.
fn media_and_trays(qemu: &Qemu) -> TestResult {
    let files = Files::new()?;
    for name in ["old.iso", "new.iso"] {
        raw(&files.path(name))?;
    }
    let (old, new) = (files.text("old.iso"), files.text("new.iso"));
    let insert = |device: Value| {
        let mut arguments = json!({ "filename": new, "format": "raw" });
        for (key, value) in device.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        Change {
            commands: vec![("blockdev-change-medium", arguments)],
            image: Some(new.clone()),
            tray_open: Some(false),
        }
    };
    let eject = |mut device: Value| {
        device["force"] = json!(true);
        Change { commands: vec![("eject", device)], image: None, tray_open: Some(true) }
    };
    let open = |device: Value| {
        let mut forced = device;
        forced["force"] = json!(true);
        let commands = vec![("blockdev-open-tray", forced)];
        Change { commands, image: Some(old.clone()), tray_open: Some(true) }
    };
    let by_id = |id: &str| json!({ "id": id });
    let cdrom = ["-cdrom", old.as_str()];
    let drive = format!("file={old},format=raw,if=none,media=cdrom,id=cd0");
    let of_drive = ["-drive", &drive, "-device", "ide-cd,drive=cd0,id=cd,bus=ide.1"];
    let node = format!("raw,node-name=n,read-only=on,file.driver=file,file.filename={old}");
    let scsi = "lsi53c895a";
    let of_node = ["-blockdev", &node, "-device", scsi, "-device", "scsi-cd,drive=n,id=cd"];
    let empty = ["-device", scsi, "-device", "scsi-cd,id=cd"];
    let floppy = ["-fda", old.as_str()];
    let in_floppy = Change { tray_open: None, ..insert(json!({ "device": "floppy0" })) };
    for (words, change) in [
        (&cdrom[..], insert(json!({ "device": "ide1-cd0" }))),
        (&cdrom, eject(json!({ "device": "ide1-cd0" }))),
        (&cdrom, open(json!({ "device": "ide1-cd0" }))),
        (&of_drive, insert(by_id("cd"))),
        (&of_drive, eject(by_id("cd"))),
        (&of_node, insert(by_id("cd"))),
        (&of_node, eject(by_id("cd"))),
        (&of_node, open(by_id("cd"))),
        (&empty, insert(by_id("cd"))),
        (&floppy, in_floppy),
    ] {
        let mut guest = guest(words).boot_to(qemu, 1)?;
        for (command, arguments) in change.commands {
            guest.qmp(command, arguments)?;
        }
        let saved = guest.save_and_end(&changed_ok())?;
        let mut restored = saved.restore_saved(&RestoreOptions::default())?;
        let drive = restored_drive(&mut restored)?;
        let image = drive.image().map(|image| image.path.clone());
        assert_eq!(image, change.image, "{words:?}: {drive:?}");
        assert_eq!(drive.tray_open, change.tray_open, "{words:?}: {drive:?}");
    }
    Ok(())
}

#[test]
fn media_and_trays_come_back_as_they_were() -> TestResult {
    media_and_trays(&requires!(Qemu::of(Release::Distribution)))
}

#[test]
fn media_and_trays_come_back_as_they_were_in_the_newest() -> TestResult {
    media_and_trays(&requires!(Qemu::of(Release::Newest)))
}

/// If the saved line does not make a disk of the file, the restore is refused with an error that
/// names the disk.
#[test]
fn a_disk_without_a_place_on_the_saved_line_is_refused_by_name() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let files = Files::new()?;
    let image = files.qcow2("a.qcow2", None)?;
    let drive = format!("file={image},format=qcow2,id=d0");
    let mut guest = guest(&["-drive", &drive]).boot_to(&qemu, 1)?;
    let saved = guest.save_and_end(&SaveOptions::default())?;
    // Stands for a line that makes the disk in a way that vmfile does not know.
    rewrite_manifest(&saved.file, |vm| {
        let at = vm.command_line.iter().position(|word| *word == drive).unwrap_or_default();
        vm.command_line.drain(at - 1..=at);
    })?;
    let error = saved.restore_saved(&RestoreOptions::default()).expect_err("no place");
    assert!(matches!(error, RestoreError::DiskNotNamed { .. }), "{error}");
    assert!(error.to_string().contains("d0") && error.to_string().contains(&image), "{error}");
    Ok(())
}
