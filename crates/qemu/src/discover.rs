//! The VMs that run on this host, found in `/proc`.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::command_line::{CommandLine, is_program};
use crate::proc;
use crate::qmp::{LIBVIRT_HINT, is_of_libvirt};

/// No VM was found by what the user gave.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoverError {
    /// `/proc` cannot be read.
    #[error("list the processes")]
    Processes {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No VM of this name or process id runs.
    #[error("no VM {address}{}", running(.known))]
    NotFound {
        /// What was looked for.
        address: VmAddress,
        /// The VMs that run, by name or process id.
        known: Vec<String>,
    },
    /// More than one VM has this name.
    #[error("the name {name:?} belongs to processes {pids:?}")]
    Ambiguous {
        /// The name.
        name: String,
        /// The processes.
        pids: Vec<u32>,
    },
    /// The VM has no other monitor than the one that libvirt holds.
    #[error("libvirt owns the monitor of process {pid}")]
    OfLibvirt {
        /// Its process.
        pid: u32,
    },
    /// The VM has no monitor that vmfile could connect to.
    #[error("the VM of process {pid} has no QMP socket")]
    NoMonitor {
        /// Its process.
        pid: u32,
    },
}

impl DiscoverError {
    /// Returns what the user could try, if vmfile knows it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            DiscoverError::NotFound { .. } => {
                Some("name a QMP socket, a process id, or a name that `vmfile list` prints")
            }
            DiscoverError::Ambiguous { .. } => Some("name one by its process id"),
            DiscoverError::NoMonitor { .. } => {
                Some("start QEMU with -qmp unix:PATH,server=on,wait=off")
            }
            DiscoverError::OfLibvirt { .. } => Some(LIBVIRT_HINT),
            DiscoverError::Processes { .. } => None,
        }
    }
}

fn running(known: &[String]) -> String {
    if known.is_empty() {
        "; none runs here".to_owned()
    } else {
        format!("; running: {}", known.join(", "))
    }
}

/// One QEMU that runs on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Found {
    /// Its process.
    pub pid: u32,
    /// The VM's name, from `-name`.
    pub name: Option<String>,
    /// The program's path; the name that it was started by, if this process may not see the path.
    pub executable: PathBuf,
    /// Its QMP sockets, as paths that this process can use, without the one that libvirt holds.
    pub qmp: Vec<PathBuf>,
    /// Whether libvirt holds a monitor of it.
    pub is_of_libvirt: bool,
}

/// What the user may give for a VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum VmAddress {
    /// The path of a QMP socket.
    Socket(PathBuf),
    /// A process id.
    Pid(u32),
    /// A name, or the path of a socket in this directory.
    Name(String),
}

impl FromStr for VmAddress {
    type Err = Infallible;

    /// Reads `unix:PATH`, a path with a slash, a number, or anything else as a name.
    fn from_str(text: &str) -> Result<VmAddress, Infallible> {
        Ok(if let Some(path) = text.strip_prefix("unix:") {
            VmAddress::Socket(PathBuf::from(path))
        } else if text.contains('/') {
            VmAddress::Socket(PathBuf::from(text))
        } else if let Ok(pid) = text.parse() {
            VmAddress::Pid(pid)
        } else {
            VmAddress::Name(text.to_owned())
        })
    }
}

impl fmt::Display for VmAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmAddress::Socket(path) => write!(f, "{}", path.display()),
            VmAddress::Pid(pid) => write!(f, "{pid}"),
            VmAddress::Name(name) => f.write_str(name),
        }
    }
}

/// Returns the VMs that run on this host, by process id.
///
/// A process that ends meanwhile is left out.
///
/// # Errors
///
/// [`DiscoverError::Processes`] when `/proc` cannot be read at all.
pub fn list() -> Result<Vec<Found>, DiscoverError> {
    let pids = proc::pids().map_err(|source| DiscoverError::Processes { source })?;
    Ok(pids.into_iter().filter_map(look_at).collect())
}

/// Returns the QMP socket of the VM at `address`.
///
/// A path is returned as it is: whether a QEMU answers there is found out by connecting.
///
/// # Errors
///
/// [`DiscoverError::NotFound`] names the VMs that do run.
pub fn resolve(address: &VmAddress) -> Result<PathBuf, DiscoverError> {
    match address {
        VmAddress::Socket(path) => Ok(path.clone()),
        VmAddress::Name(name) if is_socket(Path::new(name)) => Ok(PathBuf::from(name)),
        VmAddress::Pid(_) | VmAddress::Name(_) => choose(address, list()?),
    }
}

fn choose(address: &VmAddress, found: Vec<Found>) -> Result<PathBuf, DiscoverError> {
    let matches = |vm: &Found| match address {
        VmAddress::Pid(pid) => vm.pid == *pid,
        VmAddress::Name(name) => vm.name.as_ref() == Some(name),
        VmAddress::Socket(path) => vm.qmp.contains(path),
    };
    let (matching, others): (Vec<Found>, Vec<Found>) = found.into_iter().partition(matches);
    match matching.as_slice() {
        [] => {
            let known = |vm: Found| vm.name.unwrap_or_else(|| vm.pid.to_string());
            let known = others.into_iter().map(known).collect();
            Err(DiscoverError::NotFound { address: address.clone(), known })
        }
        [vm] => vm.qmp.first().cloned().ok_or(if vm.is_of_libvirt {
            DiscoverError::OfLibvirt { pid: vm.pid }
        } else {
            DiscoverError::NoMonitor { pid: vm.pid }
        }),
        several => Err(DiscoverError::Ambiguous {
            name: address.to_string(),
            pids: several.iter().map(|vm| vm.pid).collect(),
        }),
    }
}

fn is_socket(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Looks at one process; `None` when it is no QEMU that runs a machine.
fn look_at(pid: u32) -> Option<Found> {
    if !proc::is_qemu(pid) {
        return None;
    }
    let arguments = proc::arguments(pid).ok()?;
    let started_as = arguments.first()?;
    // A wrapper may start QEMU under another name, so that the program's path counts first.
    let executable = proc::executable(pid).ok();
    let executable =
        executable.or_else(|| is_program(started_as).then(|| PathBuf::from(started_as)))?;
    // The VM is listed even if its command line cannot be parsed.
    let line = CommandLine::from_process(&arguments).ok();
    let qmp = line.as_ref().map(|line| monitors(pid, line)).unwrap_or_default();
    let (of_libvirt, qmp): (Vec<PathBuf>, Vec<PathBuf>) =
        qmp.into_iter().partition(|path| is_of_libvirt(path));
    Some(Found {
        pid,
        name: line.as_ref().and_then(CommandLine::name),
        executable,
        qmp,
        is_of_libvirt: !of_libvirt.is_empty()
            || line.is_some_and(|line| line.has_libvirt_monitor()),
    })
}

fn monitors(pid: u32, line: &CommandLine) -> Vec<PathBuf> {
    let mut paths = line.qmp_sockets();
    let descriptors = line.qmp_descriptors();
    if !descriptors.is_empty() {
        let sockets: HashMap<u32, PathBuf> = proc::listening_sockets(pid).unwrap_or_default();
        paths.extend(descriptors.iter().filter_map(|number| sockets.get(number).cloned()));
    }
    paths.iter().map(|path| proc::path_for_us(pid, path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(pid: u32, name: Option<&str>, qmp: &[&str]) -> Found {
        Found {
            pid,
            name: name.map(str::to_owned),
            executable: PathBuf::from("/usr/bin/qemu-system-x86_64"),
            qmp: qmp.iter().map(PathBuf::from).collect(),
            is_of_libvirt: false,
        }
    }

    fn address(text: &str) -> VmAddress {
        let Ok(address) = text.parse();
        address
    }

    #[test]
    fn an_address_is_a_path_a_number_or_a_name() {
        assert_eq!(address("/run/vm.sock"), VmAddress::Socket("/run/vm.sock".into()));
        assert_eq!(address("unix:vm.sock"), VmAddress::Socket("vm.sock".into()));
        assert_eq!(address("./vm.sock"), VmAddress::Socket("./vm.sock".into()));
        assert_eq!(address("4711"), VmAddress::Pid(4711));
        assert_eq!(address("db1"), VmAddress::Name("db1".to_owned()));
        assert_eq!(address("db1").to_string(), "db1");
    }

    #[test]
    fn a_vm_is_chosen_by_name_and_by_process() {
        let vms = || vec![found(7, Some("db1"), &["/run/7"]), found(8, None, &["/run/8"])];
        assert_eq!(choose(&address("db1"), vms()).unwrap(), Path::new("/run/7"));
        assert_eq!(choose(&address("8"), vms()).unwrap(), Path::new("/run/8"));
    }

    #[test]
    fn an_unknown_name_lists_what_runs() {
        let vms = vec![found(7, Some("db1"), &[]), found(8, None, &[])];
        let error = choose(&address("db2"), vms).unwrap_err();
        assert_eq!(error.to_string(), "no VM db2; running: db1, 8");
        assert_eq!(
            choose(&address("9"), vec![]).unwrap_err().to_string(),
            "no VM 9; none runs here"
        );
    }

    #[test]
    fn a_name_that_two_vms_have_is_refused() {
        let vms = vec![found(7, Some("db1"), &["/run/7"]), found(8, Some("db1"), &["/run/8"])];
        let error = choose(&address("db1"), vms).unwrap_err();
        assert_eq!(error.to_string(), "the name \"db1\" belongs to processes [7, 8]");
    }

    #[test]
    fn a_vm_without_a_monitor_is_refused_by_process() {
        let error = choose(&address("7"), vec![found(7, None, &[])]).unwrap_err();
        assert_eq!(error.to_string(), "the VM of process 7 has no QMP socket");
    }
}
