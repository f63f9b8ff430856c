//! Checks whether the file fits the QEMU that waits.

use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::RamBlockInfo;

use crate::restore_error::{Mismatch, RestoreError};

/// Compares the file with the QEMU that waits, before QEMU gets a byte of it: QEMU itself (9.0 to
/// 11.0) does not compare the lengths of RAM blocks in a mapped-ram file.
pub(super) fn compare(
    snapshot: &Snapshot,
    machine: &str,
    found: &[RamBlockInfo],
) -> Result<(), RestoreError> {
    let structure = snapshot.structure();
    let mut differ = Vec::new();
    if structure.configuration.machine != machine {
        differ.push(Mismatch {
            what: "machine type".to_owned(),
            file: structure.configuration.machine.clone(),
            vm: machine.to_owned(),
        });
    }
    for placed in &structure.blocks {
        let (name, length) = (placed.block.name(), placed.block.used_length());
        let what = format!("RAM block {name:?}");
        match found.iter().find(|info| info.name == name) {
            None => differ.push(Mismatch {
                what,
                file: format!("{length} bytes"),
                vm: "none of that name".to_owned(),
            }),
            // QEMU resizes a resizable block to the length that the stream says.
            Some(info)
                if length == info.used_length
                    || length <= info.total_length && info.total_length > info.used_length => {}
            Some(info) => differ.push(Mismatch {
                what,
                file: format!("{length} bytes"),
                vm: format!("{} bytes", info.used_length),
            }),
        }
    }
    for info in found {
        if structure.block(&info.name).is_none() {
            differ.push(Mismatch {
                what: format!("RAM block {:?}", info.name),
                file: "none of that name".to_owned(),
                vm: format!("{} bytes", info.used_length),
            });
        }
    }
    if differ.is_empty() { Ok(()) } else { Err(RestoreError::Incompatible { differ }) }
}
