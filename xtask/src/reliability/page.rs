//! docs/reliability.md: what people wrote, with what the tests have shown.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;

use super::names::{Row, is_named, rows};
use super::record::{CHAOS, End, Record, Run, Tried, add_up};
use crate::case::Case;

const BEGIN: &str = "<!-- What the tests have shown; `cargo xtask reliability` writes it. -->\n";
const FINISH: &str = "<!-- End of what the tests have shown. -->\n";

/// Returns the page with the cells `cases` and `result` of each promise, and with the totals.
pub(super) fn page(text: &str, record: &Record) -> Result<String, Box<dyn Error>> {
    let filled: BTreeMap<usize, String> =
        rows(text).map(|row| (row.line, filled(&row, record))).collect();
    let mut page = String::new();
    for (number, line) in (1..).zip(text.lines()) {
        page += filled.get(&number).map_or(line, String::as_str);
        page.push('\n');
    }
    let (before, rest) = page.split_once(BEGIN).ok_or("the page has no line before the totals")?;
    let (_, after) = rest.split_once(FINISH).ok_or("the page has no line after the totals")?;
    Ok(format!("{before}{BEGIN}{}{FINISH}{after}", totals(record)))
}

fn filled(row: &Row<'_>, record: &Record) -> String {
    let is_of_row = |test: &str| row.names.iter().any(|name| is_named(name, test));
    let tests = record.tests.iter().filter(|(name, _)| is_of_row(name)).map(|(_, shown)| shown);
    let tests: Vec<&(Tried, Run)> = tests.collect();
    let cases = add_up(tests.iter().map(|(tried, _)| tried)).to_string();
    let mut by: Vec<&str> = tests
        .iter()
        .filter(|(tried, _)| !tried.cases.is_empty())
        .filter_map(|(_, run)| run.command.strip_prefix(CHAOS))
        .collect();
    by.dedup();
    let by: Vec<String> = by.iter().map(|mode| format!("`chaos {mode}`")).collect();
    let cases = if by.is_empty() { cases } else { format!("{cases} ({})", by.join(", ")) };
    let is_run = |name: &&&str| record.tests.keys().any(|test| is_named(name, test));
    let not_run = row.names.iter().filter(|name| !is_run(name)).count();
    let result = result(tests.iter().map(|(tried, _)| tried), not_run);
    let [promise, how, .., names] = row.cells[..] else { return String::new() };
    let cells = [promise, how, &cases, &result, names];
    let cells = cells.map(|cell| if cell.is_empty() { String::new() } else { format!(" {cell}") });
    format!("|{} |", cells.join(" |"))
}

/// Says how tests ended: `passed` of one, `3 passed, 1 skipped` of more. Of `not_run` names no test has run.
fn result<'a>(tests: impl Iterator<Item = &'a Tried> + Clone, not_run: usize) -> String {
    let ends = [(End::Passed, "passed"), (End::Skipped, "skipped"), (End::Failed, "FAILED")];
    let counts = ends.map(|(end, word)| (tests.clone().filter(|one| one.end == end).count(), word));
    let told: Vec<String> = counts
        .iter()
        .chain(&[(not_run, "not run")])
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
    match &told[..] {
        [one] if one.starts_with("1 ") => one[2..].to_owned(),
        _ => told.join(", "),
    }
}

fn totals(record: &Record) -> String {
    let tests = || record.tests.values().map(|(tried, _)| tried);
    let mut text = format!("\n{} tests: {}.\n", tests().count(), result(tests(), 0));
    for (word, end) in [("Failed", End::Failed), ("Skipped", End::Skipped)] {
        let of_end = |(_, (tried, _)): &(&String, &(Tried, Run))| tried.end == end;
        let names: Vec<String> =
            record.tests.iter().filter(of_end).map(|(name, _)| format!("`{name}`")).collect();
        if !names.is_empty() {
            let _ = write!(text, "\n{word}: {}.\n", names.join(", "));
        }
    }
    text += "\n| kind | tried | by tests | what one is |\n|---|---|---|---|\n";
    let cases = add_up(tests());
    for case in Case::ALL.into_iter().filter(|case| cases.of(*case) > 0) {
        let by = tests().filter(|tried| tried.cases.of(case) > 0).count();
        let _ = writeln!(text, "| {case} | {} | {by} | {} |", cases.of(case), case.meaning());
    }
    text += "\n| command | day | commit | kernel | QEMU | tests |\n|---|---|---|---|---|---|\n";
    let mut runs: BTreeMap<&Run, usize> = BTreeMap::new();
    for (_, run) in record.tests.values() {
        *runs.entry(run).or_default() += 1;
    }
    for (Run { command, day, commit, kernel, qemu }, tests) in runs {
        let cells = [&format!("`{command}`"), day, commit, kernel, qemu, &tests.to_string()];
        let _ = writeln!(text, "| {} |", cells.map(String::as_str).join(" | "));
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reliability::record::Cases;

    fn run(command: &str) -> Run {
        let [day, commit, kernel, qemu] = ["2026-12-01", "abc", "Linux 6", "7.2, 10.0"];
        let [command, day, commit, kernel, qemu] =
            [command, day, commit, kernel, qemu].map(str::to_owned);
        Run { command, day, commit, kernel, qemu }
    }

    fn record() -> Record {
        let mut record = Record::default();
        let tried = |end, kills| {
            let mut cases = Cases::default();
            if kills > 0 {
                cases.add(kills, Case::Kill);
            }
            Tried { end, cases }
        };
        let one = |name: &str, tried| BTreeMap::from([(name.to_owned(), tried)]);
        let (test, chaos) = (run("cargo xtask test"), run("cargo xtask chaos vmfile 300"));
        record.add(one("cli program kills::a", tried(End::Passed, 300)), &chaos);
        record.add(one("cli program kills::b", tried(End::Passed, 12)), &test);
        record.add(one("testing live c", tried(End::Skipped, 0)), &test);
        record
    }

    const PAGE: &str = "\
# Title

| promise | how it is tried | cases | result | tests |
|---|---|---|---|---|
| One | so | old | old | `cli program kills::*` |
| Two | | | | `testing live c` |
| Three | | | | `testing live d` |
| Four | | | | `testing live c`, `testing live d` |

<!-- What the tests have shown; `cargo xtask reliability` writes it. -->
old
<!-- End of what the tests have shown. -->

The rest.
";

    #[test]
    fn a_row_gets_what_its_tests_have_shown() {
        let page = page(PAGE, &record()).unwrap();
        for row in [
            "| One | so | 312 kills (`chaos vmfile 300`) | 2 passed | `cli program kills::*` |\n",
            "| Two | | | skipped | `testing live c` |\n",
            "| Three | | | not run | `testing live d` |\n",
            "| Four | | | 1 skipped, 1 not run | `testing live c`, `testing live d` |\n",
        ] {
            assert!(page.contains(row), "{page}");
        }
        assert!(page.starts_with("# Title\n") && page.ends_with("\nThe rest.\n"));
    }

    #[test]
    fn the_totals_say_what_was_tried_and_by_which_command() {
        let text = page(PAGE, &record()).unwrap();
        for line in [
            "3 tests: 2 passed, 1 skipped.\n\nSkipped: `testing live c`.\n",
            "| kills | 312 | 2 | ",
            "| `cargo xtask chaos vmfile 300` | 2026-12-01 | abc | Linux 6 | 7.2, 10.0 | 1 |\n",
            "| `cargo xtask test` | 2026-12-01 | abc | Linux 6 | 7.2, 10.0 | 2 |\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(!text.contains("old\n"));
        assert_eq!(page(&text, &record()).unwrap(), text);
        assert!(page("# Title\n", &record()).is_err());
    }
}
