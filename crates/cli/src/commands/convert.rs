//! `vmfile convert`.

use std::process::ExitCode;

use vmfile::convert::{ConvertOptions, Format};
use vmfile::{Control, Existing};

use crate::args::{ConvertArguments, FileName, FormatMode};
use crate::failure::Failure;
use crate::output::progress::Meter;
use crate::output::{Printer, human};
use crate::signals::Signals;

pub(crate) fn run(arguments: &ConvertArguments, printer: &Printer) -> Result<ExitCode, Failure> {
    let signals = Signals::listen().map_err(|error| Failure::system("signals", &error))?;
    let source = FileName::parse(&arguments.source).map_err(Failure::usage)?;
    let to = match arguments.to {
        FormatMode::MappedRam => Format::MappedRam,
        FormatMode::Stream => Format::Stream,
    };
    let options = ConvertOptions::default()
        .direct_io(arguments.direct_io.into())
        .io(arguments.io.into())
        .existing(if arguments.force { Existing::Replace } else { Existing::Refuse });
    let meter = Meter::new("convert", printer.progress, &signals.asked);
    let show = |progress| meter.show(progress);
    let control = Control::new(&signals.stop, &show);
    let from = (source.path.as_path(), source.offset);
    let result = vmfile::convert::convert(from, &arguments.destination, to, &options, &control);
    drop(meter);
    let report =
        result.map_err(|error| signals.explain(Failure::from(&error), "there is no new file"))?;
    printer.warnings(&report.warnings);
    printer.report(&report, human::convert);
    Ok(ExitCode::SUCCESS)
}
