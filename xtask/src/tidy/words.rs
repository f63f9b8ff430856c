//! Rules about words: the glossary's, the engine's, and what code must not contain.

use super::{Finding, has_word, numbered};

/// Words that this project does not use, each with the one to use. Only words that cannot mean
/// anything else here.
const GLOSSARY: [(&str, &str); 10] = [
    ("page number", "page index"),
    ("page frame", "page"),
    ("paddr", "guest physical address"),
    ("vaddr", "host virtual address"),
    ("snapshotting", "saving"),
    ("snapshotted", "saved"),
    ("behaviour", "behavior"),
    ("neighbour", "neighbor"),
    ("initialise", "initialize"),
    ("serialise", "serialize"),
];

/// What code must not contain, and why.
const CODE: [(&str, &str); 7] = [
    (concat!("todo", "!("), "unfinished code"),
    (concat!("unimplemented", "!("), "unfinished code"),
    (concat!("dbg", "!("), "left over from debugging"),
    (concat!("#[", "ignore"), "a test that cannot run prints `skipped: ` and its reason"),
    (concat!("#[", "allow("), "use `#[expect(..., reason = \"...\")]`"),
    (concat!("#![", "allow("), "use `#![expect(..., reason = \"...\")]`"),
    (concat!("error(\"", "failed to"), "an error states facts: no \"failed to\""),
];

/// Words that must not occur in the engine, which knows only bytes, pages and descriptors.
const NOT_IN_THE_ENGINE: [&str; 6] =
    ["QEMU", "qemu", "section", "sections", "RAM block", "ram block"];

/// The rules themselves, which must name these words.
const RULES: &str = "xtask/src/tidy/";

/// One thing, one word.
pub(super) fn glossary(path: &str, text: &str, findings: &mut Vec<Finding>) {
    // The glossary itself names the words that are not used.
    if path.starts_with(RULES) || path == "docs/glossary.md" {
        return;
    }
    for (number, line) in numbered(text) {
        let lower = line.to_ascii_lowercase();
        for (word, ours) in GLOSSARY {
            if has_word(&lower, word) {
                findings.push(Finding::new(path, number, format!("we say {ours:?} for {word:?}")));
            }
        }
    }
}

/// Nothing unfinished, nothing silenced without a reason.
pub(super) fn code(path: &str, text: &str, findings: &mut Vec<Finding>) {
    for (number, line) in numbered(text) {
        for (needle, why) in CODE {
            if line.contains(needle) {
                findings.push(Finding::new(path, number, format!("`{needle}`: {why}")));
            }
        }
    }
}

/// The engine knows bytes, not their meaning.
pub(super) fn engine(path: &str, text: &str, findings: &mut Vec<Finding>) {
    if !path.starts_with("crates/engine/src/") {
        return;
    }
    for (number, line) in numbered(text) {
        for word in NOT_IN_THE_ENGINE {
            if has_word(line, word) {
                let reason = format!("the engine knows bytes and pages, but no {word:?}");
                findings.push(Finding::new(path, number, reason));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::findings_of;

    #[test]
    fn words_of_the_wrong_column_are_found() {
        assert_eq!(
            findings_of(glossary, "docs/a.md", "# A\nThe Page Number counts.\n"),
            ["docs/a.md:2: we say \"page index\" for \"page number\""]
        );
        assert!(findings_of(glossary, "docs/a.md", "The page index counts.").is_empty());
        assert!(findings_of(glossary, "docs/glossary.md", "page number").is_empty());
    }

    #[test]
    fn unfinished_and_silenced_code_is_found() {
        for (needle, _why) in CODE {
            assert_eq!(findings_of(code, "a.rs", &format!("x {needle} y")).len(), 1, "{needle}");
        }
        assert!(findings_of(code, "a.rs", "#[expect(lint, reason = \"why\")]").is_empty());
    }

    #[test]
    fn meaning_is_found_in_the_engine_only() {
        let text = "// as QEMU does\nintersection(a, b)\n";
        assert_eq!(
            findings_of(engine, "crates/engine/src/a.rs", text),
            ["crates/engine/src/a.rs:1: the engine knows bytes and pages, but no \"QEMU\""]
        );
        assert!(findings_of(engine, "crates/qemu/src/a.rs", text).is_empty());
    }
}
