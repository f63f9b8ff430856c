//! If a save and its guardian were both killed, the next vmfile that uses the VM undoes what the
//! save left in it.

use std::path::Path;

use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::{SaveRecord, Vm, VmError};

/// Undoes what a killed save left in the VM; returns a sentence about it, or `None` if nothing was
/// left.
///
/// # Errors
///
/// [`VmError::Held`] while another save is at work, or else QEMU's error.
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
    vm.remove_left_monitors()?;
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

/// Whether the save gave its file the name, and the file's manifest lists `overlay`.
fn belongs_to_a_file(record: &SaveRecord, overlay: &Path) -> bool {
    let Ok(snapshot) = Snapshot::open_alone(&record.destination, 0) else { return false };
    let Some(manifest) = snapshot.manifest() else { return false };
    let overlays = manifest.meta.vm.disks.iter().filter_map(|disk| disk.overlay.as_deref());
    overlays.map(Path::new).any(|found| found == overlay)
}
