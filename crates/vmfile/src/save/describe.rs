//! Describes the VM for the manifest.

use std::ffi::OsString;
use std::path::Path;

use vmfile_format::manifest::{MemoryRangeMeta, VmMeta};
use vmfile_format::stream::device_state::DeviceState;
use vmfile_qemu::{CommandLine, Drive, MemoryRange, ProcessInfo, RunState, Vm};

use super::{SaveOptions, Work, config_files, images};
use crate::error::SaveError;
use crate::{secrets, surroundings};

/// Describes the VM; `drives` are its drives.
pub(super) fn describe_vm(
    vm: &mut Vm,
    state: &RunState,
    drives: &[Drive],
) -> Result<VmMeta, SaveError> {
    let process = match vm.process() {
        Ok(process) => Some(process),
        // The file then has no command line, and the user must give one to a restore.
        Err(error) if error.is_out_of_reach() => None,
        Err(error) => return Err(error.into()),
    };
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let command_line = match &process {
        Some(process) => command_line(vm, process)?,
        None => Vec::new(),
    };
    let mut meta = VmMeta {
        disks: Vec::new(),
        empty_drives: Vec::new(),
        parts: None,
        changes: Vec::new(),
        memory_map: memory_map(vm)?,
        name: vm.name()?,
        uuid: vm.uuid()?,
        machine: vm.machine_type()?,
        qemu_version: Some(vm.version()?.to_string()),
        run_state: run_state(state),
        executable: process.as_ref().map(|process| text(&process.executable)),
        user: process.as_ref().map(|process| process.user),
        surroundings: process.as_ref().and_then(surroundings::of_process),
        command_line,
        working_directory: process.as_ref().map(|process| text(&process.working_directory)),
    };
    images::describe(drives, &mut meta);
    Ok(meta)
}

/// Updates what may have changed since the VM was described: the images and the memory map.
pub(super) fn record(work: &mut Work<'_>) -> Result<(), SaveError> {
    images::record(work.vm, work.meta)?;
    let map = memory_map(work.vm)?;
    // A guest that ran meanwhile may have changed the map before the saved moment or after it.
    let is_of_moment = work.paused_at.is_some() || work.meta.memory_map == map;
    work.meta.memory_map = map.filter(|_| is_of_moment);
    Ok(())
}

/// Asks QEMU which memory the guest sees at which address.
fn memory_map(vm: &mut Vm) -> Result<Option<Vec<MemoryRangeMeta>>, SaveError> {
    let range = |range: MemoryRange| MemoryRangeMeta {
        guest_address: range.guest_address,
        bytes: range.bytes,
        block: range.block,
        offset: range.offset,
        writable: range.writable,
    };
    Ok(vm.memory_map()?.map(|map| map.into_iter().map(range).collect()))
}

/// Returns a warning if the file will hold no command line, or one without its secrets.
pub(super) fn warn_of_command_line(meta: &VmMeta, options: &SaveOptions) -> Option<String> {
    if meta.command_line.is_empty() {
        let reason = "the file holds no command line, because QEMU's process is not known or cannot \
                      be read: a restore needs one after `--`, and this save could not compare the VM \
                      with one";
        return Some(reason.to_owned());
    }
    if options.with_secrets {
        return None;
    }
    secrets::warning(&secrets::leave_out(&mut meta.clone()))
}

/// Records the state that the VM had before it was paused for the save.
pub(super) fn set_run_state(meta: &mut VmMeta, state: &RunState) {
    meta.run_state = run_state(state);
}

/// Writes the run state that the VM had before the save into its device state, where QEMU wrote that of
/// a stopped VM, and notes whether the guest sleeps: while it is stopped, QEMU says so only there.
pub(super) fn write_run_state(
    work: &mut Work<'_>,
    state: &DeviceState,
    bytes: &mut [u8],
) -> Result<(), SaveError> {
    if !state.set_run_state(bytes, &work.meta.run_state) {
        return Err(SaveError::NoRunState);
    }
    if RunState::from_name(&work.meta.run_state) == RunState::Running && state.sleeps(bytes) {
        work.meta.run_state = RunState::Suspended.to_string();
    }
    Ok(())
}

fn run_state(state: &RunState) -> String {
    let is_said = *state == RunState::Running || state.is_kept();
    if is_said { state } else { &RunState::Paused }.to_string()
}

/// Returns the command line for the manifest. The options from configuration files are written out
/// in it, so that a restore does not depend on those files.
fn command_line(vm: &mut Vm, process: &ProcessInfo) -> Result<Vec<String>, SaveError> {
    let words = texts(&process.arguments)?;
    let is_elsewhere = |word: &String| matches!(word.trim_start_matches('-'), "readconfig" | "set");
    let Some(program) = words.first().filter(|_| words.iter().any(is_elsewhere)) else {
        return Ok(words);
    };
    let mut line = CommandLine::from_process(&process.arguments).map_err(SaveError::Options)?;
    let has_user_network = vm.has_user_network()?;
    line.expand_config(has_user_network, |path| config_files::read(process, path))
        .map_err(SaveError::Options)?;
    Ok([program.clone()].into_iter().chain(line.to_arguments()).collect())
}

/// Returns arguments as text.
fn texts(arguments: &[OsString]) -> Result<Vec<String>, SaveError> {
    let mut words: Vec<String> = Vec::new();
    for (index, argument) in arguments.iter().enumerate() {
        let Some(word) = argument.to_str() else {
            let option = words.pop().filter(|before| before.starts_with('-'));
            return Err(SaveError::NotText { index, option: option.unwrap_or_default() });
        };
        words.push(word.to_owned());
    }
    Ok(words)
}
