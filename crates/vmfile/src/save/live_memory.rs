//! The memory of QEMU's process, for a save while the guest runs.

use std::io;

use rustix::io::Errno;
use vmfile_pages::PageSource as _;
use vmfile_pages::draft::Draft;
use vmfile_pages::plan::WINDOW_LEN;
use vmfile_qemu::{DeviceStateFile, RunState, Vm, VmError};

use super::base::ChosenBase;
use super::direct::{Devices, DirectRoute};
use super::{SaveOptions, Work};
use crate::error::SaveError;

/// What is set up while the guest runs, before the method is chosen.
#[derive(Debug)]
pub(super) struct LiveMemory {
    pub(super) direct: DirectRoute,
    /// Why windows of this memory cannot be copied aside as the guest writes to them.
    pub(super) not_by_userfault: Option<String>,
}

impl LiveMemory {
    /// Finds the RAM, and refuses what can be refused while the guest runs.
    pub(super) fn prepare(
        vm: &mut Vm,
        from: (&Draft, &ChosenBase),
        options: &SaveOptions,
    ) -> Result<LiveMemory, SaveError> {
        let direct = DirectRoute::prepare(vm, from, options)?;
        let page_len = direct.process.page_len_max();
        let not_by_userfault = if page_len > WINDOW_LEN {
            Some(format!("its RAM has pages of {page_len} bytes, {WINDOW_LEN} at most can be used"))
        } else {
            // The same right as for reading the memory, and a call that Linux has since 5.6.
            let borrowed = direct.process.process().descriptor(0).map(drop).or_else(unless_closed);
            borrowed.err().map(|error| format!("borrow a descriptor of QEMU's: {error}"))
        };
        Ok(LiveMemory { direct, not_by_userfault })
    }

    /// Tells whether a block is a private mapping of a file: the kernel does not write-protect it.
    pub(super) fn is_mapped(&self) -> bool {
        let process = &self.direct.process;
        (0..self.direct.ram.blocks().len())
            .any(|number| process.beneath(number).is_ok_and(|beneath| beneath.is_some()))
    }
}

/// Stops the guest, runs `pause`, freezes the disks, has the devices saved, and lets the guest run on. If
/// `pause` returns `None`, does nothing more, and leaves the guest stopped. A guest that stands still by
/// then was stopped by another client or by itself, and stays so.
pub(super) fn in_a_pause<T>(
    work: &mut Work<'_>,
    pause: impl FnOnce(&mut Work<'_>) -> Result<Option<T>, SaveError>,
) -> Result<Option<(T, Devices)>, SaveError> {
    work.set_may_stand(true)?;
    let file = work.vm.prepare_device_state()?;
    let done = stopped(work, &file, pause);
    let bytes = work.vm.take_device_state(file);
    let Some(done) = done? else { return Ok(None) };
    Ok(Some((done, Devices::read(work, &bytes?)?)))
}

fn stopped<T>(
    work: &mut Work<'_>,
    file: &DeviceStateFile,
    pause: impl FnOnce(&mut Work<'_>) -> Result<Option<T>, SaveError>,
) -> Result<Option<T>, SaveError> {
    let has_stopped = work.vm.stop_if_running()?;
    match work.vm.run_state()? {
        RunState::Paused if has_stopped => {}
        RunState::Running => return Err(let_run_by_another()),
        found => {
            work.set_may_stand(false)?;
            return Err(SaveError::StoppedMeanwhile { found: found.to_string() });
        }
    }
    let resumes = work.vm.resumes();
    let Some(done) = pause(work)? else { return Ok(None) };
    work.disks.freeze(work.vm)?;
    work.vm.write_device_state(file, work.is_last())?;
    if work.vm.resumes() != resumes {
        return Err(let_run_by_another());
    }
    work.vm.cont()?;
    work.set_may_stand(false)?;
    Ok(Some(done))
}

/// Refuses a guest that another client has let run while QEMU stopped it: QEMU's migration may wait for
/// ever.
pub(super) fn refuse_if_overtaken(vm: &Vm) -> Result<(), SaveError> {
    if vm.is_overtaken() { Err(let_run_by_another()) } else { Ok(()) }
}

/// Returns the error for a guest that another client let run while the save needed it to stand still.
pub(super) fn let_run_by_another() -> SaveError {
    VmError::NotStill { what: "another client of QEMU let the guest run".to_owned() }.into()
}

/// The descriptor is closed: that is no matter of rights.
fn unless_closed(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(Errno::BADF.raw_os_error()) { Ok(()) } else { Err(error) }
}
