//! `vmfile send`.

use std::io::{IsTerminal as _, stdout};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::ExitCode;

use vmfile::send::{SendOptions, SendTo};
use vmfile::{Channels, Control};

use crate::args::SendArguments;
use crate::failure::Failure;
use crate::output::progress::Meter;
use crate::output::{Printer, human};
use crate::signals::Signals;

pub(crate) fn run(arguments: &SendArguments, printer: &Printer) -> Result<ExitCode, Failure> {
    let signals = Signals::listen().map_err(|error| Failure::system("signals", &error))?;
    let to = destination(arguments)?;
    let snapshot = super::open(&arguments.file)?;
    let options = SendOptions::default()
        .direct_io(arguments.direct_io.into())
        .io(arguments.io.into())
        .channels(arguments.channels.and_then(Channels::new))
        .assume_zeroed(arguments.assume_zeroed);
    let meter = Meter::new("send", printer.progress, &signals.asked);
    let show = |progress| meter.show(progress);
    let control = Control::new(&signals.stop, &show);
    let result = vmfile::send::send(&snapshot, to, &options, &control);
    drop(meter);
    let report = result.map_err(|error| {
        let left = "the QEMU that was to take the stream has to be started again";
        signals.explain(Failure::from(&error), left)
    })?;
    if arguments.connect.is_some() {
        printer.report(&report, human::send);
    } else {
        printer.report_aside(&report, human::send);
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns where the stream goes.
fn destination(arguments: &SendArguments) -> Result<SendTo, Failure> {
    if let Some(address) = &arguments.connect {
        return Ok(SendTo::Connect(super::socket_path(address)?));
    }
    let number = match arguments.fd {
        Some(number) => number,
        None if stdout().is_terminal() => {
            return Err(Failure::usage("standard output is a terminal".to_owned())
                .hint("send the stream to QEMU by -incoming \"exec:vmfile send FILE\", or by --connect unix:PATH"));
        }
        None => stdout().as_fd().as_raw_fd(),
    };
    let descriptor = vmfile::inherited(number)
        .map_err(|error| Failure::system(&format!("descriptor {number}"), &error))?;
    Ok(SendTo::Descriptor(descriptor))
}
