//! The disk of a file fails, or its file system becomes read-only, while a verb uses it.
//!
//! `cargo xtask chaos storage` tries more moments than a test has time for.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use tempfile::TempDir;
use vmfile_testing::{
    Case, FailingFile, Guest, Missing, Mount, Qemu, Ram, Random, Release, TestResult, cases, given,
    requires,
};

use crate::guests::{Saved, directory, prepare, saved};
use crate::run::{EndAllIn, Said, command, names_in, pid, processes_in, start, vmfile, wait_until};
use crate::trial::{Trial, WAYS};
use crate::words;

/// How many moments a test run tries.
const CASES: u64 = 12;

/// How long a verb may take whose disk has failed.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of the file system: room for the old file and a new one.
const DISK_LEN: u64 = 600 << 20;

/// What becomes of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// Its journal ends, and it is read-only: what ext4 does after an error.
    Abort,
    /// ext4 refuses everything.
    Ext4Shutdown,
    /// xfs refuses everything, as it does after an error.
    XfsShutdown,
    /// Every read and write of the disk below it fails.
    Disk(&'static str),
}

impl Failure {
    const ALL: [Failure; 5] = [
        Failure::Abort,
        Failure::Ext4Shutdown,
        Failure::XfsShutdown,
        Failure::Disk("EIO"),
        Failure::Disk("ENOSPC"),
    ];
}

/// A file system that fails when the test says so.
struct Disk {
    mount: Mount,
    failing: Option<FailingFile>,
    /// What is mounted.
    device: PathBuf,
    failure: Failure,
    _directory: TempDir,
}

impl Disk {
    fn make(failure: Failure) -> Result<Disk, Missing> {
        let directory = directory().map_err(|error| Missing::new(error.to_string()))?;
        let image = directory.path().join("image");
        let (failing, device) = match failure {
            Failure::XfsShutdown => {
                Mount::make_xfs(&image, DISK_LEN)?;
                (None, image)
            }
            Failure::Abort | Failure::Ext4Shutdown => {
                Mount::make_ext4(&image, DISK_LEN)?;
                (None, image)
            }
            Failure::Disk(error) => {
                Mount::make_ext4(&image, DISK_LEN)?;
                let failing = FailingFile::of(&image, error, "100%")?;
                let device = failing.path();
                (Some(failing), device)
            }
        };
        Ok(Disk {
            mount: Mount::of_image(&device)?,
            failing,
            device,
            failure,
            _directory: directory,
        })
    }

    fn path(&self) -> &Path {
        self.mount.path()
    }

    fn fail(&self) -> TestResult {
        match (&self.failing, self.failure) {
            (Some(failing), _) => failing.fail(),
            (None, Failure::Abort) => mount_with("remount,abort", self.path()),
            (None, _) => {
                succeeds(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(self.path()))
            }
        }
    }

    /// Mounts it again, as after a boot of the machine.
    fn mend(&mut self) -> TestResult {
        if let Some(failing) = &self.failing {
            failing.heal()?;
        }
        self.mount_again()
    }

    fn mount_again(&mut self) -> TestResult {
        self.mount.again(&self.device)
    }
}

fn mount_with(options: &str, path: &Path) -> TestResult {
    succeeds(Command::new("mount").args(["-o", options]).arg(path))
}

fn succeeds(command: &mut Command) -> TestResult {
    let output = command.output()?;
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {output:?}").into()) }
}

/// Waits for a verb, which must end in time.
fn finish(child: Child, what: &str) -> TestResult<Said> {
    let process = pid(child.id());
    // What it says may be more than a pipe holds.
    let reader = thread::spawn(move || child.wait_with_output());
    let deadline = Instant::now() + TIMEOUT;
    while !reader.is_finished() {
        if Instant::now() > deadline {
            kill_process(process, Signal::KILL)?;
            return Err(format!("{what}: it does not end").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(reader.join().expect("it does not panic")?.into())
}

/// The name of the file of every save, and where the old one is that stays.
const NAME: &str = "vm.vmf";
const KEPT: &str = "kept";

#[test]
fn a_vm_whose_file_system_fails_in_the_middle_of_its_save_is_as_it_was() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let count = given("VMFILE_CASES").unwrap_or(CASES);
    println!("{count} moments");
    let mut trial = Trial::begin(&qemu, Random::of_this_run())?;
    for (number, failure) in (0_u64..).zip(Failure::ALL) {
        let mut disk = requires!(Disk::make(failure));
        let kept = disk.path().join(KEPT);
        fs::create_dir(&kept)?;
        let words = words!["save", trial.guest.qmp_path(), kept.join(NAME), "--after", "resume"];
        vmfile(words).assert(0, &["saved"]);
        // So that the old file is on the disk.
        disk.mount_again()?;
        for case in (number..count).step_by(Failure::ALL.len()) {
            let way = usize::try_from(trial.random.next_number())? % WAYS.len();
            break_a_save(&mut trial, &mut disk, way, case % 2 == 0)?;
            cases(1, Case::Fault);
        }
        vmfile(words!["check", disk.path().join(KEPT).join(NAME)]).assert(0, &["ok: "]);
    }
    trial.next_save_is_right()?;
    println!("{} of {count} saves had their file; slowest {:?}", trial.finished, trial.slowest);
    Ok(())
}

/// Saves while the file system fails at a random moment, and checks the VM and the file system.
fn break_a_save(trial: &mut Trial, disk: &mut Disk, way: usize, replaces: bool) -> TestResult {
    let seconds = trial.seconds(way)?;
    let moment = Duration::from_secs_f64(seconds * 1.1 * trial.random.next_fraction());
    let over = if replaces { ", over an old file" } else { "" };
    let what = format!("{:?}{over}: {:?} after {moment:?}", WAYS[way], disk.failure);
    let (file, kept) = (disk.path().join(NAME), disk.path().join(KEPT).join(NAME));
    trial.end_a_save((&what, way, &file), |trial| {
        let mut words = trial.words(way, &file);
        if replaces {
            fs::hard_link(&kept, &file)?;
            // The name would be lost with what the file system has not written yet.
            File::open(disk.path())?.sync_all()?;
            words.push("--force".into());
        }
        let child = start(words)?;
        let pid = child.id();
        thread::sleep(moment);
        disk.fail()?;
        let said = finish(child, &what)?;
        let is_told = matches!(said.code, Some(3..=7)) && said.stderr.contains("vmfile: ");
        assert!(said.code == Some(0) || is_told, "{what}: {said:?}");
        assert!(!said.stderr.contains("panicked"), "{what}: {said:?}");
        if said.code != Some(0) && said.code != Some(7) {
            assert_eq!(trial.guest.status()?, "running", "{what}: {said:?}");
        }
        disk.mend()?;
        // What the end of a save checks is a new file.
        if fs::metadata(&file)
            .is_ok_and(|file| fs::metadata(&kept).is_ok_and(|kept| kept.ino() == file.ino()))
        {
            fs::remove_file(&file)?;
            assert!(said.code != Some(0), "{what}: the file is the old one: {said:?}");
        } else if replaces || said.code == Some(0) {
            assert!(file.exists(), "{what}: no file: {said:?}");
        }
        let known = [NAME, KEPT, "lost+found"];
        let left: Vec<String> = names_in(disk.path());
        assert!(left.iter().all(|name| known.contains(&name.as_str())), "{what}: {left:?}");
        Ok((said, pid))
    })
}

/// A file system that is read-only from the beginning is found before the VM stops.
#[test]
fn a_read_only_file_system_is_refused_and_keeps_its_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(150).boot_to(&qemu, 1)?;
    let mut disk = requires!(Disk::make(Failure::Abort));
    let file = disk.path().join(NAME);
    vmfile(words!["save", guest.qmp_path(), file, "--after", "resume"]).assert(0, &["saved"]);
    mount_with("remount,ro", disk.path())?;
    for name in [NAME, "new.vmf"] {
        for way in [&["--route", "direct"], &["--route", "stream"], &["--route", "native"]] {
            let words = words!["save", guest.qmp_path(), disk.path().join(name), "--force"];
            let said = vmfile(words.iter().chain(&way.map(Into::into)));
            said.assert(5, &["Read-only file system"]);
            assert_eq!(guest.status()?, "running");
        }
    }
    vmfile(words!["check", file]).assert(0, &["ok: "]);
    disk.mount_again()?;
    vmfile(words!["check", file]).assert(0, &["ok: "]);
    guest.counts_on(1)?;
    vmfile(words!["save", guest.qmp_path(), file, "--force"]).assert(0, &["saved"]);
    Ok(())
}

/// Every verb that reads a file, with what it does with the words of a destination.
const READERS: [&[&str]; 4] = [
    &["info", "FILE"],
    &["check", "FILE"],
    &["convert", "FILE", "NEW", "--to", "stream"],
    &["send", "FILE"],
];

/// Runs a verb whose file begins to fail after `moment`.
fn read_while_it_fails(
    failing: &FailingFile,
    (what, mut command): (&str, Command),
    moment: Option<Duration>,
) -> TestResult<Said> {
    if moment.is_none() {
        failing.fail()?;
    }
    command.stderr(Stdio::piped());
    let child = command.spawn()?;
    if let Some(moment) = moment {
        thread::sleep(moment);
        failing.fail()?;
    }
    let said = finish(child, what);
    failing.heal()?;
    let said = said?;
    assert!(!said.stderr.contains("panicked"), "{what}: {said:?}");
    let is_named = (said.stdout.clone() + &said.stderr).contains("Input/output error");
    // What `check` cannot read is a finding.
    let is_told = matches!(said.code, Some(1 | 3 | 5)) && is_named;
    let is_late = said.code == Some(0) && moment.is_some();
    assert!(is_told || is_late, "{what}: {said:?}");
    Ok(said)
}

#[test]
fn a_file_whose_reads_fail_is_told_by_every_verb() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(128)).seed(151).data_share(200);
    let Saved { file, directory, .. } = &saved(&qemu, &config)?;
    let failing = requires!(FailingFile::of(file, "EIO", "100%"));
    let mut random = Random::of_this_run();
    let (source, new) = (failing.path(), directory.path().join("new"));
    for number in 0..4 {
        let mut moment = || {
            let fraction = random.next_fraction();
            (number > 0).then(|| Duration::from_secs_f64(0.15 * fraction))
        };
        for reader in READERS {
            let mut command = command();
            command.args(reader.iter().map(|&word| match word {
                "FILE" => source.as_os_str(),
                "NEW" => new.as_os_str(),
                word => word.as_ref(),
            }));
            let is_stream = reader.contains(&"send");
            command.stdout(if is_stream { Stdio::null() } else { Stdio::piped() });
            let what = format!("{reader:?}");
            let said = read_while_it_fails(&failing, (&what, command), moment())?;
            cases(1, Case::Fault);
            assert_eq!(new.exists(), said.code == Some(0) && reader.contains(&"NEW"), "{what}");
            if new.exists() {
                fs::remove_file(&new)?;
            }
        }
        for mode in ["map", "load", "stream"] {
            let (prepared, EndAllIn(of_vm)) = &prepare(&config, &qemu)?;
            let mut command = command();
            command.args(words!["restore", source, "--mode", mode, "--"]);
            command.args(prepared.command_line()).stdout(Stdio::null());
            let said = read_while_it_fails(&failing, (mode, command), moment())?;
            cases(1, Case::Fault);
            if said.code != Some(0) {
                wait_until("QEMU is gone", || processes_in(of_vm).is_empty())?;
            }
        }
    }
    vmfile(words!["check", source]).assert(0, &["ok: "]);
    assert_eq!(names_in(directory.path()).len(), 1);
    Ok(())
}

/// A file that is a mount point cannot be replaced.
#[test]
fn a_file_of_fuse_is_not_replaced() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(16)).seed(152).boot_to(&qemu, 1)?;
    let directory = directory()?;
    let image = directory.path().join("image");
    fs::write(&image, vec![7; 1 << 20])?;
    let failing = requires!(FailingFile::of(&image, "EIO", "100%"));
    let before = names_in(failing.path().parent().ok_or("a directory")?);
    let said = vmfile(words!["save", guest.qmp_path(), failing.path()]);
    said.assert(5, &["exists"]);
    let said = vmfile(words!["save", guest.qmp_path(), failing.path(), "--force"]);
    said.assert(5, &["Device or resource busy"]);
    assert_eq!(guest.status()?, "running");
    assert_eq!(names_in(failing.path().parent().ok_or("a directory")?), before);
    assert_eq!(fs::read(&image)?, vec![7; 1 << 20]);
    guest.counts_on(1)
}
