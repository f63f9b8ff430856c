//! Images: what a running VM has is what a command line names, what a file records, and what a
//! restore gives back, in whatever way the line is written.

use std::fs;
use std::path::Path;

use vmfile::restore::{Destination, RestoreOptions, Restored};
use vmfile::{Control, RestoreError, Snapshot, Vm};
use vmfile_qemu::CommandLine;
use vmfile_testing::verbs::save;
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, requires};

/// Makes an empty raw image.
fn raw(path: &Path) -> TestResult {
    Ok(fs::File::create(path)?.set_len(4 << 20)?)
}

/// A guest in the boot sector, with `more` arguments.
fn guest(more: &[&str]) -> GuestConfig {
    Guest::boot_sector(Ram::private(64)).arguments(more.iter().copied())
}

/// Holds what the line of a running VM makes against what QEMU says it has.
fn line_and_vm_agree(qemu: &Qemu, more: &[&str], expected: usize) -> TestResult {
    let guest = guest(more).boot(qemu)?;
    let mut vm = Vm::connect(&guest.qmp_path())?;
    let process = vm.process()?;
    let mut line = CommandLine::from_process(&process.arguments)?;
    line.expand_config(|path| fs::read_to_string(path))?;
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

/// The kind: a command line was believed to name an image as `file=PATH` and in no other way, so
/// that what was written otherwise was not found, and the VM came back on whatever the line said.
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
    // The boot sector is on ide0-hd0 and counts with each.
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
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
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

/// A1: a VM that was started with `-readconfig` came back with whatever the file said by then, and
/// its drives were on no line that a restore could read.
#[test]
fn a_configuration_file_is_in_the_saved_line_and_not_needed_any_more() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let files = tempfile::tempdir()?;
    let image = files.path().join("data.raw");
    raw(&image)?;
    let config = files.path().join("vm.conf");
    let text = format!(
        "[drive \"d0\"]\n  file = \"{}\"\n  format = \"raw\"\n  if = \"virtio\"\n",
        image.display()
    );
    fs::write(&config, text)?;
    let mut guest = guest(&["-readconfig", &config.display().to_string()]).boot(&qemu)?;
    guest.wait_for_count(1)?;
    let file = files.path().join("vm.vmf");
    save(&guest, &file)?;
    guest.wait_for_exit()?;
    fs::remove_file(&config)?;
    let mut restored = restore_saved(&file, &RestoreOptions::default())?;
    let drives = restored.qemu.as_mut().ok_or("a QEMU was started")?.vm().drives()?;
    let drive = drives.iter().find(|drive| drive.id == "d0").ok_or("no drive d0")?;
    assert_eq!(drive.image().map(|image| Path::new(&image.path)), Some(&*image));
    Ok(())
}

/// Restores into a QEMU that is started with the saved command line.
fn restore_saved(file: &Path, options: &RestoreOptions) -> Result<Restored, RestoreError> {
    let snapshot = Snapshot::open(file, 0)?;
    vmfile::restore::restore(&snapshot, Destination::Saved, options, &Control::none())
}
