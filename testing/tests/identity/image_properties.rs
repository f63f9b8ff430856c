//! Drives whose images are those of the command line, but with other properties.

use std::path::Path;

use serde_json::{Value, json};
use vmfile::error::SaveError;
use vmfile::restore::{RestoreOptions, Restored};
use vmfile::save::SaveOptions;
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, make_image, requires};

use super::{ask, changes, goes_on, images, names};

fn qcow2(path: &Path, more: &[&str]) -> TestResult {
    make_image(path, &[&["-f", "qcow2"], more].concat(), 4)
}

/// Images in a directory: `0.raw` to `2.raw`, `a.qcow2`, `b.qcow2` and `c.qcow2`, and `o.qcow2` on
/// top of `a.qcow2`.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> TestResult<Files> {
        let files = Files(tempfile::tempdir()?);
        images(files.0.path(), 3)?;
        for name in ["a", "b", "c"] {
            qcow2(Path::new(&files.at(&format!("{name}.qcow2"))), &[])?;
        }
        qcow2(Path::new(&files.at("o.qcow2")), &["-F", "qcow2", "-b", &files.at("a.qcow2")])?;
        Ok(files)
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn file(&self, name: &str) -> Value {
        json!({"driver": "file", "filename": self.at(name)})
    }

    fn window(&self, offset: u64) -> Value {
        json!({"driver": "raw", "node-name": "w", "offset": offset, "size": 1 << 20,
            "file": self.file("0.raw")})
    }

    /// A qcow2 image that begins within a file.
    fn slice(&self) -> TestResult<Value> {
        let image = std::fs::read(self.at("c.qcow2"))?;
        let begin = 1 << 16;
        let path = self.at("s.img");
        std::fs::write(&path, [vec![0; begin], image, vec![0; 1 << 20]].concat())?;
        Ok(json!({"driver": "qcow2", "node-name": "s",
            "file": {"driver": "raw", "offset": begin, "file": self.file("s.img")}}))
    }

    /// A guest with a window into a raw image, a quorum, and the options `more`.
    fn guest(&self, more: &[&str]) -> GuestConfig {
        let qcow2 = |name: &str| json!({"driver": "qcow2", "file": self.file(name)});
        let quorum = json!({"driver": "quorum", "node-name": "q", "vote-threshold": 1,
            "children": [qcow2("b.qcow2"), qcow2("c.qcow2")]});
        let device = |node: &str| format!("virtio-blk-pci,drive={node},id=d{node}");
        let config = Guest::boot_sector(Ram::private(64)).seed(43).fill_mib(32);
        let nodes = [self.window(1 << 20), quorum];
        let config = nodes
            .iter()
            .fold(config, |config, node| config.arguments(["-blockdev", &node.to_string()]));
        let config = config.arguments(["-device", &device("w"), "-device", &device("q")]);
        config.arguments(more.iter().copied())
    }
}

/// Expects that a save which would end the VM is refused, names only `drive`, and leaves the VM
/// running.
fn is_named(guest: &mut Guest, drive: &str) -> TestResult {
    let error = guest.save_fails(&SaveOptions::default())?;
    let SaveError::Changed { changes } = &error else { return Err(error.into()) };
    let [name] = &*names(changes) else { panic!("{error}") };
    assert!(name.contains(drive), "{error}");
    assert_eq!(guest.status()?, "running");
    Ok(())
}

/// The driver, write protection and size of the medium in the drive with this id.
fn medium(blocks: &Value, id: &str) -> TestResult<(Value, Value, Value)> {
    let drives = blocks.as_array().into_iter().flatten();
    let drive = drives.into_iter().find(|drive| drive["device"] == id).ok_or("no such drive")?;
    let inserted = &drive["inserted"];
    let size = inserted["image"]["virtual-size"].clone();
    Ok((inserted["drv"].clone(), inserted["ro"].clone(), size))
}

fn came_back(guest: &mut Guest, id: &str, options: &SaveOptions) -> TestResult {
    let before = medium(&guest.qmp("query-block", json!({}))?, id)?;
    let saved = guest.save_and_end(options)?;
    let warnings = &saved.report.warnings;
    assert!(
        warnings.iter().any(|warning| warning.contains("images of its quorum")),
        "{warnings:?}"
    );
    let mut restored: Restored = saved.restore_saved(&RestoreOptions::default())?;
    let after = medium(&ask(&mut restored, "query-block", json!({}))?, id)?;
    assert_eq!(after, before);
    goes_on(guest, &mut restored)
}

/// Only the paths were compared, and not the offset within the file, the format and the backing
/// file: the restored VM had other bytes on its disk, another disk, or none.
#[test]
fn an_image_that_is_used_in_another_way_than_on_the_line_is_named() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let files = Files::new()?;
        let rebased = json!({"driver": "qcow2", "node-name": "o", "file": files.file("o.qcow2"),
            "backing": {"driver": "qcow2", "file": files.file("a.qcow2")}});
        let filtered = json!({"driver": "throttle", "node-name": "f", "throttle-group": "t",
            "file": {"driver": "raw", "file": {"driver": "preallocate", "file": files.file("1.raw")}}});
        let slice = files.slice()?;
        let more = [
            "-object",
            "throttle-group,id=t",
            "-blockdev",
            &rebased.to_string(),
            "-device",
            "virtio-blk-pci,drive=o",
            "-blockdev",
            &filtered.to_string(),
            "-device",
            "virtio-blk-pci,drive=f",
            "-blockdev",
            &slice.to_string(),
            "-device",
            "virtio-blk-pci,drive=s",
        ];
        assert_eq!(changes(&files.guest(&more).boot_to(&qemu, 1)?)?, [], "{release:?}");

        let mut guest = files.guest(&[]).boot_to(&qemu, 1)?;
        guest.qmp("blockdev-reopen", json!({"options": [files.window(2 << 20)]}))?;
        is_named(&mut guest, "dw")?;
        guest.qmp("blockdev-reopen", json!({"options": [files.window(1 << 20)]}))?;

        let other = json!({"driver": "qcow2", "node-name": "n", "file": files.file("a.qcow2")});
        guest.qmp("blockdev-add", other)?;
        guest.qmp("x-blockdev-change", json!({"parent": "q", "node": "n"}))?;
        is_named(&mut guest, "dq")?;

        drop(guest);
        let top = json!({"driver": "qcow2", "node-name": "o", "file": files.file("o.qcow2")});
        let more = ["-blockdev", &top.to_string(), "-device", "virtio-blk-pci,drive=o,id=do"];
        let mut guest = files.guest(&more).boot_to(&qemu, 1)?;
        let rebase =
            json!({"device": "o", "image-node-name": "o", "backing-file": files.at("b.qcow2")});
        guest.qmp("change-backing-file", rebase)?;
        is_named(&mut guest, "do")?;
    }
    Ok(())
}

/// The format or write protection of a medium differs from the command line.
#[test]
fn a_medium_comes_back_in_its_format_and_with_its_write_protection() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        let files = Files::new()?;
        let change = |id: &str, name: &str, format: &str, mode: &str| {
            json!({"device": id, "filename": files.at(name), "format": format,
                "read-only-mode": mode})
        };
        let mut guest = files.guest(&["-cdrom", &files.at("a.qcow2")]).boot_to(&qemu, 1)?;
        let raw = change("ide1-cd0", "a.qcow2", "raw", "retain");
        guest.qmp("blockdev-change-medium", raw)?;
        is_named(&mut guest, "ide1-cd0")?;
        came_back(&mut guest, "ide1-cd0", &SaveOptions::default().changed_ok(true))?;

        let floppy = format!("if=floppy,format=raw,file={}", files.at("1.raw"));
        let mut guest = files.guest(&["-drive", &floppy]).boot_to(&qemu, 1)?;
        guest.qmp("blockdev-change-medium", change("floppy0", "1.raw", "raw", "read-only"))?;
        came_back(&mut guest, "floppy0", &SaveOptions::default())?;

        let locked = floppy + ",readonly=on";
        let mut guest = files.guest(&["-drive", &locked]).boot_to(&qemu, 1)?;
        guest.qmp("blockdev-change-medium", change("floppy0", "1.raw", "raw", "read-write"))?;
        came_back(&mut guest, "floppy0", &SaveOptions::default())?;
    }
    Ok(())
}
