//! Saves a running VM through the library, ends it, and brings it back in a new QEMU.
//!
//! ```text
//! cargo run --release -p vmfile --example save_and_restore -- QMP-SOCKET FILE
//! ```

#![expect(clippy::print_stdout, reason = "an example that shows what it does")]

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};

use vmfile::restore::{Destination, RestoreOptions, Restored, restore};
use vmfile::save::{After, SaveOptions, save};
use vmfile::{Control, LaunchedQemu, Progress, Snapshot, Vm};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let usage = "usage: save_and_restore QMP-SOCKET FILE";
    let (socket, file) = (arguments.next().ok_or(usage)?, arguments.next().ok_or(usage)?);
    // A QEMU that is not detached ends with its value.
    drop(run(&socket, &file)?.detach());
    Ok(())
}

/// Saves the VM whose QMP socket is at `socket` to `file`, and restores it; returns the new QEMU.
///
/// # Errors
///
/// Returns an error if either fails. A VM that was not saved runs on.
pub(crate) fn run(socket: &Path, file: &Path) -> Result<LaunchedQemu, Box<dyn Error>> {
    let stop = Default::default();
    let show = |Progress { done_bytes, total_bytes }| println!("{done_bytes} of {total_bytes}");
    // Setting `stop` in another thread would end the save with everything as it was.
    let control = Control::new(&stop, &show);
    let mut vm = Vm::connect(socket)?;
    let report = save(&mut vm, file, &SaveOptions::default().after(After::Quit), &control)?;
    println!("{}: paused for {:.3} s", report.route, report.pause_seconds);
    for warning in &report.warnings {
        println!("warning: {warning}");
    }

    let snapshot = Snapshot::open(file, 0)?;
    let options = RestoreOptions::default();
    let Restored { report, qemu, .. } =
        restore(&snapshot, Destination::Saved, &options, &Control::none())?;
    println!("{} ({}), running: {}", report.mode, report.mode_reason, report.running);
    qemu.ok_or_else(|| "a QEMU was started".into())
}
