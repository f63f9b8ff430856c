//! `save --with-disks`: memory and disks are of one moment, and the saved images stay unchanged
//! while the VM goes on.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use vmfile::error::SaveError;
use vmfile::restore::{Mode, RestoreOptions};
use vmfile::save::{After, Live, Route, SaveOptions};
use vmfile::{Control, Existing, Progress, Vm};
use vmfile_testing::verbs::{check_is_clean, save_with};
use vmfile_testing::{
    Guest, GuestConfig, Mount, Qemu, Ram, Release, TestResult, make_image, requires,
};

/// A guest that writes to its disk in every pass, and reports a disk of another moment.
fn config(ram: Ram) -> GuestConfig {
    Guest::linux(ram).vcpus(2).disk(16).one_moment()
}

fn with_disks(route: Route) -> SaveOptions {
    SaveOptions::default().route(route).with_disks(true).after(After::Resume)
}

fn live() -> SaveOptions {
    let live = Some(Live::default().pause_max(Duration::from_secs(2)));
    with_disks(Route::Auto).live(live)
}

/// The images in the directory of the guest's disk, with the disk itself, sorted by name.
fn images(config: &GuestConfig) -> TestResult<Vec<PathBuf>> {
    let disk = config.disk_path();
    let directory = disk.parent().ok_or("no directory")?;
    let mut images = Vec::new();
    for entry in fs::read_dir(directory)? {
        images.push(entry?.path());
    }
    images.retain(|path| path.extension().is_some_and(|extension| extension == "qcow2"));
    images.sort();
    Ok(images)
}

/// The top image of the guest's disk, as QEMU reports it.
fn image_in_use(guest: &mut Guest) -> TestResult<String> {
    let drives = guest.qmp("query-block", json!({}))?;
    let drives = drives.as_array().ok_or("no list")?;
    let disk = drives.iter().find(|drive| drive["device"] == "disk0").ok_or("no disk")?;
    Ok(disk["inserted"]["image"]["filename"].as_str().unwrap_or_default().to_owned())
}

/// Saves a guest that goes on, and restores the file twice, each time with the disk of the saved
/// moment. Returns the live method, or "" if the save was not live.
fn round_trip(
    source: &Qemu,
    destination: &Qemu,
    config: &GuestConfig,
    options: &SaveOptions,
) -> TestResult<String> {
    let mut guest = config.boot_to(source, 2)?;
    let saved = guest.save(options)?;
    let report = &saved.report;
    assert_eq!(report.disks.len(), 1, "{:?}", report.disks);
    let disk = &report.disks[0];
    assert_eq!(Path::new(&disk.image), config.disk_path());
    assert_eq!(image_in_use(&mut guest)?, disk.overlay);
    let frozen = fs::read(config.disk_path())?;
    guest.runs_on(3)?;
    assert!(fs::read(config.disk_path())? == frozen, "the image stays as it was");
    check_is_clean(&saved.file)?;

    for mode in [Mode::Map, Mode::Stream] {
        let mut restored = saved.restore(destination, mode)?;
        let image = image_in_use(&mut restored)?;
        assert!(image != disk.overlay && Path::new(&image) != config.disk_path(), "{image}");
        restored.wait_for_passes(1)?;
        saved.goes_on_in(&restored)?;
    }
    guest.counts_on(1)?;
    assert!(fs::read(config.disk_path())? == frozen, "the image stays as it was");
    Ok(report.live_method.as_ref().map_or_else(String::new, ToString::to_string))
}

#[test]
fn a_guest_and_its_disk_come_back_by_the_direct_route() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    round_trip(&qemu, &qemu, &config(Ram::memfd(256)), &with_disks(Route::Direct)).map(drop)
}

#[test]
fn a_guest_and_its_disk_come_back_by_the_stream_of_the_oldest() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = config(Ram::private(256)).machine_version("7.2");
    round_trip(&oldest, &qemu, &config, &with_disks(Route::Stream)).map(drop)
}

#[test]
fn a_guest_and_its_disk_come_back_when_qemu_writes_the_pages() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    round_trip(&qemu, &qemu, &config(Ram::private(256)), &with_disks(Route::Native)).map(drop)
}

fn by_userfault(source: &Qemu, config: &GuestConfig) -> TestResult {
    let destination = requires!(Qemu::of(Release::Distribution));
    let method = round_trip(source, &destination, config, &live())?;
    assert_eq!(method, "userfault");
    Ok(())
}

#[test]
fn disks_are_of_the_moment_of_a_save_by_userfault() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    by_userfault(&qemu, &config(Ram::private(256)).busy())
}

#[test]
fn disks_are_of_the_moment_of_a_background_snapshot() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = config(Ram::private(256)).busy();
    let method = round_trip(&qemu, &qemu, &config, &live().route(Route::Stream))?;
    assert!(method.starts_with("background-snapshot ("), "{method}");
    Ok(())
}

/// The oldest QEMU has background-snapshot too, but leaves its guest paused if one fails; so vmfile
/// uses pre-copy.
#[test]
fn disks_are_of_the_last_moment_of_a_pre_copy_of_the_oldest() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Oldest));
    let destination = requires!(Qemu::of(Release::Distribution));
    let config = config(Ram::private(256)).machine_version("7.2");
    let method = round_trip(&qemu, &destination, &config, &live())?;
    assert!(method.starts_with("pre-copy (QEMU 7.2"), "{method}");
    Ok(())
}

#[test]
fn disks_are_of_the_moment_of_a_save_by_userfault_of_the_newest() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    by_userfault(&qemu, &config(Ram::private(256)).busy().machine_version("10.0"))
}

#[test]
fn disks_are_of_the_last_moment_of_a_pre_copy() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = config(Ram::file(256, directory.path())).busy();
    let method = round_trip(&qemu, &qemu, &config, &live().route(Route::Stream))?;
    assert!(method.starts_with("pre-copy"), "{method}");
    Ok(())
}

#[test]
fn disks_are_of_the_moment_of_a_copy_aside() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let config = config(Ram::file(256, directory.path())).busy();
    let method = round_trip(&qemu, &qemu, &config, &live())?;
    assert!(method.starts_with("aside ("), "{method}");
    Ok(())
}

#[test]
fn a_save_that_is_stopped_leaves_the_disk_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    for options in [with_disks(Route::Direct), with_disks(Route::Stream), live()] {
        let config = config(Ram::private(256));
        let mut guest = config.boot_to(&qemu, 1)?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("vm.vmf");
        let flag = Arc::new(AtomicBool::new(false));
        let progress = |_: Progress| flag.store(true, Ordering::Relaxed);
        let mut vm = Vm::connect(&guest.qmp_path())?;
        let control = Control::new(&flag, &progress);
        let error = vmfile::save::save(&mut vm, &file, &options, &control).expect_err("stopped");
        assert!(error.is_stopped(), "{error}");
        drop(vm);
        assert_eq!(guest.status()?, "running");
        assert_eq!(Path::new(&image_in_use(&mut guest)?), config.disk_path());
        assert_eq!(images(&config)?, [config.disk_path()], "no overlay is left");
        guest.counts_on(3)?;
        // A save that is not stopped succeeds afterwards.
        guest.save(&options)?;
    }
    Ok(())
}

#[test]
fn a_vm_that_went_on_in_an_overlay_comes_back_with_its_saved_command_line() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = config(Ram::private(256));
    let mut guest = config.boot_to(&qemu, 1)?;
    let first = guest.save(&with_disks(Route::Auto))?;
    guest.wait_for_passes(1)?;
    let second = guest.save(&with_disks(Route::Auto))?;
    guest.wait_for_passes(1)?;
    let overlay = image_in_use(&mut guest)?;
    assert_eq!(second.report.disks[0].overlay, overlay);
    // Without --with-disks: the VM no longer uses the image that the command line names.
    let third = guest.save_and_end(&SaveOptions::default())?;
    for (saved, expected) in [(&third, 0), (&second, 1), (&first, 1)] {
        guest.forget_lines()?;
        let restored = saved.restore_saved(&RestoreOptions::default())?;
        assert_eq!(restored.report.disks.len(), expected, "{:?}", restored.report.disks);
        let mut qemu = restored.qemu.ok_or("a QEMU was started")?;
        let drives = qemu.vm().drives()?;
        let disk = drives.iter().find(|drive| drive.id == "disk0").ok_or("no disk")?;
        let image = &disk.image().ok_or("no image")?.path;
        assert_eq!(*image == overlay, expected == 0, "{image}");
        guest.counts_on_in(&mut qemu, 2)?;
    }
    Ok(())
}

#[test]
fn nodes_in_json_are_frozen_and_come_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let images = tempfile::tempdir()?;
    let image = images.path().join("data.raw");
    fs::File::create_new(&image)?.set_len(16 << 20)?;
    let file = json!({"driver": "file", "node-name": "f0", "filename": image}).to_string();
    let format = json!({"driver": "raw", "node-name": "d0", "file": "f0"}).to_string();
    let arguments =
        ["-blockdev", &file, "-blockdev", &format, "-device", "virtio-blk-pci,drive=d0"];
    let config = Guest::linux(Ram::private(256)).arguments(arguments);
    let mut guest = config.boot_to(&qemu, 1)?;
    let saved = guest.save(&with_disks(Route::Auto))?;
    let disks = &saved.report.disks;
    assert_eq!(disks.len(), 1, "{disks:?}");
    saved.comes_back_on(&qemu, Mode::Auto)?;
    guest.runs_on(1)?;
    let info = Command::new("qemu-img").args(["info", "-U"]).arg(&disks[0].overlay).output()?;
    let info = String::from_utf8_lossy(&info.stdout).into_owned();
    assert!(info.contains("backing file format: raw"), "{info}");
    Ok(())
}

#[test]
fn a_disk_that_is_no_file_is_refused_before_the_guest_is_paused() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let node = "driver=null-co,node-name=n0,size=1048576";
    let config = Guest::boot_sector(Ram::private(64)).arguments(["-blockdev", node, "-device"]);
    let config = config.arguments(["virtio-blk-pci,id=none,drive=n0"]);
    let mut guest = config.boot_to(&qemu, 1)?;
    let error = guest.save_fails(&with_disks(Route::Auto))?;
    assert!(matches!(error, SaveError::Disk { .. }), "{error}");
    assert!(error.to_string().contains("its format is \"null-co\""), "{error}");
    assert_eq!(guest.status()?, "running");
    Ok(())
}

/// Below the overlays of a restore, QEMU finds backing files by the headers of the images. The
/// guest read other bytes than before, and both verbs exited with 0.
#[test]
fn an_image_below_that_only_the_command_line_names_is_refused() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let images = tempfile::tempdir()?;
    let create = |name: &str, below: Option<&str>| -> TestResult<PathBuf> {
        let path = images.path().join(name);
        let mut options = vec!["-f", "qcow2"];
        options.extend(below.iter().flat_map(|below| ["-F", "qcow2", "-b", below]));
        make_image(&path, &options, 1)?;
        Ok(path)
    };
    create("named.qcow2", None)?;
    let other = create("other.qcow2", None)?;
    let top = create("top.qcow2", Some("named.qcow2"))?;
    let file = |path: &Path| json!({"driver": "file", "filename": path});
    let below = json!({"driver": "qcow2", "node-name": "o", "read-only": true,
        "file": file(&other)});
    for (backing, is_named) in [(json!("o"), false), (json!(null), false), (json!(""), true)] {
        let mut node = json!({"driver": "qcow2", "node-name": "t", "file": file(&top)});
        if !is_named {
            node["backing"] = backing.clone();
        }
        let (below, node) = (below.to_string(), node.to_string());
        let words = ["-blockdev", &below, "-blockdev", &node, "-device", "virtio-blk-pci,drive=t"];
        let mut guest = Guest::boot_sector(Ram::private(64)).arguments(words).boot_to(&qemu, 1)?;
        if is_named {
            let report = guest.save(&with_disks(Route::Auto))?.report;
            assert!(report.disks.iter().any(|disk| Path::new(&disk.image) == top));
            continue;
        }
        let error = guest.save_fails(&with_disks(Route::Auto))?.to_string();
        assert!(error.contains("named.qcow2 below it, and the VM has"), "{backing}: {error}");
        assert_eq!(guest.status()?, "running");
    }
    Ok(())
}

/// From about the 13th save on, every save failed: the name of each overlay contained that of the
/// image below, until the names, and QEMU's names of the whole chain, were too long.
#[test]
fn a_vm_is_saved_with_its_disks_twenty_times_in_a_row() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = config(Ram::private(96)).boot_to(&qemu, 1)?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    for number in 1..=20 {
        let file = directory.path().join("a-name-that-is-not-short-at-all.vmf");
        let options = with_disks(Route::Auto).existing(Existing::Replace);
        let report = save_with(&guest, &file, &options)?;
        let [disk] = report.disks.as_slice() else { return Err("one disk".into()) };
        assert_eq!(disk.depth, number + 1);
        let expected = format!("disk.vmfile-{number}.qcow2");
        assert!(disk.overlay.ends_with(&expected), "{} {expected}", disk.overlay);
        let warned = report.warnings.iter().any(|warning| warning.contains("images on top"));
        assert_eq!(warned, disk.depth >= 16, "{:?}", report.warnings);
    }
    guest.runs_on(1)
}

/// If QEMU cannot make all overlays, it removes those that it made from the disks, but leaves their
/// files.
#[test]
fn overlays_that_were_made_for_nothing_are_removed() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let full = requires!(Mount::tmpfs(1));
    let directory = tempfile::tempdir()?;
    let (first, second) = (directory.path().join("a.raw"), full.path().join("b.raw"));
    fs::write(&first, [0; 4096])?;
    // Fills the file system.
    while fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&second)?
        .write_all(&[1; 512])
        .is_ok()
    {}
    let drive = |path: &Path| format!("file={},format=raw,if=virtio", path.display());
    let config = Guest::boot_sector(Ram::private(64)).fill_mib(32);
    let config = config.arguments(["-drive", &drive(&first), "-drive", &drive(&second)]);
    let mut guest = config.boot_to(&qemu, 1)?;

    let error = guest.save_fails(&with_disks(Route::Direct))?;
    assert!(error.to_string().contains("No space left"), "{error}");
    let names = |path: &Path| -> TestResult<Vec<_>> {
        let entries = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name()));
        entries.collect()
    };
    assert_eq!(names(directory.path())?, ["a.raw"]);
    assert_eq!(names(full.path())?, ["b.raw"]);
    guest.runs_on(2)
}
