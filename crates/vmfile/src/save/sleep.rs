//! A guest that sleeps (ACPI S3) must not come to the end of a migration: QEMU aborts if it goes on from
//! there (9.0 to 11.1: "invalid runstate transition: 'postmigrate' -> 'suspended'").

use vmfile_qemu::Feature;

use super::{Work, direct};
use crate::error::SaveError;

/// Tells whether the guest of a stopped VM sleeps. QEMU says `paused` of it, and only its device state
/// tells. QEMU before 9.0 does not stop a guest that sleeps.
pub(super) fn sleeps(work: &mut Work<'_>) -> Result<bool, SaveError> {
    if !work.vm.version()?.has(Feature::StoppedSleep) {
        return Ok(false);
    }
    let bytes = work.vm.save_device_state(false)?;
    let (state, sections) = direct::device_state(&bytes)?;
    Ok(state.sleeps(&sections))
}

/// Returns the error for a guest that sleeps and would come to the end of a migration. With QEMU before 9.0 it
/// would not wake.
pub(super) fn cannot_migrate() -> SaveError {
    let reason = "it could not go on after QEMU's migration".to_owned();
    SaveError::Sleeps { reason }
}
