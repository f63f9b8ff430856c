//! A child process that undoes a verb's changes in QEMU if this process ends in the middle of it.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vmfile_engine::{Guardian, Step, Will};
use vmfile_qemu::{Footprint, UndoStep, Vm, steps_to_end, steps_to_run, undo_steps};

/// A guardian could not be started, or has ended.
#[derive(Debug, thiserror::Error)]
#[error("start or reach the guardian process, which lets the VM run on if this process ends")]
pub struct GuardError {
    /// What the kernel said.
    source: io::Error,
}

/// A guardian, and the files that it also removes.
#[derive(Debug)]
pub(crate) struct Guard {
    guardian: Guardian,
    /// Files, and then directories, that the guardian removes if this process ends.
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

    /// Has the guardian also remove files, and then directories that are empty. They need not exist
    /// yet.
    pub(crate) fn add_files(
        &mut self,
        files: impl IntoIterator<Item = PathBuf>,
    ) -> Result<(), GuardError> {
        let before = self.files.len();
        self.files.extend(files);
        if self.files.len() > before { self.replace_will(Vec::new()) } else { Ok(()) }
    }

    /// Has the guardian accept new connections to a socket, and read and discard their bytes, until
    /// QEMU stops sending: QEMU (10.0.2) may crash when several of its connections end at once.
    pub(crate) fn keep_listening(&self, listener: BorrowedFd<'_>) -> Result<(), GuardError> {
        self.guardian.keep_listening(listener).map_err(|source| GuardError { source })
    }

    /// Has the guardian keep a connection open and read it; or keep a file open, so that QEMU is
    /// not the last to close it. The last close frees the file's blocks, and QEMU would wait for
    /// that: it takes seconds for a file that QEMU wrote page by page (10 s for 140 MiB on a busy
    /// disk, ext4, Linux 6.18).
    pub(crate) fn keep_open(&self, connection: BorrowedFd<'_>) -> Result<(), GuardError> {
        self.guardian.keep_open(connection).map_err(|source| GuardError { source })
    }

    /// Has the guardian undo everything that a save may have changed, if this process ends from now
    /// on and QEMU has the record of this save.
    pub(crate) fn watch_save(&self, footprint: &Footprint<'_>) -> Result<(), GuardError> {
        self.replace_will(undo_steps(footprint))
    }

    /// Has the guardian end the QEMU that this process starts, if this process ends from now on.
    pub(crate) fn watch_start(&self) -> Result<(), GuardError> {
        self.replace_will(steps_to_end())
    }

    /// Has the guardian let the guest run in the QEMU that this process started, if this process
    /// ends from now on: the VM is restored.
    pub(crate) fn watch_run(&self) -> Result<(), GuardError> {
        self.replace_will(steps_to_run())
    }

    /// Returns the guardian's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.guardian.pid()
    }

    /// Ends the guardian: there is nothing left to undo.
    pub(crate) fn dismiss(self) {
        self.guardian.dismiss();
    }

    /// Has the guardian carry out its steps now, and does not wait for it: it waits up to an hour
    /// for QEMU's answer, where this process gives up after ten seconds.
    pub(crate) fn leave(self) {
        self.guardian.leave();
    }

    fn replace_will(&self, steps: Vec<UndoStep>) -> Result<(), GuardError> {
        let mut steps: Vec<Step> = steps.into_iter().map(step).collect();
        steps.extend(self.files.iter().filter_map(|file| path(file)).map(Step::Remove));
        self.guardian.replace_will(&Will::new(&steps)).map_err(|source| GuardError { source })
    }
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
        UndoStep::OnlyIf { line, answer, word, limit } => {
            Step::OnlyIf { line, answer, words: vec![word.into_bytes()], limit }
        }
        UndoStep::UntilStill { line, answer, from, quiet, limit } => {
            Step::AwaitStill { line, answer, from: from.as_bytes().to_vec(), quiet, limit }
        }
        UndoStep::UnlessNamed { path: name, file, steps } => Step::UnlessNamed {
            path: path(&name).unwrap_or_default(),
            device: file.device,
            inode: file.inode,
            steps: steps.into_iter().map(step).collect(),
        },
        // A path with a zero byte in it leads to no file.
        UndoStep::RemoveIfLast(file) => Step::RemoveIfLast(path(&file).unwrap_or_default()),
    }
}

fn path(file: &Path) -> Option<CString> {
    CString::new(file.as_os_str().as_bytes()).ok()
}
