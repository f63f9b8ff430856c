//! What a file says of the VM in it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;

use vmfile_format::manifest::{MemoryRangeMeta, VmMeta};
use vmfile_qemu::{CommandLine, Drive, MemoryRange, ProcessInfo, Vm};

use super::{Work, images};
use crate::error::SaveError;

/// Describes the VM, with `drives`, which are those that it has.
pub(super) fn describe_vm(
    vm: &mut Vm,
    was_running: bool,
    drives: &[Drive],
) -> Result<VmMeta, SaveError> {
    let process = match vm.process() {
        Ok(process) => Some(process),
        // The file then has no command line, and a restore asks for one.
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
        run_state: run_state(was_running),
        executable: process.as_ref().map(|process| text(&process.executable)),
        command_line,
        working_directory: process.as_ref().map(|process| text(&process.working_directory)),
    };
    images::describe(drives, &mut meta);
    Ok(meta)
}

/// Notes what may have changed until now: the guest stands still, or has run meanwhile.
pub(super) fn record(work: &mut Work<'_>) -> Result<(), SaveError> {
    images::record(work.vm, work.meta)?;
    let map = memory_map(work.vm)?;
    // A guest that ran may have changed the map before the saved moment, or after it.
    let is_of_moment = work.paused_at.is_some() || work.meta.memory_map == map;
    work.meta.memory_map = map.filter(|_| is_of_moment);
    Ok(())
}

/// Asks which memory the guest sees at which address.
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

/// Says so where the file will hold no command line.
pub(super) fn warn_of_no_command_line(meta: &VmMeta) -> Option<String> {
    meta.command_line.is_empty().then(|| {
        "the file holds no command line, for QEMU's process cannot be told or looked at: a restore \
         needs one after `--`, and that it makes what the VM has was not checked"
            .to_owned()
    })
}

/// Notes whether the guest ran until it was paused for the save.
pub(super) fn set_run_state(meta: &mut VmMeta, ran: bool) {
    meta.run_state = run_state(ran);
}

fn run_state(ran: bool) -> String {
    if ran { "running" } else { "paused" }.to_owned()
}

/// Longest configuration file read, in bytes: QEMU's own examples have ten thousand.
const CONFIG_LEN_MAX: u64 = 1 << 20;

/// Returns the command line as the manifest holds it: with what stands in configuration files
/// written out, so that a restore does not depend on them.
fn command_line(vm: &mut Vm, process: &ProcessInfo) -> Result<Vec<String>, SaveError> {
    let words = texts(&process.arguments)?;
    let is_elsewhere = |word: &String| matches!(word.trim_start_matches('-'), "readconfig" | "set");
    let Some(program) = words.first().filter(|_| words.iter().any(is_elsewhere)) else {
        return Ok(words);
    };
    let mut line = CommandLine::from_process(&process.arguments).map_err(SaveError::Options)?;
    let has_user_network = vm.has_user_network()?;
    line.expand_config(has_user_network, |path| read_as(process, path))
        .map_err(SaveError::Options)?;
    Ok([program.clone()].into_iter().chain(line.to_arguments()).collect())
}

/// Reads a configuration file that QEMU was started with.
fn read_as(process: &ProcessInfo, path: &Path) -> io::Result<String> {
    let found = process.find(path)?;
    if !found.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    // What was found is opened, whatever lies under the name by now.
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    let mut text = String::new();
    file.take(CONFIG_LEN_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Returns arguments as text.
fn texts(arguments: &[OsString]) -> Result<Vec<String>, SaveError> {
    let text = |argument: &OsString| argument.to_str().map(str::to_owned);
    arguments.iter().map(text).collect::<Option<_>>().ok_or(SaveError::CommandLine)
}
