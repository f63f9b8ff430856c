//! VMs whose command line is written in another way than most: they come back all the same.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use vmfile::restore::{Destination, Mode, ModeUsed, RestoreOptions};
use vmfile::save::{After, SaveOptions};
use vmfile::{Control, Snapshot, Vm};
use vmfile_qemu::{RunState, VmAddress};
use vmfile_testing::{Guest, Mount, Qemu, Ram, Release, TestResult, requires};

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
        wait_for(&socket);
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

/// Waits until a socket is there.
fn wait_for(socket: &Path) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !socket.exists() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
}

/// The control group, network, limits and environment of a restored VM are those of vmfile's process: that
/// was not said.
#[test]
fn what_a_vm_had_from_those_who_started_it_is_said_if_it_has_that_no_more() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let groups = requires!(Mount::control_groups());
    let directory = tempfile::tempdir()?;
    let group = groups.path().join(format!("vmfile-test-{}", std::process::id()));
    fs::create_dir(&group)?;
    let (socket, file) = (directory.path().join("qmp"), directory.path().join("vm.vmf"));
    let script = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", group.display());
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh", "unshare", "--net"]);
    command.args(["env", "TMPDIR=/var/tmp", "MALLOC_ARENA_MAX=2"]).arg(qemu.program());
    command.args(["-nodefaults", "-display", "none", "-m", "64M", "-accel", "tcg"]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
    let running = Running(command.spawn()?);
    wait_for(&socket);
    let limits = getrlimit(Resource::Nofile);
    let had = limits.current.ok_or("a limit of open files")?;
    setrlimit(Resource::Nofile, Rlimit { current: Some(had - 1), ..limits })?;
    let (mut vm, control) = (Vm::connect(&socket)?, Control::none());
    let options = SaveOptions::default().after(After::Quit);
    vmfile::save::save(&mut vm, &file, &options, &control)?;
    drop((vm, running));
    fs::remove_dir(&group)?;

    let snapshot = Snapshot::open(&file, 0)?;
    let restore = |destination| {
        vmfile::restore::restore(&snapshot, destination, &RestoreOptions::default(), &control)
    };
    let restored = restore(Destination::Saved)?;
    setrlimit(Resource::Nofile, limits)?;
    let said = restored.report.warnings.join("\n");
    let limit = format!("Max open files {} (it was {had})", had - 1);
    for expected in [
        "ran in the control group /vmfile-test-",
        "ran in the network namespace net:[",
        limit.as_str(),
        "other values of MALLOC_ARENA_MAX, TMPDIR in its environment",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    drop(restored);
    // Where the user gives the command line, the rest is theirs as well.
    let words = vec![qemu.program().display().to_string()];
    let line = ["-nodefaults", "-display", "none", "-m", "64M", "-accel", "tcg"];
    let words = words.into_iter().chain(line.map(str::to_owned)).collect();
    let given = restore(Destination::Command(words))?;
    assert_eq!(given.report.warnings, [""; 0]);
    Ok(())
}

/// A boot sector that writes the second sector of its disk again and again.
fn writer() -> Vec<u8> {
    // mov ax, 0x0301; mov bx, 0x7c00; mov cx, 2; mov dx, 0x80; int 0x13; jmp to the start
    let mut sector =
        vec![0xb8, 1, 3, 0xbb, 0, 0x7c, 0xb9, 2, 0, 0xba, 0x80, 0, 0xcd, 0x13, 0xeb, 0xf0];
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

/// A guest that waits on an I/O error was refused. The write that failed is repeated where it is restored.
#[test]
fn a_guest_that_waits_on_an_io_error_comes_back_and_repeats_the_write() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let at = |name: &str| directory.path().join(name);
    fs::write(at("disk.raw"), writer())?;
    fs::write(
        at("errors"),
        "[inject-error]\nevent = \"pwritev\"\nerrno = \"28\"\nonce = \"on\"\n",
    )?;
    let socket = at("qmp");
    let line = |drive: String| {
        let qmp = format!("unix:{},server=on,wait=off", socket.display());
        let words = ["-nodefaults", "-display", "none", "-m", "32M", "-accel", "tcg", "-qmp", &qmp];
        let drive = format!("{drive},format=raw,if=ide,id=disk0");
        words.map(str::to_owned).into_iter().chain(["-drive".to_owned(), drive]).collect::<Vec<_>>()
    };
    let failing = format!("file=blkdebug:{}:{}", at("errors").display(), at("disk.raw").display());
    let running = Running(Command::new(qemu.program()).args(line(failing)).spawn()?);
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut vm = loop {
        match Vm::connect(&socket) {
            Ok(vm) => break vm,
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    while vm.run_state()? != RunState::IoError {
        assert!(Instant::now() < deadline, "the guest writes: {:?}", vm.run_state()?);
        thread::sleep(Duration::from_millis(20));
    }
    let (file, control) = (at("vm.vmf"), Control::none());
    let options = SaveOptions::default().after(After::Quit).changed_ok(true);
    vmfile::save::save(&mut vm, &file, &options, &control)?;
    drop(running);

    let snapshot = Snapshot::open(&file, 0)?;
    let program = qemu.program().to_str().ok_or("UTF-8")?.to_owned();
    let sound = line(format!("file={}", at("disk.raw").display()));
    let options = RestoreOptions::default().disks_changed_ok(true);
    for mode in [Mode::Map, Mode::Load, Mode::Stream] {
        let words = std::iter::once(program.clone()).chain(sound.clone()).collect();
        let destination = Destination::Command(words);
        let options = options.clone().mode(mode);
        let restored = vmfile::restore::restore(&snapshot, destination, &options, &control)?;
        assert_eq!((restored.report.running, &*restored.report.run_state), (false, "io-error"));
        let mut qemu = restored.qemu.ok_or("a QEMU was started")?;
        qemu.vm().cont()?;
        thread::sleep(Duration::from_millis(200));
        assert_eq!(qemu.vm().run_state()?, RunState::Running, "the write succeeds now");
    }
    Ok(())
}

/// `qemu-img` pads a copy with zeros, and QEMU loads it.
#[test]
fn a_copy_that_was_padded_with_zeros_is_restored() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(405).boot_to(&qemu, 1)?;
    let saved = guest.save_and_end(&SaveOptions::default())?;
    let disk = saved.directory.path().join("disk.qcow2");
    for (from, to, format) in [(&saved.file, &disk, "qcow2"), (&disk, &saved.file, "raw")] {
        let mut command = Command::new("qemu-img");
        let source = if format == "raw" { "qcow2" } else { "raw" };
        command.args(["convert", "-f", source, "-O", format]).arg(from).arg(to);
        assert!(command.status()?.success());
    }
    let len = fs::metadata(&saved.file)?.len();
    fs::File::options().write(true).open(&saved.file)?.set_len(len + (3 << 20))?;
    vmfile_testing::verbs::check_is_clean(&saved.file)?;
    let mut restored = saved.restore_saved(&RestoreOptions::default())?;
    guest.counts_on_in(restored.qemu.as_mut().ok_or("a QEMU was started")?, 2)
}

/// QEMU 11.1 makes monitors by `-object monitor-qmp`: `list` and `save PID` did not find them.
#[test]
fn a_monitor_that_is_an_object_is_found_and_its_vm_comes_back() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let socket = directory.path().join("qmp");
    let tree = qemu.program().ancestors().nth(3).ok_or("a tree")?.canonicalize()?;
    let mut command = Command::new(qemu.program());
    command.args(["-nodefaults", "-display", "none", "-m", "32M", "-accel", "tcg"]);
    for place in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(tree.join(place));
    }
    let device = format!("socket,id=c,path={},server=on,wait=off", socket.display());
    command.args(["-chardev", &device, "-object", "monitor-qmp,id=m,chardev=c"]);
    let running = Running(command.spawn()?);
    let deadline = Instant::now() + Duration::from_secs(30);
    let address = VmAddress::Pid(running.0.id());
    let mut vm = loop {
        match vmfile_qemu::resolve(&address).map(|path| Vm::connect(&path)) {
            Ok(Ok(vm)) => break vm,
            found if Instant::now() > deadline => return Err(format!("{found:?}").into()),
            _ => thread::sleep(Duration::from_millis(20)),
        }
    };
    let (file, control) = (directory.path().join("vm.vmf"), Control::none());
    vmfile::save::save(&mut vm, &file, &SaveOptions::default(), &control)?;
    drop(running);
    let snapshot = Snapshot::open(&file, 0)?;
    let options = RestoreOptions::default();
    let restored = vmfile::restore::restore(&snapshot, Destination::Saved, &options, &control)?;
    assert_eq!(restored.report.qmp, Some(socket));
    // vmfile's own monitor is such an object as well: for `-mon` QEMU 11.1 has a warning at every start. The
    // next restore leaves it out and adds a new one.
    let mut qemu = restored.qemu.ok_or("a QEMU was started")?;
    let again = directory.path().join("again.vmf");
    vmfile::save::save(qemu.vm(), &again, &SaveOptions::default(), &control)?;
    drop(qemu);
    let saved = Snapshot::open(&again, 0)?;
    let line = &saved.manifest().ok_or("a manifest")?.meta.vm.command_line;
    let own = "monitor-qmp,id=vmfile-control,chardev=vmfile-control";
    assert_eq!(line.iter().filter(|word| *word == own).count(), 1, "{line:?}");
    assert!(!line.iter().any(|word| word == "-mon"), "{line:?}");
    let restored = vmfile::restore::restore(&saved, Destination::Saved, &options, &control)?;
    assert!(restored.qemu.is_some());
    Ok(())
}
