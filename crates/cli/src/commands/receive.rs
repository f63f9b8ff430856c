//! `vmfile receive`.

use std::io::{IsTerminal as _, stdin};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::ExitCode;
use std::time::Duration;

use vmfile::receive::{ReceiveOptions, StreamFrom};
use vmfile::{Channels, Control, Existing};

use crate::args::ReceiveArguments;
use crate::failure::Failure;
use crate::output::progress::Meter;
use crate::output::{Printer, human};
use crate::signals::Signals;

pub(crate) fn run(arguments: &ReceiveArguments, printer: &Printer) -> Result<ExitCode, Failure> {
    let signals = Signals::listen().map_err(|error| Failure::system("signals", &error))?;
    let from = source(arguments)?;
    let stall = Duration::from_secs(arguments.stall_timeout);
    let options = ReceiveOptions::default()
        .direct_io(arguments.direct_io.into())
        .io(arguments.io.into())
        .existing(if arguments.force { Existing::Replace } else { Existing::Refuse })
        .channels(Channels::new(arguments.channels))
        .with_secrets(arguments.with_secrets)
        .stall_timeout((!stall.is_zero()).then_some(stall))
        .timeout(arguments.timeout.map(Duration::from_secs));
    let meter = Meter::new("receive", printer.progress, &signals.asked);
    let show = |progress| meter.show(progress);
    let control = Control::new(&signals.stop, &show);
    let result = vmfile::receive::receive(from, &arguments.file, &options, &control);
    drop(meter);
    let report = result.map_err(|error| {
        signals.explain(Failure::from(&error), "there is no file, and the sender runs on")
    })?;
    printer.warnings(&report.warnings);
    printer.report(&report, human::receive);
    Ok(ExitCode::SUCCESS)
}

/// Returns where the stream comes from.
fn source(arguments: &ReceiveArguments) -> Result<StreamFrom, Failure> {
    if let Some(address) = &arguments.listen {
        return Ok(StreamFrom::Listen(super::socket_path(address)?));
    }
    let number = match arguments.fd {
        Some(number) => number,
        None if stdin().is_terminal() => {
            return Err(Failure::usage("standard input is a terminal".to_owned())
                .hint("give a stream by `<`, by a pipe, or by --listen unix:PATH"));
        }
        None => stdin().as_fd().as_raw_fd(),
    };
    let descriptor = vmfile::inherited(number)
        .map_err(|error| Failure::system(&format!("descriptor {number}"), &error))?;
    Ok(StreamFrom::Descriptor(descriptor))
}
