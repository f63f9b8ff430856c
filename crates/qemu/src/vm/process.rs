//! The process behind a monitor.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Vm, VmError};
use crate::proc;

/// The process of a running VM.
///
/// Its arguments may hold secrets; do not log them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessInfo {
    /// Its number.
    pub pid: u32,
    /// The program it runs. The file may have been replaced since it was started.
    pub executable: PathBuf,
    /// The user whose rights it has.
    pub user: u32,
    /// Its command line; the first argument is the name it was started under.
    pub arguments: Vec<OsString>,
    /// Its current directory, or the one that it left for `-daemonize`, as its environment names
    /// it. Relative paths in its arguments refer to it.
    pub working_directory: PathBuf,
}

impl ProcessInfo {
    /// Returns when the process was started, to a second; `None` if the kernel does not say.
    #[must_use]
    pub fn started(&self) -> Option<SystemTime> {
        proc::started(self.pid)
    }
}

impl Vm {
    /// Returns the number of QEMU's process.
    ///
    /// The kernel names the process that called `listen` on the socket. If a manager such as
    /// libvirt made the socket and passed it to QEMU, that is the manager; then the QEMU that holds
    /// the listening socket is returned.
    ///
    /// # Errors
    ///
    /// [`VmError::ProcessUnknown`] when no QEMU, or more than one, holds it.
    pub fn pid(&mut self) -> Result<u32, VmError> {
        if let Some(pid) = self.pid {
            return Ok(pid);
        }
        let peer = rustix::net::sockopt::socket_peercred(self.qmp.as_fd());
        // The kernel returns pid 0 for a process that is not in our PID namespace, and rustix turns
        // that into an error. No other error can occur on a Unix socket.
        let peer = peer.map_err(|_| VmError::ProcessUnknown {
            reason: "it belongs to a PID namespace that this process does not see".to_owned(),
        })?;
        let peer = peer.pid.as_raw_pid().unsigned_abs();
        let pid = match self.socket() {
            Some(socket) => owner_of(socket, peer)?,
            None if proc::is_qemu(peer) => peer,
            None => {
                let reason = format!("process {peer} is not QEMU");
                return Err(VmError::ProcessUnknown { reason });
            }
        };
        self.pid = Some(pid);
        self.qmp.set_process(pid);
        Ok(pid)
    }

    /// Returns what `/proc` says about QEMU's process.
    ///
    /// # Errors
    ///
    /// As for [`Vm::pid`], and [`VmError::System`] when `/proc` may not be read.
    pub fn process(&mut self) -> Result<ProcessInfo, VmError> {
        let pid = self.pid()?;
        info(pid)
    }
}

/// Returns the QEMU that writes into `stream`, if it can be found: the peer of a socket, or else
/// the QEMU that started this process by `exec:`, directly or through a shell.
#[must_use]
pub fn sender(stream: impl AsFd) -> Option<ProcessInfo> {
    let pid = match rustix::net::sockopt::socket_peercred(&stream) {
        Ok(peer) => peer.pid.as_raw_pid().unsigned_abs(),
        Err(_) => {
            let parent = proc::parent(std::process::id())?;
            if proc::is_qemu(parent) { parent } else { proc::parent(parent)? }
        }
    };
    if proc::is_qemu(pid) { info(pid).ok() } else { None }
}

fn info(pid: u32) -> Result<ProcessInfo, VmError> {
    let system = |what: &str| {
        let what = format!("read the {what} of process {pid}");
        move |source| VmError::System { what, source }
    };
    Ok(ProcessInfo {
        pid,
        executable: proc::executable(pid).map_err(system("program"))?,
        user: proc::user(pid).map_err(system("user"))?,
        arguments: proc::arguments(pid).map_err(system("command line"))?,
        working_directory: proc::working_directory(pid).map_err(system("directory"))?,
    })
}

/// Finds the QEMU that holds the socket at `socket`, given the process that the kernel names.
fn owner_of(socket: &Path, peer: u32) -> Result<u32, VmError> {
    if proc::is_qemu(peer) || proc::is_started_as_monitor(peer, socket) {
        return Ok(peer);
    }
    let pids = proc::pids().map_err(|source| VmError::system("list the processes", source))?;
    let owners: Vec<u32> =
        pids.into_iter().filter(|&pid| proc::is_qemu(pid) && holds(pid, socket)).collect();
    match *owners.as_slice() {
        [owner] => Ok(owner),
        [] => {
            let reason = format!("process {peer} is not QEMU, and no QEMU holds the socket");
            Err(VmError::ProcessUnknown { reason })
        }
        _ => Err(VmError::ProcessUnknown { reason: format!("{owners:?} all hold the socket") }),
    }
}

fn holds(pid: u32, socket: &Path) -> bool {
    // If we may not read a process's descriptors, it counts as one that does not hold the socket.
    proc::listening_sockets(pid)
        .is_ok_and(|held| held.values().any(|bound| proc::is_same_socket(pid, bound, socket)))
}
