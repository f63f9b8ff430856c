//! Starts a QEMU, watches it while it starts, and kills it unless the caller keeps it.

mod stderr;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};

use self::stderr::StderrTail;
use crate::command_line::{CONTROL_ID, CommandLine};
use crate::qmp::{COMMAND_TIMEOUT, Qmp, QmpError};
use crate::version::{Feature, QemuVersion};
use crate::vm::Vm;

/// How long a QEMU that has closed its monitor may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// One QEMU is started at a time: meanwhile descriptors are inheritable that only this QEMU shall
/// have.
static SPAWNING: Mutex<()> = Mutex::new(());

/// QEMU was not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A program does not say which version of QEMU it is.
    #[error("{program} does not print a version of QEMU", program = program.display())]
    NoVersion {
        /// The program.
        program: PathBuf,
    },
    /// The program could not be run.
    #[error("run {program:?}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The directory in which QEMU is to be started cannot be entered.
    #[error("QEMU is to be started in {directory}, which cannot be entered", directory = directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A socket, a pipe or a descriptor could not be made ready.
    #[error("{what}")]
    System {
        /// The step that failed.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QEMU ended before it answered.
    #[error("QEMU ended with {status} before it answered{}", quoted(.stderr))]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// The end of its standard error; empty if QEMU shares this process's.
        stderr: String,
    },
    /// QEMU runs, but its monitor cannot be used.
    #[error("QEMU's monitor does not answer{}", quoted(.stderr))]
    Monitor {
        /// What went wrong.
        #[source]
        source: QmpError,
        /// The end of its standard error; empty if QEMU shares this process's.
        stderr: String,
    },
}

fn quoted(stderr: &str) -> String {
    let words = stderr.trim();
    if words.is_empty() { String::new() } else { format!("; it said: {words}") }
}

/// A QEMU to be started.
#[derive(Debug)]
pub struct Launch {
    program: PathBuf,
    line: CommandLine,
    working_directory: Option<PathBuf>,
    inherited: Vec<OwnedFd>,
    foreground: bool,
    stop: Option<Arc<AtomicBool>>,
    monitor: Option<MonitorPair>,
    version: Option<QemuVersion>,
}

/// The two ends of the connection to the monitor of a QEMU that is to be started.
#[derive(Debug)]
pub struct MonitorPair {
    ours: UnixStream,
    theirs: UnixStream,
}

impl MonitorPair {
    /// Makes a pair of connected sockets.
    ///
    /// # Errors
    ///
    /// [`LaunchError::System`] when the kernel has no sockets left.
    pub fn new() -> Result<MonitorPair, LaunchError> {
        let what = "make the monitor's pair of sockets";
        let system = |source| LaunchError::System { what, source };
        let (ours, theirs) = UnixStream::pair().map_err(system)?;
        let theirs = high_descriptor(&theirs).map_err(system)?;
        Ok(MonitorPair { ours, theirs: theirs.into() })
    }
}

/// The lowest number of a descriptor that a QEMU gets from this process.
const HIGH: i32 = 1000;

/// Duplicates `file` to a number that no option of a user's names: `-netdev socket,fd=5` without an
/// open descriptor 5 must fail, and not find the monitor or a file of this process's.
///
/// # Errors
///
/// The kernel's error.
pub fn high_descriptor(file: impl AsFd) -> io::Result<OwnedFd> {
    match fcntl_dupfd_cloexec(&file, HIGH) {
        // The process may not have as many.
        Err(Errno::INVAL | Errno::MFILE) => Ok(fcntl_dupfd_cloexec(&file, 3)?),
        made => Ok(made?),
    }
}

impl AsFd for MonitorPair {
    /// Returns the end at which commands are written.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }
}

impl Launch {
    /// Prepares to start `program` with the options `line`.
    pub fn new(program: impl Into<PathBuf>, line: CommandLine) -> Launch {
        Launch {
            program: program.into(),
            line,
            working_directory: None,
            inherited: Vec::new(),
            foreground: false,
            stop: None,
            monitor: None,
            version: None,
        }
    }

    /// Says which version `program` is: from 11.1 on, its monitor is made in the way that is not deprecated.
    #[must_use]
    pub fn version(mut self, version: QemuVersion) -> Launch {
        self.version = Some(version);
        self
    }

    /// Sets the directory that relative paths in the options refer to.
    #[must_use]
    pub fn working_directory(mut self, directory: impl Into<PathBuf>) -> Launch {
        self.working_directory = Some(directory.into());
        self
    }

    /// Makes QEMU inherit `fd` under the number that it has here, `fd.as_raw_fd()`.
    ///
    /// That number goes into the options, as `/proc/self/fd/N` or `fd=N`. This process's copy is
    /// closed once QEMU runs.
    #[must_use]
    pub fn inherit(mut self, fd: OwnedFd) -> Launch {
        self.inherited.push(fd);
        self
    }

    /// Chooses between a QEMU that shares this process's terminal and one that runs by itself.
    ///
    /// In the foreground QEMU has this process's standard input, output and error, and signals from
    /// the terminal reach it. Otherwise it has a process group of its own, reads and writes
    /// nothing, and its standard error is kept for [`LaunchedQemu::stderr`].
    #[must_use]
    pub fn foreground(mut self, foreground: bool) -> Launch {
        self.foreground = foreground;
        self
    }

    /// Makes the wait for QEMU's first answer, and every later wait for QEMU, end soon after `stop`
    /// is set.
    #[must_use]
    pub fn until(mut self, stop: &Arc<AtomicBool>) -> Launch {
        self.stop = Some(Arc::clone(stop));
        self
    }

    /// Chooses the connection to the monitor, which the caller may have given to a guardian.
    #[must_use]
    pub fn monitor(mut self, monitor: MonitorPair) -> Launch {
        self.monitor = Some(monitor);
        self
    }

    /// Starts QEMU and waits at most `timeout` until its monitor answers.
    ///
    /// The monitor is a pair of sockets between QEMU and this process, beside the monitors in the
    /// options.
    ///
    /// # Errors
    ///
    /// [`LaunchError::Ended`] with QEMU's error text, e.g. if it refuses an option.
    pub fn spawn(mut self, timeout: Duration) -> Result<LaunchedQemu, LaunchError> {
        self.check_directory()?;
        let system = |what| move |source| LaunchError::System { what, source };
        let monitor = self.monitor.take().map_or_else(MonitorPair::new, Ok)?;
        let MonitorPair { ours, theirs } = monitor;
        let mut stderr = StderrTail::default();
        let mut command = self.command(theirs.as_raw_fd());
        if !self.foreground {
            let pipe_failed = |error| system("make a pipe for QEMU's errors")(error);
            let (read, write) =
                pipe_with(PipeFlags::CLOEXEC).map_err(|errno| pipe_failed(errno.into()))?;
            stderr = StderrTail::keep(read, self.line.secrets()).map_err(pipe_failed)?;
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(write).process_group(0);
        }
        let mut shared: Vec<BorrowedFd<'_>> = self.inherited.iter().map(AsFd::as_fd).collect();
        shared.push(theirs.as_fd());
        let child = spawn_with(&mut command, &shared, &self.program)?;
        // This closes this process's copy of the pipe's end: the pipe must end when QEMU does.
        drop(command);
        drop(theirs);
        let mut running = Running { child: Some(child), stderr };
        match Qmp::from_stream(ours, timeout, self.stop, Some(running.pid())) {
            Ok(mut qmp) => {
                // `timeout` was for the start alone.
                qmp.set_timeout(COMMAND_TIMEOUT);
                let vm = Vm::from_qmp(qmp, Some(running.pid()));
                Ok(LaunchedQemu { vm: Some(vm), running })
            }
            Err(error) => Err(running.why_silent(error)),
        }
    }

    /// Refuses a directory that cannot be entered: the kernel's error would not tell it from the program.
    fn check_directory(&self) -> Result<(), LaunchError> {
        let Some(directory) = &self.working_directory else { return Ok(()) };
        // With the dot at its end, the path leads to a directory or nowhere.
        access(directory.join("."), Access::EXEC_OK).map_err(|error| LaunchError::Directory {
            directory: directory.clone(),
            source: error.into(),
        })
    }

    fn command(&self, control_fd: i32) -> Command {
        let mut command = Command::new(&self.program);
        command.args(self.line.to_arguments());
        command.arg("-chardev").arg(format!("socket,id={CONTROL_ID},fd={control_fd}"));
        match self.version {
            Some(version) if version.has(Feature::MonitorObject) => {
                let object = format!("monitor-qmp,id={CONTROL_ID},chardev={CONTROL_ID}");
                command.arg("-object").arg(object)
            }
            _ => command.arg("-mon").arg(format!("chardev={CONTROL_ID},mode=control")),
        };
        if let Some(directory) = &self.working_directory {
            command.current_dir(directory);
        }
        command
    }
}

/// Runs a program to its end, with nothing to read, and returns what it wrote. It inherits no descriptor
/// that is meant for a QEMU which is being started.
///
/// # Errors
///
/// The kernel's error.
pub fn output_of(command: &mut Command) -> io::Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = {
        let _one_at_a_time = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
        command.spawn()?
    };
    child.wait_with_output()
}

/// Spawns `command` so that it has the descriptors `shared` under their numbers.
///
/// They are inheritable only during this call, and there is one such call at a time. If the program
/// starts another process by other means meanwhile, that process inherits them too.
fn spawn_with(
    command: &mut Command,
    shared: &[BorrowedFd<'_>],
    program: &Path,
) -> Result<Child, LaunchError> {
    let _one_at_a_time = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
    let system = |source: Errno| LaunchError::System {
        what: "share a descriptor with QEMU",
        source: source.into(),
    };
    let mut inheritable = Inheritable(Vec::new());
    for &fd in shared {
        let flags = fcntl_getfd(fd).map_err(system)?;
        fcntl_setfd(fd, flags.difference(FdFlags::CLOEXEC)).map_err(system)?;
        inheritable.0.push((fd, flags));
    }
    command.spawn().map_err(|source| LaunchError::Spawn { program: program.to_owned(), source })
}

/// Descriptors that are inheritable until this is dropped.
struct Inheritable<'a>(Vec<(BorrowedFd<'a>, FdFlags)>);

impl Drop for Inheritable<'_> {
    fn drop(&mut self) {
        for &(fd, flags) in &self.0 {
            // The call that set the flags cannot fail when it restores them.
            let _ = fcntl_setfd(fd, flags);
        }
    }
}

/// A QEMU that this process started. Dropping it kills QEMU; [`LaunchedQemu::detach`] keeps QEMU.
#[derive(Debug)]
pub struct LaunchedQemu {
    /// `None` only once it was handed out by `detach`.
    vm: Option<Vm>,
    running: Running,
}

impl LaunchedQemu {
    /// Returns the VM.
    ///
    /// # Panics
    ///
    /// Never: the VM leaves only with `self`.
    pub fn vm(&mut self) -> &mut Vm {
        self.vm.as_mut().expect("the VM leaves only with self")
    }

    /// Returns the id of QEMU's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Returns the end of what QEMU wrote to its standard error; empty in the foreground.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.running.stderr.text()
    }

    /// Returns how QEMU ended, if it has, and the end of its standard error.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn ended(&mut self) -> io::Result<Option<(ExitStatus, String)>> {
        let Some(child) = self.running.child.as_mut() else { return Ok(None) };
        let status = child.try_wait()?;
        Ok(status.map(|status| (status, self.running.stderr.last_words())))
    }

    /// Waits for QEMU to end, as the foreground does.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn wait(mut self) -> io::Result<ExitStatus> {
        let child = self.running.child.take();
        child.expect("the child leaves only with self").wait()
    }

    /// Lets QEMU run on by itself, and returns its VM.
    ///
    /// Its standard error is read as long as this process lives, and is lost afterwards.
    ///
    /// # Panics
    ///
    /// Never: the VM leaves only with `self`.
    #[must_use]
    pub fn detach(mut self) -> Vm {
        if let Some(mut child) = self.running.child.take() {
            // The thread takes QEMU's exit status. If it cannot be started, a QEMU that has ended
            // only stays in the process table until this process ends.
            let _ = thread::Builder::new().spawn(move || child.wait());
        }
        self.vm.take().expect("the VM leaves only with self")
    }
}

/// The child process, killed on drop.
#[derive(Debug)]
struct Running {
    child: Option<Child>,
    stderr: StderrTail,
}

impl Running {
    fn pid(&self) -> u32 {
        self.child.as_ref().expect("the child leaves only with self").id()
    }

    /// Finds out why a QEMU that was just started does not answer.
    fn why_silent(&mut self, error: QmpError) -> LaunchError {
        let deadline = Instant::now() + EXIT_TIMEOUT;
        let mut status = None;
        while error.is_closed() && status.is_none() && Instant::now() < deadline {
            status = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            thread::sleep(Duration::from_millis(2));
        }
        match status {
            Some(status) => LaunchError::Ended { status, stderr: self.stderr.last_words() },
            None => LaunchError::Monitor { source: error, stderr: self.stderr.text() },
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = self.child.as_mut() {
            // Both fail only when the child is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Returns the program to start for a saved VM: `saved` if it is there, or the one of that name on
/// the search path `search` (the value of `PATH`).
#[must_use]
pub fn find_program(saved: &Path, search: Option<&OsString>) -> Option<PathBuf> {
    if saved.is_file() {
        return Some(saved.to_owned());
    }
    let name = saved.file_name()?;
    let directories = search.map(std::env::split_paths).into_iter().flatten();
    directories.map(|directory| directory.join(name)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let line = CommandLine::new(["-S"]).unwrap();
        let error = Launch::new("/nowhere/qemu", line).spawn(Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.to_string(), "run \"/nowhere/qemu\"");
    }

    #[test]
    fn a_program_that_ends_is_quoted_with_its_status() {
        let line = CommandLine::new(Vec::<String>::new()).unwrap();
        // Not a QEMU: it does not know its first option and says so.
        let error = Launch::new("cat", line).spawn(Duration::from_secs(5)).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, LaunchError::Ended { .. }), "{text}");
        assert!(text.contains("exit status: 1") && text.contains("it said: "), "{text}");
    }

    #[test]
    fn a_program_is_searched_by_its_name() {
        let search = OsString::from("/nowhere:/bin");
        let found = find_program(Path::new("/gone/sh"), Some(&search));
        assert_eq!(found, Some(PathBuf::from("/bin/sh")));
        assert_eq!(find_program(Path::new("/gone/sh"), None), None);
    }
}
