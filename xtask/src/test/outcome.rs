//! Sums up the results of the test programs.
//!
//! A test that cannot run, or not as a whole, passes and prints `skipped: ` and the reason on a
//! line of its own. The programs run with `--show-output`, which prints the output of passing tests
//! after the last test. xtask reads the lines of skipped tests from there, and does not show the
//! rest.

use std::error::Error;
use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use crate::command::say;

/// The results of all tests so far.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    passed: usize,
    failed: usize,
    skipped: Vec<Skipped>,
}

/// A test, or a step, that could not run, or not as a whole.
#[derive(Debug, PartialEq, Eq)]
struct Skipped {
    /// As `testing guests a_dimm_comes_back` or `step loops`.
    what: String,
    /// Whether its program has counted it among those that passed.
    is_test: bool,
    /// Each once: a test with several parts may have several.
    reasons: Vec<String>,
}

/// The position in a program's output.
#[derive(Debug, Default)]
struct Reader {
    in_successes: bool,
    test: String,
}

impl Outcome {
    /// Runs a test program, shows what it prints and counts its tests.
    pub(crate) fn run(
        &mut self,
        program: &str,
        command: &mut Command,
    ) -> Result<(), Box<dyn Error>> {
        say(&format!("run {program}"));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut reader = Reader::default();
        if let Some(stdout) = child.stdout.take() {
            for line in BufReader::new(stdout).split(b'\n') {
                let line = String::from_utf8_lossy(&line?).into_owned();
                if self.read_line(program, &mut reader, &line) {
                    println!("{line}");
                }
            }
        }
        let status = child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("{program}: {status}").into()) }
    }

    /// Records that a step could not be done.
    pub(super) fn skip_step(&mut self, name: &str, reason: &str) {
        self.skip(format!("step {name}"), false, reason);
    }

    fn skip(&mut self, what: String, is_test: bool, reason: &str) {
        let found = self.skipped.iter().position(|skipped| skipped.what == what);
        let index = found.unwrap_or(self.skipped.len());
        if found.is_none() {
            self.skipped.push(Skipped { what, is_test, reasons: Vec::new() });
        }
        let reasons = &mut self.skipped[index].reasons;
        if !reasons.iter().any(|told| told == reason) {
            reasons.push(reason.to_owned());
        }
    }

    /// Lists what could not run, with all reasons.
    pub(crate) fn print_skipped(&self) {
        for Skipped { what, reasons, .. } in &self.skipped {
            println!("skipped {what}: {}", reasons.join("; "));
        }
    }

    /// Reads one line of a program's output; returns whether to show it.
    fn read_line(&mut self, program: &str, reader: &mut Reader, line: &str) -> bool {
        if let Some(summary) = line.strip_prefix("test result: ") {
            reader.in_successes = false;
            self.passed += number_before(summary, " passed");
            self.failed += number_before(summary, " failed");
            return true;
        }
        match line {
            "successes:" => reader.in_successes = true,
            "failures:" => reader.in_successes = false,
            _ => {}
        }
        if !reader.in_successes {
            return true;
        }
        let name = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"));
        if let Some(name) = name {
            name.clone_into(&mut reader.test);
        }
        if let Some(reason) = line.strip_prefix("skipped: ") {
            self.skip(format!("{program} {}", reader.test), true, reason);
        }
        false
    }
}

/// The last line of a run.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skipped = self.skipped.len();
        let tests = self.skipped.iter().filter(|skipped| skipped.is_test).count();
        write!(f, "{} passed, {} failed", self.passed.saturating_sub(tests), self.failed)?;
        if skipped > 0 {
            write!(f, ", {skipped} skipped")?;
        }
        Ok(())
    }
}

/// Reads the number before `what`, as in `ok. 12 passed; 0 failed`.
fn number_before(summary: &str, what: &str) -> usize {
    let before = summary.split(what).next().unwrap_or_default();
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 3 tests
test a ... ok
test b ... ok
test c ... FAILED

successes:

---- b stdout ----
some words
skipped: needs QEMU 99
skipped: needs QEMU 99
skipped: needs root


successes:
    a
    b

failures:

---- c stdout ----
skipped: not this one, it failed

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out
";

    #[test]
    fn a_skipped_test_is_counted_once_and_not_as_passed() {
        let (mut outcome, mut reader) = (Outcome::default(), Reader::default());
        for line in OUTPUT.lines() {
            outcome.read_line("p", &mut reader, line);
        }
        assert_eq!(outcome.to_string(), "1 passed, 1 failed, 1 skipped");
        assert_eq!(outcome.skipped[0].what, "p b");
        assert_eq!(outcome.skipped[0].reasons, ["needs QEMU 99", "needs root"]);
    }

    #[test]
    fn a_skipped_step_is_counted_and_takes_nothing_from_the_tests_that_passed() {
        let mut outcome = Outcome { passed: 3, ..Outcome::default() };
        outcome.skip_step("loops", "no x86-64");
        assert_eq!(outcome.to_string(), "3 passed, 0 failed, 1 skipped");
        assert_eq!(outcome.skipped[0].what, "step loops");
    }

    #[test]
    fn what_passing_tests_printed_is_not_shown() {
        let (mut outcome, mut reader) = (Outcome::default(), Reader::default());
        let shown: Vec<&str> =
            OUTPUT.lines().filter(|line| outcome.read_line("p", &mut reader, line)).collect();
        assert!(!shown.contains(&"some words"));
        assert!(shown.contains(&"test a ... ok"));
        assert!(shown.contains(&"---- c stdout ----"));
    }

    #[test]
    fn nothing_skipped_is_not_told() {
        let outcome = Outcome { passed: 3, ..Outcome::default() };
        assert_eq!(outcome.to_string(), "3 passed, 0 failed");
    }
}
