//! `cargo xtask chaos`: ends programs or the disk's power at random moments, lets system calls and disks fail, disturbs monitors, or
//! compares saves, more often than a test run has time for.

use std::error::Error;
use std::process::Command;

use crate::reliability::add_to_record;
use crate::reliability::record::CHAOS;
use crate::test::outcome::Outcome;
use crate::test::reader::Shown;
use crate::workspace::Workspace;

/// What is ended, the test that does it in its package and program, and the variable that says how often.
const MODES: [(&str, [&str; 3], &str); 8] = [
    ("vmfile", ["vmfile-cli", "program", "kills::"], "VMFILE_KILLS"),
    ("qemu", ["vmfile-cli", "program", "qemu_ends::"], "VMFILE_MOMENTS"),
    ("calls", ["vmfile-cli", "program", "calls::"], "VMFILE_FAULTS"),
    ("monitor", ["vmfile-cli", "program", "broken_monitor::"], "VMFILE_CASES"),
    ("storage", ["vmfile-cli", "program", "failing_disk::"], "VMFILE_CASES"),
    ("saves", ["vmfile-cli", "program", "one_moment::"], "VMFILE_SAVES"),
    ("rounds", ["vmfile-testing", "rounds", "again_and_again"], "VMFILE_ROUNDS"),
    ("power", ["vmfile-testing", "power", "any_moment"], "VMFILE_CUTS"),
];

/// How often the program is ended if the user does not say.
const MOMENTS: &str = "300";

/// Runs the test of a mode; its seed is printed and can be given again.
pub(crate) fn run(workspace: &Workspace, rest: &[String]) -> Result<(), Box<dyn Error>> {
    let usage = "usage: cargo xtask chaos vmfile|qemu|calls|monitor|storage|saves|power|rounds [MOMENTS [SEED]]";
    let (mode, numbers) = rest.split_first().ok_or(usage)?;
    let (_, [package, program, test], variable) =
        MODES.iter().find(|(name, ..)| name == mode).ok_or(usage)?;
    let mut command = Command::new("cargo");
    command.current_dir(workspace.root());
    command.args(["test", "-p", package, "--test", program, "--", "--nocapture"]);
    command.args(["--test-threads=1", test]);
    command.env(variable, numbers.first().map_or(MOMENTS, String::as_str));
    if let Some(seed) = numbers.get(1) {
        command.env("VMFILE_SEED", seed);
    }
    let name = format!("{} {program}", package.trim_start_matches("vmfile-"));
    let mut outcome = Outcome::default();
    let result = outcome.run_shown(&name, &mut command, Shown::AtOnce);
    outcome.print_cases_and_skipped();
    let words = format!("{CHAOS}{}", rest.join(" "));
    add_to_record(workspace, &words, outcome.tests, false)?;
    result
}
