//! `cargo xtask test`: every check and every test, in the order in which they are cheap.

use std::process::{Command, ExitCode};
use std::time::Instant;

use crate::say;

/// A step's name and its cargo command line.
const STEPS: &[(&str, &[&str])] = &[
    ("format", &["fmt", "--all", "--check"]),
    ("lints", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    ("docs", &["doc", "--workspace", "--no-deps"]),
    // VM tests start servers and guests: one at a time, on two cores.
    ("tests", &["test", "--workspace", "--", "--test-threads=1"]),
];

/// Runs the steps and stops at the first that fails.
pub(crate) fn run() -> ExitCode {
    for (name, arguments) in STEPS {
        let start = Instant::now();
        let status = Command::new(env!("CARGO"))
            .args(*arguments)
            .env("RUSTDOCFLAGS", "-D warnings")
            .status();
        let seconds = start.elapsed().as_secs_f64();
        match status {
            Ok(status) if status.success() => say(&format!("{name}: ok in {seconds:.1} s")),
            Ok(status) => {
                say(&format!("{name}: {status} after {seconds:.1} s"));
                return ExitCode::FAILURE;
            }
            Err(error) => {
                say(&format!("{name}: cargo did not start: {error}"));
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
