//! `vmfile info`.

use std::process::ExitCode;

use serde::Serialize;

use crate::args::InfoArguments;
use crate::failure::Failure;
use crate::output::{Printer, human};

/// The library's value, with the time also as text.
#[derive(Serialize)]
struct Answer {
    saved_at: Option<String>,
    #[serde(flatten)]
    info: vmfile::info::Info,
}

pub(crate) fn run(arguments: &InfoArguments, printer: &Printer) -> Result<ExitCode, Failure> {
    super::confine()?;
    // A thin file is described without its base.
    let snapshot = super::open_alone(&arguments.file)?;
    let info = vmfile::info::info(&snapshot).map_err(|error| Failure::from(&error))?;
    let answer = Answer { saved_at: info.saved_at_unix_seconds.map(human::time), info };
    printer.answer(&answer, |answer| human::info(&answer.info, printer.verbose))?;
    Ok(ExitCode::SUCCESS)
}
