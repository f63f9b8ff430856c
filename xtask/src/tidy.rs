//! `cargo xtask tidy`: checks what no compiler checks.
//!
//! A rule is a function from a file's path and text, or from those of all files, to findings. All
//! rules run over all files, so that one run shows everything that is to be done.

mod circles;
mod documents;
mod manifests;
mod source;
mod words;

use std::error::Error;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use crate::reliability::names;
use crate::workspace::Workspace;

/// Directories that hold no sources of this project.
const SKIPPED: [&str; 4] = ["target", ".git", "corpus", "artifacts"];

/// One thing that a rule found.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    path: String,
    line: usize,
    reason: String,
}

impl Finding {
    fn new(path: &str, line: usize, reason: impl Into<String>) -> Finding {
        Finding { path: path.to_owned(), line, reason: reason.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.reason)
    }
}

/// Checks the whole repository.
pub(crate) fn run(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    let mut files = Vec::new();
    collect(workspace.root(), "", &mut files)?;
    files.sort();
    let mut findings = Vec::new();
    let mut texts = Vec::new();
    for path in &files {
        let text = fs::read_to_string(workspace.root().join(path))
            .map_err(|error| format!("{path}: {error}"))?;
        check(workspace.root(), path, &text, &mut findings);
        texts.push((path.as_str(), text));
    }
    let all: Vec<(&str, &str)> = texts.iter().map(|(path, text)| (*path, text.as_str())).collect();
    circles::circles(&all, &mut findings);
    tests_of_promises(&all, &mut findings);
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => Ok(()),
        count => Err(format!("{count} findings in {} files", files.len()).into()),
    }
}

/// Every test that docs/reliability.md names exists, as far as its name shows.
fn tests_of_promises(files: &[(&str, &str)], findings: &mut Vec<Finding>) {
    for (path, page) in files.iter().filter(|(path, _)| *path == names::PAGE) {
        if names::rows(page).next().is_none() {
            findings.push(Finding::new(path, 1, "no table of promises"));
        }
        for row in names::rows(page) {
            let wrong = names::wrong_in(&row, files);
            findings.extend(wrong.into_iter().map(|reason| Finding::new(path, row.line, reason)));
        }
    }
}

fn check(root: &Path, path: &str, text: &str, findings: &mut Vec<Finding>) {
    source::whitespace(path, text, findings);
    words::glossary(path, text, findings);
    match extension(path) {
        "rs" => {
            source::ascii(path, text, findings);
            source::head(path, text, findings);
            source::length(path, text, findings);
            source::unsafe_code(path, text, findings);
            source::published_files(path, text, findings);
            words::code(path, text, findings);
            words::engine(path, text, findings);
        }
        "toml" => {
            source::ascii(path, text, findings);
            manifests::walls(path, text, findings);
        }
        "md" => {
            documents::title(path, text, findings);
            documents::links(root, path, text, findings);
            documents::named_paths(root, path, text, findings);
        }
        _ => {
            source::ascii(path, text, findings);
            source::length(path, text, findings);
        }
    }
}

/// Collects the files that have rules: Rust, TOML, Markdown and assembly.
fn collect(root: &Path, directory: &str, files: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(directory))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if directory.is_empty() { name.clone() } else { format!("{directory}/{name}") };
        if entry.file_type()?.is_dir() {
            if !SKIPPED.contains(&name.as_str()) {
                collect(root, &path, files)?;
            }
        } else if matches!(extension(&path), "rs" | "toml" | "md" | "s") {
            files.push(path);
        }
    }
    Ok(())
}

fn extension(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(_name, extension)| extension)
}

/// Returns the lines of a file with their numbers, from 1.
fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.split('\n'))
}

/// Finds `word` in `line` where neither neighbor is a letter, a digit or `_`.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(start, _)| {
        let before = line[..start].chars().next_back();
        let after = line[start + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

/// Runs one rule over one file, for the rules' tests.
#[cfg(test)]
fn findings_of(
    rule: impl Fn(&str, &str, &mut Vec<Finding>),
    path: &str,
    text: &str,
) -> Vec<String> {
    let mut findings = Vec::new();
    rule(path, text, &mut findings);
    findings.iter().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_ends_where_letters_end() {
        assert!(has_word("the section.", "section"));
        assert!(!has_word("intersection", "section"));
        assert!(!has_word("section_count", "section"));
        assert!(has_word("sections section", "section"));
    }

    #[test]
    fn a_finding_is_printed_so_that_editors_find_the_place() {
        assert_eq!(Finding::new("a.rs", 3, "why").to_string(), "a.rs:3: why");
    }
}
