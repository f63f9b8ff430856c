//! Rules about documents: a title each, links that lead somewhere, paths that exist.

use std::path::Path;

use super::{Finding, numbered};

/// The document whose paths in backticks must exist.
const ARCHITECTURE: &str = "docs/architecture.md";

/// How a path in this repository begins.
const TOP_DIRECTORIES: [&str; 7] =
    ["crates/", "docs/", "testing/", "xtask/", "fuzz/", "benches/", ".ci/"];

/// Every document has exactly one title.
pub(super) fn title(path: &str, text: &str, findings: &mut Vec<Finding>) {
    let titles: Vec<usize> =
        prose(text).filter(|(_, line)| line.starts_with("# ")).map(|(number, _)| number).collect();
    match *titles {
        [_] => {}
        [] => findings.push(Finding::new(path, 1, "the document has no `# ` title")),
        [_, second, ..] => findings.push(Finding::new(path, second, "a second `# ` title")),
    }
}

/// Links to files of this repository lead to files that exist.
pub(super) fn links(root: &Path, path: &str, text: &str, findings: &mut Vec<Finding>) {
    let directory = Path::new(path).parent().unwrap_or(Path::new(""));
    for (number, line) in prose(text) {
        for target in link_targets(line) {
            let file = target.split('#').next().unwrap_or_default();
            let is_elsewhere = file.contains(':') || file.is_empty();
            if !is_elsewhere && !root.join(directory).join(file).exists() {
                findings.push(Finding::new(path, number, format!("the link to {file} is dead")));
            }
        }
    }
}

/// Paths that the architecture names exist.
pub(super) fn named_paths(root: &Path, path: &str, text: &str, findings: &mut Vec<Finding>) {
    if path != ARCHITECTURE {
        return;
    }
    for (number, line) in prose(text) {
        for name in line.split('`').skip(1).step_by(2) {
            let is_path = TOP_DIRECTORIES.iter().any(|top| name.starts_with(top))
                && !name.contains([' ', '{', '*', '<']);
            if is_path && !root.join(name).exists() {
                findings.push(Finding::new(path, number, format!("{name} does not exist")));
            }
        }
    }
}

/// Returns the lines outside of code blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    numbered(text).filter(move |(_, line)| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !in_code && !is_fence
    })
}

/// Returns the targets of the links in a line, `[text](target)` and `[name]: target`.
fn link_targets(line: &str) -> Vec<&str> {
    let mut targets: Vec<&str> =
        line.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next()).collect();
    if line.starts_with('[') {
        targets.extend(line.split_once("]: ").map(|(_name, target)| target.trim()));
    }
    targets
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tidy::findings_of;

    #[test]
    fn a_document_has_one_title() {
        assert!(findings_of(title, "a.md", "# A\n\n```\n# a comment\n```\n## B\n").is_empty());
        assert_eq!(findings_of(title, "a.md", "# A\n# B\n"), ["a.md:2: a second `# ` title"]);
        assert_eq!(findings_of(title, "a.md", "A\n").len(), 1);
    }

    #[test]
    fn dead_links_and_dead_paths_are_found() {
        let root = std::env::temp_dir().join(format!("vmfile-tidy-{}", std::process::id()));
        fs::create_dir_all(root.join("docs")).unwrap();
        fs::write(root.join("docs/format.md"), "# Format\n").unwrap();
        let text = "[a](format.md#limits) [b](gone.md) [c](https://example.org/x) [d](#here)\n\
                    `docs/format.md` `docs/gone.md` `pread/pwrite` `crates/{a,b}`\n";
        let dead_links = findings_of(|p, t, f| links(&root, p, t, f), "docs/a.md", text);
        let dead_paths = findings_of(|p, t, f| named_paths(&root, p, t, f), ARCHITECTURE, text);
        let elsewhere = findings_of(|p, t, f| named_paths(&root, p, t, f), "docs/a.md", text);
        fs::remove_dir_all(&root).unwrap();

        assert_eq!(dead_links, ["docs/a.md:1: the link to gone.md is dead"]);
        assert_eq!(dead_paths, ["docs/architecture.md:2: docs/gone.md does not exist"]);
        assert!(elsewhere.is_empty());
    }
}
