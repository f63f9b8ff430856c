//! Checks the room on the disk, before the pause.

use vmfile_engine::{DataFile, available_space};
use vmfile_pages::PagesError;

use crate::error::SaveError;

/// Refuses a disk that `data` bytes of pages would fill up.
pub(super) fn refuse_without_space(data: u64, file: &DataFile) -> Result<(), SaveError> {
    // Bitmaps, hashes, device state and the file system's own needs.
    const OVERHEAD_PERCENT: u64 = 1;
    const OVERHEAD: u64 = 16 << 20;
    let needed_bytes = data + data / 100 * OVERHEAD_PERCENT + OVERHEAD;
    let available_bytes = available_space(file.buffered())
        .map_err(PagesError::reading("the free space of the file system"))?;
    if needed_bytes > available_bytes {
        return Err(SaveError::NoSpace { needed_bytes, available_bytes });
    }
    Ok(())
}
