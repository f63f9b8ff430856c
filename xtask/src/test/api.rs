//! The public face of the library: a list of what each crate shows, beside the list that was recorded.
//!
//! A change of the face changes the list, in the same commit: its author decides whether it breaks callers.
//!
//! The list comes from rustdoc's JSON, whose form changes with the compiler: with another minor version
//! than the recorded one nothing is compared, and that is said.

use std::error::Error;
use std::fs;
use std::process::Command;

use public_api::Builder;

use super::cargo;
use super::outcome::Outcome;
use crate::command::{output, run as run_command, say};
use crate::workspace::Workspace;

/// The crates of the library.
const CRATES: [&str; 6] =
    ["vmfile", "vmfile-engine", "vmfile-format", "vmfile-pages", "vmfile-qemu", "vmfile-stream"];

/// Where the lists are, in the repository.
const DIRECTORY: &str = "docs/api";

/// Whether to record what is shown, not to judge it.
const BLESS: &str = "VMFILE_BLESS";

/// Compares what each crate shows with what was recorded, or records it.
pub(super) fn run(workspace: &Workspace, outcome: &mut Outcome) -> Result<(), Box<dyn Error>> {
    let directory = workspace.root().join(DIRECTORY);
    let version = minor_version(&output(Command::new("rustc").arg("--version"))?);
    let version_path = directory.join("rustc.txt");
    let is_blessed = std::env::var_os(BLESS).is_some();
    let recorded = fs::read_to_string(&version_path).unwrap_or_default();
    if !is_blessed && recorded.trim() != version {
        let reason = format!("recorded with rustc {}, this is {version}", recorded.trim());
        outcome.skip("api", "the public face of the library", &reason);
        return Ok(());
    }
    let mut changed = Vec::new();
    for name in CRATES {
        let (path, shown) = (directory.join(format!("{name}.txt")), face(workspace, name)?);
        if is_blessed {
            fs::create_dir_all(&directory)?;
            fs::write(&path, &shown)?;
            continue;
        }
        let before = fs::read_to_string(&path).unwrap_or_default();
        let differences = differences(&before, &shown);
        if !differences.is_empty() {
            changed.push(name);
        }
        differences.iter().for_each(|line| println!("{name}: {line}"));
    }
    if is_blessed {
        fs::write(version_path, format!("{version}\n"))?;
    }
    if changed.is_empty() {
        say(&format!("the public face of {} crates is the recorded one", CRATES.len()));
        return Ok(());
    }
    let names = changed.join(", ");
    Err(format!("{names}: the public face changed; {BLESS}=1 cargo xtask test api records it")
        .into())
}

/// Lists what a crate shows: a line for each item, without what every type has.
fn face(workspace: &Workspace, name: &str) -> Result<String, Box<dyn Error>> {
    // A directory of its own: what is built with RUSTC_BOOTSTRAP is not what the other steps build.
    let directory = workspace.target().join("api");
    let arguments = ["rustdoc", "--quiet", "--lib", "-p", name, "--"];
    let json = ["-Zunstable-options", "--output-format", "json", "--cap-lints", "allow"];
    // The form of the JSON is unstable; public-api says if it is another than it knows.
    let mut rustdoc = cargo(workspace);
    rustdoc.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", &directory);
    run_command(rustdoc.args(arguments).args(json))?;
    let file = directory.join("doc").join(format!("{}.json", name.replace('-', "_")));
    let api = Builder::from_rustdoc_json(file)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build()?;
    Ok(api.to_string())
}

/// Returns `1.95` of `rustc 1.95.0 (59807616e 2026-04-14)`.
fn minor_version(said: &str) -> String {
    let number = said.split_whitespace().nth(1).unwrap_or_default();
    number.rsplit_once('.').map_or(number, |(minor, _patch)| minor).to_owned()
}

/// Returns the lines that are gone, after `-`, and those that are new, after `+`.
fn differences(before: &str, now: &str) -> Vec<String> {
    let gone = before.lines().filter(|line| !now.lines().any(|other| other == *line));
    let new = now.lines().filter(|line| !before.lines().any(|other| other == *line));
    gone.map(|line| format!("- {line}")).chain(new.map(|line| format!("+ {line}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_and_what_is_new_is_said() {
        assert_eq!(differences("a\nb\n", "b\nc\n"), ["- a", "+ c"]);
        assert!(differences("a\n", "a\n").is_empty());
    }

    #[test]
    fn the_patch_version_does_not_count() {
        assert_eq!(minor_version("rustc 1.95.0 (59807616e 2026-04-14)"), "1.95");
    }
}
