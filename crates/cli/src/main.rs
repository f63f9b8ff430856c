//! The `vmfile` program: words in, words out.
//!
//! stdout is the answer, stderr the conversation. Everything else is in the library.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod exit_code;
mod failure;
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
    let voice = output::Voice::new(&arguments);
    let result = match &arguments.verb {
        Verb::Save(save) => commands::save::run(save, &voice),
        Verb::Restore(restore) => commands::restore::run(restore, &voice),
        Verb::Receive(receive) => commands::receive::run(receive, &voice),
        Verb::Send(send) => commands::send::run(send, &voice),
        Verb::Convert(convert) => commands::convert::run(convert, &voice),
        Verb::Info(info) => commands::info::run(info, &voice),
        Verb::Check(check) => commands::check::run(check, &voice),
        Verb::List => commands::list::run(&voice),
        Verb::Bench(bench) => commands::bench::run(bench, &voice),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            voice.failure(&failure);
            failure.code.into()
        }
    }
}

/// Prints what clap says: help, the version, or what is wrong; as JSON if that was asked for.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    let options = std::env::args_os().take_while(|argument| argument != "--");
    let is_json = options.skip(1).any(|argument| argument == "--json");
    if !error.use_stderr() || !is_json {
        // The reader may have closed its end.
        let _ = error.print();
        return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
    }
    let failure = Failure::of_usage(error);
    output::Voice::json().failure(&failure);
    failure.code.into()
}
