//! What would be lost with a VM that ends once its file is durable.

use vmfile_qemu::Vm;

use super::{After, SaveOptions};
use crate::error::SaveError;

/// Refuses to end a VM with block jobs or exports, unless the options allow it; then each is a
/// warning.
///
/// # Errors
///
/// [`SaveError::Activities`].
pub(super) fn with_activities(
    vm: &mut Vm,
    options: &SaveOptions,
) -> Result<Vec<String>, SaveError> {
    if options.after != After::Quit {
        return Ok(Vec::new());
    }
    let activities = vm.activities()?;
    if activities.is_empty() || options.changed_ok {
        let warning = |what| format!("{what} ends with the VM");
        return Ok(activities.into_iter().map(warning).collect());
    }
    Err(SaveError::Activities { activities })
}

/// Refuses to end a VM whose disks may not be durable, for `reasons`, unless the options allow it;
/// then they are warnings.
///
/// # Errors
///
/// [`SaveError::NotConfirmed`].
pub(super) fn with_doubtful_disks(
    reasons: Vec<String>,
    options: &SaveOptions,
) -> Result<Vec<String>, SaveError> {
    if reasons.is_empty() || options.after != After::Quit || options.changed_ok {
        return Ok(reasons);
    }
    Err(SaveError::NotConfirmed { reasons })
}
