//! `vmfile check`.

use std::process::ExitCode;

use vmfile::Control;
use vmfile::check::CheckOptions;

use crate::args::CheckArguments;
use crate::exit_code::Code;
use crate::failure::Failure;
use crate::output::progress::Meter;
use crate::output::{Printer, human};
use crate::signals::Signals;

pub(crate) fn run(arguments: &CheckArguments, printer: &Printer) -> Result<ExitCode, Failure> {
    let signals = Signals::listen().map_err(|error| Failure::system("signals", &error))?;
    super::confine()?;
    let snapshot = super::open(&arguments.file)?;
    let options = CheckOptions::default()
        .direct_io(arguments.engine.direct_io())
        .io(arguments.engine.io())
        .jobs(arguments.engine.jobs());
    let meter = Meter::new("check", printer.progress, &signals.asked);
    let show = |progress| meter.show(progress);
    let result = vmfile::check::check(&snapshot, &options, &Control::new(&signals.stop, &show));
    drop(meter);
    let report = result.map_err(|error| {
        signals.explain(Failure::from(&error), "what was not looked at may be damaged")
    })?;
    printer.answer(&report, human::check)?;
    Ok(if report.findings_total == 0 { ExitCode::SUCCESS } else { Code::Found.into() })
}
