//! `vmfile save`: a running VM into a file.
//!
//! ```text
//! begin - pause - the route: device state and RAM, metadata - prove - verify - publish - release
//! ```
//!
//! Everything that can be refused is refused in `begin`, while the VM runs. From `pause` on, every
//! exit but the last resumes the VM as it ran and leaves no file. If this process is killed, its
//! guardian does the same; if the guardian is killed as well, a record inside QEMU tells the next
//! vmfile what to undo.

mod aside;
mod base;
mod changed;
mod config_files;
mod describe;
mod direct;
mod disks;
mod ending;
mod hang_up;
mod images;
mod live;
mod live_memory;
mod live_stream;
mod native;
mod native_file;
mod options;
mod report;
mod route;
mod sending;
mod sleep;
mod space;
mod stream;
pub(crate) mod target;
mod userfault;
mod work;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmfile_engine::PublishError;
use vmfile_engine::{BackendInUse, DirectIoInUse};
use vmfile_format::manifest::{SnapshotId, VmMeta};
use vmfile_pages::PagesError;
use vmfile_pages::control::Control;
use vmfile_pages::draft::{Draft, Proven};
use vmfile_qemu::{
    FileId, Footprint, Holder, PUT_BACK_TIMEOUT, Paused, RunState, SaveRecord, Vm, VmError,
};

pub use self::base::BaseUsed;
use self::base::ChosenBase;
use self::changed::Known;
use self::describe::describe_vm;
pub use self::disks::SavedDisk;
pub(crate) use self::disks::overlay_names;
use self::disks::{Disks, deep_disks, saved_disks};
use self::live_memory::let_run_by_another;
pub use self::options::{After, BaseFile, Live, Route, SaveOptions};
pub use self::report::{GuestWaits, LiveMethod, RouteUsed, SaveReport};
use self::route::{ChosenRoute, ReadyRoute, choose_live, choose_paused};
use self::work::Work;
pub use crate::change::Change;
use crate::error::SaveError;
use crate::guard::Guard;
use crate::leftover::put_right;
use crate::new_file::new_file;

/// How long QEMU may take to flush its disks and end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(60);

/// Saves `vm` to a new file at `destination`.
///
/// The guest is paused, its RAM written as [`SaveOptions::route`] says, the file made durable and
/// given its name; then comes what [`SaveOptions::after`] says.
///
/// # Errors
///
/// Returns [`SaveError`]. Whatever it is, the VM runs on as it did and no file is left under the
/// name, but for [`SaveError::LeftPaused`] and [`SaveError::Release`], which say so.
pub fn save(
    vm: &mut Vm,
    destination: &Path,
    options: &SaveOptions,
    control: &Control<'_>,
) -> Result<SaveReport, SaveError> {
    options.check()?;
    vm.set_stop(control.stop_flag());
    vm.take_own_monitor(control.stop_flag())?;
    let begun = Save::begin(vm, destination, options, control);
    let mut save = begun.map_err(|error| unless_qemu_is_gone(vm, error))?;
    let done = match save.route.route {
        ReadyRoute::Live(_) => save.live(vm),
        _ => save.paused(vm),
    };
    match done {
        Ok(()) => Ok(save.finish(vm)),
        Err(error) => Err(save.give_up(vm, error)),
    }
}

/// A save at work.
struct Save<'a> {
    options: &'a SaveOptions,
    control: &'a Control<'a>,
    path: PathBuf,
    started: Instant,
    guard: Guard,
    record: SaveRecord,
    route: ChosenRoute,
    base: ChosenBase,
    /// `None` once the file was published or dropped.
    draft: Option<Draft>,
    /// The file, whatever its name.
    file: FileId,
    /// The file's identity, once it is complete.
    id: Option<SnapshotId>,
    /// Whether the file has its name: then the overlays belong to it.
    is_named: bool,
    known: Known,
    disks: Disks,
    direct_io: DirectIoInUse,
    meta: VmMeta,
    /// `None` before the route has written.
    written: Option<Written>,
    warnings: Vec<String>,
    pause_seconds: f64,
}

/// What a route has written: everything but the name.
#[derive(Debug)]
struct Written {
    pages_total: u64,
    pages_data: u64,
    /// Those of them that are the pages of the base.
    pages_of_base: u64,
    /// Bytes of RAM that this process read; 0 if QEMU sent or wrote them.
    bytes_read: u64,
    bytes_written: u64,
    bytes_rewritten: u64,
    io: BackendInUse,
    live: Option<LiveDone>,
}

/// How a guest was saved that ran.
#[derive(Debug)]
struct LiveDone {
    method: LiveMethod,
    pause_seconds: f64,
    /// Only if vmfile read the memory.
    waits: Option<GuestWaits>,
}

impl LiveDone {
    /// Takes the pause that has just ended.
    fn now(vm: &mut Vm, method: LiveMethod, waits: Option<GuestWaits>) -> LiveDone {
        let pause_seconds = vm.pause_seen().unwrap_or_default().as_secs_f64();
        LiveDone { method, pause_seconds, waits }
    }
}

impl<'a> Save<'a> {
    /// Refuses what can be refused while the VM runs, and chooses the route.
    fn begin(
        vm: &mut Vm,
        destination: &Path,
        options: &'a SaveOptions,
        control: &'a Control<'a>,
    ) -> Result<Save<'a>, SaveError> {
        let started = Instant::now();
        let path = as_text(destination)?;
        let unpublished = new_file(destination, options.existing, vm.pid().ok())?;
        // Forked before there is much memory to copy.
        let mut guard = Guard::of_vm(vm)?;
        guard.add_files(unpublished.temporary_path())?;
        let mut warnings: Vec<String> = put_right(vm)?.into_iter().collect();
        let state = vm.run_state()?;
        let was_running = vm.runs_or_sleeps(&state)?;
        if !was_running && !state.stands_still() {
            return Err(SaveError::RunState { found: state.to_string() });
        }
        let state = if was_running { RunState::Running } else { state };
        let blockers = vm.why_not_saved()?;
        if !blockers.is_empty() {
            return Err(SaveError::Blocked { blockers });
        }
        warnings.extend(ending::with_activities(vm, options)?);
        let found = vm.drives()?;
        let mut meta = describe_vm(vm, &state, &found)?;
        warnings.extend(describe::warn_of_command_line(&meta, options));
        warnings.extend(images::look(vm, &mut meta, options, was_running)?);
        let known = changed::compare(vm, &mut meta, &found, options)?;
        warnings.extend(known.notes.iter().cloned());
        let disks =
            if options.with_disks { Disks::plan(&found, &mut meta)? } else { Disks::default() };
        let draft = Draft::new(unpublished, options.direct_io)?;
        let (route, base) = choose(vm, options, was_running, (&draft, destination))?;
        warnings.extend(route.unused(options));
        guard.add_files(route.route.sockets())?;
        let record = SaveRecord {
            holder: Holder::this_process()?,
            guardian: guard.pid(),
            destination: path,
            was_running,
            settings: route.route.settings().cloned(),
            overlays: disks.overlays().to_vec(),
        };
        let file = draft.file().buffered().metadata();
        let file = file.map_err(PagesError::reading("what the new file is"))?;
        let mut save = Save {
            options,
            control,
            path: destination.to_path_buf(),
            started,
            guard,
            record,
            direct_io: route.route.direct_io(&draft),
            route,
            base,
            file: FileId::of(&file),
            id: None,
            draft: Some(draft),
            is_named: false,
            known,
            disks,
            meta,
            written: None,
            warnings,
            pause_seconds: 0.0,
        };
        // Before there is a record that would be left.
        save.watch(options.after == After::Pause)?;
        if let Err(error) = vm.hold(&save.record) {
            // QEMU may take the record later than this save waits.
            save.guard.leave();
            return Err(error.into());
        }
        match save.route.route.listen() {
            Ok(()) => Ok(save),
            Err(error) => Err(save.give_up(vm, error)),
        }
    }

    /// Tells the guardian what to undo from now on. The guardian checks by itself whether the file
    /// has its name, because this process may be killed right before or right after it gives the
    /// name.
    fn watch(&self, stays_paused: bool) -> Result<(), SaveError> {
        let footprint = footprint(&self.record, (self.file, &self.route.route), stays_paused);
        Ok(self.guard.watch_save(&footprint)?)
    }

    /// Saves a VM that stands still, from the pause to the release.
    fn paused(&mut self, vm: &mut Vm) -> Result<(), SaveError> {
        let mut paused = vm.pause()?;
        match self.write(&mut paused) {
            Ok(()) => self.release(paused),
            Err(error) => Err(resume_after(error, paused)),
        }
    }

    /// From the pause to the durable file.
    fn write(&mut self, paused: &mut Paused<'_>) -> Result<(), SaveError> {
        if *paused.state() == RunState::Running {
            return Err(let_run_by_another());
        }
        if !paused.state().stands_still() {
            return Err(SaveError::RunState { found: paused.state().to_string() });
        }
        if paused.ran() != self.record.was_running {
            self.note_that_it_ran(paused)?;
        }
        self.known.still_holds(paused.vm())?;
        ending::with_activities(paused.vm(), self.options)?;
        self.disks.freeze(paused.vm())?;
        let doubts = paused.vm().flush_disks()?;
        self.warnings.extend(ending::with_doubtful_disks(doubts, self.options)?);
        let blocks = paused.blocks().to_vec();
        let paused_at = paused.stopped_at();
        let stays_paused = self.options.after == After::Pause;
        let footprint = footprint(&self.record, (self.file, &self.route.route), stays_paused);
        let mut work = Work {
            vm: paused.vm(),
            guard: &self.guard,
            blocks: &blocks,
            draft: self.draft.as_ref().expect("proven once"),
            disks: &mut self.disks,
            options: self.options,
            base: &mut self.base,
            control: self.control,
            meta: &mut self.meta,
            warnings: &mut self.warnings,
            paused_at: Some(paused_at),
            footprint,
        };
        self.written = Some(match &mut self.route.route {
            ReadyRoute::Direct(route) => route.write(&mut work)?,
            ReadyRoute::Stream(route) => route.write(&mut work)?,
            ReadyRoute::Live(_) => unreachable!("`save` calls `Save::live` for it"),
            ReadyRoute::Native(route) => route.write(&mut work)?,
        });
        let proven = self.prove()?;
        paused.verify()?;
        self.publish(proven)
    }

    /// Notes that another client or the guest itself stopped the VM between the first look and the
    /// pause: the save must not let it run.
    fn note_that_it_ran(&mut self, paused: &mut Paused<'_>) -> Result<(), SaveError> {
        self.record.was_running = paused.ran();
        let state = if paused.ran() { &RunState::Running } else { paused.state() };
        describe::set_run_state(&mut self.meta, state);
        paused.vm().update_record(&self.record)?;
        self.watch(self.options.after == After::Pause)
    }

    /// Saves a VM whose guest runs meanwhile.
    fn live(&mut self, vm: &mut Vm) -> Result<(), SaveError> {
        let stays_paused = self.options.after == After::Pause;
        let footprint = footprint(&self.record, (self.file, &self.route.route), stays_paused);
        let ReadyRoute::Live(route) = &mut self.route.route else {
            unreachable!("chosen by `save`")
        };
        let mut work = Work {
            vm: &mut *vm,
            guard: &self.guard,
            blocks: &[],
            draft: self.draft.as_ref().expect("proven once"),
            disks: &mut self.disks,
            options: self.options,
            base: &mut self.base,
            control: self.control,
            meta: &mut self.meta,
            warnings: &mut self.warnings,
            paused_at: None,
            footprint,
        };
        let written = route.write(&mut work)?;
        self.known.still_holds(vm)?;
        ending::with_activities(vm, self.options)?;
        let proven = self.prove()?;
        self.publish(proven)?;
        self.pause_seconds = written.live.as_ref().map_or(0.0, |live| live.pause_seconds);
        self.written = Some(written);
        let after = self.options.after;
        let released = vm.unstoppable(QUIT_TIMEOUT, |vm| match after {
            After::Quit => vm.quit(QUIT_TIMEOUT),
            After::Resume => Ok(()),
            After::Pause => vm.stop(),
        });
        released.map_err(|source| SaveError::Release { file: self.path.clone(), source })
    }

    /// Makes the file durable and reads it back.
    fn prove(&mut self) -> Result<Proven, SaveError> {
        let proven = self.draft.take().expect("proven once").prove()?;
        self.id = Some(proven.id());
        Ok(proven)
    }

    /// Gives the file its name.
    fn publish(&mut self, proven: Proven) -> Result<(), SaveError> {
        if self.control.is_stopped() {
            return Err(PagesError::Stopped.into());
        }
        // Once more, so that a guardian that was killed is noticed before the file has its name.
        self.watch(self.options.after == After::Pause)?;
        match proven.publish() {
            Ok(()) => {
                self.is_named = true;
                Ok(())
            }
            Err(error) => {
                self.is_named = matches!(error, PublishError::NotDurable { .. });
                // The save has failed: the guest is to run.
                self.watch(false)?;
                Err(error.into())
            }
        }
    }

    /// Does with the VM what [`SaveOptions::after`] says, once the file has its name.
    fn release(&mut self, mut paused: Paused<'_>) -> Result<(), SaveError> {
        let after = self.options.after;
        // The file has its name: there is nothing left that a stop could undo.
        let vm_timeout = QUIT_TIMEOUT;
        let released = match after {
            After::Quit => {
                let quit = |vm: &mut Vm| vm.quit(QUIT_TIMEOUT);
                paused.vm().unstoppable(vm_timeout, quit)
            }
            After::Resume => paused.resume(),
            After::Pause => Ok(()),
        };
        self.pause_seconds = paused.leave().as_secs_f64();
        released.map_err(|source| SaveError::Release { file: self.path.clone(), source })
    }

    /// Removes the record from QEMU, ends the guardian and returns the report.
    fn finish(mut self, vm: &mut Vm) -> SaveReport {
        let id = self.id.expect("the file is complete").to_string();
        let (path, after) = (&self.path, self.options.after);
        if after != After::Quit {
            let note = |vm: &mut Vm| vm.note_last_file(&id, path);
            let noted = vm.unstoppable(PUT_BACK_TIMEOUT, note);
            let warning = |error| format!("`save --base auto` will not find this file: {error}");
            self.warnings.extend(noted.err().map(warning));
        }
        let freed = vm.unstoppable(PUT_BACK_TIMEOUT, |vm| match after {
            After::Quit => Ok(()),
            After::Resume | After::Pause => vm.remove_record(),
        });
        match freed {
            Ok(()) => self.guard.dismiss(),
            Err(error) => {
                self.warnings.push(format!("the record of this save is left in QEMU: {error}"));
                self.guard.leave();
            }
        }
        let written = self.written.expect("the route has written it");
        let route = self.route.route.used();
        let disks = saved_disks(&self.meta);
        self.warnings.extend(deep_disks(&disks));
        self.warnings.extend(self.base.warning());
        SaveReport {
            file: self.path,
            id,
            base: self.base.used(written.pages_of_base, written.bytes_read),
            route: written.live.as_ref().map_or(route, |live| live.method.route()),
            route_reason: self.route.reason,
            live: written.live.is_some(),
            guest_waits: written.live.as_ref().and_then(|live| live.waits),
            live_method: written.live.map(|live| live.method),
            direct_io: self.direct_io,
            io: written.io,
            pages_total: written.pages_total,
            pages_zero: written.pages_total - written.pages_data,
            bytes_written: written.bytes_written,
            bytes_rewritten: written.bytes_rewritten,
            disks,
            changes: changed::report(&self.meta),
            warnings: self.warnings,
            pause_seconds: self.pause_seconds,
            total_seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    /// Drops the file, puts back what was changed in QEMU, and returns the error to report. The
    /// guest runs already, if it ran.
    fn give_up(mut self, vm: &mut Vm, error: SaveError) -> SaveError {
        self.draft = None;
        if vm.is_cut_off() && vm.reconnect(&self.record).is_ok() {
            return self.give_up_after(vm, error);
        }
        let thawed = if self.is_named { Ok(()) } else { self.disks.thaw(vm) };
        // The record stays while something is left to undo: the guardian acts only if it is there.
        let settings = self.put_settings_back(vm);
        let is_as_it_was = thawed.is_ok() && settings.is_ok() && !error.leaves_paused();
        let remove = |vm: &mut Vm| vm.remove_descriptors().and_then(|()| vm.remove_record());
        if is_as_it_was && vm.unstoppable(PUT_BACK_TIMEOUT, remove).is_ok() {
            self.guard.dismiss();
        } else {
            // The guardian tries once more, and may wait longer than the user wants to.
            self.guard.leave();
        }
        match thawed {
            Err(source) if !source.is_closed() => {
                SaveError::LeftOverlays { cause: Box::new(error), source }
            }
            _ => error,
        }
    }

    /// Puts QEMU's migration settings back, wherever the save was stopped: in the middle of changing them
    /// too.
    fn put_settings_back(&self, vm: &mut Vm) -> Result<(), VmError> {
        let Some(change) = &self.record.settings else { return Ok(()) };
        vm.unstoppable(PUT_BACK_TIMEOUT, |vm| vm.put_back_stream_settings(change))
    }

    /// As [`Save::give_up`], by a new connection to QEMU: it is not known which commands QEMU
    /// carried out on the old one.
    fn give_up_after(self, vm: &mut Vm, error: SaveError) -> SaveError {
        let Save { guard, record, is_named, .. } = self;
        // Its connection has ended as well. It closes what it keeps open, which ends what QEMU
        // sends.
        guard.leave();
        match vm.put_back(&record, |_| is_named) {
            // The file is whole: that the connection broke on the way does not matter.
            Ok(()) if is_named => error,
            Ok(()) => error.cut_off(),
            Err(source) => SaveError::LeftPaused { cause: Box::new(error), source },
        }
    }
}

/// Returns what a save may have changed, before it has stopped a guest that is to run meanwhile.
fn footprint<'a>(
    record: &'a SaveRecord,
    (file, route): (FileId, &ReadyRoute),
    stays_paused: bool,
) -> Footprint<'a> {
    let writes_file = matches!(route, ReadyRoute::Native(_));
    let may_stand = !matches!(route, ReadyRoute::Live(_));
    let file = (&*record.destination, file);
    Footprint { record, writes_file, file, stays_paused, may_stand }
}

/// Returns a path as it goes into the record of the save: absolute, and text.
fn as_text(path: &Path) -> Result<PathBuf, SaveError> {
    let path = std::path::absolute(path).unwrap_or(path.to_path_buf());
    if path.to_str().is_none() { Err(SaveError::PathNotText { path }) } else { Ok(path) }
}

/// Chooses the route and the base, and makes both ready; nothing has been stopped yet.
fn choose(
    vm: &mut Vm,
    options: &SaveOptions,
    was_running: bool,
    (draft, destination): (&Draft, &Path),
) -> Result<(ChosenRoute, ChosenBase), SaveError> {
    let mut base = ChosenBase::choose(vm, options, (draft, destination))?;
    let route = match options.live.filter(|_| was_running) {
        Some(live) => choose_live(vm, options, live, (draft, &base))?,
        None => choose_paused(vm, options, (draft, &base))?,
    };
    if let ReadyRoute::Stream(_) | ReadyRoute::Native(_) = route.route {
        base.without_memory(options, &route.reason)?;
    }
    Ok((route, base))
}

/// Asks QEMU whether it still runs, before `error` is reported. When QEMU ends, the kernel frees
/// its memory and files before it closes the monitor, so that reading them fails with an error that
/// hides the cause.
fn unless_qemu_is_gone(vm: &mut Vm, error: SaveError) -> SaveError {
    // QEMU was not needed for these, or said so itself.
    if matches!(
        error,
        SaveError::Pages(PagesError::Publish(_) | PagesError::Stopped) | SaveError::Vm(_)
    ) {
        return error;
    }
    match vm.unstoppable(PUT_BACK_TIMEOUT, Vm::run_state) {
        Err(source) if source.is_closed() => error.with_qemu_gone(source),
        _ => error,
    }
}

/// Resumes the guest after `error`, and returns the error to report.
fn resume_after(error: SaveError, mut paused: Paused<'_>) -> SaveError {
    match paused.resume() {
        Ok(()) => error,
        // QEMU has ended: there is no VM that could be left paused.
        Err(source) if source.is_closed() => error.with_qemu_gone(source),
        Err(source) => SaveError::LeftPaused { cause: Box::new(error), source },
    }
}
