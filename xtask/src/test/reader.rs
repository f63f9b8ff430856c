//! Reads what a test program prints.
//!
//! The programs run with `--show-output`, which prints the output of passing tests after the last test, and
//! then their names. With `--nocapture` and one thread, the output of a test follows its name at once.

use crate::case::Case;

/// What a line says of a test.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Passed,
    Failed,
    /// It could not run, or not as a whole, for this reason.
    Skipped(String),
    /// It has tried so many cases.
    Cases(u64, Case),
    /// It has tried something that nobody knows.
    Unknown(String),
    /// How many tests of the program passed and failed; of no test.
    Summary(usize, usize),
}

/// How a test program was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// With `--show-output`: what passing tests print is not shown.
    AtTheEnd,
    /// With `--nocapture`: all of it is shown.
    AtOnce,
}

/// The position in a program's output.
#[derive(Debug)]
pub(crate) struct Reader {
    shown: Shown,
    section: Section,
    /// The test whose output is read.
    pub(crate) test: String,
}

/// A part of a program's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    /// A line for each test, as it ends.
    Progress,
    /// What the tests that passed have printed.
    Successes,
    /// Their names.
    Passed,
    /// What the tests that failed have printed.
    Failures,
    /// Their names.
    Failed,
}

impl Reader {
    pub(crate) fn new(shown: Shown) -> Reader {
        Reader { shown, section: Section::Progress, test: String::new() }
    }

    /// Returns whether a user is to see the lines that come now.
    pub(crate) fn is_shown(&self) -> bool {
        !matches!(self.section, Section::Successes | Section::Passed)
    }

    /// Reads a line; returns what it says of [`Reader::test`].
    pub(crate) fn read(&mut self, line: &str) -> Option<Told> {
        if let Some(summary) = line.strip_prefix("test result: ") {
            self.section = Section::Progress;
            let number = |what| number_before(summary, what);
            return Some(Told::Summary(number(" passed"), number(" failed")));
        }
        match (line, self.section) {
            ("successes:", Section::Successes) => self.section = Section::Passed,
            ("successes:", _) => self.section = Section::Successes,
            ("failures:", Section::Failures) => self.section = Section::Failed,
            ("failures:", _) => self.section = Section::Failures,
            (_, Section::Progress) if self.shown == Shown::AtOnce => return self.at_once(line),
            (_, Section::Successes) => return self.in_successes(line),
            (_, Section::Passed | Section::Failed) => return self.in_names(line),
            _ => {}
        }
        None
    }

    fn in_successes(&mut self, line: &str) -> Option<Told> {
        let name = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"));
        if let Some(name) = name {
            name.clone_into(&mut self.test);
        }
        of_test(line)
    }

    fn in_names(&mut self, line: &str) -> Option<Told> {
        let name = line.strip_prefix("    ")?;
        name.clone_into(&mut self.test);
        Some(if self.section == Section::Passed { Told::Passed } else { Told::Failed })
    }

    /// Reads `test NAME ... ` with what the test has printed first, and all that follows it.
    fn at_once(&mut self, line: &str) -> Option<Told> {
        let begun = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
        let line = match begun {
            Some((name, first)) => {
                name.clone_into(&mut self.test);
                first
            }
            None => line,
        };
        match line {
            "ok" => Some(Told::Passed),
            "FAILED" => Some(Told::Failed),
            _ => of_test(line),
        }
    }
}

/// Reads a line that a test has printed.
fn of_test(line: &str) -> Option<Told> {
    if let Some(reason) = line.strip_prefix("skipped: ") {
        return Some(Told::Skipped(reason.to_owned()));
    }
    let tried = line.strip_prefix("cases: ")?;
    let case = tried.split_once(' ').and_then(|(number, name)| {
        let case = Case::ALL.into_iter().find(|case| case.name() == name)?;
        Some(Told::Cases(number.parse().ok()?, case))
    });
    Some(case.unwrap_or_else(|| Told::Unknown(tried.to_owned())))
}

/// Reads the number before `what`, as in `ok. 12 passed; 0 failed`.
fn number_before(summary: &str, what: &str) -> usize {
    let before = summary.split(what).next().unwrap_or_default();
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_cases_has_a_number_and_a_kind_that_is_known() {
        assert_eq!(of_test("cases: 30 kills"), Some(Told::Cases(30, Case::Kill)));
        assert_eq!(of_test("cases: 2 ends of QEMU"), Some(Told::Cases(2, Case::QemuEnd)));
        for wrong in ["30 kittens", "kills", "many kills", "-1 kills", ""] {
            let told = of_test(&format!("cases: {wrong}"));
            assert_eq!(told, Some(Told::Unknown(wrong.to_owned())));
        }
        assert_eq!(of_test("in many cases: 30 kills"), None);
    }

    #[test]
    fn what_a_test_prints_at_once_is_its_own() {
        let output = "\
running 2 tests
test a ... 3 kills, seed 7
cases: 3 kills
ok
test b ... cases: 1 flips
ok
test c ... ok
test d ... FAILED

failures:

failures:
    d
";
        let mut reader = Reader::new(Shown::AtOnce);
        let mut told = Vec::new();
        for line in output.lines() {
            told.extend(reader.read(line).map(|told| (reader.test.clone(), told)));
        }
        let expected = [
            ("a", Told::Cases(3, Case::Kill)),
            ("a", Told::Passed),
            ("b", Told::Cases(1, Case::Flip)),
            ("b", Told::Passed),
            ("c", Told::Passed),
            ("d", Told::Failed),
            ("d", Told::Failed),
        ];
        assert_eq!(told, expected.map(|(test, told)| (test.to_owned(), told)));
    }
}
