//! `vmfile list`: the VMs that run on this host.

use std::path::PathBuf;

use crate::leftover::put_right;
use serde::Serialize;
use vmfile_qemu::{DiscoverError, Feature, Found, RunState, Vm};

/// A VM that runs on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ListedVm {
    /// QEMU's process.
    pub pid: u32,
    /// The VM's name, where it has one.
    pub name: Option<String>,
    /// A QMP socket that answers, or the first that the command line names.
    pub qmp: Option<PathBuf>,
    /// Length of all RAM blocks, in bytes, where QEMU could be asked.
    pub ram_bytes: Option<u64>,
    /// Where its RAM lies: `private`, `memfd`, `file`, ... , each once.
    pub backing: Vec<String>,
    /// How it could be saved now: `direct`, `stream`, `native`, or nothing. Whether `direct` is permitted shows
    /// when it is tried.
    pub routes: Vec<String>,
    /// Why there is no route.
    pub reason: Option<String>,
    /// What a killed save had left in the VM, which is put right now.
    pub note: Option<String>,
}

/// Returns the VMs that run on this host, in the order of their process ids.
///
/// Each QEMU is asked over its QMP socket; one whose socket is held by somebody else is listed with
/// the reason.
///
/// # Errors
///
/// Returns [`DiscoverError`] if the host's processes cannot be listed.
pub fn list() -> Result<Vec<ListedVm>, DiscoverError> {
    Ok(vmfile_qemu::list()?.into_iter().map(look_at).collect())
}

fn look_at(found: Found) -> ListedVm {
    let mut listed = ListedVm {
        pid: found.pid,
        name: found.name,
        qmp: found.qmp.first().cloned(),
        ram_bytes: None,
        backing: Vec::new(),
        routes: Vec::new(),
        reason: None,
        note: None,
    };
    let mut reason = "its command line names no QMP socket".to_owned();
    for socket in found.qmp {
        match Vm::connect(&socket) {
            Ok(mut vm) => {
                listed.qmp = Some(socket);
                listed.reason = ask(&mut vm, &mut listed).err();
                return listed;
            }
            Err(error) => reason = error.to_string(),
        }
    }
    listed.reason = Some(reason);
    listed
}

/// Asks a VM for what is listed; `Err` says why it cannot be saved.
fn ask(vm: &mut Vm, listed: &mut ListedVm) -> Result<(), String> {
    let text = |error: vmfile_qemu::VmError| error.to_string();
    listed.note = put_right(vm).map_err(text)?;
    if listed.name.is_none() {
        listed.name = vm.name().map_err(text)?;
    }
    let blocks = vm.ram_blocks().map_err(text)?;
    listed.ram_bytes = Some(blocks.iter().map(|block| block.used_length).sum());
    let mut backing: Vec<String> = vm
        .memory_backends()
        .map_err(text)?
        .iter()
        .map(|backend| {
            let kind = backend.kind.trim_start_matches("memory-backend-");
            if backend.share { format!("{kind} (shared)") } else { format!("{kind} (private)") }
        })
        .collect();
    backing.sort();
    backing.dedup();
    if backing.is_empty() {
        backing.push("private".to_owned());
    }
    listed.backing = backing;
    let state = vm.run_state().map_err(text)?;
    if !matches!(state, RunState::Running | RunState::Paused) {
        return Err(format!("it is in run state {state}"));
    }
    let blockers = vm.why_not_saved().map_err(text)?;
    if let Some(blocker) = blockers.first() {
        return Err(blocker.to_string());
    }
    if blocks.iter().all(|block| block.host_address.is_some()) {
        listed.routes.push("direct".to_owned());
    }
    listed.routes.push("stream".to_owned());
    if vm.version().map_err(text)?.has(Feature::MigrationDirectIo) {
        listed.routes.push("native".to_owned());
    }
    Ok(())
}
