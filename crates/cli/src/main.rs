//! The `vmfile` program: turns arguments into options, and reports into text or JSON.
//!
//! Results go to stdout (`send` may write its stream there); progress, warnings and errors go to
//! stderr. Everything else is in the library.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod confine;
mod exit_code;
mod failure;
mod hints;
mod output;
mod signals;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Arguments, Verb};
use crate::failure::Failure;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return wrong_usage(&error),
    };
    let printer = output::Printer::new(&arguments);
    let result = match &arguments.verb {
        Verb::Save(save) => commands::save::run(save, &printer),
        Verb::Restore(restore) => commands::restore::run(restore, &printer),
        Verb::Receive(receive) => commands::receive::run(receive, &printer),
        Verb::Send(send) => commands::send::run(send, &printer),
        Verb::Convert(convert) => commands::convert::run(convert, &printer),
        Verb::Info(info) => commands::info::run(info, &printer),
        Verb::Check(check) => commands::check::run(check, &printer),
        Verb::List => commands::list::run(&printer),
        Verb::Bench(bench) => commands::bench::run(bench, &printer),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            printer.failure(&failure);
            failure.code.into()
        }
    }
}

/// Prints clap's help, version or error; with `--json`, the error as JSON.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    let options = std::env::args_os().take_while(|argument| argument != "--");
    let is_json = options.skip(1).any(|argument| argument == "--json");
    if !error.use_stderr() || !is_json {
        // An error means that the reader has closed its end.
        let _ = error.print();
        return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
    }
    let failure = Failure::of_usage(error);
    output::Printer::json().failure(&failure);
    failure.code.into()
}
