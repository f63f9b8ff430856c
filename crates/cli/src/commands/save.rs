//! `vmfile save`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use vmfile::save::{After, BaseFile, Live, Route, SaveOptions};
use vmfile::{Channels, Control, Existing, Vm, VmAddress};

use crate::args::{AfterMode, RouteMode, SaveArguments};
use crate::failure::Failure;
use crate::output::progress::Meter;
use crate::output::{Printer, human};
use crate::signals::{NoSuspend, Signals};

pub(crate) fn run(arguments: &SaveArguments, printer: &Printer) -> Result<ExitCode, Failure> {
    let signals = Signals::listen().map_err(|error| Failure::system("signals", &error))?;
    let held = NoSuspend::begin().map_err(|error| Failure::system("signals", &error))?;
    let options = options(arguments);
    // Before the VM is asked for anything.
    options.check().map_err(|error| Failure::from(&error))?;
    let mut vm = connect(&arguments.vm, &signals)?;
    let meter = Meter::new("save", printer.progress, &signals.asked);
    let show = |progress| meter.show(progress);
    let control = Control::new(&signals.stop, &show);
    let result = vmfile::save::save(&mut vm, &arguments.file, &options, &control);
    drop(meter);
    drop(held);
    let report = result.map_err(|error| {
        let failure = Failure::from(&error);
        signals.explain(failure, "the VM is as it was, and there is no file")
    })?;
    printer.warnings(&report.warnings);
    printer.report(&report, human::save);
    Ok(ExitCode::SUCCESS)
}

/// Returns what the user chose.
fn options(arguments: &SaveArguments) -> SaveOptions {
    SaveOptions::default()
        .route(match arguments.route {
            RouteMode::Auto => Route::Auto,
            RouteMode::Direct => Route::Direct,
            RouteMode::Stream => Route::Stream,
            RouteMode::Native => Route::Native,
        })
        .after(match arguments.after {
            None if arguments.live => After::Resume,
            None | Some(AfterMode::Quit) => After::Quit,
            Some(AfterMode::Resume) => After::Resume,
            Some(AfterMode::Pause) => After::Pause,
        })
        .live(arguments.live.then(|| {
            Live::default()
                .timeout(Duration::from_secs(arguments.live_timeout))
                .pause_max(Duration::from_millis(arguments.max_pause))
        }))
        .with_disks(arguments.with_disks)
        .with_secrets(arguments.with_secrets)
        .base(arguments.base.clone().map(|base| match base.to_str() {
            Some("auto") => BaseFile::Auto,
            _ => BaseFile::File(base),
        }))
        .thin(arguments.thin)
        .direct_io(arguments.engine.direct_io())
        .io(arguments.engine.io())
        .jobs(arguments.engine.jobs())
        .channels(arguments.channels.and_then(Channels::new))
        .changed_ok(arguments.changed_ok)
        .existing(if arguments.force { Existing::Replace } else { Existing::Refuse })
}

/// Finds the QMP socket of the VM that the user named.
pub(crate) fn socket_of(name: &str) -> Result<PathBuf, Failure> {
    let address: VmAddress = name.parse().unwrap_or_else(|never| match never {});
    vmfile::resolve(&address).map_err(|error| Failure::from(&error))
}

/// Connects to the VM that the user named.
pub(crate) fn connect(name: &str, signals: &Signals) -> Result<Vm, Failure> {
    let socket = socket_of(name)?;
    Vm::connect_until(&socket, &signals.stop).map_err(|error| {
        let failure = signals.explain(Failure::from(&error), "the VM was not touched");
        if failure.hint.is_some() {
            return failure;
        }
        failure.hint("name a QMP socket, a process id, or a name that `vmfile list` prints")
    })
}
