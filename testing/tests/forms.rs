//! VMs whose command line is written in another way than most: they come back all the same.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::json;
use vmfile::restore::{Destination, Mode, ModeUsed, RestoreOptions};
use vmfile::save::{After, SaveOptions};
use vmfile::{Control, Snapshot, Vm};
use vmfile_testing::{Guest, Qemu, Ram, Release, TestResult, requires};

/// QEMU rounds the machine's RAM up to 8 KiB; no mode restored such a VM.
#[test]
fn a_vm_whose_ram_qemu_rounds_up_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::machine(64)).seed(401).arguments(["-m", "65534K"]);
    let saved = config.boot_to(&qemu, 1)?.save(&SaveOptions::default())?;
    saved.comes_back(&qemu, [Mode::Map, Mode::Load, Mode::Stream])
}

/// Connects to a socket as soon as it is there, and reads until it is closed.
fn client(socket: &Path) -> JoinHandle<()> {
    let socket = socket.to_path_buf();
    thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Ok(mut stream) = UnixStream::connect(&socket) {
                let _ = stream.read_to_end(&mut Vec::new());
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    })
}

/// QEMU waits at its start until a client has connected to such a socket. A restore waited for QEMU's
/// first answer, and gave up after a minute.
#[test]
fn a_vm_with_a_socket_that_waits_for_a_client_comes_back_without_one() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir()?;
    let (serial, device) = (directory.path().join("serial"), directory.path().join("device"));
    let clients = [client(&serial), client(&device)];
    let config = Guest::boot_sector(Ram::private(64)).seed(402).arguments([
        "-serial".to_owned(),
        format!("unix:{},server", serial.display()),
        "-chardev".to_owned(),
        format!("socket,id=waits,path={},server=on,wait=on", device.display()),
    ]);
    let mut guest = config.boot_to(&qemu, 1)?;
    let saved = guest.save(&SaveOptions::default())?;
    guest.wait_for_exit()?;
    clients.into_iter().for_each(|client| client.join().expect("no panic"));
    let mut restored = saved.restore_saved(&RestoreOptions::default())?;
    let warnings = &restored.report.warnings;
    let expected = "-serial, -chardev waits for no client: QEMU would not start until one connects";
    assert!(warnings.iter().any(|warning| warning == expected), "{warnings:?}");
    let qemu = restored.qemu.as_mut().ok_or("a QEMU was started")?;
    guest.counts_on_in(qemu, 2)
}

/// What a mapping does not have was dropped without a word.
#[test]
fn a_restore_by_map_says_which_properties_of_the_ram_it_does_not_keep() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::memfd(64)).seed(403).boot_to(&qemu, 1)?;
    let saved = guest.save(&SaveOptions::default())?;
    guest.wait_for_exit()?;
    let restored = saved.restore_saved(&RestoreOptions::default())?;
    assert_eq!(restored.report.mode, ModeUsed::Map);
    let warnings = &restored.report.warnings;
    let is_said =
        |warning: &String| warning.contains("share is not kept: RAM is mapped from the file");
    assert!(warnings.iter().any(is_said), "{warnings:?}");
    drop(restored);
    let loaded = saved.restore_saved(&RestoreOptions::default().mode(Mode::Load))?;
    assert_eq!(loaded.report.warnings, [""; 0]);
    Ok(())
}

/// A QEMU, which is killed when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `-machine q35` is another machine in another version of QEMU: after an upgrade, the saved command
/// line made a machine that could not take the state.
#[test]
fn a_vm_comes_back_after_its_qemu_was_upgraded() -> TestResult {
    let (old, new) =
        (requires!(Qemu::of(Release::Distribution)), requires!(Qemu::of(Release::Newest)));
    let directory = tempfile::tempdir()?;
    let bin = directory.path().join("usr/bin");
    fs::create_dir_all(&bin)?;
    // The newest one finds its libraries from where it is.
    let tree = new.program().ancestors().nth(3).ok_or("a tree")?.canonicalize()?;
    symlink(tree.join("usr/lib"), directory.path().join("usr/lib"))?;
    symlink(tree.join("lib"), directory.path().join("lib"))?;
    let program = bin.join("qemu-system-x86_64");
    let machines = [&["-machine", "q35,smm=off"][..], &["-M", "pc"], &[]];
    for (number, machine) in machines.into_iter().enumerate() {
        let socket = directory.path().join(format!("qmp-{number}"));
        let file = directory.path().join("vm.vmf");
        fs::copy(old.executable()?, &program)?;
        let mut command = Command::new(&program);
        command.args(["-nodefaults", "-display", "none", "-m", "64M", "-accel", "tcg"]);
        command.args(["-L", "/usr/share/qemu", "-L", "/usr/share/seabios"]).args(machine);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        let running = Running(command.spawn()?);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let (mut vm, control) = (Vm::connect(&socket)?, Control::none());
        let options = SaveOptions::default().after(After::Quit);
        vmfile::save::save(&mut vm, &file, &options, &control)?;
        drop(running);
        fs::remove_file(&program)?;
        fs::copy(new.program(), &program)?;

        let snapshot = Snapshot::open(&file, 0)?;
        let options = RestoreOptions::default();
        let restored = vmfile::restore::restore(&snapshot, Destination::Saved, &options, &control)?;
        let mut qemu = restored.qemu.ok_or("a QEMU was started")?;
        let version = qemu.vm().execute("query-version", json!({}))?;
        assert_eq!(version["qemu"]["major"], new.version().major, "{version}");
        drop(qemu);
        fs::remove_file(&file)?;
    }
    Ok(())
}
