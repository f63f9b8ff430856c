//! The program's help, and the document that repeats it.

use std::fs;
use std::path::{Path, PathBuf};

use vmfile_testing::TestResult;

use crate::run::vmfile;

const VERBS: [&str; 9] =
    ["save", "restore", "receive", "send", "convert", "info", "check", "bench", "list"];

const BEGIN: &str = "<!-- The help of the program; `VMFILE_BLESS=1 cargo test` writes it. -->\n";

/// Returns the chapter of docs/cli.md that is the program's own help.
fn help_chapter() -> String {
    let mut text = String::new();
    for verb in [""].into_iter().chain(VERBS) {
        let arguments: Vec<&str> = [verb, "--help"].into_iter().filter(|s| !s.is_empty()).collect();
        let said = vmfile(&arguments);
        said.assert(0, &[]);
        assert_eq!(said.stderr, "");
        let help: Vec<&str> = said.stdout.lines().map(str::trim_end).collect();
        let line = arguments.join(" ");
        text.push_str(&format!("\n```text\n$ vmfile {line}\n{}\n```\n", help.join("\n")));
    }
    text
}

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md")
}

/// Returns the fields that the first table of a chapter of docs/cli.md names.
pub(crate) fn fields_of(chapter: &str) -> Vec<String> {
    let text = fs::read_to_string(document()).expect("docs/cli.md");
    let lines = text.lines().skip_while(|line| *line != format!("### {chapter}"));
    let rows = lines.skip_while(|line| !line.starts_with("|---")).skip(1);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let first = rows.filter_map(|row| Some(row.split('|').nth(1)?.to_owned()));
    let names = first.flat_map(|cell| {
        cell.split(',').map(|name| name.trim().trim_matches('`').to_owned()).collect::<Vec<_>>()
    });
    names.collect()
}

#[test]
fn no_verb_is_left_out() {
    let help = vmfile(["--help"]).stdout;
    let list = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = list.map_while(|line| line.strip_prefix("  ")?.split(' ').next());
    let names: Vec<&str> = names.filter(|name| *name != "help").collect();
    assert_eq!(names, VERBS);
}

#[test]
fn the_document_holds_the_whole_help_of_every_verb() -> TestResult {
    let text = fs::read_to_string(document())?;
    let (before, written) = text.split_once(BEGIN).ok_or("no chapter of help")?;
    let help = help_chapter();
    if std::env::var_os("VMFILE_BLESS").is_some() {
        fs::write(document(), format!("{before}{BEGIN}{help}"))?;
        return Ok(());
    }
    assert!(written == help, "docs/cli.md differs from the program, whose help is:\n{help}");
    Ok(())
}

#[test]
fn the_document_names_every_status() -> TestResult {
    let text = fs::read_to_string(document())?;
    for status in ["0", "1", "2", "3", "4", "5", "6", "7", "129", "130", "143"] {
        assert!(text.contains(&format!("| {status} |")), "{status}");
    }
    Ok(())
}

#[test]
fn every_verb_is_listed_and_has_examples() {
    let help = vmfile(["--help"]);
    for verb in VERBS {
        help.assert(0, &[&format!("\n  {verb} ")]);
        vmfile([verb, "--help"]).assert(0, &["Examples:", &format!("vmfile {verb}")]);
        vmfile([verb, "-h"]).assert(0, &["Usage: vmfile"]);
    }
}

#[test]
fn the_version_is_that_of_the_package() {
    let said = vmfile(["--version"]);
    assert_eq!(said.stdout, concat!("vmfile ", env!("CARGO_PKG_VERSION"), "\n"));
    assert_eq!(said.code, Some(0));
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_is_wrong() {
    vmfile([""; 0]).assert(2, &["Usage: vmfile"]);
    vmfile(["sav"]).assert(2, &["unrecognized subcommand 'sav'", "'save'"]);
    vmfile(["save", "vm"]).assert(2, &["<FILE>"]);
    vmfile(["save", "vm", "file", "--after", "never"]).assert(2, &["quit, resume, pause"]);
    vmfile(["save", "vm", "file", "--jobs", "0"]).assert(2, &["a number from 1 to 16"]);
    vmfile(["save", "vm", "file", "--jobs", "17"]).assert(2, &["a number from 1 to 16"]);
    vmfile(["check", "file", "--direct-io", "maybe"]).assert(2, &["required, preferred, off"]);
    vmfile(["send", "f", "--channels", "2"]).assert(2, &["--connect"]);
    vmfile(["send", "f", "--connect", "s", "--channels", "17"]).assert(2, &["17 is not in 1..=16"]);
    vmfile(["send", "f", "--connect", "s", "--fd", "1"]).assert(2, &["cannot be used with"]);
    vmfile(["send", "f", "--connect", "tcp:host:1"]).assert(2, &["no address of a Unix socket"]);
    vmfile(["info", "file", "--json", "--quiet"]).assert(2, &["cannot be used with"]);
    vmfile(["info", "file:vm,offset=five"]).assert(2, &["\"five\" is no size"]);
    vmfile(["restore", "f", "--qmp", "s", "--", "qemu"]).assert(2, &["cannot be used with"]);
    vmfile(["restore", "f", "--qmp", "s", "--foreground"]).assert(2, &["cannot be used with"]);
}

#[test]
fn wrong_usage_is_one_json_object_where_that_was_asked_for() -> TestResult {
    let said = vmfile(["save", "--json", "vm"]);
    said.assert(2, &[]);
    let error = said.json_error()?;
    assert_eq!((&error["code"], &error["kind"]), (&2.into(), &"usage".into()));
    assert!(error["message"].as_str().is_some_and(|text| text.contains("<FILE>")), "{error}");
    assert_eq!(error["hint"], "--help says more");
    // Words after `--` are QEMU's command line.
    let said = vmfile(["restore", "--bad", "--", "--json"]);
    said.assert(2, &["error: unexpected argument '--bad'"]);
    Ok(())
}
