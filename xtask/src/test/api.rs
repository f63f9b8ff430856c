//! Compares the public API of each crate of the library with the recorded list.
//!
//! A commit that changes the API also changes the list, and its author decides whether that breaks
//! callers.
//!
//! The list comes from rustdoc's JSON, whose form changes with the compiler. With another minor
//! version than the recorded one, the comparison is skipped, and the outcome lists it.

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

/// The directory of the lists.
const DIRECTORY: &str = "docs/api";

/// The variable that is set to record the lists instead of comparing them.
const BLESS: &str = "VMFILE_BLESS";

/// Compares the API of each crate with the recorded list, or records it.
pub(super) fn run(workspace: &Workspace, outcome: &mut Outcome) -> Result<(), Box<dyn Error>> {
    let directory = workspace.root().join(DIRECTORY);
    let version = minor_version(&output(Command::new("rustc").arg("--version"))?);
    let version_path = directory.join("rustc.txt");
    let is_blessed = std::env::var_os(BLESS).is_some();
    let recorded = fs::read_to_string(&version_path).unwrap_or_default();
    if !is_blessed && recorded.trim() != version {
        let reason = format!("recorded with rustc {}, this is {version}", recorded.trim());
        outcome.skip_step("api", &reason);
        return Ok(());
    }
    let mut changed = Vec::new();
    for name in CRATES {
        let (path, shown) = (directory.join(format!("{name}.txt")), api_of(workspace, name)?);
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
        say(&format!("the public API of {} crates is the recorded one", CRATES.len()));
        return Ok(());
    }
    let names = changed.join(", ");
    Err(format!("{names}: the public API changed; {BLESS}=1 cargo xtask test api records it")
        .into())
}

/// Returns the API of a crate: a line for each item, without blanket, auto-trait and derived
/// implementations.
fn api_of(workspace: &Workspace, name: &str) -> Result<String, Box<dyn Error>> {
    // Uses a directory of its own, because a build with RUSTC_BOOTSTRAP differs from that of the
    // other steps.
    let directory = workspace.target().join("api");
    let arguments = ["rustdoc", "--quiet", "--lib", "-p", name, "--"];
    let json = ["-Zunstable-options", "--output-format", "json", "--cap-lints", "allow"];
    // The form of the JSON is unstable; public-api fails if it does not know it.
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

/// Returns the removed lines, each after `- `, and the new ones, each after `+ `.
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
