//! `vmfile restore`.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vmfile::restore::{Destination, Mode, RestoreOptions};
use vmfile::{Control, LaunchedQemu, PagesError, RestoreError};

use crate::args::{RestoreArguments, RestoreMode};
use crate::failure::Failure;
use crate::hints::Given;
use crate::output::progress::Meter;
use crate::output::{Printer, human};
use crate::signals::{NoSuspend, Signals};

pub(crate) fn run(arguments: &RestoreArguments, printer: &Printer) -> Result<ExitCode, Failure> {
    let signals = Signals::listen().map_err(|error| Failure::system("signals", &error))?;
    let held = NoSuspend::begin().map_err(|error| Failure::system("signals", &error))?;
    let snapshot = super::open(&arguments.file)?;
    let destination = match &arguments.qmp {
        Some(socket) => {
            let vm = vmfile::Vm::connect_until(socket, &signals.stop)
                .map_err(|error| signals.explain(Failure::from(&error), "QEMU waits as it did"))?;
            Destination::Waiting(vm)
        }
        None if arguments.command.is_empty() => Destination::Saved,
        None => Destination::Command(arguments.command.clone()),
    };
    let options = RestoreOptions::default()
        .mode(match arguments.mode {
            RestoreMode::Auto => Mode::Auto,
            RestoreMode::Map => Mode::Map,
            RestoreMode::Load => Mode::Load,
            RestoreMode::Stream => Mode::Stream,
        })
        .direct_io(arguments.engine.direct_io())
        .io(arguments.engine.io())
        .jobs(arguments.engine.jobs())
        .disks_changed_ok(arguments.disks_changed_ok)
        .verify(arguments.verify)
        .trust_command(arguments.trust_command)
        .secrets(arguments.secret.clone())
        .paused(arguments.paused)
        .foreground(arguments.foreground);
    let meter = Meter::new("restore", printer.progress, &signals.asked);
    let show = |progress| meter.show(progress);
    let control = Control::new(&signals.stop, &show);
    let given = given(&destination);
    let result = vmfile::restore::restore(&snapshot, destination, &options, &control);
    drop(meter);
    drop(held);
    let restored = result.map_err(|error| failure(&error, given, &signals))?;
    printer.warnings(&restored.report.warnings);
    printer.report(&restored.report, human::restore);
    match restored.qemu {
        Some(qemu) if arguments.foreground => {
            let status = wait(qemu, &signals)?;
            Ok(ExitCode::from(status))
        }
        Some(qemu) => {
            drop(qemu.detach());
            Ok(ExitCode::SUCCESS)
        }
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Returns the failure for `error`. A signal from the terminal also reaches a QEMU in the
/// foreground: if there was one, it is the cause, whatever the error.
fn failure(error: &RestoreError, given: Given, signals: &Signals) -> Failure {
    if signals.are_set() && !matches!(error, RestoreError::Unanswered { .. }) {
        let failure = Failure::from(&PagesError::Stopped);
        return Failure { code: signals.code(), ..failure }
            .hint("no QEMU was left running; one that waited may have to be started again");
    }
    Failure::of_restore(error, given)
}

fn given(destination: &Destination) -> Given {
    match destination {
        Destination::Saved => Given::Nothing,
        Destination::Command(_) => Given::Command,
        Destination::Waiting(_) => Given::Waiting,
    }
}

/// Waits for QEMU and returns its exit status as a shell does; if a signal tells this process to
/// stop, sends SIGTERM to QEMU.
fn wait(qemu: LaunchedQemu, signals: &Signals) -> Result<u8, Failure> {
    let pid = i32::try_from(qemu.pid()).ok().and_then(Pid::from_raw);
    let stop = Arc::clone(&signals.stop);
    let over = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&over);
    thread::spawn(move || {
        while !is_over.load(Ordering::Relaxed) {
            if stop.load(Ordering::Relaxed) {
                // QEMU may have ended by itself.
                let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let status = qemu.wait();
    over.store(true, Ordering::Relaxed);
    let status = status.map_err(|error| Failure::system("wait for QEMU", &error))?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}
