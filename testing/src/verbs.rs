//! The verbs, called as a user of the library calls them, with the checks that every test needs.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use vmfile::check::CheckOptions;
use vmfile::restore::{Destination, Mode, ModeUsed, RestoreOptions, Restored};
use vmfile::save::{SaveOptions, SaveReport};
use vmfile::{Control, RestoreError, Snapshot, Vm};
use vmfile_format::manifest::VmMeta;

use crate::{Guest, GuestConfig, Prepared, Qemu, TestResult};

/// Saves the guest.
///
/// # Errors
///
/// The library's error.
pub fn save_with(guest: &Guest, file: &Path, options: &SaveOptions) -> TestResult<SaveReport> {
    let mut vm = Vm::connect(&guest.qmp_path())?;
    Ok(vmfile::save::save(&mut vm, file, options, &Control::none())?)
}

/// Checks every byte and expects no finding.
///
/// # Errors
///
/// The library's error.
///
/// # Panics
///
/// If there is a finding.
pub fn check_is_clean(file: &Path) -> TestResult {
    let snapshot = Snapshot::open(file, 0)?;
    let report = vmfile::check::check(&snapshot, &CheckOptions::default(), &Control::none())?;
    assert_eq!(report.findings, []);
    assert!(report.pages_checked > 0, "pages have hashes");
    Ok(())
}

/// Restores into a QEMU of the same configuration.
///
/// All VMs of a configuration share one disk, and another one may have written to it since the
/// save. So changed disks are accepted here: the guest itself checks its disk.
///
/// # Errors
///
/// The library's error.
///
/// # Panics
///
/// If the restore used another mode.
pub fn restore(qemu: &Qemu, config: &GuestConfig, file: &Path, mode: Mode) -> TestResult<Guest> {
    let prepared = config.prepare(qemu)?;
    let options = RestoreOptions::default().mode(mode).disks_changed_ok(true);
    let restored = restore_given(&prepared, file, &options)?;
    let expected = match mode {
        Mode::Map => Some(ModeUsed::Map),
        Mode::Load => Some(ModeUsed::Load),
        Mode::Stream => Some(ModeUsed::Stream),
        Mode::Auto => None,
    };
    assert!(expected.is_none_or(|mode| mode == restored.report.mode), "{:?}", restored.report);
    drop(restored.qemu.expect("a QEMU was started").detach());
    prepared.attach()
}

/// Restores into a QEMU that the library starts with the command line of `prepared`.
///
/// # Errors
///
/// The library's error.
///
/// # Panics
///
/// If the command line is no UTF-8.
pub fn restore_given(
    prepared: &Prepared,
    file: &Path,
    options: &RestoreOptions,
) -> Result<Restored, RestoreError> {
    let words = prepared.command_line().into_iter();
    let words = words.map(|word| word.into_string().expect("UTF-8")).collect();
    let snapshot = Snapshot::open(file, 0)?;
    vmfile::restore::restore(&snapshot, Destination::Command(words), options, &Control::none())
}

/// Restores into a QEMU that waits.
///
/// # Errors
///
/// The library's error.
pub fn restore_into(
    waiting: &Guest,
    snapshot: &Snapshot,
    options: &RestoreOptions,
) -> TestResult<Restored> {
    let destination = Destination::Waiting(Vm::connect(&waiting.qmp_path())?);
    Ok(vmfile::restore::restore(snapshot, destination, options, &Control::none())?)
}

/// Changes the metadata of the VM in a file and makes its checksums match: as an older vmfile, or
/// an attacker, would write it.
///
/// # Errors
///
/// The library's or the kernel's error.
pub fn rewrite_manifest(file: &Path, change: impl FnOnce(&mut VmMeta)) -> TestResult {
    let snapshot = Snapshot::open(file, 0)?;
    let manifest = snapshot.manifest().ok_or("no manifest")?;
    let (mut meta, footer) = (manifest.meta.clone(), &manifest.footer);
    change(&mut meta.vm);
    let bytes = meta.encode(footer.stream_end, footer.metadata_offset);
    let out = File::options().write(true).open(file)?;
    out.set_len(footer.metadata_offset)?;
    out.write_all_at(&bytes, footer.metadata_offset)?;
    Ok(())
}

/// Reads all pages of a RAM block from the file; holes read as zeros.
///
/// # Errors
///
/// The library's error.
pub fn pages(file: &Path, block: &str) -> TestResult<Vec<u8>> {
    let snapshot = Snapshot::open(file, 0)?;
    let placed = snapshot.structure().block(block).ok_or("no such block")?;
    let mut bytes = vec![0; usize::try_from(placed.block.used_length())?];
    snapshot.file().read_exact_at(&mut bytes, placed.pages_offset)?;
    Ok(bytes)
}
