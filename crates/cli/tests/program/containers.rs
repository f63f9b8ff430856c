//! VMs whose QEMU sees other files or processes than vmfile does.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use vmfile_testing::{Guest, Qemu, Ram, Release, TestResult, requires};

use crate::run::{Said, names_in, program, vmfile, wait_until};
use crate::words;

/// A guest whose QEMU has changed its root directory.
fn in_root(qemu: &Qemu, root: &Path) -> TestResult<Guest> {
    let config = Guest::boot_sector(Ram::private(64)).seed(81).data_share(100);
    let version = qemu.version();
    let words: [OsString; 2] = if version.major < 9 {
        ["-chroot".into(), root.into()]
    } else {
        ["-run-with".into(), format!("chroot={}", root.display()).into()]
    };
    let guest = config.arguments(words).boot_to(qemu, 1)?;
    Ok(guest)
}

/// vmfile waited 120 s, with the guest paused, for channels that could not connect, and the hint
/// named an option that `save` does not have.
#[test]
fn a_qemu_that_cannot_reach_the_socket_of_the_channels_is_said_to_at_once() -> TestResult {
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = requires!(Qemu::of(release));
        requires!(vmfile_testing::root());
        let empty = tempfile::tempdir()?;
        let mut guest = in_root(&qemu, empty.path())?;
        let file = guest.directory().join("vm.vmf");
        let arguments = words!["save", guest.qmp_path(), file, "--route", "stream"];
        let began = Instant::now();
        let said = vmfile(arguments.iter().chain(&words!["--channels", "2", "--after", "resume"]));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}: {said:?}", began.elapsed());
        said.assert(3, &["QEMU did not connect to /tmp/vmfile-", "without --channels"]);
        assert_eq!(guest.status()?, "running");
        assert!(!file.exists());
    }
    Ok(())
}

#[test]
fn channels_reach_a_qemu_that_has_another_root_directory() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(vmfile_testing::root());
    let root = tempfile::tempdir()?;
    fs::create_dir(root.path().join("tmp"))?;
    let guest = in_root(&qemu, root.path())?;
    // QEMU opens its images again after it has sent the VM.
    let line = fs::read_to_string(format!("/proc/{}/cmdline", guest.pid()?))?;
    let image = line.split('\0').find_map(|word| word.strip_prefix("file="));
    let image = image.and_then(|word| word.split(',').next()).ok_or("it boots an image")?;
    let inside = root.path().join(image.trim_start_matches('/'));
    fs::create_dir_all(inside.parent().ok_or("an absolute path")?)?;
    fs::copy(image, inside)?;
    let file = guest.directory().join("vm.vmf");
    let arguments = ["--route", "stream", "--channels", "2", "--after", "resume"];
    let arguments =
        words!["save", guest.qmp_path(), file].into_iter().chain(arguments.map(Into::into));
    vmfile(arguments).assert(0, &["saved"]);
    let left = names_in(&root.path().join("tmp"));
    assert!(!left.iter().any(|name| name.starts_with("vmfile-")), "{left:?}");
    vmfile(words!["check", file]).assert(0, &[]);
    Ok(())
}

/// Every route failed with "Success (os error 0)".
#[test]
fn a_qemu_of_another_pid_namespace_is_saved_by_its_stream() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(vmfile_testing::root());
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(82).boot_to(&qemu, 1)?;
    let file = guest.directory().join("vm.vmf");
    let save = |route: &str| -> TestResult<Said> {
        let arguments = words!["--pid", "--fork", "--mount-proc", program(), "save"];
        let rest = words![guest.qmp_path(), file, "--after", "resume", "--route", route];
        Ok(Command::new("unshare").args(arguments).args(rest).output()?.into())
    };
    save("direct")?
        .assert(3, &["a PID namespace that this process does not see", "run vmfile on the host"]);
    save("stream")?.assert(0, &["saved"]);
    vmfile(words!["check", file]).assert(0, &[]);
    assert_eq!(guest.status()?, "running");
    Ok(())
}

/// The guest ran, and then the restore failed, because it could not say which process QEMU is. `auto`
/// did not take the one mode that is possible.
#[test]
fn a_qemu_of_another_pid_namespace_that_waits_gets_the_vm_by_its_stream() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(vmfile_testing::root());
    let config = Guest::boot_sector(Ram::private(64)).seed(83);
    let saved = crate::guests::saved(&qemu, &config)?;
    let mut waiting = config.incoming(&qemu, "defer")?;
    let arguments = words!["--pid", "--fork", "--mount-proc", program(), "restore", saved.file];
    let rest = words!["--qmp", waiting.qmp_path(), "--disks-changed-ok", "--json"];
    let said = Said::from(Command::new("unshare").args(arguments).args(rest).output()?);
    said.assert(0, &["a PID namespace that this process does not see"]);
    let report = said.json()?;
    assert!(report["pid"].is_null() && report["mode"] == "stream", "{report}");
    waiting.runs_on(2)
}

/// A QEMU in its own mount namespace, where its monitor lies on a private file system.
struct Contained(Child);

impl Drop for Contained {
    fn drop(&mut self) {
        // A save may have ended it already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `list` and `save NAME` looked for the socket under the path that it has inside QEMU's container.
#[test]
fn a_vm_in_a_mount_namespace_is_listed_and_saved_by_its_name() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(vmfile_testing::root());
    let directory = tempfile::tempdir()?;
    let inside = directory.path().join("inside");
    fs::create_dir(&inside)?;
    for (number, monitor) in [inside.join("vm.sock"), "vm.sock".into()].into_iter().enumerate() {
        let name = format!("contained-{}-{number}", std::process::id());
        let script = "mount -t tmpfs none \"$0\" && cd \"$0\" && exec \"$@\"";
        let socket = format!("unix:{},server=on,wait=off", monitor.display());
        let words = words!["-m", "--propagation", "private", "sh", "-c", script, inside];
        let line = ["-m", "16", "-display", "none", "-nodefaults", "-accel", "tcg"];
        let mut command = Command::new("unshare");
        command.args(words).arg(qemu.program()).args(line);
        let child = command.args(["-name", &name, "-qmp", &socket]).spawn()?;
        let contained = Contained(child);
        wait_until("it is listed", || {
            let said = vmfile(words!["list", "--json"]);
            let vms = said.json().unwrap_or_default();
            let mut vms = vms.as_array().into_iter().flatten();
            vms.any(|vm| vm["name"] == *name && vm["reason"].is_null())
        })?;
        assert!(!inside.join("vm.sock").exists(), "it is seen from inside only");
        let file = directory.path().join(&name);
        vmfile(words!["save", name, file]).assert(0, &["saved"]);
        vmfile(words!["check", file]).assert(0, &[]);
        drop(contained);
    }
    Ok(())
}
