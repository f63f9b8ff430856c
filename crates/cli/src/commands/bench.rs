//! `vmfile bench`.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use vmfile::{Existing, Unpublished};
use vmfile_bench::{Backing, BenchOptions, Contents};

use crate::args::{BenchArguments, RamMode};
use crate::commands::save::socket_of;
use crate::failure::Failure;
use crate::output::Printer;
use crate::signals::Signals;

pub(crate) fn run(arguments: &BenchArguments, printer: &Printer) -> Result<ExitCode, Failure> {
    let signals = Signals::listen().map_err(|error| Failure::system("signals", &error))?;
    if arguments.data + arguments.repeated > 100 {
        return Err(Failure::usage(
            "--data and --repeated are more than 100 % together".to_owned(),
        ));
    }
    let program = std::env::current_exe();
    let options = BenchOptions {
        vm: arguments.vm.as_deref().map(socket_of).transpose()?,
        sizes: arguments.size.clone(),
        backings: arguments.ram.iter().map(|&ram| ram.into()).collect(),
        contents: Contents { data_percent: arguments.data, repeated_percent: arguments.repeated },
        rounds: arguments.runs,
        directory: arguments.dir.clone(),
        qemu: arguments.qemu.clone(),
        program: program.map_err(|error| Failure::system("find this program", &error))?,
        against: arguments.against.clone(),
        ways: arguments.ways.clone(),
        restores: !arguments.saves_only,
        sweep: arguments.sweep,
    };
    // Made before the rounds, which take minutes, so that a bad path is refused now.
    let page = arguments.html.as_deref().map(new_page).transpose()?;
    let command = std::env::args().collect();
    let result =
        vmfile_bench::run(&options, command, &signals.stop, &|line| printer.step("bench", line));
    let report = result.map_err(|error| {
        signals.explain(Failure::from(&error), "guests were ended and files removed")
    })?;
    if let Some(page) = page {
        write(page, &vmfile_bench::html::html(&report))?;
    }
    printer.answer(&report, vmfile_bench::table::table)?;
    Ok(if signals.are_set() { signals.code().into() } else { ExitCode::SUCCESS })
}

/// Makes the file for the page, which will replace an older one of that name.
fn new_page(path: &Path) -> Result<Unpublished, Failure> {
    vmfile::new_file(path, Existing::Replace, None).map_err(|error| Failure::from(&error))
}

fn write(unpublished: Unpublished, page: &str) -> Result<(), Failure> {
    std::io::Write::write_all(&mut unpublished.file(), page.as_bytes())
        .map_err(|error| Failure::system("write the page", &error))?;
    let file = unpublished.publish().map_err(|error| Failure::from(&error))?;
    // Everybody may read a page, unlike a saved VM.
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::File::set_permissions(&file, readable).map_err(|error| Failure::system("chmod", &error))
}

impl From<RamMode> for Backing {
    fn from(mode: RamMode) -> Backing {
        match mode {
            RamMode::Private => Backing::Private,
            RamMode::Shared => Backing::Shared,
        }
    }
}
