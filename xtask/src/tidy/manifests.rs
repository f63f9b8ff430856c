//! Checks the walls between the crates: which crate may depend on which.

use super::{Finding, numbered};

/// The crates of the library by directory, each with the crates that it may depend on.
const WALLS: [(&str, &[&str]); 6] = [
    ("crates/format/", &[]),
    ("crates/engine/", &[]),
    ("crates/qemu/", &[]),
    ("crates/pages/", &["vmfile-engine", "vmfile-format"]),
    ("crates/stream/", &["vmfile-engine", "vmfile-format", "vmfile-pages"]),
    (
        "crates/vmfile/",
        &["vmfile-engine", "vmfile-format", "vmfile-pages", "vmfile-qemu", "vmfile-stream"],
    ),
];

/// The packages that may depend on the library.
const ABOVE_THE_LIBRARY: [&str; 4] = ["crates/cli/", "testing/Cargo.toml", "xtask/", "fuzz/"];

/// A crate of the library depends on those below it only, and only what is above the library
/// depends on the library.
pub(super) fn walls(path: &str, text: &str, findings: &mut Vec<Finding>) {
    if path == "Cargo.toml" || !path.ends_with("/Cargo.toml") {
        return;
    }
    let wall = WALLS.iter().find(|(directory, _)| path.starts_with(directory));
    let is_above = ABOVE_THE_LIBRARY.iter().any(|start| path.starts_with(start));
    for (number, line) in numbered(text) {
        let Some(dependency) = dependency(line) else { continue };
        if let Some((directory, below)) = wall {
            if dependency.starts_with("vmfile-") && !below.contains(&dependency) {
                let reason = format!("{directory} must not know {dependency}");
                findings.push(Finding::new(path, number, reason));
            }
        }
        if dependency == "vmfile" && !is_above {
            findings.push(Finding::new(path, number, "only what is above it may know vmfile"));
        }
    }
}

/// Returns the name that a line such as `vmfile-qemu.workspace = true` or `[dependencies.vmfile]`
/// begins with.
fn dependency(line: &str) -> Option<&str> {
    let line = line.trim();
    let key = match line.strip_prefix('[') {
        Some(table) => table.trim_end_matches(']').rsplit_once("dependencies.")?.1,
        None => line.split_once('=')?.0.trim(),
    };
    key.split('.').next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::findings_of;

    #[test]
    fn a_crate_that_knows_another_than_those_below_it_is_found() {
        let manifest =
            "[package]\nname = \"vmfile-qemu\"\n[dependencies]\nvmfile-format.workspace = true\n";
        assert_eq!(
            findings_of(walls, "crates/qemu/Cargo.toml", manifest),
            ["crates/qemu/Cargo.toml:4: crates/qemu/ must not know vmfile-format"]
        );
        assert!(findings_of(walls, "crates/pages/Cargo.toml", manifest).is_empty());
        let manifest = "[dependencies]\nvmfile-qemu.workspace = true\n";
        assert_eq!(findings_of(walls, "crates/pages/Cargo.toml", manifest).len(), 1);
        assert!(findings_of(walls, "crates/vmfile/Cargo.toml", manifest).is_empty());
        assert_eq!(
            findings_of(walls, "crates/format/Cargo.toml", "[dev-dependencies.vmfile-engine]")
                .len(),
            1
        );
    }

    #[test]
    fn only_what_is_above_the_library_may_know_it() {
        let manifest = "[dependencies]\nvmfile = { workspace = true }\n";
        assert_eq!(findings_of(walls, "crates/engine/Cargo.toml", manifest).len(), 1);
        assert_eq!(findings_of(walls, "testing/guest/linux/Cargo.toml", manifest).len(), 1);
        assert!(findings_of(walls, "crates/cli/Cargo.toml", manifest).is_empty());
        assert!(findings_of(walls, "testing/Cargo.toml", manifest).is_empty());
    }
}
