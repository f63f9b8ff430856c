//! What a save has left in a VM that was killed together with its guardian, put right by the next
//! vmfile that meets the VM.

use std::path::Path;

use vmfile_qemu::{SaveRecord, Vm, VmError};

use crate::snapshot::Snapshot;

/// Puts right what a killed save has left; returns a sentence about it, or `None` where there was
/// nothing.
///
/// # Errors
///
/// [`VmError::Held`] while the other save is at work; whatever QEMU says.
pub(crate) fn put_right(vm: &mut Vm) -> Result<Option<String>, VmError> {
    let Some(record) = vm.record()? else { return Ok(None) };
    if record.holder.is_alive() != Some(false) {
        return Err(VmError::Held { by: record.holder });
    }
    vm.put_back(&record, |overlay| belongs_to_a_file(&record, overlay))?;
    Ok(Some(format!(
        "a save to {}, whose {} was killed, had left the VM changed: it is as it was before that save",
        record.destination.display(),
        record.holder
    )))
}

/// Whether the save came so far that its file has its name, and the file says that `overlay` lies on
/// top of an image of its own.
fn belongs_to_a_file(record: &SaveRecord, overlay: &Path) -> bool {
    let Ok(snapshot) = Snapshot::open(&record.destination, 0) else { return false };
    let Some(manifest) = snapshot.manifest() else { return false };
    let overlays = manifest.meta.vm.disks.iter().filter_map(|disk| disk.overlay.as_deref());
    overlays.map(Path::new).any(|found| found == overlay)
}
