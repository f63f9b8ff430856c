//! VMs whose QEMU sees other files or processes than this program does.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use vmfile_testing::{Guest, Qemu, Ram, Release, TestResult, requires};

use crate::run::{Said, program, vmfile};
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
    let guest = config.arguments(words).boot(qemu)?;
    guest.wait_for_count(1)?;
    Ok(guest)
}

/// The guest stood still for 120 s while channels were waited for that could not come, and the hint
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
        let said = vmfile(arguments.iter().chain(&words!["--channels", "2"]));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}: {said:?}", began.elapsed());
        said.assert(3, &["QEMU did not connect to /tmp/vmfile-", "without --channels"]);
        assert_eq!(guest.status()?, "running");
        assert!(!file.exists());
        vmfile(arguments).assert(0, &["saved"]);
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
    let file = guest.directory().join("vm.vmf");
    let arguments = ["--route", "stream", "--channels", "2", "--after", "resume"];
    let arguments =
        words!["save", guest.qmp_path(), file].into_iter().chain(arguments.map(Into::into));
    vmfile(arguments).assert(0, &["saved"]);
    assert_eq!(fs::read_dir(root.path().join("tmp"))?.count(), 0);
    vmfile(words!["check", file]).assert(0, &[]);
    Ok(())
}

/// It was "Success (os error 0)", on every route.
#[test]
fn a_qemu_of_another_pid_namespace_is_saved_by_its_stream() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    requires!(vmfile_testing::root());
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(82).boot(&qemu)?;
    guest.wait_for_count(1)?;
    let file = guest.directory().join("vm.vmf");
    let save = |route: &str| -> TestResult<Said> {
        let arguments = words!["--pid", "--fork", "--mount-proc", program(), "save"];
        let rest = words![guest.qmp_path(), file, "--after", "resume", "--route", route];
        Ok(Command::new("unshare").args(arguments).args(rest).output()?.into())
    };
    save("direct")?
        .assert(5, &["a PID namespace that this process does not see", "run vmfile on the host"]);
    save("stream")?.assert(0, &["saved"]);
    vmfile(words!["check", file]).assert(0, &[]);
    assert_eq!(guest.status()?, "running");
    Ok(())
}
