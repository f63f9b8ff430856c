//! Chores of this workspace: `cargo xtask` lists them.

mod test;

use std::process::ExitCode;

const HELP: &str = "\
Usage: cargo xtask VERB

  test     run every check and every test, as continuous integration does
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("test") => test::run(),
        None | Some("help" | "--help" | "-h") => {
            say(HELP);
            ExitCode::SUCCESS
        }
        Some(verb) => {
            say(&format!("unknown verb {verb:?}\n\n{HELP}"));
            ExitCode::from(2)
        }
    }
}

/// The one place where this program speaks.
#[expect(clippy::print_stderr, reason = "a program for people")]
fn say(text: &str) {
    eprintln!("{text}");
}
