//! What a file says of the VM in it.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use vmfile_format::manifest::{DiskMeta, VmMeta};
use vmfile_qemu::{Disk, Vm, VmError};

use crate::error::SaveError;

/// Describes the VM, with `disks`, which are those that it has.
pub(super) fn describe_vm(
    vm: &mut Vm,
    was_running: bool,
    disks: &[Disk],
) -> Result<VmMeta, SaveError> {
    let process = match vm.process() {
        Ok(process) => Some(process),
        // The file then has no command line, and a restore asks for one.
        Err(error) if is_out_of_reach(&error) => None,
        Err(error) => return Err(error.into()),
    };
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let disks = disks.iter().map(|disk| DiskMeta {
        device: disk.device.clone(),
        path: disk.file.clone(),
        format: disk.format.clone(),
        backing_files: disk.backing_files.clone(),
        read_only: disk.read_only,
        overlay: None,
    });
    Ok(VmMeta {
        disks: disks.collect(),
        parts: None,
        changes: Vec::new(),
        name: vm.name()?,
        uuid: vm.uuid()?,
        machine: vm.machine_type()?,
        qemu_version: Some(vm.version()?.to_string()),
        run_state: if was_running { "running" } else { "paused" }.to_owned(),
        executable: process.as_ref().map(|process| text(&process.executable)),
        command_line: process.as_ref().map_or(Ok(Vec::new()), |p| texts(&p.arguments))?,
        working_directory: process.as_ref().map(|process| text(&process.working_directory)),
    })
}

/// Whether QEMU's process cannot be found or looked at, which leaves its monitor.
pub(super) fn is_out_of_reach(error: &VmError) -> bool {
    match error {
        VmError::ProcessUnknown { .. } => true,
        VmError::System { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
        _ => false,
    }
}

/// Returns the command line as the manifest holds it.
fn texts(arguments: &[OsString]) -> Result<Vec<String>, SaveError> {
    let text = |argument: &OsString| argument.to_str().map(str::to_owned);
    arguments.iter().map(text).collect::<Option<_>>().ok_or(SaveError::CommandLine)
}
