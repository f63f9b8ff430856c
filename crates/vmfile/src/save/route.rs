//! Which route a save takes, and why: direct, stream, live or native.

use super::RouteUsed;
use std::path::PathBuf;

use vmfile_engine::DirectIoInUse;
use vmfile_pages::draft::Draft;
use vmfile_qemu::{SettingsChange, Vm};

use super::base::ChosenBase;
use super::direct::DirectRoute;
use super::live::LiveRoute;
use super::live_memory::LiveMemory;
use super::native::NativeRoute;
use super::stream::StreamRoute;
use super::target::not_direct;
use super::{BaseFile, Live, Route, SaveOptions};
use crate::error::{SaveError, with_sources};

/// The route by which a VM is saved, and why.
pub(super) struct ChosenRoute {
    pub(super) route: ReadyRoute,
    pub(super) reason: String,
}

impl ChosenRoute {
    /// Returns a warning if the caller chose channels, and this route has none.
    pub(super) fn unused(&self, options: &SaveOptions) -> Option<String> {
        let count = options.channels?.count();
        let what = match self.route {
            ReadyRoute::Direct(_) => "the route direct",
            ReadyRoute::Live(_) => "a live save",
            ReadyRoute::Stream(_) | ReadyRoute::Native(_) => return None,
        };
        Some(format!("no channels were used, {count} were chosen: {what} has none"))
    }
}

/// A route that is ready to go.
pub(super) enum ReadyRoute {
    Direct(DirectRoute),
    Stream(StreamRoute),
    Live(LiveRoute),
    Native(NativeRoute),
}

impl ReadyRoute {
    /// Says whether pages are written past the page cache.
    pub(super) fn direct_io(&self, draft: &Draft) -> DirectIoInUse {
        match self {
            ReadyRoute::Native(route) => route.direct_io(),
            ReadyRoute::Direct(_) | ReadyRoute::Stream(_) | ReadyRoute::Live(_) => {
                draft.file().direct().clone()
            }
        }
    }

    /// Returns which route it is.
    pub(super) fn used(&self) -> RouteUsed {
        match self {
            ReadyRoute::Direct(_) => RouteUsed::Direct,
            ReadyRoute::Stream(_) | ReadyRoute::Live(_) => RouteUsed::Stream,
            ReadyRoute::Native(_) => RouteUsed::Native,
        }
    }

    /// Returns the paths of the sockets that QEMU connects to, and then of their directories; they
    /// do not exist before [`ReadyRoute::listen`].
    pub(super) fn sockets(&self) -> Vec<PathBuf> {
        match self {
            ReadyRoute::Stream(route) => route.sockets(),
            ReadyRoute::Direct(_) | ReadyRoute::Live(_) | ReadyRoute::Native(_) => Vec::new(),
        }
    }

    /// Makes these sockets.
    pub(super) fn listen(&mut self) -> Result<(), SaveError> {
        match self {
            ReadyRoute::Stream(route) => route.listen(),
            ReadyRoute::Direct(_) | ReadyRoute::Live(_) | ReadyRoute::Native(_) => Ok(()),
        }
    }

    /// Returns what the route may change in QEMU's migration settings, if it has QEMU send anything.
    pub(super) fn settings(&self) -> Option<&SettingsChange> {
        match self {
            ReadyRoute::Direct(_) => None,
            ReadyRoute::Stream(route) => Some(route.settings()),
            ReadyRoute::Live(route) => Some(route.settings()),
            ReadyRoute::Native(route) => Some(route.settings()),
        }
    }
}

/// Makes ready the only route that saves a running guest.
pub(super) fn choose_live(
    vm: &mut Vm,
    options: &SaveOptions,
    live: Live,
    from: (&Draft, &ChosenBase),
) -> Result<ChosenRoute, SaveError> {
    let reason = match options.route {
        Route::Auto => "the guest runs meanwhile",
        // `Native` was refused by `SaveOptions::check`.
        Route::Stream | Route::Direct | Route::Native => "asked for",
    };
    let other = not_direct(vm)?;
    let memory = match (options.route, other) {
        (Route::Stream, _) => Err("the route stream was asked for".to_owned()),
        (_, Some(reason)) => Err(reason),
        _ => match LiveMemory::prepare(vm, from, options) {
            Ok(memory) => Ok(memory),
            Err(error) if options.route == Route::Auto && is_memory_out_of_reach(&error) => {
                Err(with_sources(&error))
            }
            Err(error) => return Err(error),
        },
    };
    // QEMU's stream has all pages, and a base that was named is used.
    let only = options.route == Route::Direct || matches!(options.base, Some(BaseFile::File(_)));
    let route = ReadyRoute::Live(LiveRoute::prepare(vm, live, (memory, only))?);
    Ok(ChosenRoute { route, reason: reason.to_owned() })
}

/// Chooses the route and makes it ready; nothing has been stopped yet.
pub(super) fn choose_paused(
    vm: &mut Vm,
    options: &SaveOptions,
    (draft, base): (&Draft, &ChosenBase),
) -> Result<ChosenRoute, SaveError> {
    let route = options.route;
    let stream = |vm: &mut Vm, reason: String| {
        Ok(ChosenRoute {
            route: ReadyRoute::Stream(StreamRoute::prepare(vm, options, draft)?),
            reason,
        })
    };
    if route == Route::Stream {
        return stream(vm, "asked for".to_owned());
    }
    if route == Route::Native {
        let route = ReadyRoute::Native(NativeRoute::prepare(vm, options, draft)?);
        return Ok(ChosenRoute { route, reason: "asked for".to_owned() });
    }
    if let Some(reason) = not_direct(vm)? {
        return match route {
            Route::Direct => Err(SaveError::NotDirect { reason }),
            _ => stream(vm, format!("not direct: {reason}")),
        };
    }
    match DirectRoute::prepare(vm, (draft, base), options) {
        Ok(direct) => {
            let reason = match route {
                Route::Direct => "asked for",
                _ => "QEMU's memory can be reached",
            };
            Ok(ChosenRoute { route: ReadyRoute::Direct(direct), reason: reason.to_owned() })
        }
        // QEMU can send its memory even if this process cannot read it.
        Err(error) if route == Route::Auto && is_memory_out_of_reach(&error) => {
            stream(vm, format!("not direct: {}", with_sources(&error)))
        }
        Err(error) => Err(error),
    }
}

/// Whether an error of the route `direct` says that QEMU's memory cannot be reached.
fn is_memory_out_of_reach(error: &SaveError) -> bool {
    match error {
        SaveError::NoAddress { .. } | SaveError::Process(_) => true,
        SaveError::Vm(error) => error.is_out_of_reach(),
        _ => false,
    }
}
