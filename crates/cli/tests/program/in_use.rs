//! No verb replaces a file that a VM uses.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use vmfile::restore::Mode;
use vmfile_testing::verbs::restore;
use vmfile_testing::{Guest, GuestConfig, Missing, Ram, TestResult, requires};

use crate::guests::directory;
use crate::run::{Said, vmfile};
use crate::words;

/// Files that a VM uses, in their own directory.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> TestResult<Files> {
        let files = Files { directory: directory()? };
        for name in ["base.raw", "disc.iso", "blob", "initrd"] {
            fs::write(files.path(name), vec![7; 1 << 20])?;
        }
        let mut qemu_img = Command::new("qemu-img");
        qemu_img.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
        let status = qemu_img.args([files.path("base.raw"), files.path("disk.qcow2")]).status()?;
        assert!(status.success());
        Ok(files)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        let drive = format!("file={},if=none,id=x,format=qcow2", path("disk.qcow2"));
        let disc = format!("driver=file,node-name=cd,filename={},read-only=on", path("disc.iso"));
        let log = format!("file,id=log,path={}", path("serial.log"));
        let blob = format!("name=opt/vmfile/test,file={}", path("blob"));
        let words = [
            ["-drive", &drive],
            ["-device", "virtio-blk-pci,drive=x"],
            ["-blockdev", &disc],
            ["-device", "ide-cd,drive=cd,bus=ide.1"],
            ["-chardev", &log],
            ["-device", "isa-serial,chardev=log"],
            ["-fw_cfg", &blob],
        ];
        words.into_iter().flatten().map(str::to_owned).collect()
    }
}

/// Asserts that `run` refuses `path` because a QEMU uses it, and does not change the file.
fn refused(path: &Path, pid: u32, run: impl Fn(&Path) -> Said) -> TestResult {
    let before = fs::metadata(path)?;
    let said = run(path);
    let words = format!("{} is in use: the QEMU of process {pid} ", path.display());
    said.assert(5, &[&words, "hint: choose another name"]);
    let after = fs::metadata(path)?;
    assert_eq!((before.ino(), before.len()), (after.ino(), after.len()), "{}", path.display());
    Ok(())
}

fn config(files: &Files, seed: u32) -> GuestConfig {
    Guest::boot_sector(Ram::tmpfs(32)).seed(seed).arguments(files.arguments())
}

/// `save VM disk.qcow2 --force` onto an image of this VM exited with 0, and the disk was lost: QEMU
/// kept the replaced image open until it ended.
#[test]
fn a_file_that_the_vm_uses_is_not_replaced_by_any_name_or_verb() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let files = Files::new()?;
    let config = config(&files, 61);
    let mut guest = config.boot_to(&qemu, 1)?;
    let (vm, pid) = (guest.qmp_path(), guest.pid()?);
    let saved = directory()?;
    let whole = saved.path().join("vm.vmf");
    vmfile(words!["save", vm, whole, "--after", "resume"]).assert(0, &["saved"]);

    let ram = guest.ram_file("pc.ram").ok_or("a RAM file")?;
    let names = ["disk.qcow2", "base.raw", "disc.iso", "serial.log", "blob"];
    let paths: Vec<PathBuf> = names.iter().map(|name| files.path(name)).chain([ram]).collect();
    for path in &paths {
        let save = |path: &Path| vmfile(words!["save", vm, path, "--force", "--after", "resume"]);
        refused(path, pid, save)?;
        let link = files.path("link");
        symlink(path, &link)?;
        refused(&link, pid, save)?;
        fs::remove_file(&link)?;
        let hard = path.with_extension("hard");
        fs::hard_link(path, &hard)?;
        refused(&hard, pid, save)?;
        fs::remove_file(&hard)?;
        // Without --force, the hint does not suggest --force.
        refused(path, pid, |path| vmfile(words!["save", vm, path]))?;
        refused(path, pid, |path| vmfile(words!["receive", path, "--force"]))?;
        refused(path, pid, |path| {
            vmfile(words!["convert", whole, path, "--to", "stream", "--force"])
        })?;
        refused(path, pid, |path| vmfile(words!["bench", "--html", path]))?;
    }
    assert_eq!(guest.status()?, "running");
    // An existing file that no VM uses is replaced.
    vmfile(words!["save", vm, files.path("initrd"), "--force"]).assert(0, &["saved"]);
    Ok(())
}

/// A VM is saved and restored repeatedly under one name. It maps the file that it came from, and
/// loses nothing when a new file takes that name.
#[test]
fn the_file_that_a_vm_came_from_may_be_replaced_by_its_next_save() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(32)).seed(62);
    let guest = config.boot_to(&qemu, 1)?;
    let saved = directory()?;
    let file = saved.path().join("vm.vmf");
    vmfile(words!["save", guest.qmp_path(), file]).assert(0, &["saved"]);
    for after in ["resume", "quit"] {
        let guest = restore(&qemu, &config, &file, Mode::Map)?;
        let said = vmfile(words!["save", guest.qmp_path(), file, "--force", "--after", after]);
        said.assert(0, &["saved"]);
        if after == "resume" {
            guest.counts_on(1)?;
        }
    }
    let guest = restore(&qemu, &config, &file, Mode::Map)?;
    guest.counts_on(1)
}

/// A loop device; dropping it detaches it from its file.
struct Loop(PathBuf);

impl Loop {
    /// Attaches a loop device to `file`.
    fn on(file: &Path) -> Result<Loop, Missing> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8_lossy(&output.stdout);
                Ok(Loop(PathBuf::from(name.trim())))
            }
            _ => Err(Missing::beyond_setup("no loop device can be had here")),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A drop cannot fail; `losetup -a` lists a device that is left.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A save onto the file below the VM's own block device exited with 0, and the disk was lost.
#[test]
fn the_file_below_a_block_device_of_the_vm_is_not_replaced() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let files = directory()?;
    let disk = files.path().join("a.raw");
    fs::write(&disk, vec![7; 1 << 20])?;
    let device = requires!(Loop::on(&disk));
    let drive = format!("file={},format=raw,if=virtio", device.0.display());
    let config = Guest::boot_sector(Ram::tmpfs(32)).seed(63).arguments(["-drive", &drive]);
    let mut guest = config.boot_to(&qemu, 1)?;
    let (vm, pid) = (guest.qmp_path(), guest.pid()?);
    refused(&disk, pid, |path| vmfile(words!["save", vm, path, "--force"]))?;
    refused(&disk, pid, |path| vmfile(words!["receive", path, "--force"]))?;
    assert_eq!(guest.status()?, "running");
    // QEMU must end first: it uses the device.
    drop(guest);
    Ok(())
}
