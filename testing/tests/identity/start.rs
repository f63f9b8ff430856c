//! How QEMU was started: the files that it read, its working directory, and its name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use vmfile::error::SaveError;
use vmfile::restore::{Destination, RestoreOptions, restore};
use vmfile::save::{SaveOptions, save};
use vmfile::{Control, LaunchError, RestoreError, Snapshot, Vm};
use vmfile_testing::{Guest, Qemu, Ram, Release, TestResult, requires};

use super::{goes_on, names};

/// The saved line held the contents that the configuration file had when the VM was saved, and not
/// those that QEMU had read. A missing file for the guest was noticed only by the restore, when the
/// VM had ended.
#[test]
fn files_that_qemu_read_and_that_are_not_there_any_more_are_named() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    fs::write(at("vm.conf"), "[device \"v\"]\n  driver = \"virtio-rng-pci\"\n")?;
    fs::write(at("blob"), "words")?;
    let blob = format!("name=opt/org.example,file={}", at("blob").display());
    let config = Guest::boot_sector(Ram::private(64)).seed(44);
    let config = config.arguments(["-readconfig", &at("vm.conf").display().to_string()]);
    let mut guest = config.arguments(["-fw_cfg", &blob]).boot_to(&qemu, 1)?;

    let later = SystemTime::now() + Duration::from_secs(60);
    fs::File::options().append(true).open(at("vm.conf"))?.set_modified(later)?;
    fs::rename(at("blob"), at("elsewhere"))?;
    let error = guest.save_fails(&SaveOptions::default())?;
    let SaveError::Changed { changes } = &error else { return Err(error.into()) };
    let expected = [
        format!("-readconfig {}", at("vm.conf").display()),
        format!("-fw_cfg {}", at("blob").display()),
    ];
    assert_eq!(names(changes), expected);

    fs::File::options().append(true).open(at("vm.conf"))?.set_modified(SystemTime::UNIX_EPOCH)?;
    fs::rename(at("elsewhere"), at("blob"))?;
    let saved = guest.save_and_end(&SaveOptions::default())?;
    goes_on(&guest, &mut saved.restore_saved(&RestoreOptions::default())?)
}

/// A QEMU in the background, by its directory. Dropping this ends QEMU; a QEMU that has ended by
/// itself has removed its pid file.
struct Daemon<'a>(&'a Path);

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.0.join("pid")).ok();
        let pid = pid.and_then(|pid| Pid::from_raw(pid.trim().parse().ok()?));
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Starts a QEMU in `directory`, saves it and restores it with the saved command line.
fn comes_back(program: &Path, directory: &Path, more: &[&str]) -> TestResult {
    let daemon = Daemon(directory);
    let output = Command::new(program)
        .args(["-nodefaults", "-display", "none", "-m", "64M", "-machine", "accel=tcg"])
        .args(["-qmp", "unix:q.sock,server=on,wait=off", "-daemonize", "-pidfile", "pid"])
        .args(more)
        .current_dir(directory)
        .env("PWD", directory)
        .output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let file = directory.join("vm.vmf");
    let control = Control::none();
    let mut vm = Vm::connect(&directory.join("q.sock"))?;
    let report = save(&mut vm, &file, &SaveOptions::default(), &control)?;
    assert_eq!(report.warnings, [""; 0]);
    assert_eq!(report.changes, []);
    drop(daemon);
    let snapshot = Snapshot::open(&file, 0)?;
    let options = RestoreOptions::default();
    let mut restored = restore(&snapshot, Destination::Saved, &options, &control)?;
    let qemu = restored.qemu.as_mut().ok_or("a QEMU was started")?;
    qemu.vm().execute("query-status", json!({}))?;
    assert!(directory.join("q.sock").exists(), "the monitor is where it was");
    Ok(())
}

/// A QEMU with `-daemonize` changes its directory to `/`: a restore looked for its disks there and
/// made its sockets there.
#[test]
fn relative_names_of_a_daemon_are_found_again() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir()?;
    fs::File::create_new(directory.path().join("d.raw"))?.set_len(1 << 20)?;
    fs::write(directory.path().join("blob"), "words")?;
    let more = ["-drive", "file=d.raw,format=raw,if=virtio", "-fw_cfg", "name=opt/x,file=blob"];
    comes_back(qemu.program(), directory.path(), &more)
}

/// vmfile did not recognize a QEMU under another name: it compared nothing, and the file had no
/// command line.
#[test]
fn a_qemu_of_any_name_is_known_by_its_monitor() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir()?;
    let program = directory.path().join("emulator");
    fs::copy(qemu.executable()?, &program)?;
    symlink(&program, directory.path().join("vm"))?;
    let bios = ["-L", "/usr/share/qemu", "-L", "/usr/share/seabios"];
    comes_back(&directory.path().join("vm"), directory.path(), &bios)
}

/// The file named a directory that ended with ` (deleted)`, and the restore said that QEMU was not there.
#[test]
fn a_working_directory_that_is_gone_is_named_by_save_and_restore() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let (here, socket) = (at("here"), at("q.sock"));
    fs::create_dir(&here)?;
    let qmp = format!("unix:{},server=on,wait=off", socket.display());
    let mut child = Command::new(qemu.program())
        .args(["-m", "16", "-display", "none", "-nodefaults", "-qmp", &qmp])
        .current_dir(&here)
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while !socket.exists() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    let options = SaveOptions::default();
    let save = |name: &str, options: &SaveOptions| {
        save(&mut Vm::connect(&socket).expect("a monitor"), &at(name), options, &Control::none())
    };
    let restore = |name: &str| -> TestResult<_> {
        let snapshot = Snapshot::open(&at(name), 0)?;
        let options = RestoreOptions::default();
        Ok(restore(&snapshot, Destination::Saved, &options, &Control::none()))
    };
    let saved = save("vmf", &options);
    if saved.is_err() {
        child.kill()?;
    }
    child.wait()?;
    saved?;

    fs::remove_dir(&here)?;
    let error = restore("vmf")?.expect_err("no directory");
    assert!(matches!(error, RestoreError::Launch(LaunchError::Directory { .. })), "{error:?}");
    assert!(error.to_string().contains(&here.display().to_string()), "{error}");
    fs::create_dir(&here)?;
    let restored = restore("vmf")??;

    fs::remove_dir(&here)?;
    let name = format!("working directory {}", here.display());
    let error = save("none", &options).expect_err("it is gone");
    let SaveError::Changed { changes } = &error else { return Err(error.into()) };
    assert_eq!(names(changes), [name.as_str()]);
    save("without", &options.changed_ok(true))?;
    drop(restored);
    let error = restore("without")?.expect_err("no directory");
    let RestoreError::CannotRemake { what } = &error else { return Err(error.into()) };
    assert!(what.iter().any(|what| what.starts_with(&name)), "{what:?}");
    Ok(())
}
