//! Undoing what a save has changed in QEMU. The save itself does it, or its guardian, or the next
//! vmfile process that is used with the VM.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::record::{inquiry, removal};
use super::{FileId, Overlay, RunState, SaveRecord, Vm, VmError, flush};
use crate::outgoing::{self, Outgoing};
use crate::pass_fd::{self, FDSETS};
use crate::qmp::{QmpError, command_line};
use crate::stream_settings::{TRICKLE, set_bandwidth};

/// How long QEMU may take to end a migration, or to write an overlay into the image below it.
const LONG: Duration = Duration::from_secs(60);

/// How long QEMU may take to make its connections.
const CONNECTING: Duration = Duration::from_secs(10);

/// How long QEMU may take until it gives its threads no more pages of a file that it writes.
const RUNNING_DRY: Duration = Duration::from_secs(10);

/// How long QEMU may take for a command that waits neither for a disk nor for a migration.
const SHORT: Duration = Duration::from_secs(10);

/// How long QEMU may take to resume the guest. QEMU's process may itself be stopped, by a debugger
/// or an overloaded host, and QEMU forgets a command when the connection ends; so a guardian keeps
/// waiting.
const PATIENT: Duration = Duration::from_secs(3600);

/// What a save may have changed, so far.
#[derive(Clone, Copy, Debug)]
pub struct Footprint<'a> {
    /// The save's record: which process saves, and the VM's state before.
    pub record: &'a SaveRecord,
    /// Whether QEMU writes the file itself: its threads must be idle before the migration is
    /// cancelled.
    pub writes_file: bool,
    /// The path and the id of the file of this save. Once the file has its name, the overlays
    /// belong to it and stay.
    pub file: (&'a Path, FileId),
    /// Whether a guest that ran before is to stay paused once the file has its name.
    pub stays_paused: bool,
    /// Whether the save may have stopped the guest, and not let it run since.
    pub may_stand: bool,
}

/// One step of the undo, for a process that cannot parse QEMU's answers: QEMU's answer to `line` is
/// the first line that contains `answer`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UndoStep {
    /// Send a line and wait for its answer, which may be an error.
    Ask {
        /// The line.
        line: Vec<u8>,
        /// The text that identifies its answer.
        answer: Vec<u8>,
        /// How long it may take.
        limit: Duration,
    },
    /// Send a line again and again until its answer contains one of the words, or none of them.
    Until {
        /// The line.
        line: Vec<u8>,
        /// The text that identifies its answer.
        answer: Vec<u8>,
        /// The words.
        words: &'static [&'static str],
        /// A further word, which depends on the VM; empty for none.
        word: String,
        /// Whether one of the words must be there; if not, none of them may be.
        is_there: bool,
        /// How long it may take.
        limit: Duration,
    },
    /// Send a line; unless its answer contains the word, carry out none of the later steps.
    OnlyIf {
        /// The line.
        line: Vec<u8>,
        /// The text that identifies its answer.
        answer: Vec<u8>,
        /// The word.
        word: String,
        /// How long it may take.
        limit: Duration,
    },
    /// Send a line again and again until the part of its answer from `from` to the next `}` has not
    /// changed for `quiet`.
    UntilStill {
        /// The line.
        line: Vec<u8>,
        /// The text that identifies its answer.
        answer: Vec<u8>,
        /// The text with which the part begins.
        from: &'static str,
        /// How long the part must stay the same.
        quiet: Duration,
        /// How long it may take.
        limit: Duration,
    },
    /// Carry out steps unless `path` leads to `file`.
    UnlessNamed {
        /// The path.
        path: PathBuf,
        /// The file that may have this name.
        file: FileId,
        /// The steps.
        steps: Vec<UndoStep>,
    },
    /// Remove a file if the last [`UndoStep::Until`] ended well.
    RemoveIfLast(PathBuf),
}

/// The states of a migration that is under way (QEMU 7.2 to 11.1).
const UNDER_WAY: [&str; 10] = [
    "\"setup\"",
    "\"active\"",
    "\"device\"",
    "\"cancelling\"",
    "\"failing\"",
    "\"pre-switchover\"",
    "\"wait-unplug\"",
    "\"postcopy-active\"",
    "\"postcopy-device\"",
    "\"colo\"",
];

/// Returns the steps that undo everything that a save may have changed. The save need not have got
/// that far: no step does anything to a VM that is as it was before. The first step checks that the
/// record in QEMU is the one of this save, because by then another save may hold the VM.
#[must_use]
pub fn undo_steps(footprint: &Footprint<'_>) -> Vec<UndoStep> {
    let mut steps = Steps::default();
    let record = footprint.record;
    steps.only_if_held(record);
    if record.settings.is_some() {
        steps.end_migration(footprint);
    }
    if record.was_running && footprint.may_stand {
        steps.unless(footprint.stays_paused.then_some(footprint.file), |steps| {
            let (command, arguments) = flush::taking(true);
            steps.ask(command, arguments, SHORT);
            steps.ask("cont", json!({}), PATIENT);
        });
    }
    if let Some(change) = &record.settings {
        for (command, arguments) in change.commands() {
            steps.ask(command, arguments, SHORT);
        }
        steps.ask("closefd", json!({ "fdname": outgoing::STREAM_NAME }), SHORT);
    }
    for fdset in FDSETS {
        steps.ask("remove-fd", json!({ "fdset-id": fdset }), SHORT);
    }
    if !record.overlays.is_empty() {
        steps.unless(Some(footprint.file), |steps| {
            record.overlays.iter().for_each(|overlay| steps.merge(overlay));
        });
    }
    let (command, arguments) = removal();
    steps.ask(command, arguments, SHORT);
    steps.list
}

/// Returns the steps that end a QEMU. Its monitor may not be in command mode yet, so the first step
/// sends `qmp_capabilities`.
#[must_use]
pub fn steps_to_end() -> Vec<UndoStep> {
    let mut steps = Steps::default();
    steps.ask("qmp_capabilities", json!({}), LONG);
    steps.ask("quit", json!({}), LONG);
    steps.list
}

/// Returns the steps that let a guest run.
#[must_use]
pub fn steps_to_run() -> Vec<UndoStep> {
    let mut steps = Steps::default();
    steps.ask("cont", json!({}), PATIENT);
    steps.list
}

/// Steps, each with an id of its own.
#[derive(Default)]
struct Steps {
    list: Vec<UndoStep>,
    lines: usize,
}

impl Steps {
    /// Adds the steps that `add` adds. If `file` is given, they are skipped once the file has its
    /// name.
    fn unless(&mut self, file: Option<(&Path, FileId)>, add: impl FnOnce(&mut Steps)) {
        let before = self.list.len();
        add(self);
        if let Some((path, file)) = file {
            let steps = self.list.split_off(before);
            self.list.push(UndoStep::UnlessNamed { path: path.to_path_buf(), file, steps });
        }
    }

    fn line(&mut self, command: &str, arguments: &Value) -> (Vec<u8>, Vec<u8>) {
        let id = format!("guardian-{}-", self.lines);
        self.lines += 1;
        (command_line(command, arguments, &id), id.into_bytes())
    }

    fn ask(&mut self, command: &str, arguments: Value, limit: Duration) {
        let (line, answer) = self.line(command, &arguments);
        self.list.push(UndoStep::Ask { line, answer, limit });
    }

    fn only_if_held(&mut self, record: &SaveRecord) {
        let (command, arguments) = inquiry();
        let (line, answer) = self.line(command, &arguments);
        let word = record.mark();
        self.list.push(UndoStep::OnlyIf { line, answer, word, limit: PATIENT });
    }

    fn until(
        &mut self,
        (command, arguments): (&str, Value),
        (words, word): (&'static [&'static str], String),
        is_there: bool,
        limit: Duration,
    ) {
        let (line, answer) = self.line(command, &arguments);
        self.list.push(UndoStep::Until { line, answer, words, word, is_there, limit });
    }

    /// Cancels the migration: the process that received it is gone. QEMU reports the end of the
    /// migration some moments before it accepts `cont` again ("Migration is not finalized yet", 7.2
    /// to 11.1), so the last step waits for that.
    fn end_migration(&mut self, footprint: &Footprint<'_>) {
        let over = || (&UNDER_WAY[..], String::new());
        // QEMU 10.0.2 may abort if the migration is cancelled while it connects.
        let connects = (&["\"setup\""][..], String::new());
        self.until(("query-migrate", json!({})), connects, false, CONNECTING);
        if footprint.writes_file {
            // See `Vm::cancel_file`.
            let (command, arguments) = set_bandwidth(&TRICKLE.into());
            self.ask(command, arguments, SHORT);
            let (line, answer) = self.line("query-migrate", &json!({}));
            let (from, quiet, limit) = ("\"ram\"", outgoing::QUIET, RUNNING_DRY);
            self.list.push(UndoStep::UntilStill { line, answer, from, quiet, limit });
        }
        self.ask("migrate_cancel", json!({}), SHORT);
        if footprint.record.was_running && footprint.may_stand {
            // See `Vm::wait_cancelled`. A later step lets the guest run.
            self.until(("query-migrate", json!({})), over(), false, outgoing::FREE_AFTER);
            self.ask("stop", json!({}), SHORT);
        }
        self.until(("query-migrate", json!({})), over(), false, LONG);
        let finishes = (&["\"finish-migrate\""][..], String::new());
        self.until(("query-status", json!({})), finishes, false, LONG);
    }

    /// Commits an overlay into the image below it, and removes its file.
    fn merge(&mut self, overlay: &Overlay) {
        let node = overlay.node();
        let commit = json!({ "job-id": node, "device": node, "base-node": overlay.below() });
        self.ask("block-commit", commit, SHORT);
        // QEMU refuses this until the job is ready. Once the job has ended, it answers "not found".
        let ended = (&["\"return\"", "not found"][..], String::new());
        let complete = ("block-job-complete", json!({ "device": node }));
        self.until(complete, ended, true, LONG);
        let nodes = ("query-named-block-nodes", json!({ "flat": true }));
        self.until(nodes, (&[], format!("\"{node}\"")), false, LONG);
        self.list.push(UndoStep::RemoveIfLast(overlay.file().to_owned()));
    }
}

impl Vm {
    /// Undoes what the save of `record` has changed in QEMU. Overlays stay if `is_kept` returns
    /// `true` for them: they belong to a file.
    ///
    /// # Errors
    ///
    /// QEMU's error; the record then stays in QEMU.
    pub fn put_back(
        &mut self,
        record: &SaveRecord,
        is_kept: impl Fn(&Path) -> bool,
    ) -> Result<(), VmError> {
        self.put_back_at_once(record)?;
        let drives = self.drives()?;
        let is_there = |overlay: &&Overlay| {
            drives.iter().any(|drive| drive.node.as_deref() == Some(overlay.node()))
        };
        let left = record.overlays.iter().filter(is_there).filter(|left| !is_kept(left.file()));
        for overlay in left {
            self.merge_overlay(overlay, LONG)?;
            remove(overlay.file())?;
        }
        self.remove_record()
    }

    /// Undoes everything but the overlays: ends the migration, resumes the guest, and restores the
    /// settings. The overlays and the record stay, for [`Vm::put_back`].
    ///
    /// # Errors
    ///
    /// QEMU's error, or [`VmError::NotStill`] if the migration does not end.
    pub fn put_back_at_once(&mut self, record: &SaveRecord) -> Result<(), VmError> {
        if record.settings.is_some() {
            self.end_left_migration()?;
        }
        let is_still = match self.run_state()? {
            RunState::Paused => true,
            // If the save starts no migration, another client migrated the guest, and it runs
            // elsewhere.
            RunState::PostMigrate => record.settings.is_some(),
            _ => false,
        };
        if record.was_running && is_still {
            self.take_back_disks()?;
            self.resume_and_check()?;
        }
        if let Some(change) = &record.settings {
            self.put_back_stream_settings(change)?;
        }
        self.remove_descriptors()
    }

    /// Removes the descriptors that a save may have left in QEMU: those, too, of a command that QEMU has
    /// carried out and whose answer has not come.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn remove_descriptors(&mut self) -> Result<(), VmError> {
        match pass_fd::closefd(&mut self.qmp, outgoing::STREAM_NAME) {
            // QEMU refuses if it has no descriptor of that name.
            Ok(()) | Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(pass_fd::remove_left(&mut self.qmp)?)
    }

    /// Ends a migration whose receiver is gone.
    fn end_left_migration(&mut self) -> Result<(), VmError> {
        self.wait_connected(Instant::now() + CONNECTING)?;
        match self.outgoing()? {
            Outgoing::Active | Outgoing::Held => {}
            _ => return self.settle(Instant::now() + LONG),
        }
        match self.cancel_file(LONG)? {
            Outgoing::Active | Outgoing::Held => {
                let reason = "a migration that a save has left does not end".to_owned();
                Err(VmError::NotStill { what: reason })
            }
            _ => Ok(()),
        }
    }
}

fn remove(file: &Path) -> Result<(), VmError> {
    match std::fs::remove_file(file) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(VmError::system(format!("remove {}", file.display()), source))
        }
        _ => Ok(()),
    }
}
