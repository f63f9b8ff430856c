//! How the program speaks: text or JSON, and progress.

pub(crate) mod human;
pub(crate) mod progress;
pub(crate) mod size;

use std::io::{self, Write};

use serde::Serialize;
use serde_json::json;

use crate::args::{Arguments, ProgressMode};
use crate::failure::Failure;

/// What was asked for, for the whole run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Voice {
    json: bool,
    quiet: bool,
    pub(crate) verbose: bool,
    pub(crate) progress: ProgressMode,
}

impl Voice {
    pub(crate) fn new(arguments: &Arguments) -> Voice {
        Voice {
            json: arguments.json,
            quiet: arguments.quiet,
            verbose: arguments.verbose,
            progress: if arguments.quiet { ProgressMode::Off } else { arguments.progress },
        }
    }

    /// Prints the answer: `value` as JSON, or `text`.
    pub(crate) fn answer<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        let text = if self.json {
            let mut text = serde_json::to_string_pretty(value)
                .map_err(|error| Failure::system("stdout", &error.into()))?;
            text.push('\n');
            text
        } else if self.quiet {
            return Ok(());
        } else {
            text(value)
        };
        match io::stdout().lock().write_all(text.as_bytes()) {
            // Whoever reads has read enough, as `head` does.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.map_err(|error| Failure::system("stdout", &error)),
        }
    }

    /// Prints a failure on stderr.
    pub(crate) fn failure(&self, failure: &Failure) {
        let text = if self.json {
            let object = json!({
                "code": failure.code as u8,
                "kind": failure.kind,
                "message": failure.message,
                "hint": failure.hint,
            });
            format!("{object}\n")
        } else {
            let mut text = format!("vmfile: {}\n", failure.message);
            if let Some(hint) = &failure.hint {
                text.push_str(&format!("hint: {hint}\n"));
            }
            text
        };
        // There is nobody left to tell.
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }
}
