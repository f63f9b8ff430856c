//! Waits for QEMU: each has a timeout, names what it waited for, and obeys signals.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::json;
use vmfile_testing::{Case, Guest, Monitor, Qemu, Ram, TestError, TestResult, cases, requires};

use crate::guests::directory;
use crate::run::{self, Said, names_in, pid, vmfile, wait_until, wait_until_it_catches};
use crate::words;

/// How long a verb may take to end after a signal.
const AT_ONCE: Duration = Duration::from_secs(1);

fn small(qemu: &Qemu, name: &str) -> TestResult<Guest> {
    let config = Guest::boot_sector(Ram::private(16)).seed(71);
    config.arguments(["-name", name]).boot(qemu)
}

/// A process that is stopped until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(process: u32) -> TestResult<Stopped> {
        kill_process(pid(process), Signal::STOP)?;
        wait_until("the process is stopped", || state(process) == Some('T'))?;
        Ok(Stopped(process))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // The process may have ended.
        let _ = kill_process(pid(self.0), Signal::CONT);
    }
}

fn state(process: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Starts the program and waits until it catches signals.
fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> TestResult<Child> {
    let child = run::start(arguments)?;
    wait_until_it_catches(child.id(), Signal::USR1)?;
    Ok(child)
}

/// Sends `signal` and returns the program's output; fails if the program does not end at once.
fn end_by(child: Child, signal: Signal) -> TestResult<Said> {
    let sent = Instant::now();
    kill_process(pid(child.id()), signal)?;
    let said = Said::from(child.wait_with_output()?);
    assert!(sent.elapsed() < AT_ONCE, "{:?}: {said:?}", sent.elapsed());
    cases(1, Case::Signal);
    Ok(said)
}

/// Connects a client that QEMU serves, and two that wait: as many as QEMU's backlog takes.
fn hold(path: &Path) -> TestResult<(Monitor, Vec<UnixStream>)> {
    let held = Monitor::connect(path, Duration::from_secs(10))?;
    let waiting = (0..2).map(|_| UnixStream::connect(path)).collect::<Result<_, _>>()?;
    Ok((held, waiting))
}

/// `connect` blocks in the kernel while the backlog is full. With one client at the monitor and two
/// that waited, `save` and `list` hung for ever and ignored SIGINT.
#[test]
fn a_monitor_that_others_wait_for_is_given_up_and_signals_are_obeyed() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let guest = small(&qemu, "held")?;
    let (mut held, waiting) = hold(&guest.qmp_path())?;
    let file = guest.directory().join("vm.vmf");
    let started = Instant::now();
    let said = vmfile(words!["save", guest.qmp_path(), file]);
    assert!(started.elapsed() < Duration::from_secs(7), "{:?}", started.elapsed());
    let words = ["another client holds this monitor, and 2 wait", "give QEMU a second one"];
    said.assert(3, &words);
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::QUIT, 131)] {
        let child = start(words!["save", guest.qmp_path(), file])?;
        thread::sleep(Duration::from_millis(300));
        let said = end_by(child, signal)?;
        said.assert(status, &["stopped while connecting to the monitor", "was not touched"]);
    }
    held.execute("query-status", json!({}))?;
    drop(waiting);
    Ok(())
}

/// The kernel accepts connections for a stopped QEMU, which then sends nothing.
#[test]
fn a_qemu_whose_process_is_stopped_is_said_to_be_and_signals_are_obeyed() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = small(&qemu, "stopped")?;
    let file = guest.directory().join("vm.vmf");
    let stopped = Stopped::new(guest.pid()?)?;
    let said = vmfile(words!["save", guest.qmp_path(), file]);
    said.assert(3, &["QEMU's process is stopped", "kill -CONT"]);
    let child = start(words!["save", guest.qmp_path(), file])?;
    thread::sleep(Duration::from_millis(300));
    let said = end_by(child, Signal::INT)?;
    said.assert(130, &["stopped while waiting for QEMU's greeting", "was not touched"]);
    drop(stopped);
    assert_eq!(guest.status()?, "running");
    Ok(())
}

/// vmfile waited up to ten minutes for the answer to `stop`, and no signal ended that.
#[test]
fn a_qemu_that_stops_answering_before_the_pause_does_not_hold_a_save() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = small(&qemu, "silent")?;
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    // QEMU is stopped at different moments, some after its greeting.
    for delay in [0, 2, 5, 10, 20, 40] {
        let arguments = words!["save", guest.qmp_path(), file, "--after", "resume", "--force"];
        let child = start(arguments)?;
        thread::sleep(Duration::from_millis(delay));
        let stopped = Stopped::new(guest.pid()?)?;
        thread::sleep(Duration::from_millis(300));
        kill_process(pid(child.id()), Signal::TERM)?;
        // The save undoes its changes as soon as QEMU answers.
        thread::sleep(Duration::from_millis(1000));
        drop(stopped);
        let said = Said::from(child.wait_with_output()?);
        assert!(matches!(said.code, Some(0 | 143)), "{delay} ms: {said:?}");
        assert_eq!(guest.status()?, "running", "{delay} ms: {said:?}");
        assert_eq!(names_in(directory.path()).len(), usize::from(file.exists()), "{said:?}");
        let _ = fs::remove_file(&file);
        cases(1, Case::QemuEnd);
        cases(u32::from(said.code == Some(143)), Case::Signal);
    }
    Ok(())
}

/// Ctrl-Z in the middle of a save left the guest paused until `fg`, perhaps hours later.
#[test]
fn sigtstp_waits_until_the_guest_runs() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(600)).seed(72).data_share(200);
    let mut guest = config.boot_to(&qemu, 1)?;
    let file = guest.directory().join("vm.vmf");
    let arguments = ["--after", "resume", "--jobs", "1", "--direct-io", "required"];
    let words = words!["save", guest.qmp_path(), file, "--progress", "json"];
    let mut child = run::start(words.iter().chain(&arguments.map(OsString::from)))?;
    let mut byte = [0];
    child.stderr.as_mut().ok_or("piped")?.read_exact(&mut byte)?;
    kill_process(pid(child.id()), Signal::TSTP)?;
    wait_until("the program is stopped", || state(child.id()) == Some('T'))?;
    assert_eq!(guest.status()?, "running");
    assert!(file.exists(), "it has done its work");
    kill_process(pid(child.id()), Signal::CONT)?;
    Said::from(child.wait_with_output()?).assert(0, &["saved"]);
    cases(1, Case::Signal);
    guest.judge_counts()
}

/// With one stopped QEMU, `list` took 125 s, and 5 s more for each monitor that another client
/// held. The reason was "connect to the QMP socket", without the kernel's error.
#[test]
fn list_answers_within_two_seconds_whatever_the_vms_do() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let free = small(&qemu, "free")?;
    let held = small(&qemu, "held")?;
    let stopped = small(&qemu, "stopped")?;
    let gone = small(&qemu, "gone")?;
    let _holders = hold(&held.qmp_path())?;
    let process = Stopped::new(stopped.pid()?)?;
    fs::remove_file(gone.qmp_path())?;
    let started = Instant::now();
    let said = vmfile(words!["list", "--json"]);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let vms = said.json()?;
    let of = |guest: &Guest| -> TestResult<serde_json::Value> {
        let pid = guest.pid()?;
        let vms = vms.as_array().ok_or("a list")?;
        Ok(vms.iter().find(|vm| vm["pid"] == pid).ok_or("it is listed")?.clone())
    };
    assert_eq!(of(&free)?["reason"], json!(null));
    let reason = |guest: &Guest| Ok::<_, TestError>(of(guest)?["reason"].to_string());
    let expected = "another client holds this monitor, and 2 wait";
    assert!(reason(&held)?.contains(expected), "{}", reason(&held)?);
    assert!(reason(&stopped)?.contains("QEMU's process is stopped"), "{}", reason(&stopped)?);
    assert!(reason(&gone)?.contains("No such file or directory"), "{}", reason(&gone)?);
    drop(process);
    Ok(())
}

/// A `save` that waited for libvirt's monitor got it when libvirtd was restarted, saved the VM and
/// ended it: libvirt reported "crashed".
#[test]
fn a_monitor_of_libvirt_is_not_connected_to() -> TestResult {
    let directory = tempfile::tempdir()?;
    let monitor = directory.path().join("libvirt/qemu/domain-1-web/monitor.sock");
    fs::create_dir_all(monitor.parent().ok_or("a directory")?)?;
    let listener = UnixListener::bind(&monitor)?;
    listener.set_nonblocking(true)?;
    let said = vmfile(words!["save", monitor, directory.path().join("vm.vmf")]);
    said.assert(3, &["libvirt owns the monitor", "virsh save"]);
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    Ok(())
}
