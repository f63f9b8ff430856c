//! VMs of other architectures than x86: their memory comes back, or the save says why it is refused.

mod page_table;

use std::error::Error as _;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vmfile::error::SaveError;
use vmfile::restore::{Destination, Mode, RestoreOptions};
use vmfile::save::{After, Live, Route, RouteUsed, SaveOptions};
use vmfile::{Control, Snapshot, Vm};
use vmfile_testing::{Case, Missing, Monitor, Random, TestResult, cases, requires};

/// How much of the guest's memory is filled, and where in its RAM: firmware does not get there.
const FILLED_LEN: usize = 8 << 20;
const FILLED_AT: u64 = 64 << 20;

/// A machine of a target.
struct Target {
    program: &'static str,
    machine: &'static [&'static str],
    memory: &'static str,
    /// Where the guest sees its RAM.
    ram: u64,
    page_len: u64,
}

const TARGETS: [Target; 7] = [
    Target {
        program: "qemu-system-aarch64",
        machine: &["-machine", "virt", "-cpu", "cortex-a57"],
        memory: "128M",
        ram: 0x4000_0000,
        page_len: 4096,
    },
    Target {
        program: "qemu-system-arm",
        machine: &[
            "-machine",
            "versatilepb,audiodev=a",
            "-cpu",
            "arm926",
            "-audiodev",
            "none,id=a",
        ],
        memory: "128M",
        ram: 0,
        page_len: 1024,
    },
    Target {
        program: "qemu-system-riscv64",
        machine: &["-machine", "virt", "-bios", "none"],
        memory: "128M",
        ram: 0x8000_0000,
        page_len: 4096,
    },
    Target {
        program: "qemu-system-ppc64",
        machine: &["-machine", "mac99"],
        memory: "128M",
        ram: 0,
        page_len: 4096,
    },
    Target {
        program: "qemu-system-ppc64",
        machine: &["-machine", "pseries"],
        // A multiple of 256 MiB.
        memory: "256M",
        ram: 0,
        page_len: 4096,
    },
    Target {
        program: "qemu-system-s390x",
        // Its firmware panics without a disk.
        machine: &["-machine", "s390-ccw-virtio", "-action", "panic=none"],
        memory: "128M",
        ram: 0,
        page_len: 4096,
    },
    Target {
        program: "qemu-system-sparc64",
        machine: &["-machine", "sun4u"],
        memory: "128M",
        ram: 0,
        page_len: 8192,
    },
];

fn installed(program: &str) -> Result<(), Missing> {
    let said = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    match said {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Missing::new(format!("no {program}: run `cargo xtask setup`"))),
    }
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

/// Starts a QEMU with two monitors in `directory`, `qmp` and `oracle`; returns its command line as well.
fn run(mut line: Vec<String>, directory: &Path) -> TestResult<(Running, Vec<String>)> {
    line.extend(["-display", "none", "-nodefaults", "-accel", "tcg"].map(str::to_owned));
    for name in ["qmp", "oracle"] {
        let socket = directory.join(name);
        line.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())]);
    }
    let child = Command::new(&line[0]).args(&line[1..]).spawn()?;
    Ok((Running(child), line))
}

/// A VM whose memory is filled, in a directory.
struct Filled {
    _running: Running,
    directory: PathBuf,
    line: Vec<String>,
    bytes: Vec<u8>,
}

impl Filled {
    /// Starts the VM, lets it run, and stops it.
    fn start(target: &Target, directory: &Path) -> TestResult<Filled> {
        let mut random = Random::new(target.ram);
        let bytes: Vec<u8> =
            (0..FILLED_LEN / 8).flat_map(|_| random.next_number().to_le_bytes()).collect();
        let mut line: Vec<String> = vec![target.program.to_owned()];
        line.extend(target.machine.iter().map(|&word| word.to_owned()));
        line.extend(["-m".to_owned(), target.memory.to_owned()]);
        let (running, line) = run(line, directory)?;
        let pid = running.0.id();
        let filled = Filled { _running: running, directory: directory.to_path_buf(), line, bytes };
        filled.oracle("qmp")?.execute("stop", json!({}))?;
        let blocks = Vm::connect(&directory.join("qmp"))?.ram_blocks()?;
        let ram = blocks.iter().max_by_key(|block| block.used_length).ok_or("RAM")?;
        let address = ram.host_address.ok_or("no address")? + FILLED_AT;
        let memory = fs::File::options().write(true).open(format!("/proc/{pid}/mem"))?;
        memory.write_all_at(&filled.bytes, address)?;
        Ok(filled)
    }

    fn oracle(&self, name: &str) -> TestResult<Monitor> {
        Monitor::connect(&self.directory.join(name), Duration::from_secs(30))
    }

    /// Expects that the guest sees the memory that was filled.
    fn has_its_memory(&self, target: &Target, what: &str) -> TestResult {
        let path = self.directory.join("seen");
        let arguments =
            json!({ "val": target.ram + FILLED_AT, "size": FILLED_LEN, "filename": path });
        self.oracle("oracle")?.execute("pmemsave", arguments)?;
        assert!(fs::read(&path)? == self.bytes, "{}: {what}", target.program);
        Ok(())
    }
}

fn comes_back(target: &Target) -> TestResult {
    requires!(installed(target.program));
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let filled = Filled::start(target, directory.path())?;
    filled.has_its_memory(target, "before the save")?;
    let (file, control) = (directory.path().join("vm.vmf"), Control::none());
    let mut vm = Vm::connect(&directory.path().join("qmp"))?;
    let direct = SaveOptions::default().route(Route::Direct);
    let refused = vmfile::save::save(&mut vm, &file, &direct, &control);
    assert!(matches!(refused, Err(SaveError::NotDirect { .. })), "{refused:?}");
    // Live as well, if its stream is the only way.
    vm.cont()?;
    let live = SaveOptions::default().live(Some(Live::default())).after(After::Resume);
    let live_file = directory.path().join("live.vmf");
    let saved = vmfile::save::save(&mut vm, &live_file, &live, &control);
    // QEMU alone writes pages that are smaller than the blocks of a disk.
    let is_small = target.page_len < 4096;
    let (files, route) = match saved {
        Ok(report) if !is_small => {
            assert!(report.live && report.route == RouteUsed::Stream, "{report:?}");
            (vec![&file, &live_file], RouteUsed::Stream)
        }
        Err(error) if is_small => {
            let words = format!("{error}: {:?}", error.source());
            assert!(words.contains("page size"), "{words}");
            (vec![&file], RouteUsed::Native)
        }
        saved => panic!("{}: {saved:?}", target.program),
    };
    vm.stop()?;
    let options = SaveOptions::default().after(After::Quit);
    let options = if is_small { options.route(Route::Native) } else { options };
    let report = vmfile::save::save(&mut vm, &file, &options, &control)?;
    assert_eq!(report.route, route);
    assert!(is_small || report.route_reason.contains("no x86"), "{}", report.route_reason);
    vmfile_testing::verbs::check_is_clean(&file)?;
    let Filled { _running, line, bytes, directory: place } = filled;
    drop(_running);
    for file in files {
        let snapshot = Snapshot::open(file, 0)?;
        let block = snapshot.structure().blocks.iter().max_by_key(|one| one.block.used_length());
        let page_size = block.ok_or("RAM")?.block.page_size();
        assert_eq!(page_size.bytes(), target.page_len, "{}", target.program);
        for mode in [Mode::Load, Mode::Stream, Mode::Auto] {
            let destination = Destination::Command(line.clone());
            let options = RestoreOptions::default().mode(mode).paused(true);
            let restored = vmfile::restore::restore(&snapshot, destination, &options, &control)?;
            let again = Filled {
                _running: Running(Command::new("true").spawn()?),
                directory: place.clone(),
                line: Vec::new(),
                bytes: bytes.clone(),
            };
            again.has_its_memory(target, &format!("{mode:?} of {}", file.display()))?;
            cases(1, Case::Restore);
            drop(restored);
            let deadline = Instant::now() + Duration::from_secs(10);
            while Vm::connect(&place.join("qmp")).is_ok() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
    Ok(())
}

/// The direct save of an ARM guest succeeded, and no mode restored it: its pages were taken for 4 KiB.
#[test]
fn the_memory_of_a_guest_that_is_no_x86_comes_back() -> TestResult {
    TARGETS.iter().try_for_each(comes_back)
}
