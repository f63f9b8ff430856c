//! docs/guide.md: its commands, in their order, with a real guest.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, TestResult, requires};

use crate::guests::{directory, prepare};
use crate::run::{Said, program};

const GUIDE: &str = include_str!("../../../../docs/guide.md");

/// Returns the blocks of the guide that a shell runs.
fn blocks() -> Vec<&'static str> {
    let blocks = GUIDE.split("```sh\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap_or_default()).collect()
}

/// Runs a block as the reader would, in `directory`, with the reader's variables and arguments.
fn run(
    block: &str,
    directory: &Path,
    variables: &[(&str, String)],
    arguments: &[OsString],
) -> TestResult<Said> {
    let programs = program().parent().ok_or("a directory")?.display().to_string();
    let path = std::env::var("PATH")?;
    let mut command = Command::new("sh");
    command.args(["-e", "-c", block, "sh"]).args(arguments).current_dir(directory);
    command.env("PATH", format!("{programs}:{path}"));
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    Ok(command.output()?.into())
}

/// Does what the guide says with such a guest.
fn follow(config: &GuestConfig, qemu: &Qemu) -> TestResult {
    let directory = directory()?;
    let template = config.boot_to(qemu, 1)?;
    let (prepared, _end) = prepare(config, qemu)?;
    let variables = [
        ("TEMPLATE", template.qmp_path().display().to_string()),
        ("VM", prepared.qmp_path().display().to_string()),
    ];
    let blocks = blocks();
    assert_eq!(blocks.len(), 9, "{blocks:?}");
    for block in blocks {
        let said = run(block, directory.path(), &variables, &prepared.command_line())?;
        said.assert(0, &[]);
    }
    // Everything that was made is sound, and the last file needs no other.
    for file in ["template", "one", "two", "branch", "whole"] {
        let file = directory.path().join(format!("{file}.vmf"));
        crate::run::vmfile([Path::new("check"), &file]).assert(0, &["ok"]);
    }
    fs::remove_file(directory.path().join("template.vmf"))?;
    let whole = directory.path().join("whole.vmf");
    crate::run::vmfile([Path::new("check"), &whole]).assert(0, &["ok"]);
    let branch = directory.path().join("branch.vmf");
    crate::run::vmfile([Path::new("check"), &branch]).assert(4, &["template.vmf", "id"]);
    crate::run::vmfile([Path::new("info"), &branch]).assert(0, &["thin", "template.vmf"]);
    Ok(())
}

#[test]
fn the_guide_does_what_it_says() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    follow(&Guest::boot_sector(Ram::private(128)).seed(81).data_share(4), &qemu)
}

/// The checkpoint of a clone with a disk could not be restored as the guide said.
#[test]
fn the_guide_does_what_it_says_with_a_disk() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    follow(&Guest::linux(Ram::private(256)).disk(16).busy(), &qemu)
}
