//! Starts a QEMU that waits for a VM, and loads one into it.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{TestQemu, launch, line, program, sparse_file};
use vmfile_qemu::{
    CommandLine, CommandLineError, Launch, LaunchError, LaunchedQemu, LoadError, MappedBlock,
    RunState, Vm,
};

const RAM_LEN: u64 = 64 << 20;
const LOAD_TIMEOUT: Duration = Duration::from_secs(60);

fn wait_loaded(qemu: &mut LaunchedQemu) -> Result<(), LoadError> {
    qemu.vm().wait_loaded(Instant::now() + LOAD_TIMEOUT, &|| false)
}

/// Sends `stream` to a waiting QEMU, and waits until QEMU has loaded or refused it.
fn load(qemu: &mut LaunchedQemu, stream: Vec<u8>) -> Result<(), LoadError> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    qemu.vm().load_stream(OwnedFd::from(theirs))?;
    // QEMU may stop reading in the middle.
    let writer = thread::spawn(move || ours.write_all(&stream).is_ok());
    let loaded = wait_loaded(qemu);
    let _ = writer.join();
    loaded
}

/// Has QEMU write a paused VM as a stream.
fn migrate(vm: &mut Vm) -> Vec<u8> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    vm.qmp().execute_with_fd("getfd", json!({"fdname": "out"}), theirs.as_fd()).unwrap();
    drop(theirs);
    vm.execute("migrate", json!({"uri": "fd:out"})).unwrap();
    let mut stream = Vec::new();
    ours.read_to_end(&mut stream).unwrap();
    stream
}

/// Makes a stream of a machine type and the device sections, without any RAM.
fn stream_of(machine_type: &str, device_state: &[u8]) -> Vec<u8> {
    let mut stream = b"QEVM\0\0\0\x03\x07".to_vec();
    stream.extend(u32::try_from(machine_type.len()).unwrap().to_be_bytes());
    stream.extend(machine_type.as_bytes());
    stream.extend(device_state.get(8..).unwrap());
    // QEMU warns if there is no description; this one is empty.
    stream.extend(b"\x06\0\0\0\x02{}");
    stream
}

/// A file with `RAM_LEN` zero bytes at `offset`, open for reading.
fn ram_file(directory: &Path, offset: u64) -> (PathBuf, File) {
    let path = directory.join("ram, with a comma");
    sparse_file(&path, offset + RAM_LEN);
    let file = File::open(&path).unwrap();
    (path, file)
}

fn mapped(name: &str, path: PathBuf, offset: u64) -> MappedBlock {
    MappedBlock { block_name: name.to_owned(), size: RAM_LEN, path, offset }
}

#[test]
fn a_vm_goes_through_a_stream_and_runs_on() {
    let source = TestQemu::start(&["-machine", "pc"]);
    let mut vm = source.vm();
    vm.stop().unwrap();
    let stream = migrate(&mut vm);

    let waiting = line(&["-machine", "pc"]).for_incoming(&[]).unwrap();
    let mut qemu = launch(waiting).unwrap();
    qemu.vm().incoming_ready().unwrap();
    load(&mut qemu, stream).unwrap();

    assert_eq!(qemu.vm().run_state().unwrap(), RunState::Paused);
    qemu.vm().cont().unwrap();
    assert!(qemu.vm().is_running().unwrap());
    assert!(matches!(qemu.vm().incoming_ready(), Err(LoadError::NotWaiting { .. })));
}

#[test]
fn a_device_state_of_ours_is_loaded_by_another_qemu() {
    let source = TestQemu::start(&["-machine", "pc", "-device", "virtio-rng-pci"]);
    let mut vm = source.vm();
    vm.stop().unwrap();
    let state = vm.save_device_state(false).unwrap();
    let stream = stream_of(&vm.machine_type().unwrap(), &state);

    let options = ["-machine", "pc", "-device", "virtio-rng-pci"];
    let mut qemu = launch(line(&options).for_incoming(&[]).unwrap()).unwrap();
    load(&mut qemu, stream).unwrap();

    qemu.vm().cont().unwrap();
    assert!(qemu.vm().is_running().unwrap());
    assert_eq!(qemu.stderr(), "");
}

#[test]
fn a_refused_stream_tells_qemu_s_reason_and_its_log_says_more() {
    let mut qemu = launch(line(&[]).for_incoming(&[]).unwrap()).unwrap();
    let error = load(&mut qemu, b"no migration stream at all".to_vec()).unwrap_err();
    match error {
        LoadError::Failed { reason } => {
            assert!(!reason.is_empty());
            assert!(qemu.stderr().contains("Not a migration stream"), "{}", qemu.stderr());
        }
        // QEMU before 9.1 ends.
        LoadError::Ended => {
            let (_, words) = qemu.ended().unwrap().unwrap();
            assert!(words.contains("Not a migration stream"), "{words}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_stream_that_never_ends_can_be_cancelled() {
    let mut qemu = launch(line(&[]).for_incoming(&[]).unwrap()).unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    qemu.vm().load_stream(OwnedFd::from(theirs)).unwrap();
    let deadline = Instant::now() + LOAD_TIMEOUT;
    let cancelled = qemu.vm().wait_loaded(deadline, &|| true).unwrap_err();
    assert!(matches!(cancelled, LoadError::Cancelled), "{cancelled}");
    let late = qemu.vm().wait_loaded(Instant::now(), &|| false).unwrap_err();
    assert!(matches!(late, LoadError::TimedOut), "{late}");
}

#[test]
fn a_qemu_that_dies_while_it_loads_is_noticed() {
    let mut qemu = launch(line(&[]).for_incoming(&[]).unwrap()).unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    qemu.vm().load_stream(OwnedFd::from(theirs)).unwrap();
    let pid = qemu.pid().to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    let error = wait_loaded(&mut qemu).unwrap_err();
    assert!(matches!(error, LoadError::Ended), "{error}");
}

#[test]
fn a_qemu_that_does_not_wait_takes_no_stream() {
    let mut qemu = launch(line(&[])).unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let error = qemu.vm().load_stream(OwnedFd::from(theirs)).unwrap_err();
    assert!(error.to_string().starts_with("QEMU is running, expected inmigrate"), "{error}");
}

#[test]
fn the_machine_s_own_ram_is_mapped_from_an_inherited_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let (_, file) = ram_file(directory.path(), 1 << 20);
    let fd = OwnedFd::from(file);
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    for machine in
        [&["-machine", "q35"][..], &["-M", "pc,smm=off"], &["-mem-path", "/dev/shm"], &[]]
    {
        let line = line(machine).for_incoming(&[mapped("pc.ram", path.clone(), 1 << 20)]).unwrap();
        let fd = fd.try_clone().unwrap();
        // The number in the options must be that of the inherited descriptor.
        let line = renumbered(&line, &path, &fd);
        let mut qemu =
            Launch::new(program(), line).inherit(fd).spawn(support::START_TIMEOUT).unwrap();

        let backends = qemu.vm().memory_backends().unwrap();
        let backend = backends.first().unwrap();
        assert_eq!((backend.id.as_str(), backend.kind.as_str()), ("pc.ram", "memory-backend-file"));
        assert!(!backend.share);
        assert_eq!(qemu.vm().ram_blocks().unwrap().first().unwrap().name, "pc.ram");
        let class = qemu.vm().machine_type().unwrap();
        let expected = if machine.contains(&"q35") { "pc-q35-" } else { "pc-i440fx-" };
        assert!(class.starts_with(expected), "{machine:?}: {class}");
    }
}

fn renumbered(line: &CommandLine, path: &Path, fd: &OwnedFd) -> CommandLine {
    let new = format!("/proc/self/fd/{},", fd.as_raw_fd());
    let old = format!("{},", path.display());
    CommandLine::new(line.to_arguments().into_iter().map(|word| word.replace(&old, &new))).unwrap()
}

#[test]
fn backends_of_every_form_are_mapped_and_the_file_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let (path, file) = ram_file(directory.path(), 4096);
    for (options, name) in [
        (
            &[
                "-object",
                "memory-backend-memfd,id=ram0,size=64M,share=on",
                "-machine",
                "q35,memory-backend=ram0",
            ][..],
            "ram0",
        ),
        (
            &[
                "-object",
                r#"{"qom-type":"memory-backend-ram","id":"ram0","size":67108864}"#,
                "-numa",
                "node,memdev=ram0",
            ],
            "ram0",
        ),
        (
            &[
                "-m",
                "64M,slots=2,maxmem=1G",
                "-object",
                "memory-backend-ram,id=d0,size=64M",
                "-device",
                "pc-dimm,memdev=d0",
            ],
            "d0",
        ),
    ] {
        let line = line(options).for_incoming(&[mapped(name, path.clone(), 4096)]).unwrap();
        let mut qemu = launch(line).unwrap();
        let backends = qemu.vm().memory_backends().unwrap();
        let backend = backends.iter().find(|backend| backend.id == name).unwrap();
        assert_eq!(backend.kind, "memory-backend-file", "{options:?}");
        assert_eq!(backend.path.as_deref(), Some(path.as_path()));
        assert!(qemu.vm().ram_blocks().unwrap().iter().any(|block| block.name == name));
    }
    let mut bytes = vec![1_u8; 1 << 20];
    file.read_exact_at(&mut bytes, 4096).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
}

#[test]
fn a_mapped_vm_runs_and_does_not_write_its_file() {
    let source = TestQemu::start(&["-machine", "pc"]);
    let mut vm = source.vm();
    vm.stop().unwrap();
    let stream = stream_of(&vm.machine_type().unwrap(), &vm.save_device_state(false).unwrap());
    let directory = tempfile::tempdir().unwrap();
    let (path, file) = ram_file(directory.path(), 4096);
    // The stream lacks the firmware, so the guest does nothing; but the device `loader` writes to
    // its RAM at each reset.
    let loader = "loader,addr=0x1000,data=0x5a5a5a5a,data-len=4";
    let waiting = line(&["-machine", "pc", "-device", loader]);
    let mut qemu = launch(waiting.for_incoming(&[mapped("pc.ram", path, 4096)]).unwrap()).unwrap();
    load(&mut qemu, stream).unwrap();
    qemu.vm().execute("system_reset", Value::Null).unwrap();
    qemu.vm().cont().unwrap();
    let seen = directory.path().join("seen");
    let look = json!({ "val": 0x1000, "size": 4, "filename": seen });
    let deadline = Instant::now() + LOAD_TIMEOUT;
    loop {
        qemu.vm().execute("pmemsave", look.clone()).unwrap();
        if fs::read(&seen).unwrap() == [0x5a; 4] {
            break;
        }
        assert!(Instant::now() < deadline, "the RAM is written to");
        thread::sleep(Duration::from_millis(20));
    }
    qemu.vm().stop().unwrap();

    let mut bytes = vec![1_u8; 1 << 20];
    file.read_exact_at(&mut bytes, 4096).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0), "the guest's writes reached the file");
}

#[test]
fn a_command_line_taken_from_a_process_starts_the_same_vm_twice_over() {
    let first = launch(line(&["-machine", "q35", "-name", "again"])).unwrap();
    let mut vm = first.detach();
    let process = vm.process().unwrap();
    let taken = CommandLine::from_process(&process.arguments).unwrap();
    vm.quit(LOAD_TIMEOUT).unwrap();
    let again = taken.for_incoming(&[]).unwrap();
    let mut second = Launch::new(process.executable, again)
        .working_directory(process.working_directory)
        .spawn(support::START_TIMEOUT)
        .unwrap();
    assert_eq!(second.vm().name().unwrap().as_deref(), Some("again"));
    let process = second.vm().process().unwrap();
    let monitors = process.arguments.iter().filter(|word| *word == "-mon").count();
    assert_eq!(monitors, 1, "the monitor of the first start is gone");
}

#[test]
fn a_program_on_disk_tells_the_version_that_it_has_when_it_runs() {
    let mut qemu = launch(line(&[])).unwrap();
    let running = qemu.vm().version().unwrap();
    assert_eq!(vmfile_qemu::program_version(&program()).unwrap(), running);
    let error = vmfile_qemu::program_version(Path::new("/bin/echo")).unwrap_err();
    assert!(matches!(error, LaunchError::NoVersion { .. }), "{error}");
}

#[test]
fn qemu_s_own_words_are_in_the_error() {
    let error = launch(line(&["-device", "no-such-device"])).unwrap_err();
    assert!(matches!(error, LaunchError::Ended { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("exit status: 1") && text.contains("no-such-device"), "{text}");
}

#[test]
fn a_dropped_qemu_is_killed_and_a_detached_one_lives() {
    let qemu = launch(line(&[])).unwrap();
    let pid = qemu.pid();
    drop(qemu);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());

    let qemu = launch(line(&[])).unwrap();
    let pid = qemu.pid();
    let mut vm = qemu.detach();
    assert!(vm.is_running().unwrap());
    assert_eq!(vm.pid().unwrap(), pid);
    vm.quit(LOAD_TIMEOUT).unwrap();
}

#[test]
fn a_background_qemu_has_a_process_group_of_its_own_and_no_descriptor_of_ours() {
    let secret = File::open("/proc/self/status").unwrap();
    let descriptors = |process: &str| -> Vec<(u32, PathBuf)> {
        let entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap().map(Result::unwrap);
        let number = |entry: &fs::DirEntry| entry.file_name().to_str()?.parse().ok();
        entries
            .filter_map(|entry| Some((number(&entry)?, fs::read_link(entry.path()).ok()?)))
            .collect()
    };
    let before = descriptors("self");
    let mut qemu = launch(line(&[])).unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", qemu.pid())).unwrap();
    let group = stat.rsplit(')').next().unwrap().split_whitespace().nth(2).unwrap();
    assert_eq!(group, qemu.pid().to_string());
    let made = descriptors("self").into_iter().filter(|descriptor| !before.contains(descriptor));
    let made: Vec<_> = made.map(|(_, target)| target).collect();
    let theirs = descriptors(&qemu.pid().to_string());
    assert!(theirs.len() > 3, "{theirs:?}");
    // QEMU inherits only stdin, stdout and stderr, which is a pipe to this process.
    for (number, target) in theirs.iter().filter(|(number, _)| *number > 2) {
        let is_ours = target.ends_with("status") || made.contains(target);
        assert!(!is_ours, "{number}: {}", target.display());
    }
    assert!(qemu.ended().unwrap().is_none());
    drop(secret);
}

#[test]
fn a_socket_of_a_vm_that_still_runs_is_in_use() {
    let qemu = TestQemu::start(&[]);
    let process = qemu.vm().process().unwrap();
    assert_eq!(process.pid, qemu.pid());
    let line = CommandLine::from_process(&process.arguments).unwrap();
    let used = line.sockets_in_use(qemu.directory.path()).unwrap();
    assert_eq!(used, std::slice::from_ref(&qemu.socket));
    drop(qemu);
    assert!(line.sockets_in_use(&process.working_directory).unwrap().is_empty());
}

#[test]
fn the_options_without_a_value_are_those_of_qemu_s_help() {
    let help = Command::new(program()).arg("-help").output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    // In QEMU's help, one space and a word after an option is a value; more space, or nothing, is a
    // description. The help of -dtb pads its value like a description.
    let options = help.lines().filter(|line| line.starts_with('-') && !line.starts_with("-dtb"));
    let options = options.map(|line| line.split_once(' ').unwrap_or((line, "")));
    let (without, with): (Vec<_>, Vec<_>) = options.partition(|(_, rest)| {
        rest.is_empty() || rest.starts_with([' ', '\t']) || rest.starts_with("or ")
    });
    assert!(without.len() > 10 && with.len() > 50);
    for (option, _) in without {
        assert!(CommandLine::new([option]).is_ok(), "{option}");
    }
    for (option, _) in with {
        let error = CommandLine::new([option]).unwrap_err();
        assert!(matches!(error, CommandLineError::MissingValue { .. }), "{option}");
    }
}
