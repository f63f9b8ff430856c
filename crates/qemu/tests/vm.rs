//! A running VM, on a real QEMU.

#![expect(clippy::unwrap_used, reason = "a test that cannot be arranged has failed")]

mod support;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{TestQemu, launch, line, program, sparse_file};
use vmfile_qemu::version::Feature;
use vmfile_qemu::{BlockerKind, Launch, QmpError, RunState, Vm, VmAddress, VmError};

const QUIT_TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn a_vm_says_who_it_is() {
    let uuid = "12345678-9abc-def0-1234-56789abcdef0";
    let qemu = TestQemu::start(&["-machine", "pc", "-name", "guest=db1", "-uuid", uuid]);
    let mut vm = qemu.vm();
    assert!(vm.version().unwrap() >= "7.2".parse().unwrap());
    assert!(vm.machine_type().unwrap().starts_with("pc-i440fx-"));
    assert_eq!(vm.name().unwrap().as_deref(), Some("db1"));
    assert_eq!(vm.uuid().unwrap().as_deref(), Some(uuid));
    let process = vm.process().unwrap();
    assert_eq!(process.pid, qemu.pid());
    assert_eq!(process.executable, program().canonicalize().unwrap());
    assert!(process.arguments.contains(&"guest=db1".into()));
    assert_eq!(process.working_directory, qemu.directory.path().canonicalize().unwrap());
}

#[test]
fn a_vm_without_name_and_uuid_has_none() {
    let qemu = TestQemu::start(&["-machine", "q35"]);
    let mut vm = qemu.vm();
    assert_eq!(vm.name().unwrap(), None);
    assert_eq!(vm.uuid().unwrap(), None);
    assert!(vm.machine_type().unwrap().starts_with("pc-q35-"));
}

#[test]
fn the_ram_blocks_lie_where_qemu_says() {
    let qemu = TestQemu::start(&["-machine", "pc", "-device", "VGA"]);
    let mut vm = qemu.vm();
    let blocks = vm.ram_blocks().unwrap();
    let block = |name: &str| blocks.iter().find(|block| block.name == name).unwrap();
    assert_eq!(block("pc.ram").used_length, 64 << 20);
    assert_eq!(block("0000:00:02.0/vga.vram").page_size, 4096);
    let tables = block("/rom@etc/acpi/tables");
    assert!(tables.total_length > tables.used_length);
    if vm.version().unwrap().has(Feature::RamBlockAddresses) {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", qemu.pid())).unwrap();
        for block in &blocks {
            let start = block.host_address.unwrap();
            assert!(is_mapped(&maps, start, start + block.used_length), "{block:?}");
        }
    }
}

/// Returns whether every byte of a range lies in one of the mappings.
fn is_mapped(maps: &str, start: u64, end: u64) -> bool {
    let mut reached = start;
    for line in maps.lines() {
        let range = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let from = u64::from_str_radix(range.0, 16).unwrap();
        let to = u64::from_str_radix(range.1, 16).unwrap();
        if (from..to).contains(&reached) {
            reached = to;
        }
    }
    reached >= end
}

#[test]
fn a_vm_stops_and_continues() {
    let qemu = TestQemu::start(&["-S"]);
    let mut vm = qemu.vm();
    assert_eq!(vm.run_state().unwrap(), RunState::Prelaunch);
    vm.cont().unwrap();
    assert!(vm.is_running().unwrap());
    vm.stop().unwrap();
    assert_eq!(vm.run_state().unwrap(), RunState::Paused);
    let names: Vec<String> = vm.qmp().take_events().into_iter().map(|event| event.name).collect();
    assert!(names.contains(&"STOP".to_owned()), "{names:?}");
}

#[test]
fn quit_returns_when_the_process_is_gone() {
    let running = launch(line(&[])).unwrap();
    let pid = running.pid();
    running.detach().quit(QUIT_TIMEOUT).unwrap();
    // The launcher takes the exit status; until then the process is a zombie, with no memory map.
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    assert_eq!(maps, "");
}

#[test]
fn a_monitor_that_another_client_holds_does_not_hang_us() {
    let qemu = TestQemu::start(&[]);
    let _holder = qemu.vm();
    let started = Instant::now();
    let error = Vm::connect(&qemu.socket).unwrap_err();
    assert!(matches!(error, VmError::Qmp(QmpError::NoGreeting { .. })), "{error}");
    assert!(error.hint().unwrap().contains("another client"));
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn the_device_state_holds_device_sections_only_and_the_vm_runs_on() {
    let qemu = TestQemu::start(&["-device", "virtio-rng-pci"]);
    let mut vm = qemu.vm();
    vm.stop().unwrap();

    let state = vm.save_device_state(false).unwrap();

    // "QEVM", version 3, and then the first device: no configuration, no RAM.
    assert_eq!(state.get(..9).unwrap(), b"QEVM\0\0\0\x03\x04");
    assert_eq!(state.get(13..19).unwrap(), b"\x05timer");
    assert_eq!(state.last(), Some(&0));
    assert!(!state.windows(4).any(|bytes| bytes == b"\x03ram"), "a RAM section");
    // The device state says that the guest runs after a restore, although it is paused now.
    assert!(state.windows(11).any(|bytes| bytes == b"\0\0\0\x08running"));
    assert_eq!(vm.run_state().unwrap(), RunState::Paused);
    assert_eq!(vm.execute("query-fdsets", Value::Null).unwrap(), json!([]));
    // Nothing changes in a paused VM, so a second save has the same bytes.
    assert!(vm.save_device_state(false).unwrap() == state);
    vm.cont().unwrap();
    assert!(vm.is_running().unwrap());
}

#[test]
fn a_vm_that_never_ran_has_a_device_state_and_stays_so() {
    let qemu = TestQemu::start(&["-S"]);
    let mut vm = qemu.vm();
    assert!(!vm.save_device_state(false).unwrap().is_empty());
    assert_eq!(vm.run_state().unwrap(), RunState::Prelaunch);
}

#[test]
fn a_running_vm_does_not_give_its_device_state() {
    let qemu = TestQemu::start(&[]);
    let mut vm = qemu.vm();
    let error = vm.save_device_state(false).unwrap_err();
    assert_eq!(error.to_string(), "the VM is running, expected a stopped VM");
    assert!(vm.is_running().unwrap());
}

#[test]
fn the_disks_stay_locked_after_a_device_state() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.raw");
    sparse_file(&image, 1 << 20);
    let drive = format!("file={},format=raw,if=virtio,id=d0", image.display());
    let qemu = TestQemu::start(&["-drive", &drive]);
    let mut vm = qemu.vm();
    vm.stop().unwrap();

    drop(vm.save_device_state(false).unwrap());

    let error = launch(line(&["-drive", &drive])).unwrap_err().to_string();
    assert!(error.contains("lock"), "{error}");
    vm.cont().unwrap();
    assert!(vm.is_running().unwrap());
}

#[test]
fn the_disks_are_listed_with_their_images() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.raw");
    sparse_file(&image, 1 << 20);
    let path = image.to_str().unwrap();
    let file = format!(r#"{{"driver":"file","filename":"{path}","node-name":"f0"}}"#);
    let qemu = TestQemu::start(&[
        "-blockdev",
        &file,
        "-blockdev",
        "raw,file=f0,node-name=r0,read-only=on",
        "-device",
        "virtio-blk-pci,drive=r0,id=vb",
        "-device",
        "floppy",
    ]);
    let drives = qemu.vm().drives().unwrap();
    let [disk, floppy] = &*drives else { panic!("{drives:?}") };
    let image = disk.image().unwrap();
    assert_eq!((image.path.as_str(), image.format.as_str()), (path, "raw"));
    assert_eq!(disk.node.as_deref(), Some("r0"));
    assert!(disk.name().contains("/vb/"), "{disk:?}");
    assert!(disk.read_only && !disk.temporary && !disk.is_writable());
    assert!(floppy.removable && floppy.image().is_none(), "{floppy:?}");
}

#[test]
fn the_memory_behind_the_guest_is_named() {
    let qemu = TestQemu::start(&[
        "-object",
        "memory-backend-memfd,id=ram0,size=64M,share=on",
        "-machine",
        "q35,memory-backend=ram0",
        "-object",
        "memory-backend-file,id=f0,size=16M,mem-path=/dev/shm,share=off",
    ]);
    let backends = qemu.vm().memory_backends().unwrap();
    let backend = |id: &str| backends.iter().find(|backend| backend.id == id).unwrap();
    assert_eq!(backend("ram0").kind, "memory-backend-memfd");
    assert!(backend("ram0").share && !backend("ram0").hugetlb);
    assert_eq!(backend("ram0").size, 64 << 20);
    assert_eq!(backend("f0").path.as_deref(), Some(Path::new("/dev/shm")));
    assert!(!backend("f0").share);
}

#[test]
fn the_memory_of_a_plain_vm_is_private_and_has_no_path() {
    let qemu = TestQemu::start(&["-machine", "pc"]);
    let backends = qemu.vm().memory_backends().unwrap();
    let backend = backends.first().unwrap();
    assert_eq!((backend.id.as_str(), backend.kind.as_str()), ("pc.ram", "memory-backend-ram"));
    assert!(!backend.share && backend.path.is_none());
}

fn blockers(options: &[&str]) -> Vec<BlockerKind> {
    let qemu = TestQemu::start(options);
    let blockers = qemu.vm().why_not_saved().unwrap();
    blockers.into_iter().map(|blocker| blocker.kind).collect()
}

#[test]
fn nothing_forbids_the_save_of_a_plain_vm() {
    for machine in ["pc", "q35"] {
        assert_eq!(blockers(&["-machine", machine, "-device", "VGA"]), []);
    }
}

#[test]
fn what_qemu_forbids_is_reported_in_its_words() {
    let options =
        ["-object", "memory-backend-ram,id=m1,size=1M", "-device", "ivshmem-plain,memdev=m1"];
    let qemu = TestQemu::start(&options);
    let blockers = qemu.vm().why_not_saved().unwrap();
    let blocker = blockers.first().unwrap();
    assert_eq!(blocker.kind, BlockerKind::QemuForbids);
    assert!(blocker.reason.contains("ivshmem"), "{blocker}");
}

#[test]
fn virtio_mem_forbids() {
    let options = [
        "-machine",
        "pc",
        "-m",
        "64M,slots=1,maxmem=1G",
        "-object",
        "memory-backend-ram,id=v1,size=128M",
        "-device",
        "virtio-mem-pci,memdev=v1,id=vm0",
    ];
    assert_eq!(blockers(&options), [BlockerKind::VirtioMem]);
}

#[test]
fn a_temporary_disk_forbids() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.raw");
    sparse_file(&image, 1 << 20);
    let drive = format!("file={},format=raw,if=virtio", image.display());
    assert_eq!(blockers(&["-drive", &drive]), []);
    assert_eq!(blockers(&["-snapshot", "-drive", &drive]), [BlockerKind::TemporaryDisk]);
}

#[test]
fn record_and_replay_forbids() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("replay");
    let icount = format!("shift=auto,rr=record,rrfile={}", file.display());
    assert_eq!(blockers(&["-icount", &icount]), [BlockerKind::Replay]);
}

#[test]
fn a_waiting_qemu_is_no_vm_to_save() {
    assert_eq!(blockers(&["-incoming", "defer"]), [BlockerKind::Migration]);
}

#[test]
fn the_process_behind_an_inherited_socket_is_found() {
    // As libvirt does it: the manager listens, QEMU inherits the socket.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("manager's monitor.sock");
    let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
    let chardev = format!("socket,id=m,fd={},server=on,wait=off", listener.as_raw_fd());
    let line = line(&["-chardev", &chardev, "-mon", "chardev=m,mode=control"]);
    let qemu =
        Launch::new(program(), line).inherit(listener).spawn(support::START_TIMEOUT).unwrap();

    let mut vm = Vm::connect(&path).unwrap();

    assert_eq!(vm.pid().unwrap(), qemu.pid());
    let found = vmfile_qemu::list().unwrap();
    let found = found.iter().find(|found| found.pid == qemu.pid()).unwrap();
    assert_eq!(found.qmp, [path]);
}

#[test]
fn a_vm_is_found_by_name_and_by_process() {
    let name = format!("vmfile-test-{}", std::process::id());
    let qemu = TestQemu::start(&["-name", &name]);
    // The socket was given as a relative path.
    let expected = qemu.directory.path().canonicalize().unwrap().join("qmp.sock");
    let by_name = vmfile_qemu::resolve(&VmAddress::Name(name.clone())).unwrap();
    let by_pid = vmfile_qemu::resolve(&VmAddress::Pid(qemu.pid())).unwrap();
    assert_eq!((by_name, by_pid), (expected.clone(), expected));

    let _twin = TestQemu::start(&["-name", &name]);
    let error = vmfile_qemu::resolve(&VmAddress::Name(name)).unwrap_err().to_string();
    assert!(error.contains(&qemu.pid().to_string()), "{error}");
    let error = vmfile_qemu::resolve(&VmAddress::Name("no-such-vm".to_owned())).unwrap_err();
    assert!(error.to_string().starts_with("no VM no-such-vm; running: "), "{error}");
}
