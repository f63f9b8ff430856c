//! Compares the number of instructions of the hot loops with the recorded numbers.
//!
//! Time depends on what else the machine does; the number of instructions does not. callgrind
//! counts them on an emulated processor, which is the same everywhere except for vector
//! instructions that the real one lacks. The build is for any processor of the target. So the
//! figures depend only on the compiler, whose version is recorded with them.

use std::error::Error;
use std::fmt;
use std::fs;
use std::process::Command;

use super::outcome::Outcome;
use crate::apt::find_in_path;
use crate::command::{output, run as run_command, say};
use crate::workspace::Workspace;

/// The file with the figures.
const FIGURES: &str = "xtask/loops.txt";

/// The package in `testing/loops`, and its program.
const PROGRAM: &str = "vmfile-loops";

/// The crate of [`PROGRAM`], in the names of functions for callgrind.
const CRATE: &str = "vmfile_loops";

/// The variable that is `1` to record the counts instead of judging them.
const BLESS: &str = "VMFILE_BLESS";

/// The tolerance of a loop that was not recorded before. Another release of the compiler changes a
/// loop by less; a lost vectorization or work done twice changes it by more.
const TOLERANCE_PERCENT: f64 = 15.0;

/// The tolerance if the figures are of another minor version of the compiler: work done twice is
/// still found.
const OTHER_COMPILER_PERCENT: f64 = 95.0;

const HEAD: &str = "\
# Instructions of the hot loops: loop, instructions for each round, tolerance in percent, what a
# round is for. Written by `VMFILE_BLESS=1 cargo xtask test loops`, which keeps tolerances.
";

/// The figures of all loops.
#[derive(Debug, PartialEq)]
struct Figures {
    /// The compiler's version, such as `1.95.0`.
    rustc: String,
    loops: Vec<Figure>,
}

/// The instructions of a loop.
#[derive(Debug, Clone, PartialEq)]
struct Figure {
    name: String,
    /// Instructions for each round.
    instructions: f64,
    tolerance_percent: f64,
    /// What a round is for, such as `page of 4 KiB`.
    what: String,
}

/// A loop as the program lists it.
#[derive(Debug, PartialEq, Eq)]
struct Loop {
    name: String,
    function: String,
    rounds: u64,
    what: String,
}

/// Counts the instructions of all loops, and compares or records them.
pub(super) fn run(workspace: &Workspace, outcome: &mut Outcome) -> Result<(), Box<dyn Error>> {
    if !cfg!(target_arch = "x86_64") {
        outcome.skip_step("loops", "the figures are those of x86-64");
        return Ok(());
    }
    if !has_avx2() {
        outcome.skip_step("loops", "the figures are those of a processor with AVX2");
        return Ok(());
    }
    if find_in_path("valgrind").is_none() {
        return Err("no valgrind: `cargo xtask setup` installs it".into());
    }
    let found = count_all(workspace)?;
    let path = workspace.root().join(FIGURES);
    let text = fs::read_to_string(&path).map_err(|error| format!("{FIGURES}: {error}"))?;
    let recorded = Figures::parse(&text)?;
    if std::env::var_os(BLESS).is_some_and(|value| value == "1") {
        fs::write(&path, found.with_tolerances_of(&recorded).to_string())?;
        say(&format!("wrote {FIGURES}"));
        return Ok(());
    }
    let differences = found.differences(&recorded);
    if differences.is_empty() {
        return Ok(());
    }
    let compiler = found.other_compiler(&recorded).unwrap_or_default();
    Err(format!(
        "\n  {}\n{compiler}Find out which change did it. If the new figures are as they should be, \
         record them and say why:\n  {BLESS}=1 cargo xtask test loops",
        differences.join("\n  ")
    )
    .into())
}

/// Whether this processor, and so callgrind's, has the instructions that hash pages.
fn has_avx2() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains(" avx2 "))
}

fn count_all(workspace: &Workspace) -> Result<Figures, Box<dyn Error>> {
    let mut build = Command::new(env!("CARGO"));
    build.current_dir(workspace.root()).args(["build", "--quiet", "--release", "-p", PROGRAM]);
    // Removes flags for this machine's processor, which would change the figures.
    run_command(build.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS"))?;
    let program = workspace.target().join("release").join(PROGRAM);
    let mut loops = Vec::new();
    for line in output(&mut Command::new(&program))?.lines() {
        let Loop { name, function, rounds, what } = Loop::parse(line)?;
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--command-line-only=yes", "--tool=callgrind", "--log-fd=1"]);
        valgrind.arg("--callgrind-out-file=/dev/null");
        valgrind.arg(format!("--toggle-collect={CRATE}::{function}"));
        let total = collected(&output(valgrind.arg(&program).arg(&name))?)
            .ok_or_else(|| format!("{name}: callgrind counted nothing in {function}"))?;
        let instructions = total as f64 / rounds as f64;
        say(&format!("{name}: {instructions:.2} instructions for each {what}"));
        loops.push(Figure { name, instructions, tolerance_percent: TOLERANCE_PERCENT, what });
    }
    Ok(Figures { rustc: rustc(workspace)?, loops })
}

/// Returns the version of the compiler, such as `1.95.0`.
fn rustc(workspace: &Workspace) -> Result<String, Box<dyn Error>> {
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let text = output(command.current_dir(workspace.root()).arg("--version"))?;
    Ok(text.split(' ').nth(1).ok_or("rustc names no version")?.trim().to_owned())
}

/// Reads from callgrind's messages how many instructions it counted; `None` if there are none.
fn collected(messages: &str) -> Option<u64> {
    let (_, number) = messages.lines().find_map(|line| line.split_once("Collected : "))?;
    number.trim().parse().ok().filter(|&number| number > 0)
}

impl Loop {
    fn parse(line: &str) -> Result<Loop, String> {
        let fields: Vec<&str> = line.splitn(4, ' ').collect();
        match (&fields[..], fields.get(2).and_then(|rounds| rounds.parse().ok())) {
            (&[name, function, _, what], Some(rounds)) => {
                Ok(Loop { name: name.into(), function: function.into(), rounds, what: what.into() })
            }
            _ => Err(format!("{PROGRAM} lists {line:?}, not a loop")),
        }
    }
}

impl Figure {
    fn parse(line: &str) -> Option<Figure> {
        let fields: Vec<&str> = line.splitn(4, ' ').collect();
        let &[name, instructions, tolerance_percent, what] = &fields[..] else { return None };
        Some(Figure {
            name: name.to_owned(),
            instructions: instructions.parse().ok()?,
            tolerance_percent: tolerance_percent.parse().ok()?,
            what: what.to_owned(),
        })
    }

    /// Compares a loop with its recorded figure; `None` if it is within the tolerance.
    fn difference(&self, recorded: &Figure, tolerance: f64) -> Option<String> {
        let change_percent = (self.instructions / recorded.instructions - 1.0) * 100.0;
        if change_percent.abs() <= tolerance {
            return None;
        }
        let Figure { name, instructions, what, .. } = self;
        let expected = recorded.instructions;
        Some(format!(
            "{name}: {instructions:.2} instructions for each {what} found, {expected:.2} expected: \
             {change_percent:+.0} %, {tolerance} % tolerated"
        ))
    }
}

impl Figures {
    fn parse(text: &str) -> Result<Figures, String> {
        let mut figures = Figures { rustc: String::new(), loops: Vec::new() };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match (line.strip_prefix("rustc "), Figure::parse(line)) {
                (Some(rustc), _) => rustc.clone_into(&mut figures.rustc),
                (None, Some(figure)) => figures.loops.push(figure),
                (None, None) => return Err(format!("{FIGURES}: {line:?} is no figure")),
            }
        }
        Ok(figures)
    }

    fn of(&self, name: &str) -> Option<&Figure> {
        self.loops.iter().find(|figure| figure.name == name)
    }

    /// Returns a sentence about each loop that differs from its recorded figure. Faster loops are
    /// included: with a figure that is too high, a loop could become slow again unnoticed.
    fn differences(&self, recorded: &Figures) -> Vec<String> {
        let is_other = self.other_compiler(recorded).is_some();
        let tolerance = |figure: &Figure| {
            if is_other { OTHER_COMPILER_PERCENT } else { figure.tolerance_percent }
        };
        let mut differences: Vec<String> = Vec::new();
        for found in &self.loops {
            match recorded.of(&found.name) {
                Some(figure) => differences.extend(found.difference(figure, tolerance(figure))),
                None => differences.push(format!("{}: not recorded", found.name)),
            }
        }
        let gone = recorded.loops.iter().filter(|figure| self.of(&figure.name).is_none());
        differences.extend(gone.map(|figure| format!("{}: recorded, but gone", figure.name)));
        differences
    }

    /// Returns a hint if the figures are another compiler's. The patch version does not matter.
    fn other_compiler(&self, recorded: &Figures) -> Option<String> {
        let minor = |figures: &Figures| {
            figures.rustc.rsplit_once('.').map(|(minor, _patch)| minor.to_owned())
        };
        let (here, there) = (&self.rustc, &recorded.rustc);
        (minor(self) != minor(recorded)).then(|| {
            format!(
                "The figures are rustc {there}'s, this is rustc {here}: it may be the compiler.\n"
            )
        })
    }

    fn with_tolerances_of(mut self, recorded: &Figures) -> Figures {
        for figure in &mut self.loops {
            if let Some(recorded) = recorded.of(&figure.name) {
                figure.tolerance_percent = recorded.tolerance_percent;
            }
        }
        self
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEAD}rustc {}", self.rustc)?;
        for Figure { name, instructions, tolerance_percent, what } in &self.loops {
            writeln!(f, "{name} {instructions:.2} {tolerance_percent} {what}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(rustc: &str, loops: &[(&str, f64)]) -> Figures {
        let figure = |&(name, instructions): &(&str, f64)| Figure {
            name: name.to_owned(),
            instructions,
            tolerance_percent: 15.0,
            what: "page of 4 KiB".to_owned(),
        };
        Figures { rustc: rustc.to_owned(), loops: loops.iter().map(figure).collect() }
    }

    #[test]
    fn twice_the_work_and_half_the_work_are_found() {
        let recorded = figures("1.95.0", &[("a", 100.0), ("b", 100.0), ("c", 100.0)]);
        let found = figures("1.95.0", &[("a", 200.0), ("b", 50.0), ("c", 110.0)]);
        assert_eq!(
            found.differences(&recorded),
            [
                "a: 200.00 instructions for each page of 4 KiB found, 100.00 expected: +100 %, \
                 15 % tolerated",
                "b: 50.00 instructions for each page of 4 KiB found, 100.00 expected: -50 %, \
                 15 % tolerated"
            ]
        );
    }

    #[test]
    fn another_compiler_may_differ_but_not_do_the_work_twice() {
        let recorded = figures("1.95.0", &[("a", 100.0), ("b", 100.0)]);
        let found = figures("1.96.0", &[("a", 200.0), ("b", 30.0)]);
        assert_eq!(found.differences(&recorded).len(), 1);
    }

    #[test]
    fn loops_come_and_go_with_their_figures() {
        let (recorded, found) = (figures("1", &[("a", 1.0)]), figures("1", &[("b", 1.0)]));
        let expected = ["b: not recorded", "a: recorded, but gone"];
        assert_eq!(found.differences(&recorded), expected);
    }

    #[test]
    fn only_another_minor_version_is_another_compiler() {
        let recorded = figures("1.95.0", &[]);
        assert_eq!(figures("1.95.1", &[]).other_compiler(&recorded), None);
        assert!(figures("1.96.0", &[]).other_compiler(&recorded).is_some());
        assert!(figures("1.97.0-nightly", &[]).other_compiler(&recorded).is_some());
    }

    #[test]
    fn figures_are_read_as_they_were_written() {
        let written = figures("1.95.0", &[("a", 727.25), ("b", 1.5)]);
        assert_eq!(Figures::parse(&written.to_string()), Ok(written));
        assert!(Figures::parse("a 1.0\n").is_err());
    }

    #[test]
    fn new_figures_keep_their_tolerances() {
        let mut recorded = figures("1", &[("a", 1.0)]);
        recorded.loops[0].tolerance_percent = 5.0;
        let blessed = figures("2", &[("a", 2.0), ("b", 2.0)]).with_tolerances_of(&recorded);
        let tolerances: Vec<f64> = blessed.loops.iter().map(|l| l.tolerance_percent).collect();
        assert_eq!(tolerances, [5.0, 15.0]);
    }

    #[test]
    fn a_function_that_callgrind_never_saw_is_no_figure() {
        assert_eq!(collected("==1== Events    : Ir\n==1== Collected : 744468\n"), Some(744_468));
        assert_eq!(collected("==1== Collected : 0\n"), None);
        assert_eq!(collected(""), None);
    }

    #[test]
    fn a_loop_is_listed_with_its_function_and_rounds() {
        let found = Loop::parse("decode_pages decode_stream 1024 page of a stream").unwrap();
        assert_eq!((found.function.as_str(), found.rounds), ("decode_stream", 1024));
        assert_eq!(found.what, "page of a stream");
        assert!(Loop::parse("decode_pages decode_stream many pages").is_err());
    }
}
