//! The device state: everything that QEMU saves of a stopped VM besides RAM.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use super::{PUT_BACK_TIMEOUT, RunState, Vm, VmError};
use crate::pass_fd::{self, DEVICE_STATE_FDSET};
use crate::version::Feature;

/// Most bytes of device state accepted.
///
/// A large server VM has a few megabytes; one with a device that has big buffers of its own (such
/// as virtio-gpu) has tens of megabytes. More than this is not a device state.
pub const DEVICE_STATE_LEN_MAX: u64 = 256 << 20;

/// "QEVM" and version 3: how every migration stream of QEMU starts.
const STREAM_START: [u8; 8] = *b"QEVM\x00\x00\x00\x03";
/// Type byte of a section that holds the whole state of one device.
const SECTION_FULL: u8 = 0x04;
/// The byte that ends a stream.
const END_OF_STREAM: u8 = 0x00;

/// Memory to which QEMU writes the device state.
#[derive(Debug)]
pub struct DeviceStateFile {
    memory: File,
}

impl Vm {
    /// Returns the state of every device, as a stream without RAM; the VM must be stopped.
    ///
    /// The bytes are QEMU's: "QEVM", version 3, then sections of type FULL with their footers, then
    /// one zero byte. Tried on 10.0.2: no configuration section, no RAM section, no description.
    /// Its `globalstate` section says `running`, whatever the VM's state was.
    ///
    /// The VM stays stopped, and [`Vm::resume_and_check`] can resume it. With `is_last`, which is
    /// for a VM that ends soon, QEMU also releases its disks.
    ///
    /// # Errors
    ///
    /// [`VmError::WrongState`] when the guest runs, [`VmError::DeviceState`] when QEMU hands over
    /// something else.
    pub fn save_device_state(&mut self, is_last: bool) -> Result<Vec<u8>, VmError> {
        if self.is_running()? {
            let found = RunState::Running;
            return Err(VmError::WrongState { found, expected: "a stopped VM" });
        }
        let file = self.prepare_device_state()?;
        let saved = self.write_device_state(&file, is_last);
        let bytes = self.take_device_state(file);
        saved?;
        bytes
    }

    /// Gives QEMU memory to write the device state to. [`Vm::take_device_state`] takes it back, also
    /// after an error.
    ///
    /// The guest may run: what this does need not be done while it stands still.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn prepare_device_state(&mut self) -> Result<DeviceStateFile, VmError> {
        // Known before the guest stands still.
        self.version()?;
        let memory = memfd_create("vmfile-device-state", MemfdFlags::CLOEXEC)
            .map_err(|errno| VmError::system("create memory for the device state", errno))?;
        // QEMU opens the fd set for writing only, and picks a descriptor with exactly that access
        // mode, so the memory must be opened once more.
        let for_qemu = OpenOptions::new()
            .write(true)
            .open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
            .map_err(|source| VmError::system("open memory for the device state", source))?;
        pass_fd::add_fd(&mut self.qmp, DEVICE_STATE_FDSET, for_qemu.as_fd())?;
        Ok(DeviceStateFile { memory: File::from(memory) })
    }

    /// Has QEMU write the device state of a VM that the caller knows to be stopped: see
    /// [`Vm::save_device_state`].
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn write_device_state(
        &mut self,
        _: &DeviceStateFile,
        is_last: bool,
    ) -> Result<(), VmError> {
        let can_release = self.version()?.has(Feature::BlockdevSetActive);
        if is_last && can_release {
            self.release_disks()?;
        }
        let release = is_last && !can_release;
        // `live` affects the disks, not the guest. With `true` and a stopped VM, QEMU releases the
        // disks, as Xen's tools want before the domain is destroyed: another QEMU may then open
        // them for writing, and only `cont` takes them back. With `false` the disks stay active and
        // locked. The bytes are the same either way. (Tried on 7.2, 10.0.2 and 11.1.)
        let filename = format!("/dev/fdset/{DEVICE_STATE_FDSET}");
        let arguments = json!({ "filename": filename, "live": release });
        Ok(self.execute("xen-save-devices-state", arguments).map(drop)?)
    }

    /// Takes the memory from QEMU, and returns the device state that QEMU wrote there.
    ///
    /// # Errors
    ///
    /// [`VmError::DeviceState`] if QEMU wrote something else, or nothing.
    pub fn take_device_state(&mut self, file: DeviceStateFile) -> Result<Vec<u8>, VmError> {
        self.unstoppable(PUT_BACK_TIMEOUT, |vm| {
            pass_fd::remove_fd(&mut vm.qmp, DEVICE_STATE_FDSET)
        })?;
        read_device_state(file.memory)
    }
}

fn read_device_state(memory: File) -> Result<Vec<u8>, VmError> {
    let bad = |reason: String| VmError::DeviceState { reason };
    let system = |source| VmError::system("read the device state", source);
    let len = memory.metadata().map_err(system)?.len();
    if len > DEVICE_STATE_LEN_MAX {
        return Err(bad(format!("{len} bytes, expected at most {DEVICE_STATE_LEN_MAX}")));
    }
    let mut bytes = Vec::new();
    // Our descriptor's offset is still 0: QEMU wrote through a separate open.
    memory.take(DEVICE_STATE_LEN_MAX).read_to_end(&mut bytes).map_err(system)?;
    check_device_state(&bytes).map_err(|reason| bad(reason.to_owned()))?;
    Ok(bytes)
}

/// Checks the parts that we know: the start, the first section's type, and the end.
fn check_device_state(bytes: &[u8]) -> Result<(), &'static str> {
    let Some(sections) = bytes.strip_prefix(&STREAM_START) else {
        return Err("it does not start with QEVM, version 3");
    };
    if sections.first() != Some(&SECTION_FULL) {
        return Err("its first section is not that of a device");
    }
    if sections.last() != Some(&END_OF_STREAM) {
        return Err("it does not end with the end of a stream");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_or_foreign_device_state_is_refused() {
        assert_eq!(check_device_state(b"QEVM\0\0\0\x03\x04...\0"), Ok(()));
        for bytes in [
            &b""[..],
            b"QEVM\0\0\0\x03",
            b"QEVM\0\0\0\x02\x04...\0",
            b"QEVM\0\0\0\x03\x07...\0",
            b"QEVM\0\0\0\x03\x04...",
        ] {
            assert!(check_device_state(bytes).is_err(), "{bytes:?}");
        }
    }
}
