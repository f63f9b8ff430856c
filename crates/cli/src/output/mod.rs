//! How the program prints: text or JSON, and progress.

pub(crate) mod human;
pub(crate) mod progress;
pub(crate) mod size;

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{Arguments, ProgressMode};
use crate::failure::Failure;

/// Prints results, warnings and errors in the form that the user chose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Printer {
    json: bool,
    quiet: bool,
    pub(crate) verbose: bool,
    pub(crate) progress: ProgressMode,
}

impl Printer {
    pub(crate) fn new(arguments: &Arguments) -> Printer {
        Printer {
            json: arguments.json,
            quiet: arguments.quiet,
            verbose: arguments.verbose,
            progress: if arguments.quiet { ProgressMode::Off } else { arguments.progress },
        }
    }

    /// A printer of JSON, for an error before the arguments are parsed.
    pub(crate) fn json() -> Printer {
        Printer { json: true, quiet: false, verbose: false, progress: ProgressMode::Off }
    }

    /// Prints the answer: `value` as JSON, or `text`.
    pub(crate) fn answer<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        let Some(text) = self.words(value, text)? else { return Ok(()) };
        match io::stdout().lock().write_all(text.as_bytes()) {
            // The reader has closed its end, as `head` does.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.map_err(|error| Failure::system("stdout", &error)),
        }
    }

    /// Prints what was done, as [`Printer::answer`] does. If the report cannot be written, the work
    /// is done all the same: that is a warning, not a failure.
    pub(crate) fn report<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) {
        if let Err(failure) = self.answer(value, text) {
            self.warn(&format!("done, but the report is lost: {}", failure.message));
        }
    }

    /// Prints what was done on stderr, if stdout was used for something else.
    pub(crate) fn report_aside<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) {
        if let Ok(Some(text)) = self.words(value, text) {
            // If standard error is closed, nothing else can report it.
            let _ = io::stderr().lock().write_all(text.as_bytes());
        }
    }

    /// Returns `value` in the form that the user chose: JSON, `text`, or nothing.
    fn words<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<Option<String>, Failure> {
        if self.json {
            let mut text = serde_json::to_string_pretty(value)
                .map_err(|error| Failure::system("stdout", &error.into()))?;
            text.push('\n');
            return Ok(Some(plain_json(&text)));
        }
        Ok((!self.quiet).then(|| printable(&text(value))))
    }

    /// Prints on stderr what is being done, if progress is shown.
    pub(crate) fn step(&self, verb: &str, line: &str) {
        let text = match self.progress {
            ProgressMode::Off => return,
            ProgressMode::Json => json_line(&json!({ "type": "step", "verb": verb, "step": line })),
            ProgressMode::Auto if !io::stderr().is_terminal() => return,
            ProgressMode::Auto | ProgressMode::Bar => printable(&format!("{line}\n")),
        };
        // If standard error is closed, nothing else can report it.
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// Prints warnings about work that was done; in JSON they are part of the report.
    pub(crate) fn warnings(&self, warnings: &[String]) {
        if !self.json {
            warnings.iter().for_each(|warning| self.warn(warning));
        }
    }

    /// Whether each line of stderr is a JSON object.
    fn stderr_is_json(&self) -> bool {
        self.json || self.progress == ProgressMode::Json
    }

    fn warn(&self, message: &str) {
        let text = if self.stderr_is_json() {
            json_line(&json!({ "type": "warning", "message": message }))
        } else {
            printable(&format!("vmfile: warning: {message}\n"))
        };
        // If standard error is closed, nothing else can report it.
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// Prints a failure on stderr.
    pub(crate) fn failure(&self, failure: &Failure) {
        let text = if self.stderr_is_json() {
            let object = json!({
                "type": "error",
                "code": failure.code as u8,
                "kind": failure.kind,
                "message": failure.message,
                "hint": failure.hint,
            });
            json_line(&object)
        } else {
            let mut text = format!("vmfile: {}\n", failure.message);
            if let Some(hint) = &failure.hint {
                text.push_str(&format!("hint: {hint}\n"));
            }
            printable(&text)
        };
        // If standard error is closed, nothing else can report it.
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }
}

/// Returns JSON in one line.
pub(crate) fn json_line(value: &Value) -> String {
    plain_json(&format!("{value}\n"))
}

/// Escapes what a terminal would obey, as JSON escapes it: such characters are only within strings.
fn plain_json(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character != '\n' && is_obeyed(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Escapes characters that a terminal would obey: a name in a file may come from anybody.
fn printable(text: &str) -> String {
    escape(text, |character| character != '\n')
}

/// Escapes these characters and ends of lines: a name must not look like another line.
pub(crate) fn one_line(text: &str) -> String {
    escape(text, |_| true)
}

fn escape(text: &str, is_meant: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if is_obeyed(character) && is_meant(character) {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Tells whether a terminal obeys a character instead of showing it: a control character, or one
/// that hides, joins or turns around the text beside it.
fn is_obeyed(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_told_what_to_do() {
        assert_eq!(printable("a\u{1b}[2Jb\r\n"), "a\\u{1b}[2Jb\\r\n");
        assert_eq!(printable("gnp.\u{202e}exe"), "gnp.\\u{202e}exe");
        assert_eq!(printable("B\u{fc}rgeramt"), "B\u{fc}rgeramt");
    }

    #[test]
    fn json_does_not_tell_a_terminal_what_to_do_and_means_the_same() {
        let value = json!({ "name": "a\u{9b}2J\u{202e}\u{e0041}\u{1b}\n\u{fc}" });
        let line = json_line(&value);
        assert!(line.contains(r"\u009b2J\u202e\udb40\udc41"), "{line}");
        assert!(!line.trim_end().chars().any(is_obeyed), "{line}");
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }

    #[test]
    fn a_name_is_one_line() {
        assert_eq!(one_line("a\nformat vmfile"), "a\\nformat vmfile");
    }
}
