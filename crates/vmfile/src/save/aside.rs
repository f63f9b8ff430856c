//! Saves a guest while it runs, from a copy of its memory that is made while it stands still.
//!
//! The pause follows what has to be copied. That is little for a VM that was restored by `map`: a page
//! that the guest has not written is the file's. Where memory cannot be write-protected, it is the way
//! to save a guest without a stream.

use std::time::{Duration, Instant};

use vmfile_engine::available_memory;
use vmfile_pages::copied_ram::{CopiedRam, Room, own_len};
use vmfile_pages::ram_writer::write_ram;

use super::direct::DirectRoute;
use super::live_memory::{LiveMemory, in_a_pause};
use super::{GuestWaits, LiveDone, LiveMethod, Work, Written};
use crate::error::{SaveError, UserfaultError};

/// How many bytes a thread copies in a second at least: a quarter of what was measured (17 GB/s).
const BYTES_PER_SECOND: u64 = 4 << 30;

/// How many bytes more than are known before the stop may be copied: the guest writes on.
const SLACK: u64 = 32 << 20;

impl LiveMemory {
    /// Returns how many bytes would be copied, or why they are too many for a pause of `pause_max`
    /// or for the host's memory.
    pub(super) fn to_copy(&self, pause_max: Duration) -> Result<u64, String> {
        let bytes = own_len(&self.direct.process).map_err(|error| error.to_string())?;
        let most = BYTES_PER_SECOND / 1000 * u64::try_from(pause_max.as_millis()).unwrap_or(0);
        let free = available_memory() / 2;
        if bytes > most {
            return Err(format!("{bytes} bytes cannot be copied aside within {pause_max:?}"));
        }
        if bytes + SLACK > free {
            return Err(format!("{bytes} bytes cannot be copied aside: {free} may be used"));
        }
        Ok(bytes)
    }

    /// Copies the memory while the guest stands still, and writes the copy while it runs. Returns
    /// `None` if the copy took longer than `pause_max`, or had more than `bytes` and some: then the
    /// guest is still stopped.
    pub(super) fn by_copy(
        &mut self,
        work: &mut Work<'_>,
        (method, bytes, pause_max): (&LiveMethod, u64, Duration),
    ) -> Result<Option<Written>, SaveError> {
        let jobs = work.options.jobs.count();
        let room = Room::new(bytes + SLACK, jobs).map_err(SaveError::Workers)?;
        let DirectRoute { ram: layout, process, data_bytes, found, workers } = &mut self.direct;
        let done = in_a_pause(work, |work| {
            let started = Instant::now();
            let is_too_long = || started.elapsed() > pause_max || work.control.is_stopped();
            let copied = CopiedRam::copy(process, room, is_too_long);
            let Some(copied) = copied.map_err(UserfaultError::Kernel)? else { return Ok(None) };
            if work.vm.ram_blocks()? != *found {
                return Err(SaveError::ChangedMeanwhile { what: "a RAM block".to_owned() });
            }
            Ok(Some(copied))
        })?;
        let Some((copied, devices)) = done else { return Ok(None) };
        let places = devices.places(work, layout)?;
        let workers = workers.take().expect("a copy is written once");
        let written = write_ram(workers, &places, &copied, *data_bytes, work.control)?;
        let waits = Some(GuestWaits::none(copied.bytes()));
        let live = LiveDone::now(work.vm, method.clone(), waits);
        devices.finish(work, &places, written, Some(live)).map(Some)
    }
}
