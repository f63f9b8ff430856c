//! Saves a guest while it runs: chooses the method, and puts back what it changes in QEMU.
//!
//! `userfault`: see `userfault.rs`; `aside`: `aside.rs`; `background-snapshot` and `pre-copy`:
//! `live_stream.rs`.

use vmfile_qemu::{
    Feature, PUT_BACK_TIMEOUT, RunState, SettingsChange, StreamSettings, Vm, VmError,
};
use vmfile_stream::receiver::Received;

use super::live_memory::LiveMemory;
use super::live_stream::{finish, receive};
use super::{Live, LiveMethod, Work, Written};
use crate::error::{SaveError, UserfaultError};

/// QEMU's migration settings before the save, and the caller's options.
#[derive(Debug)]
pub(super) struct LiveRoute {
    before: StreamSettings,
    change: SettingsChange,
    live: Live,
    /// `Err` says why the memory of QEMU's process is not used.
    memory: Result<LiveMemory, String>,
    /// Whether no other method may be used than those that read this memory.
    only_memory: bool,
    /// Why QEMU's protection of memory is not enough, if it is not.
    unprotected: Option<String>,
}

/// A method, and what it needs.
struct Chosen {
    method: LiveMethod,
    /// How many bytes are to be copied aside.
    copied_bytes: u64,
}

impl LiveRoute {
    /// Asks QEMU for its migration settings, which are put back later.
    pub(super) fn prepare(
        vm: &mut Vm,
        live: Live,
        (memory, only_memory): (Result<LiveMemory, String>, bool),
    ) -> Result<LiveRoute, SaveError> {
        let (before, unprotected) = (vm.stream_settings()?, unprotected(vm)?);
        let pre_copy = before.pre_copy(live.pause_max);
        let all: Vec<_> = before.background_snapshot().into_iter().chain([pre_copy]).collect();
        let change = SettingsChange::new(&before, &all);
        Ok(LiveRoute { before, change, live, memory, only_memory, unprotected })
    }

    /// Returns what the save may change in QEMU's migration settings.
    pub(super) fn settings(&self) -> &SettingsChange {
        &self.change
    }

    /// Saves the VM by the best method that is possible, and completes the file.
    pub(super) fn write(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        let hold = !work.disks.is_empty();
        // Discards the events of earlier pauses: all pauses of this save are measured.
        let _ = work.vm.pause_seen();
        let chosen = self.choose(work.vm, hold)?;
        if let Some(written) = self.by(work, &chosen)? {
            return Ok(written);
        }
        let pause_max = self.live.pause_max;
        let reason = format!("the guest's memory could not be copied aside within {pause_max:?}");
        let chosen = self.pre_copy(work.vm, reason)?;
        let written = self.by(work, &chosen)?;
        Ok(written.expect("only a copy aside can be too much"))
    }

    /// Saves the VM by one method; returns `None` if the copy aside took too long. The guest runs
    /// afterwards, with QEMU's settings as they were.
    fn by(&mut self, work: &mut Work<'_>, chosen: &Chosen) -> Result<Option<Written>, SaveError> {
        let pause_max = self.live.pause_max;
        let Chosen { method, copied_bytes } = chosen;
        let copied = match (&mut self.memory, method) {
            (Ok(memory), LiveMethod::Userfault) => memory.by_userfault(work).map(Copied::File),
            (Ok(memory), LiveMethod::Aside { .. }) => {
                let copied = memory.by_copy(work, (method, *copied_bytes, pause_max));
                copied.map(|written| written.map_or(Copied::TooLong, Copied::File))
            }
            _ => {
                let given_up = work.base.without_memory(work.options, "QEMU sends the memory");
                let timeout = self.live.timeout;
                let received = given_up.and_then(|()| receive(work, method, timeout));
                received.map(Box::new).map(Copied::Stream)
            }
        };
        let may_stand = work.footprint.may_stand;
        let runs = work.vm.unstoppable(PUT_BACK_TIMEOUT, |vm| let_run(vm, may_stand));
        let put_back =
            work.vm.unstoppable(PUT_BACK_TIMEOUT, |vm| vm.put_back_stream_settings(&self.change));
        let copied = match (copied, runs) {
            (Ok(copied), Ok(())) => copied,
            // `let_run` asks QEMU nothing if the guest does not stand still because of the save.
            (Err(error), Ok(())) => {
                return Err(match put_back {
                    Err(source) if source.is_closed() => error.with_qemu_gone(source),
                    _ => error,
                });
            }
            (Ok(_), Err(source)) => return Err(source.into()),
            (Err(cause), Err(source)) if source.is_closed() => {
                return Err(cause.with_qemu_gone(source));
            }
            (Err(cause), Err(source)) => {
                return Err(SaveError::LeftPaused { cause: Box::new(cause), source });
            }
        };
        put_back?;
        match copied {
            Copied::File(written) => Ok(Some(written)),
            Copied::Stream(received) => finish(work, received, method.clone()).map(Some),
            Copied::TooLong => Ok(None),
        }
    }

    /// Chooses the method by trying: QEMU refuses the capability if the guest's memory does not
    /// allow it.
    fn choose(&self, vm: &mut Vm, hold: bool) -> Result<Chosen, SaveError> {
        let (version, protected) = (vm.version()?, self.protection(vm)?);
        let memory = self.memory.as_ref();
        let mut reasons = Vec::new();
        match (&protected, memory.map(|memory| &memory.not_by_userfault)) {
            (Ok(()), Ok(None)) => {
                return Ok(Chosen { method: LiveMethod::Userfault, copied_bytes: 0 });
            }
            (Ok(()), Ok(Some(reason)) | Err(reason)) | (Err(reason), _) => {
                reasons.push(reason.clone());
            }
        }
        match memory.map(|memory| memory.to_copy(self.live.pause_max)) {
            Ok(Ok(copied_bytes)) => {
                self.unprotect(vm, &protected)?;
                let reason = match memory.is_ok_and(LiveMemory::is_mapped) {
                    true => "its RAM is mapped from a file, as after a restore by map".to_owned(),
                    false => reasons.remove(0),
                };
                let method = LiveMethod::Aside { reason };
                return Ok(Chosen { method, copied_bytes });
            }
            Ok(Err(reason)) => reasons.push(reason),
            Err(_) => {}
        }
        let reason = reasons.join("; ");
        match protected {
            _ if self.only_memory => {
                self.unprotect(vm, &protected)?;
                Err(UserfaultError::NotPossible { reason }.into())
            }
            // Up to 8.2, QEMU lets the guest run as soon as its memory is protected, also one that vmfile
            // has stopped: that looks like another client's `cont` after the disks were frozen.
            Ok(()) if hold && !version.has(Feature::PausedSnapshot) => {
                self.unprotect(vm, &protected)?;
                let other = format!("QEMU {version} lets the guest run in a background snapshot");
                self.pre_copy(vm, format!("{reason}; {other}"))
            }
            Ok(()) => {
                let method = LiveMethod::BackgroundSnapshot { reason };
                Ok(Chosen { method, copied_bytes: 0 })
            }
            Err(_) => self.pre_copy(vm, reason),
        }
    }

    /// Has QEMU switch on `background-snapshot`, or says why it cannot be used.
    fn protection(&self, vm: &mut Vm) -> Result<Result<(), String>, SaveError> {
        let version = vm.version()?;
        Ok(Err(match (&self.unprotected, self.before.background_snapshot()) {
            (Some(reason), _) => reason.clone(),
            _ if !version.has(Feature::StoppableSnapshot) => {
                format!(
                    "QEMU {version} leaves the guest stopped if a background-snapshot ends early"
                )
            }
            (None, None) => "this QEMU has no background-snapshot".to_owned(),
            (None, Some(ours)) => match vm.change_stream_settings(&self.before, &ours) {
                Ok(()) => return Ok(Ok(())),
                Err(error) if error.is_refused() => with_what_qemu_needs(error.to_string()),
                Err(error) => return Err(error.into()),
            },
        }))
    }

    /// Puts back the settings that [`LiveRoute::protection`] has changed.
    fn unprotect(&self, vm: &mut Vm, protected: &Result<(), String>) -> Result<(), VmError> {
        if protected.is_ok() { vm.put_back_stream_settings(&self.change) } else { Ok(()) }
    }

    fn pre_copy(&self, vm: &mut Vm, reason: String) -> Result<Chosen, SaveError> {
        if self.only_memory {
            return Err(UserfaultError::NotPossible { reason }.into());
        }
        let settings = self.before.pre_copy(self.live.pause_max);
        vm.apply_stream_settings(&self.before, &settings)?;
        Ok(Chosen { method: LiveMethod::PreCopy { reason }, copied_bytes: 0 })
    }
}

/// Says why QEMU's write protection does not give the VM as it was in one moment, if it does not.
fn unprotected(vm: &mut Vm) -> Result<Option<String>, VmError> {
    if let Some(other) = vm.other_writer()? {
        return Ok(Some(format!("{other} writes to the guest's RAM from outside of QEMU")));
    }
    let machine = vm.machine_with_other_parts()?;
    Ok(machine.map(|machine| {
        format!("QEMU does not protect what it sends of machine {machine} besides RAM")
    }))
}

/// Resumes the guest if it stands still because of the save. QEMU resumes it by itself if the migration
/// was cancelled in time. Without `may_stand`, another client or the guest itself has stopped it, whatever
/// its run state: while it stands still, pre-copy comes to its end, and QEMU says `finish-migrate` and
/// `postmigrate` instead of `paused`.
fn let_run(vm: &mut Vm, may_stand: bool) -> Result<(), VmError> {
    if !may_stand || vm.run_state()? == RunState::Running {
        return Ok(());
    }
    vm.cont()
}

/// Adds what QEMU did not say: it calls the kernel too old also if QEMU's user may not use userfaultfd. QEMU 8.0
/// and later try `/dev/userfaultfd` first, which Linux has since 6.1.
fn with_what_qemu_needs(refusal: String) -> String {
    if !refusal.contains("not supported by host kernel") {
        return refusal;
    }
    format!(
        "{refusal}: QEMU needs Linux 5.7, and to be root, to have CAP_SYS_PTRACE, to be allowed to open \
         /dev/userfaultfd, or vm.unprivileged_userfaultfd=1"
    )
}

/// What was copied while the guest ran.
enum Copied {
    /// The file, which is complete but for its name.
    File(Written),
    Stream(Box<Received>),
    /// Nothing: the copy aside took too long.
    TooLong,
}
