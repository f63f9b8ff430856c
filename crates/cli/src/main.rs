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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let voice = output::Voice::new(&arguments);
    let result = match &arguments.verb {
        Verb::Save(save) => commands::save::run(save, &voice),
        Verb::Restore(restore) => commands::restore::run(restore, &voice),
        Verb::Info(info) => commands::info::run(info, &voice),
        Verb::Check(check) => commands::check::run(check, &voice),
        Verb::List => commands::list::run(&voice),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            voice.failure(&failure);
            failure.code.into()
        }
    }
}
