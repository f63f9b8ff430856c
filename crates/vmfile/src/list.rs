//! `vmfile list`: the VMs that run on this host.

use std::io;
use std::path::PathBuf;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmfile_qemu::{DiscoverError, Feature, Found, Vm, VmError};

use crate::error::with_sources;
use crate::leftover::put_right_at_once;
use crate::save::target::not_direct;

/// A VM that runs on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ListedVm {
    /// QEMU's process.
    pub pid: u32,
    /// The VM's name, where it has one.
    pub name: Option<String>,
    /// A QMP socket that answers, or the first that the command line names.
    pub qmp: Option<PathBuf>,
    /// Length of all RAM blocks, in bytes, if QEMU answered.
    pub ram_bytes: Option<u64>,
    /// Where its RAM lies: `private`, `memfd`, `file`, ... , each once.
    pub backing: Vec<String>,
    /// The routes by which it could be saved now: `direct`, `stream`, `native`, or none. `direct`
    /// may still fail because it is not permitted.
    pub routes: Vec<String>,
    /// Why there is no route.
    pub reason: Option<String>,
    /// What a killed save had left in the VM and [`list`] has undone.
    pub note: Option<String>,
}

/// How long a VM may take for all its answers, so that the list is there within two seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);

/// Returns the VMs that run on this host, in the order of their process ids.
///
/// Asks all QEMUs at once, over their QMP sockets. One that does not answer within 1.5 seconds is
/// listed with the reason. One whose monitor libvirt owns is not asked.
///
/// # Errors
///
/// Returns [`DiscoverError`] if the host's processes cannot be listed.
pub fn list() -> Result<Vec<ListedVm>, DiscoverError> {
    let found = vmfile_qemu::list()?;
    Ok(thread::scope(|scope| {
        let ask = |found: Found| {
            let listed = not_asked(&found);
            let asked = thread::Builder::new().spawn_scoped(scope, || look_at(found));
            (listed, asked)
        };
        let asked: Vec<_> = found.into_iter().map(ask).collect();
        let told = |(mut listed, asked): (ListedVm, io::Result<ScopedJoinHandle<'_, ListedVm>>)| {
            match asked {
                Ok(asked) => asked.join().expect("no panic"),
                Err(error) => {
                    listed.reason = Some(format!("no thread could be started to ask it: {error}"));
                    listed
                }
            }
        };
        asked.into_iter().map(told).collect()
    }))
}

/// Returns what is known of a VM without its monitor.
fn not_asked(found: &Found) -> ListedVm {
    ListedVm {
        pid: found.pid,
        name: found.name.clone(),
        qmp: found.qmp.first().cloned(),
        ram_bytes: None,
        backing: Vec::new(),
        routes: Vec::new(),
        reason: None,
        note: None,
    }
}

fn look_at(found: Found) -> ListedVm {
    let mut listed = not_asked(&found);
    let mut reasons = Vec::new();
    if found.is_of_libvirt {
        reasons.push("libvirt owns its monitor".to_owned());
    } else if found.qmp.is_empty() {
        reasons.push("its command line names no QMP socket".to_owned());
    }
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    for (tried, socket) in found.qmp.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = u32::try_from(found.qmp.len() - tried).unwrap_or(u32::MAX);
        match Vm::connect_within(socket, left / share) {
            Ok(mut vm) => {
                listed.qmp = Some(socket.clone());
                let left = deadline.saturating_duration_since(Instant::now());
                listed.reason = vm.unstoppable(left, |vm| ask(vm, &mut listed)).err();
                return listed;
            }
            Err(error) => reasons.push(with_sources(&error)),
        }
    }
    listed.reason = Some(reasons.join("; "));
    listed
}

/// Asks a VM for what is listed; an error says why it cannot be saved.
fn ask(vm: &mut Vm, listed: &mut ListedVm) -> Result<(), String> {
    let text = |error: VmError| with_sources(&error);
    listed.note = put_right_at_once(vm).map_err(text)?;
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
    if !vm.runs_or_sleeps(&state).map_err(text)? && !state.stands_still() {
        return Err(format!("it is in run state {state}"));
    }
    let blockers = vm.why_not_saved().map_err(text)?;
    if let Some(blocker) = blockers.first() {
        return Err(blocker.to_string());
    }
    let is_known = not_direct(vm).map_err(text)?.is_none();
    if is_known && blocks.iter().all(|block| block.host_address.is_some()) {
        listed.routes.push("direct".to_owned());
    }
    listed.routes.push("stream".to_owned());
    if vm.version().map_err(text)?.has(Feature::MigrationDirectIo) {
        listed.routes.push("native".to_owned());
    }
    Ok(())
}
