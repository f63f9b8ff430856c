//! `vmfile save`: a running VM into a file.
//!
//! ```text
//! begin - pause - the route: device state and RAM, metadata - publish - release
//! ```
//!
//! Everything that can be refused is refused in `begin`, while the VM runs. From `pause` on, every
//! exit but the last resumes the VM as it ran and leaves no file.

mod changed;
mod describe;
mod direct;
mod disks;
mod live;
mod native;
mod native_file;
mod stream;

use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmfile_engine::{Backend, DataFile, DirectIo, Existing, Unpublished, available_space};
use vmfile_format::manifest::VmMeta;
use vmfile_qemu::{RunState, Vm};

pub use self::changed::Change;
use self::describe::{describe_vm, is_out_of_reach};
use self::direct::DirectRoute;
pub use self::disks::SavedDisk;
pub(crate) use self::disks::overlay_names;
use self::disks::{Disks, saved_disks};
use self::live::LiveRoute;
use self::native::NativeRoute;
use self::stream::StreamRoute;
use crate::check::describe;
use crate::control::Control;
use crate::draft::Draft;
use crate::error::SaveError;
use crate::jobs::Jobs;

/// How long QEMU may take to flush its disks and end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(60);

/// What becomes of the VM once the file is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// QEMU ends, as after `virsh save`.
    #[default]
    Quit,
    /// The guest runs on, if it ran before.
    Resume,
    /// The guest stays paused.
    Pause,
}

/// How RAM is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Route {
    /// `Direct` where it can be, else `Stream`; the report says which and why.
    #[default]
    Auto,
    /// From the memory of QEMU's process.
    Direct,
    /// From the migration stream, which every QEMU has.
    Stream,
    /// By QEMU itself, 9.1 and later, which writes the file's pages.
    Native,
}

/// How a guest is saved while it runs.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    /// How long it may take, before it is given up: a guest may write faster than it is saved.
    pub timeout: Duration,
    /// How long the guest may stand still at the end, where its memory must be sent more than once.
    pub pause_max: Duration,
}

impl Default for Live {
    fn default() -> Live {
        Live { timeout: Duration::from_secs(600), pause_max: Duration::from_millis(300) }
    }
}

/// How a VM is saved.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// Let the guest run while its memory is written; the file holds one moment. A guest that is
    /// paused is saved as it is.
    pub live: Option<Live>,
    /// Put an overlay on top of every disk that the guest can write, in the same instant: the images
    /// below stay as they were then, and belong to the file.
    pub with_disks: bool,
    /// How RAM is taken.
    pub route: Route,
    /// What becomes of the VM.
    pub after: After,
    /// Whether pages are written past the page cache.
    pub direct_io: DirectIo,
    /// Who moves the bytes.
    pub io: Backend,
    /// How many threads read, hash and write.
    pub jobs: Jobs,
    /// How many threads of QEMU send or write, by the routes `stream` and `native`: its parameter
    /// `multifd-channels`. `None`: one stream without channels, or two threads that write.
    pub channels: Option<NonZeroU8>,
    /// Whether a file of that name may be replaced.
    pub existing: Existing,
    /// Save and end a VM even if it is not what its command line would make.
    pub changed_ok: bool,
}

impl Default for SaveOptions {
    fn default() -> SaveOptions {
        SaveOptions {
            live: None,
            with_disks: false,
            route: Route::default(),
            after: After::default(),
            direct_io: DirectIo::Preferred,
            io: Backend::Auto,
            jobs: Jobs::default(),
            channels: None,
            existing: Existing::Refuse,
            changed_ok: false,
        }
    }
}

/// What a save did.
#[derive(Clone, Debug, Serialize)]
pub struct SaveReport {
    /// The file.
    pub file: PathBuf,
    /// How RAM was taken: `direct`, `stream` or `native`.
    pub route: &'static str,
    /// Why it was that route.
    pub route_reason: String,
    /// Whether the guest ran meanwhile.
    pub live: bool,
    /// How: `background-snapshot` or `pre-copy`; and why not the first. `None` if it stood still.
    pub live_method: Option<String>,
    /// Whether direct I/O was used; if not, why.
    pub direct_io: String,
    /// The back end that was used.
    pub io: String,
    /// Pages of all RAM blocks.
    pub pages_total: u64,
    /// Pages that are zero and take no room.
    pub pages_zero: u64,
    /// Bytes of pages that were written, those that came again as often as they came.
    pub bytes_written: u64,
    /// Bytes of pages that were written again, because the guest had changed them.
    pub bytes_rewritten: u64,
    /// The disks that belong to the file, and where the guest writes since.
    pub disks: Vec<SavedDisk>,
    /// What of the VM is not as its command line would make it.
    pub changes: Vec<Change>,
    /// How long the guest stood still, in seconds: to the end of the save, where it did not run on.
    pub pause_seconds: f64,
    /// How long it all took, in seconds.
    pub total_seconds: f64,
}

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
    let (mut save, route) = Save::begin(vm, destination, options, control)?;
    match save.write(&route) {
        Ok(()) => {}
        Err(error) => return Err(save.give_up(error)),
    }
    save.release()?;
    Ok(save.report(&route))
}

/// A save at work.
struct Save<'a> {
    vm: &'a mut Vm,
    options: &'a SaveOptions,
    control: &'a Control<'a>,
    path: PathBuf,
    started: Instant,
    was_running: bool,
    paused_at: Option<Instant>,
    pause_seconds: f64,
    /// `None` once it was published or given up.
    draft: Option<Draft>,
    disks: Disks,
    direct_io: String,
    meta: VmMeta,
    written: Written,
}

/// The route that was taken, ready to go, and why.
struct Taken {
    way: Way,
    reason: String,
}

enum Way {
    Direct(DirectRoute),
    Stream(StreamRoute),
    Live(LiveRoute),
    Native(NativeRoute),
}

impl Way {
    /// Says whether pages are written past the page cache, in the words of a report.
    fn direct_io(&self, draft: &Draft) -> String {
        match self {
            Way::Native(route) => route.direct_io(),
            Way::Direct(_) | Way::Stream(_) | Way::Live(_) => describe(draft.file().direct()),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Way::Direct(_) => "direct",
            Way::Stream(_) | Way::Live(_) => "stream",
            Way::Native(_) => "native",
        }
    }
}

/// What a route works with.
struct Work<'a> {
    vm: &'a mut Vm,
    draft: &'a Draft,
    disks: &'a mut Disks,
    options: &'a SaveOptions,
    control: &'a Control<'a>,
    meta: &'a VmMeta,
    /// When the guest was paused for the save; `None` while it runs.
    paused_at: Option<Instant>,
}

impl Work<'_> {
    fn seconds_paused(&self) -> f64 {
        self.paused_at.map_or(0.0, |at| at.elapsed().as_secs_f64())
    }
}

/// What a route has written: everything but the name.
#[derive(Debug, Default)]
struct Written {
    pages_total: u64,
    pages_data: u64,
    bytes_written: u64,
    bytes_rewritten: u64,
    io: String,
    live: Option<LiveDone>,
}

/// How a guest was saved that ran.
#[derive(Debug)]
struct LiveDone {
    method: String,
    pause_seconds: f64,
}

impl Drop for Save<'_> {
    /// Nobody returns early with the VM paused: `give_up` resumes it and says so. This is for a
    /// panic.
    fn drop(&mut self) {
        if self.paused_at.is_some() && self.was_running {
            let _ = self.vm.cont();
        }
    }
}

impl<'a> Save<'a> {
    /// Refuses what can be refused while the VM runs, and chooses the route.
    fn begin(
        vm: &'a mut Vm,
        destination: &Path,
        options: &'a SaveOptions,
        control: &'a Control<'a>,
    ) -> Result<(Save<'a>, Taken), SaveError> {
        let started = Instant::now();
        let unpublished = Unpublished::create_beside(destination, options.existing)?;
        let state = vm.run_state()?;
        let was_running = match state {
            RunState::Running => true,
            RunState::Paused => false,
            other => return Err(SaveError::RunState { found: other.to_string() }),
        };
        let blockers = vm.why_not_saved()?;
        if !blockers.is_empty() {
            let reasons = blockers.iter().map(ToString::to_string).collect();
            return Err(SaveError::Blocked { reasons });
        }
        let found = vm.drives()?;
        let mut meta = describe_vm(vm, was_running, &found)?;
        changed::compare(vm, &mut meta, options)?;
        let disks = if options.with_disks {
            Disks::plan(&found, &mut meta, destination)?
        } else {
            Disks::default()
        };
        let draft = Draft::new(unpublished, options.direct_io)?;
        let taken = match options.live.filter(|_| was_running) {
            Some(live) => live_way(vm, options.route, live)?,
            None => choose(vm, options, &draft)?,
        };
        let save = Save {
            vm,
            options,
            control,
            path: destination.to_path_buf(),
            started,
            was_running,
            paused_at: None,
            pause_seconds: 0.0,
            direct_io: taken.way.direct_io(&draft),
            draft: Some(draft),
            disks,
            meta,
            written: Written::default(),
        };
        Ok((save, taken))
    }

    /// From the pause to the durable file.
    fn write(&mut self, taken: &Taken) -> Result<(), SaveError> {
        if !matches!(taken.way, Way::Live(_)) {
            self.pause()?;
            self.disks.freeze(self.vm)?;
        }
        let mut work = Work {
            vm: &mut *self.vm,
            draft: self.draft.as_ref().expect("published once"),
            disks: &mut self.disks,
            options: self.options,
            control: self.control,
            meta: &self.meta,
            paused_at: self.paused_at,
        };
        self.written = match &taken.way {
            Way::Direct(route) => route.write(&mut work)?,
            Way::Stream(route) => route.write(&mut work)?,
            Way::Live(route) => route.write(&mut work)?,
            Way::Native(route) => route.write(&mut work)?,
        };
        if self.control.is_stopped() {
            return Err(SaveError::Stopped);
        }
        Ok(self.draft.take().expect("published once").publish()?)
    }

    fn pause(&mut self) -> Result<(), SaveError> {
        self.paused_at = Some(Instant::now());
        if self.was_running {
            self.vm.stop()?;
        }
        Ok(())
    }

    /// The file is whole: does with the VM what was asked for.
    fn release(&mut self) -> Result<(), SaveError> {
        let released = match self.options.after {
            After::Quit => self.vm.quit(QUIT_TIMEOUT),
            After::Resume if self.was_running => self.vm.cont(),
            After::Pause if self.written.live.is_some() => self.vm.stop(),
            After::Resume | After::Pause => Ok(()),
        };
        if let Some(live) = &self.written.live {
            self.pause_seconds = live.pause_seconds;
        }
        if let Some(at) = self.paused_at.take() {
            self.pause_seconds = at.elapsed().as_secs_f64();
        }
        released.map_err(|source| SaveError::Release { file: self.path.clone(), source })
    }

    /// Resumes the VM if it ran, drops the file, and returns the error to report.
    fn give_up(&mut self, error: SaveError) -> SaveError {
        self.draft = None;
        let error = match self.paused_at.take().filter(|_| self.was_running) {
            None => error,
            Some(_) => match self.vm.cont() {
                Ok(()) => error,
                Err(source) => SaveError::LeftPaused { cause: Box::new(error), source },
            },
        };
        match self.disks.thaw(self.vm) {
            Ok(()) => error,
            Err(source) => SaveError::LeftOverlays { cause: Box::new(error), source },
        }
    }

    fn report(&self, taken: &Taken) -> SaveReport {
        let written = &self.written;
        SaveReport {
            file: self.path.clone(),
            route: taken.way.name(),
            route_reason: taken.reason.clone(),
            live: written.live.is_some(),
            live_method: written.live.as_ref().map(|live| live.method.clone()),
            direct_io: self.direct_io.clone(),
            io: written.io.clone(),
            pages_total: written.pages_total,
            pages_zero: written.pages_total - written.pages_data,
            bytes_written: written.bytes_written,
            bytes_rewritten: written.bytes_rewritten,
            disks: saved_disks(&self.meta),
            changes: changed::report(&self.meta),
            pause_seconds: self.pause_seconds,
            total_seconds: self.started.elapsed().as_secs_f64(),
        }
    }
}

/// Makes the one route ready by which a guest can run meanwhile.
fn live_way(vm: &mut Vm, route: Route, live: Live) -> Result<Taken, SaveError> {
    let reason = match route {
        Route::Direct => return Err(SaveError::NotLive { route: "direct" }),
        Route::Native => return Err(SaveError::NotLive { route: "native" }),
        Route::Stream => "asked for",
        Route::Auto => "the guest runs meanwhile",
    };
    let way = Way::Live(LiveRoute::prepare(vm, live)?);
    Ok(Taken { way, reason: reason.to_owned() })
}

/// Chooses the route and makes it ready; nothing has been stopped yet.
fn choose(vm: &mut Vm, options: &SaveOptions, draft: &Draft) -> Result<Taken, SaveError> {
    let route = options.route;
    let stream = |vm: &mut Vm, reason: String| {
        Ok(Taken { way: Way::Stream(StreamRoute::prepare(vm, options)?), reason })
    };
    if route == Route::Stream {
        return stream(vm, "asked for".to_owned());
    }
    if route == Route::Native {
        let way = Way::Native(NativeRoute::prepare(vm, options, draft)?);
        return Ok(Taken { way, reason: "asked for".to_owned() });
    }
    match DirectRoute::prepare(vm, draft) {
        Ok(direct) => {
            let reason = match route {
                Route::Direct => "asked for",
                _ => "QEMU's memory can be reached",
            };
            Ok(Taken { way: Way::Direct(direct), reason: reason.to_owned() })
        }
        // What keeps this process out of QEMU's memory does not keep QEMU from sending it.
        Err(error) if route == Route::Auto && keeps_out(&error) => {
            let because = std::error::Error::source(&error);
            let because = because.map(|source| format!(": {source}")).unwrap_or_default();
            stream(vm, format!("not direct: {error}{because}"))
        }
        Err(error) => Err(error),
    }
}

/// Refuses a disk that `data` bytes of pages would fill up.
fn refuse_without_space(data: u64, file: &DataFile) -> Result<(), SaveError> {
    // Bitmaps, hashes, device state and the file system's own needs.
    const OVERHEAD_PERCENT: u64 = 1;
    const OVERHEAD: u64 = 16 << 20;
    let needed_bytes = data + data / 100 * OVERHEAD_PERCENT + OVERHEAD;
    let available_bytes = available_space(file.buffered())
        .map_err(|source| SaveError::Write { what: "the file system's free space", source })?;
    if needed_bytes > available_bytes {
        return Err(SaveError::NoSpace { needed_bytes, available_bytes });
    }
    Ok(())
}

/// Whether an error of the route `direct` says that QEMU's memory cannot be reached.
fn keeps_out(error: &SaveError) -> bool {
    match error {
        SaveError::NoAddress { .. } | SaveError::Process(_) => true,
        SaveError::Vm(error) => is_out_of_reach(error),
        _ => false,
    }
}
