//! Sums up the results of the test programs.
//!
//! A test that cannot run, or not as a whole, passes and prints `skipped: ` and the reason on a
//! line of its own. A test that tries cases prints `cases: `, how many, and of which kind.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use super::reader::{Reader, Shown, Told};
use crate::command::say;
use crate::reliability::record::{Cases, End, Tried, add_up};

/// The results of all tests so far.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    passed: usize,
    failed: usize,
    skipped: Vec<Skipped>,
    /// What each test has shown, as `testing guests a_dimm_comes_back`.
    pub(crate) tests: BTreeMap<String, Tried>,
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

impl Outcome {
    /// Runs a test program with `--show-output`, shows what it prints and counts its tests.
    pub(crate) fn run(
        &mut self,
        program: &str,
        command: &mut Command,
    ) -> Result<(), Box<dyn Error>> {
        say(&format!("run {program}"));
        self.run_shown(program, command, Shown::AtTheEnd)
    }

    /// Runs a test program that shows its output in this way.
    pub(crate) fn run_shown(
        &mut self,
        program: &str,
        command: &mut Command,
        shown: Shown,
    ) -> Result<(), Box<dyn Error>> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut reader = Reader::new(shown);
        let mut unknown = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            for line in BufReader::new(stdout).split(b'\n') {
                let line = String::from_utf8_lossy(&line?).into_owned();
                unknown.extend(self.read_line(program, &mut reader, &line));
                if reader.is_shown() {
                    println!("{line}");
                }
            }
        }
        let status = child.wait()?;
        if !status.success() {
            return Err(format!("{program}: {status}").into());
        }
        if unknown.is_empty() { Ok(()) } else { Err(unknown.join("; ").into()) }
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

    /// Lists how many cases were tried, and what could not run, with all reasons.
    pub(crate) fn print_cases_and_skipped(&self) {
        let cases: Cases = add_up(self.tests.values());
        if !cases.is_empty() {
            println!("tried {cases}");
        }
        for Skipped { what, reasons, .. } in &self.skipped {
            println!("skipped {what}: {}", reasons.join("; "));
        }
    }

    fn tried(&mut self, what: String) -> &mut Tried {
        self.tests.entry(what).or_default()
    }

    /// Reads one line of a program's output; returns what is wrong with it.
    fn read_line(&mut self, program: &str, reader: &mut Reader, line: &str) -> Option<String> {
        let told = reader.read(line)?;
        let what = format!("{program} {}", reader.test);
        match told {
            Told::Summary(passed, failed) => {
                self.passed += passed;
                self.failed += failed;
            }
            Told::Unknown(tried) => {
                return Some(format!("{what}: a number of cases that nobody knows: {tried:?}"));
            }
            Told::Cases(number, case) => self.tried(what).cases.add(number, case),
            Told::Passed => drop(self.tried(what)),
            Told::Failed => *self.tried(what) = Tried { end: End::Failed, ..Tried::default() },
            Told::Skipped(reason) => {
                self.tried(what.clone()).end = End::Skipped;
                self.skip(what, true, &reason);
            }
        }
        None
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Case;

    const OUTPUT: &str = "
running 3 tests
test a ... ok
test b ... ok
test c ... FAILED

successes:

---- a stdout ----
seed 7
cases: 30 kills
cases: 1 restores
cases: 12 kills

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
cases: 5 kills


failures:
    c

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out
";

    fn read(outcome: &mut Outcome, output: &str) -> (Vec<String>, Vec<String>) {
        let mut reader = Reader::new(Shown::AtTheEnd);
        let (mut shown, mut wrong) = (Vec::new(), Vec::new());
        for line in output.lines() {
            wrong.extend(outcome.read_line("p", &mut reader, line));
            if reader.is_shown() {
                shown.push(line.to_owned());
            }
        }
        (shown, wrong)
    }

    #[test]
    fn a_skipped_test_is_counted_once_and_not_as_passed() {
        let mut outcome = Outcome::default();
        read(&mut outcome, OUTPUT);
        assert_eq!(outcome.to_string(), "1 passed, 1 failed, 1 skipped");
        assert_eq!(outcome.skipped[0].what, "p b");
        assert_eq!(outcome.skipped[0].reasons, ["needs QEMU 99", "needs root"]);
    }

    #[test]
    fn cases_of_tests_that_passed_are_added_up() {
        let mut outcome = Outcome::default();
        let (_, wrong) = read(&mut outcome, OUTPUT);
        assert_eq!(wrong, [""; 0]);
        let ends: Vec<_> =
            outcome.tests.iter().map(|(name, tried)| (name.as_str(), tried.end)).collect();
        assert_eq!(ends, [("p a", End::Passed), ("p b", End::Skipped), ("p c", End::Failed)]);
        let cases = add_up(outcome.tests.values());
        assert_eq!(cases.of(Case::Kill), 42);
        assert_eq!(cases.to_string(), "42 kills, 1 restore");
    }

    #[test]
    fn a_kind_of_case_that_nobody_knows_is_wrong() {
        let output = OUTPUT.replace("12 kills", "12 kittens");
        let (_, wrong) = read(&mut Outcome::default(), &output);
        assert_eq!(wrong, ["p a: a number of cases that nobody knows: \"12 kittens\""]);
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
        let (shown, _) = read(&mut Outcome::default(), OUTPUT);
        let has = |line: &str| shown.iter().any(|shown| shown == line);
        assert!(!has("some words"));
        assert!(has("test a ... ok"));
        assert!(has("---- c stdout ----"));
    }

    #[test]
    fn nothing_skipped_is_not_told() {
        let outcome = Outcome { passed: 3, ..Outcome::default() };
        assert_eq!(outcome.to_string(), "3 passed, 0 failed");
    }
}
