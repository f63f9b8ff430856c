//! Creates a new file, and refuses to replace one that a VM uses, whatever the caller allows.

use std::fs::Metadata;
use std::path::Path;

use vmfile_engine::{Existing, PublishError, Unpublished};
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::user_of_file;

/// Creates an empty file that will be named `path`; `vm` is the process of the VM that is being
/// saved, whose program may have any name.
///
/// An existing file is not replaced if a QEMU of this host has it open, has it mapped or was
/// started with it, or if another program has locked it, as QEMU locks its images. A saved VM may
/// be replaced even while a VM that was restored from it maps it: that VM keeps the old one's
/// bytes.
///
/// # Errors
///
/// Returns [`PublishError::InUse`], which names the QEMU, and otherwise what
/// [`Unpublished::create_beside`] returns.
pub fn new_file(
    path: &Path,
    existing: Existing,
    vm: Option<u32>,
) -> Result<Unpublished, PublishError> {
    let find_user = move |path: &Path, metadata: &Metadata| {
        let user = user_of_file(metadata, vm)?;
        (!is_saved_vm(path)).then(|| user.to_string())
    };
    Unpublished::create_unless_used(path, existing, Box::new(find_user))
}

fn is_saved_vm(path: &Path) -> bool {
    Snapshot::open_alone(path, 0).is_ok_and(|snapshot| snapshot.manifest().is_some())
}
