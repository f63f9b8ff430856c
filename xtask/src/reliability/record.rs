//! What each test has shown when it ran last: a file in the build directory.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::case::Case;
use crate::workspace::Workspace;

/// How the command of a longer run begins.
pub(crate) const CHAOS: &str = "cargo xtask chaos ";

/// How a test ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum End {
    #[default]
    Passed,
    /// It could not run, or not as a whole.
    Skipped,
    Failed,
}

/// How many cases were tried, of each kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cases(BTreeMap<Case, u64>);

/// What a test has shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tried {
    pub(crate) end: End,
    pub(crate) cases: Cases,
}

/// A run of tests.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Run {
    /// As a user types it.
    pub(crate) command: String,
    pub(crate) day: String,
    pub(crate) commit: String,
    pub(crate) kernel: String,
    /// The versions of QEMU that were there.
    pub(crate) qemu: String,
}

/// What each test has shown, by its name, and in which run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) tests: BTreeMap<String, (Tried, Run)>,
}

impl Cases {
    pub(crate) fn add(&mut self, number: u64, case: Case) {
        // A test may find that it was too late each time.
        if number > 0 {
            let sum = self.0.entry(case).or_default();
            *sum = sum.saturating_add(number);
        }
    }

    pub(crate) fn of(&self, case: Case) -> u64 {
        self.0.get(&case).copied().unwrap_or_default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn total(&self) -> u64 {
        self.0.values().fold(0, |sum, number| sum.saturating_add(*number))
    }
}

/// As `30 kills, 1 restore`.
impl fmt::Display for Cases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0.iter().map(|(case, number)| match number {
            1 => format!("1 {}", singular(case.name())),
            number => format!("{number} {case}"),
        });
        f.write_str(&shown.collect::<Vec<String>>().join(", "))
    }
}

/// Returns `power cut` of `power cuts`, and `end of QEMU` of `ends of QEMU`.
fn singular(name: &str) -> String {
    match name.split_once("s of ") {
        Some((what, of)) => format!("{what} of {of}"),
        None => name.trim_end_matches('s').to_owned(),
    }
}

/// Adds up the cases of tests.
pub(crate) fn add_up<'a>(tests: impl IntoIterator<Item = &'a Tried>) -> Cases {
    let mut sum = Cases::default();
    for tried in tests {
        for (&case, &number) in &tried.cases.0 {
            sum.add(number, case);
        }
    }
    sum
}

impl Run {
    /// Whether it tried more than a run of all tests does.
    pub(crate) fn is_longer(&self) -> bool {
        self.command.starts_with(CHAOS)
    }
}

impl Record {
    /// Reads the record; it is empty before the first run.
    pub(crate) fn read(workspace: &Workspace) -> Result<Record, Box<dyn Error>> {
        let path = path(workspace);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Record::default()),
            Err(error) => return Err(format!("{}: {error}", path.display()).into()),
        };
        let not_ours = || format!("{}: no record of tests; remove it", path.display());
        let read: Value = serde_json::from_str(&text).map_err(|_error| not_ours())?;
        Ok(Record::from_json(&read).ok_or_else(not_ours)?)
    }

    /// Adds what tests have shown. What a longer run of the same commit has shown stays, for example one of
    /// `cargo xtask chaos`.
    pub(crate) fn add(&mut self, tests: BTreeMap<String, Tried>, run: &Run) {
        for (name, tried) in tests {
            let is_more = |(old, in_run): &(Tried, Run)| {
                let is_longer = old.cases.total() > tried.cases.total();
                let stands = tried.end == End::Skipped || tried.end == End::Passed && is_longer;
                old.end == End::Passed && in_run.commit == run.commit && stands
            };
            if !self.tests.get(&name).is_some_and(is_more) {
                self.tests.insert(name, (tried, run.clone()));
            }
        }
    }

    pub(crate) fn write(&self, workspace: &Workspace) -> Result<(), Box<dyn Error>> {
        fs::write(path(workspace), serde_json::to_string_pretty(&self.to_json())?)?;
        Ok(())
    }

    fn to_json(&self) -> Value {
        let test = |(name, (tried, run)): (&String, &(Tried, Run))| {
            let cases: Map<String, Value> = tried
                .cases
                .0
                .iter()
                .map(|(case, number)| (case.to_string(), json!(number)))
                .collect();
            let Run { command, day, commit, kernel, qemu } = run;
            let run = [command, day, commit, kernel, qemu];
            (name.clone(), json!({ "end": tried.end.name(), "cases": cases, "run": run }))
        };
        Value::Object(self.tests.iter().map(test).collect())
    }

    fn from_json(value: &Value) -> Option<Record> {
        let test = |(name, value): (&String, &Value)| {
            let end = value["end"].as_str()?;
            let end = End::ALL.into_iter().find(|one| one.name() == end)?;
            let mut cases = Cases::default();
            for (name, number) in value["cases"].as_object()? {
                // A kind that was removed since.
                if let Some(case) = Case::ALL.into_iter().find(|case| case.name() == name) {
                    cases.add(number.as_u64()?, case);
                }
            }
            let run = value["run"].as_array()?.iter().map(|word| word.as_str().map(str::to_owned));
            let run: [String; 5] = run.collect::<Option<Vec<_>>>()?.try_into().ok()?;
            let [command, day, commit, kernel, qemu] = run;
            let run = Run { command, day, commit, kernel, qemu };
            Some((name.clone(), (Tried { end, cases }, run)))
        };
        Some(Record { tests: value.as_object()?.iter().map(test).collect::<Option<_>>()? })
    }
}

impl End {
    const ALL: [End; 3] = [End::Passed, End::Skipped, End::Failed];

    pub(crate) fn name(self) -> &'static str {
        match self {
            End::Passed => "passed",
            End::Skipped => "skipped",
            End::Failed => "failed",
        }
    }
}

fn path(workspace: &Workspace) -> PathBuf {
    workspace.target().join("reliability.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(command: &str, commit: &str) -> Run {
        let (command, commit) = (command.to_owned(), commit.to_owned());
        Run { command, day: String::new(), commit, kernel: String::new(), qemu: String::new() }
    }

    fn tried(end: End, kills: u64) -> BTreeMap<String, Tried> {
        let cases = Cases(BTreeMap::from([(Case::Kill, kills)]));
        BTreeMap::from([("p a".to_owned(), Tried { end, cases })])
    }

    #[test]
    fn a_longer_run_of_the_same_commit_stays() {
        let mut record = Record::default();
        let mut after = |end, kills, command, commit| {
            record.add(tried(end, kills), &run(command, commit));
            let (tried, run) = &record.tests["p a"];
            (run.command.clone(), tried.end, tried.cases.of(Case::Kill))
        };
        let of = |command: &str, end, kills| (command.to_owned(), end, kills);
        assert_eq!(after(End::Passed, 30, "test", "1"), of("test", End::Passed, 30));
        assert_eq!(after(End::Passed, 300, "chaos", "1"), of("chaos", End::Passed, 300));
        assert_eq!(after(End::Passed, 30, "test", "1"), of("chaos", End::Passed, 300));
        assert_eq!(after(End::Skipped, 0, "test", "1"), of("chaos", End::Passed, 300));
        assert_eq!(after(End::Failed, 0, "test", "1"), of("test", End::Failed, 0));
        assert_eq!(after(End::Passed, 300, "chaos", "1"), of("chaos", End::Passed, 300));
        assert_eq!(after(End::Passed, 30, "test", "2"), of("test", End::Passed, 30));
    }

    #[test]
    fn one_case_is_told_as_one() {
        let cases = Cases(BTreeMap::from([(Case::Kill, 2), (Case::PowerCut, 1)]));
        assert_eq!(cases.to_string(), "2 kills, 1 power cut");
        assert_eq!(Cases(BTreeMap::from([(Case::QemuEnd, 1)])).to_string(), "1 end of QEMU");
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let mut record = Record::default();
        record.add(tried(End::Skipped, 3), &run("cargo xtask test vm", "1"));
        assert_eq!(Record::from_json(&record.to_json()), Some(record));
        assert_eq!(Record::from_json(&json!({ "p a": {} })), None);
    }
}
