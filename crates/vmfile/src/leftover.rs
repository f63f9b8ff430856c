//! What a save has left in a VM that was killed together with its guardian, put right by the next
//! vmfile that meets the VM.

use std::path::Path;

use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::{SaveRecord, Vm, VmError};

/// Puts right what a killed save has left; returns a sentence about it, or `None` where there was
/// nothing.
///
/// # Errors
///
/// [`VmError::Held`] while the other save is at work; whatever QEMU says.
pub(crate) fn put_right(vm: &mut Vm) -> Result<Option<String>, VmError> {
    let Some(record) = left_record(vm)? else { return Ok(None) };
    vm.put_back(&record, |overlay| belongs_to_a_file(&record, overlay))?;
    Ok(Some(format!("{}: it is as it was before that save", what_happened(&record))))
}

/// As [`put_right`], but leaves overlays, which may take long to merge, to the next save.
///
/// # Errors
///
/// As for [`put_right`].
pub(crate) fn put_right_at_once(vm: &mut Vm) -> Result<Option<String>, VmError> {
    let Some(record) = left_record(vm)? else { return Ok(None) };
    if record.overlays.is_empty() {
        return put_right(vm);
    }
    vm.put_back_at_once(&record)?;
    let what = what_happened(&record);
    Ok(Some(format!(
        "{what}: the guest runs on, and the next save merges the overlays of its disks"
    )))
}

/// Returns the record of a save whose process is gone.
fn left_record(vm: &mut Vm) -> Result<Option<SaveRecord>, VmError> {
    match vm.record()? {
        Some(record) if record.holder.is_alive() != Some(false) => {
            Err(VmError::Held { by: record.holder })
        }
        record => Ok(record),
    }
}

fn what_happened(record: &SaveRecord) -> String {
    let destination = record.destination.display();
    format!("a save to {destination}, whose {} was killed, had left the VM changed", record.holder)
}

/// Whether the save came so far that its file has its name, and the file says that `overlay` lies on
/// top of an image of its own.
fn belongs_to_a_file(record: &SaveRecord, overlay: &Path) -> bool {
    let Ok(snapshot) = Snapshot::open(&record.destination, 0) else { return false };
    let Some(manifest) = snapshot.manifest() else { return false };
    let overlays = manifest.meta.vm.disks.iter().filter_map(|disk| disk.overlay.as_deref());
    overlays.map(Path::new).any(|found| found == overlay)
}
