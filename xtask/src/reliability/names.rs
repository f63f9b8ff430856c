//! The names of tests in docs/reliability.md.
//!
//! A name is written in backticks in the last column of a table: the directory of the package, the test
//! program, and the test as its program calls it, such as `cli program kills::a_test`. Without a test it
//! names all tests of the program; with a `*` at its end, all that begin so.

use std::collections::BTreeMap;

use super::record::Tried;

/// The page with the names.
pub(crate) const PAGE: &str = "docs/reliability.md";

/// The head of each table of promises.
pub(crate) const HEAD: [&str; 5] = ["promise", "how it is tried", "cases", "result", "tests"];

/// One promise.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    /// The number of its line, from 1.
    pub(crate) line: usize,
    /// As many as [`HEAD`] has.
    pub(crate) cells: Vec<&'a str>,
    pub(crate) names: Vec<&'a str>,
}

/// Returns the rows of all tables of promises.
pub(crate) fn rows(page: &str) -> impl Iterator<Item = Row<'_>> {
    let mut is_promise = false;
    (1..).zip(page.lines()).filter_map(move |(line, text)| {
        let cells = cells(text);
        if cells == HEAD {
            is_promise = true;
            return None;
        }
        is_promise &= text.starts_with('|');
        let is_row = is_promise && !text.starts_with("|---");
        let names = cells.last().map(|last| last.split('`').skip(1).step_by(2).collect());
        is_row.then(|| Row { line, names: names.unwrap_or_default(), cells })
    })
}

fn cells(line: &str) -> Vec<&str> {
    let inner = line.strip_prefix('|').and_then(|line| line.trim_end().strip_suffix('|'));
    inner.map(|inner| inner.split('|').map(str::trim).collect()).unwrap_or_default()
}

/// Whether `name` names `test`.
pub(crate) fn is_named(name: &str, test: &str) -> bool {
    match name.strip_suffix('*') {
        Some(beginning) => test.starts_with(beginning),
        None => test == name || test.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')),
    }
}

/// Returns what is wrong with a row, as far as the sources show it. `files` are paths and texts.
pub(crate) fn wrong_in(row: &Row<'_>, files: &[(&str, &str)]) -> Vec<String> {
    let mut wrong = Vec::new();
    if row.cells.len() != HEAD.len() {
        wrong.push(format!("{} cells, the head has {}", row.cells.len(), HEAD.len()));
    } else if row.names.is_empty() {
        wrong.push("no test is named".to_owned());
    }
    for name in row.names.iter().filter(|name| !is_in(name, files)) {
        wrong.push(format!("there is no test {name}"));
    }
    wrong
}

/// Whether the sources have a test of this name.
fn is_in(name: &str, files: &[(&str, &str)]) -> bool {
    let (beginning, is_group) = match name.strip_suffix('*') {
        Some(beginning) => (beginning, true),
        None => (name, false),
    };
    let mut words = beginning.splitn(3, ' ');
    let (package, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let directory = match package {
        "fuzz" => return files.iter().any(|(path, _)| is_fuzzer(path, target, is_group)),
        "testing" | "xtask" => package.to_owned(),
        _ => format!("crates/{package}"),
    };
    let (file, tests) =
        (format!("{directory}/tests/{target}.rs"), format!("{directory}/tests/{target}/"));
    let of_program = |path: &str| match target.strip_prefix("vmfile") {
        // The library or the program itself.
        Some(_) => path.starts_with(&format!("{directory}/src/")),
        None => path == file || path.starts_with(&tests),
    };
    let mut files = files.iter().filter(|(path, _)| of_program(path));
    let Some(test) = words.next() else { return files.next().is_some() };
    let (modules, test) = test.rsplit_once("::").unwrap_or(("", test));
    let module = modules.trim_end_matches("::tests").rsplit("::").next().unwrap_or_default();
    let head = if is_group { format!("fn {test}") } else { format!("fn {test}(") };
    files.any(|(path, text)| {
        let is_module = module.is_empty()
            || path.ends_with(&format!("/{module}.rs"))
            || path.contains(&format!("/{module}/"));
        is_module && text.contains(&head)
    })
}

fn is_fuzzer(path: &str, target: &str, is_group: bool) -> bool {
    let Some(name) = path.strip_prefix("fuzz/targets/") else { return false };
    if is_group { name.starts_with(target) } else { name == format!("{target}.rs") }
}

/// Returns what the page names and no test program has, among the tests that have run. `programs` are all
/// that there are, each with whether it has run.
pub(crate) fn not_there(
    page: &str,
    programs: &BTreeMap<String, bool>,
    tests: &BTreeMap<String, Tried>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for name in rows(page).flat_map(|row| row.names) {
        let is_of = |program: &str| name == program || is_named(program, name);
        let mut of = programs.iter().filter(|(program, _)| {
            is_of(program) || name.ends_with('*') && is_named(name, program)
        });
        let Some((_, &has_run)) = of.next() else {
            wrong.push(format!("{PAGE} names {name}: there is no such test program"));
            continue;
        };
        if has_run && !tests.keys().any(|test| is_named(name, test)) {
            wrong.push(format!("{PAGE} names {name}: there is no such test"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
# Title

| promise | how it is tried | cases | result | tests |
|---|---|---|---|---|
| One | so | | | `cli program kills::a_vm`, `testing live` |
| Two | | | | `cli vmfile commands::confine::*` |

| another | table |
|---|---|
| `no` | `test` |
";

    const FILES: [(&str, &str); 4] = [
        ("crates/cli/tests/program/kills.rs", "fn a_vm() {}"),
        ("crates/cli/src/commands/confine.rs", "mod tests { fn b() {} }"),
        ("testing/tests/live.rs", "fn c() {}"),
        ("fuzz/targets/stream.rs", ""),
    ];

    #[test]
    fn the_names_are_those_in_the_last_column() {
        let names: Vec<Vec<&str>> = rows(TABLE).map(|row| row.names).collect();
        let expected = [
            vec!["cli program kills::a_vm", "testing live"],
            vec!["cli vmfile commands::confine::*"],
        ];
        assert_eq!(names, expected);
        assert_eq!(rows(TABLE).map(|row| row.line).collect::<Vec<_>>(), [5, 6]);
    }

    #[test]
    fn a_name_stands_for_one_test_for_a_group_or_for_a_program() {
        let test = "cli program kills::a_vm";
        for name in [test, "cli program", "cli program kills::*", "cli program kills::a_*"] {
            assert!(is_named(name, test), "{name}");
        }
        for name in ["cli program kills::a", "cli prog", "cli program live::*", "kills::a_vm"] {
            assert!(!is_named(name, test), "{name}");
        }
    }

    #[test]
    fn a_test_that_the_sources_do_not_have_is_found() {
        assert!(rows(TABLE).all(|row| wrong_in(&row, &FILES).is_empty()));
        for name in ["fuzz *", "fuzz stream", "cli program kills::a_*", "cli program kills::*"] {
            assert!(is_in(name, &FILES), "{name}");
        }
        for name in [
            "cli program kills::a",
            "cli program live::a_vm",
            "cli program kills::b_*",
            "pages chains",
            "testing live a_vm",
            "fuzz streams",
        ] {
            assert!(!is_in(name, &FILES), "{name}");
        }
        let row = rows(&TABLE.replace("`testing live`", "")).map(|row| row.names.len()).next();
        assert_eq!(row, Some(1));
        let text = TABLE.replace("`cli program kills::a_vm`, `testing live`", "both | more");
        let wrong: Vec<String> = rows(&text).flat_map(|row| wrong_in(&row, &FILES)).collect();
        assert_eq!(wrong, ["6 cells, the head has 5"]);
    }

    #[test]
    fn a_test_that_was_not_run_is_found_if_its_program_was() {
        let programs = |has_run| {
            let names = ["cli program", "cli vmfile", "testing live"];
            names.map(|name| (name.to_owned(), has_run)).into_iter().collect()
        };
        let tests: BTreeMap<String, Tried> = ["cli program kills::a_vm", "testing live c"]
            .map(|name| (name.to_owned(), Tried::default()))
            .into_iter()
            .collect();
        assert_eq!(not_there(TABLE, &programs(false), &tests), [""; 0]);
        let expected =
            "docs/reliability.md names cli vmfile commands::confine::*: there is no such test";
        assert_eq!(not_there(TABLE, &programs(true), &tests), [expected]);
        let without = BTreeMap::from([("testing live".to_owned(), false)]);
        assert_eq!(not_there(TABLE, &without, &tests).len(), 2);
    }
}
