//! Rules about source files: their form, and what only some of them may do.

use super::{Finding, has_word, numbered};

/// The number of lines of the longest file allowed. A longer one has more than one subject.
const LINES_MAX: usize = 600;

/// No tabs and no spaces at the end of a line.
pub(super) fn whitespace(path: &str, text: &str, findings: &mut Vec<Finding>) {
    for (number, line) in numbered(text) {
        if line.contains('\t') {
            findings.push(Finding::new(path, number, "a tab"));
        }
        if line.ends_with([' ', '\r']) {
            findings.push(Finding::new(path, number, "white space at the end of the line"));
        }
    }
}

/// Only ASCII.
pub(super) fn ascii(path: &str, text: &str, findings: &mut Vec<Finding>) {
    for (number, line) in numbered(text) {
        if let Some(found) = line.chars().find(|c| !c.is_ascii()) {
            findings.push(Finding::new(path, number, format!("{found:?} is not ASCII")));
        }
    }
}

/// A file begins with a comment that says what it is.
pub(super) fn head(path: &str, text: &str, findings: &mut Vec<Finding>) {
    if !text.starts_with("//! ") {
        findings.push(Finding::new(path, 1, "the file does not begin with a `//!` head"));
    }
}

/// No file is longer than [`LINES_MAX`].
pub(super) fn length(path: &str, text: &str, findings: &mut Vec<Finding>) {
    let lines = text.lines().count();
    if lines > LINES_MAX {
        let reason = format!("{lines} lines, {LINES_MAX} at most: split it by subject");
        findings.push(Finding::new(path, lines, reason));
    }
}

/// Unsafe code occurs in the engine only.
pub(super) fn unsafe_code(path: &str, text: &str, findings: &mut Vec<Finding>) {
    if path.starts_with("crates/engine/") {
        return;
    }
    for (number, line) in numbered(text) {
        let code = line.trim_start();
        let is_prose = code.starts_with("//") || code.contains('"');
        if !is_prose && has_word(code, "unsafe") {
            findings.push(Finding::new(path, number, "unsafe code outside the engine"));
        }
    }
}

/// A file gets its name from the engine's `publish`; only the engine and tests make files directly.
pub(super) fn published_files(path: &str, text: &str, findings: &mut Vec<Finding>) {
    let tests = ["crates/engine/", "testing/", "fuzz/", "xtask/"];
    if tests.iter().any(|start| path.starts_with(start)) || path.contains("/tests/") {
        return;
    }
    for (number, line) in numbered(text) {
        if line.trim() == "#[cfg(test)]" {
            return; // the tests are at the end of a file
        }
        if line.contains(concat!("File::", "create(")) {
            let reason =
                "a file is made by the engine's `publish`, so that a name means a whole file";
            findings.push(Finding::new(path, number, reason));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::findings_of;

    #[test]
    fn white_space_is_found() {
        assert_eq!(findings_of(whitespace, "a.md", "a\n\tb\n"), ["a.md:2: a tab"]);
        assert_eq!(
            findings_of(whitespace, "a.md", "a \n"),
            ["a.md:1: white space at the end of the line"]
        );
        assert!(findings_of(whitespace, "a.md", "a\n\n  b\n").is_empty());
    }

    #[test]
    fn letters_beyond_ascii_are_found() {
        assert_eq!(findings_of(ascii, "a.rs", "x\n\u{e9}"), ["a.rs:2: '\u{e9}' is not ASCII"]);
        assert!(findings_of(ascii, "a.rs", "plain").is_empty());
    }

    #[test]
    fn a_missing_head_is_found() {
        assert_eq!(findings_of(head, "a.rs", "use std::io;").len(), 1);
        assert!(findings_of(head, "a.rs", "//! Things.\n").is_empty());
    }

    #[test]
    fn the_line_after_the_last_allowed_one_is_found() {
        assert!(findings_of(length, "a.rs", &"x\n".repeat(600)).is_empty());
        assert_eq!(findings_of(length, "a.rs", &"x\n".repeat(601)).len(), 1);
    }

    #[test]
    fn unsafe_code_is_found_outside_the_engine() {
        let code = "//! Head.\n// unsafe prose\nunsafe { f() }\n";
        assert_eq!(
            findings_of(unsafe_code, "crates/qemu/src/vm.rs", code),
            ["crates/qemu/src/vm.rs:3: unsafe code outside the engine"]
        );
        assert!(findings_of(unsafe_code, "crates/engine/src/ring.rs", code).is_empty());
        assert!(findings_of(unsafe_code, "a.rs", "#![forbid(unsafe_code)]").is_empty());
    }

    #[test]
    fn files_made_by_name_are_found_outside_tests() {
        let code = concat!("let f = File::", "create(path)?;\n");
        assert_eq!(findings_of(published_files, "crates/vmfile/src/save.rs", code).len(), 1);
        assert!(findings_of(published_files, "crates/cli/tests/save.rs", code).is_empty());
        let test = format!("#[cfg(test)]\nmod tests {{\n{code}}}");
        assert!(findings_of(published_files, "crates/vmfile/src/save.rs", &test).is_empty());
    }
}
