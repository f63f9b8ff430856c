//! What is put back in QEMU by another process, should this one end in the middle of a verb.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmfile_engine::{Guardian, Step, Will};
use vmfile_qemu::qmp::command_line;
use vmfile_qemu::{Footprint, UndoStep, Vm, undo_steps};

use crate::error::GuardError;

/// How long a QEMU that is told to quit may take to answer: it may still be starting.
const QUIT_TIMEOUT: Duration = Duration::from_secs(60);

/// A guardian, and the files that it removes besides.
#[derive(Debug)]
pub(crate) struct Guard {
    guardian: Guardian,
    /// Files, and then directories, that go with this process.
    files: Vec<PathBuf>,
}

impl Guard {
    /// Starts a guardian that holds the monitor of `vm`.
    pub(crate) fn of_vm(vm: &mut Vm) -> Result<Guard, GuardError> {
        Guard::of_monitor(vm.qmp().as_fd())
    }

    /// Starts a guardian that holds a connection to a monitor.
    pub(crate) fn of_monitor(monitor: BorrowedFd<'_>) -> Result<Guard, GuardError> {
        let guardian = Guardian::start(monitor).map_err(|source| GuardError { source })?;
        Ok(Guard { guardian, files: Vec::new() })
    }

    /// Has a file removed as well, or a directory that is empty then.
    pub(crate) fn add_file(&mut self, file: &Path) {
        self.files.push(file.to_owned());
    }

    /// Has everything put back that a save may have changed, should this process end from now on.
    pub(crate) fn watch_save(&self, footprint: &Footprint<'_>) -> Result<(), GuardError> {
        let steps = undo_steps(footprint).into_iter().map(step).collect();
        self.entrust(steps)
    }

    /// Has a QEMU that this process starts ended, should this process end from now on.
    pub(crate) fn watch_start(&self) -> Result<(), GuardError> {
        // QEMU may not have greeted yet, and takes no other command before the first.
        let steps = ["qmp_capabilities", "quit"].map(|command| ask(command, QUIT_TIMEOUT));
        self.entrust(steps.to_vec())
    }

    /// Has the guest of a QEMU let run that this process has started, should this process end from
    /// now on: the VM is restored.
    pub(crate) fn watch_run(&self) -> Result<(), GuardError> {
        self.entrust(vec![ask("cont", QUIT_TIMEOUT)])
    }

    /// Nothing is to be put back any more.
    pub(crate) fn dismiss(self) {
        self.guardian.dismiss();
    }

    fn entrust(&self, mut steps: Vec<Step>) -> Result<(), GuardError> {
        steps.extend(self.files.iter().filter_map(|file| path(file)).map(Step::Remove));
        self.guardian.entrust(&Will::new(&steps)).map_err(|source| GuardError { source })
    }
}

fn ask(command: &str, limit: Duration) -> Step {
    let id = format!("guardian-{command}");
    let line = command_line(command, &serde_json::json!({}), &id);
    Step::Ask { line, answer: id.into_bytes(), limit }
}

fn step(undo: UndoStep) -> Step {
    match undo {
        UndoStep::Ask { line, answer, limit } => Step::Ask { line, answer, limit },
        UndoStep::Until { line, answer, words, word, is_there, limit } => {
            let mut all: Vec<Vec<u8>> = words.iter().map(|word| word.as_bytes().to_vec()).collect();
            all.extend((!word.is_empty()).then(|| word.into_bytes()));
            if is_there {
                Step::Await { line, answer, words: all, limit }
            } else {
                Step::AwaitNone { line, answer, words: all, limit }
            }
        }
        UndoStep::Rest(duration) => Step::Rest(duration),
        // A path with a zero byte in it leads to no file.
        UndoStep::RemoveIfLast(file) => Step::RemoveIfLast(path(&file).unwrap_or_default()),
    }
}

fn path(file: &Path) -> Option<CString> {
    CString::new(file.as_os_str().as_bytes()).ok()
}
