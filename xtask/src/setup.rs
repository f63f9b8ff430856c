//! `cargo xtask setup`: installs what the tests need, fetches other QEMUs and makes the guests.
//!
//! Programs that are there already are used as they are, on any distribution. apt-get installs the
//! missing ones; QEMU and libvirt come from backports if the distribution's own versions are too
//! old.

use std::env;
use std::error::Error;
use std::path::Path;
use std::process::Command;

use crate::apt::{
    KEYRING, apt_get, candidate_major, find_in_path, index_targets, mirror_of, own_codename,
    write_as_root,
};
use crate::command::{output, say};
use crate::qemus::qemu_version;
use crate::workspace::Workspace;
use crate::{guest, qemus};

/// The oldest QEMU that the tests use: mapped RAM came with 9.0.
const QEMU_MAJOR_MIN: u32 = 9;

/// The oldest libvirt that the benchmarks use: `virsh save --image-format sparse` came with 11.2.
const LIBVIRT_MAJOR_MIN: u32 = 11;

const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/vmfile-backports.list";

/// A package, the file that must be there, and what it is for.
#[derive(Debug)]
struct Package {
    name: &'static str,
    /// A program in `PATH`, or a file if it begins with `/`.
    provides: &'static str,
    why: &'static str,
    suite: Suite,
}

/// Where a package comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Suite {
    /// The distribution itself.
    Own,
    /// Backports, if the distribution's own has a lower major version than this.
    Backports(u32),
}

const PACKAGES: [Package; 19] = [
    Package {
        name: "qemu-system-x86",
        provides: "qemu-system-x86_64",
        why: "the VMs that the tests save and restore",
        suite: Suite::Backports(QEMU_MAJOR_MIN),
    },
    Package {
        name: "qemu-system-arm",
        provides: "qemu-system-aarch64",
        why: "VMs of other targets",
        suite: Suite::Backports(QEMU_MAJOR_MIN),
    },
    Package {
        name: "qemu-system-misc",
        provides: "qemu-system-riscv64",
        why: "VMs of other targets",
        suite: Suite::Backports(QEMU_MAJOR_MIN),
    },
    Package {
        name: "qemu-system-ppc",
        provides: "qemu-system-ppc64",
        why: "VMs of other targets",
        suite: Suite::Backports(QEMU_MAJOR_MIN),
    },
    Package {
        name: "qemu-system-sparc",
        provides: "qemu-system-sparc64",
        why: "VMs of other targets",
        suite: Suite::Backports(QEMU_MAJOR_MIN),
    },
    Package {
        name: "qemu-utils",
        provides: "qemu-img",
        why: "disk images for the guests",
        suite: Suite::Backports(QEMU_MAJOR_MIN),
    },
    Package {
        name: "ovmf",
        provides: "/usr/share/OVMF/OVMF_CODE_4M.fd",
        why: "UEFI firmware, whose flash is RAM too",
        suite: Suite::Own,
    },
    Package {
        name: "binutils",
        provides: "as",
        why: "assembles the boot-sector guest",
        suite: Suite::Own,
    },
    Package {
        name: "e2fsprogs",
        provides: "mkfs.ext4",
        why: "file systems to save to",
        suite: Suite::Own,
    },
    Package {
        name: "xfsprogs",
        provides: "mkfs.xfs",
        why: "file systems to save to",
        suite: Suite::Own,
    },
    Package { name: "g++", provides: "c++", why: "builds the fuzzers' runtime", suite: Suite::Own },
    Package {
        name: "strace",
        provides: "strace",
        why: "makes system calls fail on purpose",
        suite: Suite::Own,
    },
    Package {
        name: "nbdkit",
        provides: "nbdkit",
        why: "a disk whose reads and writes fail on purpose",
        suite: Suite::Own,
    },
    Package {
        name: "libnbd-bin",
        provides: "nbdfuse",
        why: "shows that disk as a file",
        suite: Suite::Own,
    },
    Package {
        name: "fio",
        provides: "fio",
        why: "what the disk can do, to compare with",
        suite: Suite::Own,
    },
    Package {
        name: "valgrind",
        provides: "valgrind",
        why: "counts instructions",
        suite: Suite::Own,
    },
    Package { name: "xz-utils", provides: "xz", why: "unpacks kernel modules", suite: Suite::Own },
    Package {
        name: "patchelf",
        provides: "patchelf",
        why: "gives a QEMU that is not installed its own libraries",
        suite: Suite::Own,
    },
    Package {
        name: "chromium",
        provides: "chromium",
        why: "shows the page of measurements as a reader sees it",
        suite: Suite::Own,
    },
];

/// The packages that `cargo xtask bench` needs besides.
const BENCH_PACKAGES: [Package; 3] = [
    Package {
        name: "libvirt-daemon",
        provides: "libvirtd",
        why: "`virsh save`, to compare with",
        suite: Suite::Backports(LIBVIRT_MAJOR_MIN),
    },
    Package {
        name: "libvirt-daemon-driver-qemu",
        provides: "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
        why: "`virsh save`, to compare with",
        suite: Suite::Backports(LIBVIRT_MAJOR_MIN),
    },
    Package {
        name: "libvirt-clients",
        provides: "virsh",
        why: "`virsh save`, to compare with",
        suite: Suite::Backports(LIBVIRT_MAJOR_MIN),
    },
];

/// Does what [`one_qemu`] does, and fetches the other QEMUs.
pub(crate) fn run(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    one_qemu(workspace)?;
    qemus::fetch(workspace)
}

/// Installs what is missing and makes the guests: enough for the tests with the installed QEMU.
pub(crate) fn one_qemu(workspace: &Workspace) -> Result<(), Box<dyn Error>> {
    install_missing(PACKAGES.iter())?;
    guest::make(workspace)
}

/// Installs what is missing for the tests and for the benchmarks.
pub(crate) fn for_bench() -> Result<(), Box<dyn Error>> {
    install_missing(PACKAGES.iter().chain(&BENCH_PACKAGES))
}

fn install_missing(packages: impl Iterator<Item = &'static Package>) -> Result<(), Box<dyn Error>> {
    let qemu_is_old = qemu_major().is_none_or(|major| major < QEMU_MAJOR_MIN);
    let missing: Vec<&Package> = packages
        .filter(|package| {
            let too_old = package.name == "qemu-system-x86" && qemu_is_old;
            too_old || !is_present(package.provides)
        })
        .collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

fn install(missing: &[&Package]) -> Result<(), Box<dyn Error>> {
    for package in missing {
        say(&format!("install {}: {}", package.name, package.why));
    }
    if find_in_path("apt-get").is_none() {
        return Err("no apt-get here: install these by other means, QEMU 9.0 or later".into());
    }
    apt_get(&["update", "-qq"])?;
    let backports = backports_if_needed(missing)?;
    for from_backports in [true, false] {
        let names: Vec<&str> = missing
            .iter()
            .filter(|package| (package.suite != Suite::Own) == from_backports)
            .map(|package| package.name)
            .collect();
        if names.is_empty() {
            continue;
        }
        let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
        if let (true, Some(release)) = (from_backports, &backports) {
            arguments.extend(["-t", release]);
        }
        arguments.extend(names);
        apt_get(&arguments)?;
    }
    match qemu_major() {
        Some(major) if major >= QEMU_MAJOR_MIN => Ok(()),
        found => Err(format!("QEMU {found:?} found, {QEMU_MAJOR_MIN} or later needed").into()),
    }
}

/// Returns the name of the backports release if the distribution's own version of a missing package
/// is too old. Adds the release to apt's sources if it is not there yet.
fn backports_if_needed(missing: &[&Package]) -> Result<Option<String>, Box<dyn Error>> {
    let mut too_old = None;
    for package in missing {
        let Suite::Backports(major_min) = package.suite else { continue };
        let policy = output(Command::new("apt-cache").args(["policy", package.name]))?;
        if candidate_major(&policy).is_none_or(|major| major < major_min) {
            too_old = Some((package.name, major_min));
        }
    }
    let Some((name, major_min)) = too_old else { return Ok(None) };
    let codename = own_codename()?;
    let release = format!("{codename}-backports");
    let targets = index_targets()?;
    if mirror_of(&targets, &release).is_none() {
        let mirror = mirror_of(&targets, &codename)
            .ok_or_else(|| format!("apt has no source for {codename} main to find backports by"))?;
        say(&format!("add {BACKPORTS_LIST}: {codename} has {name} older than {major_min}"));
        let entry = format!("deb [signed-by={KEYRING}] {mirror} {release} main\n");
        write_as_root(BACKPORTS_LIST, &entry)?;
        apt_get(&["update", "-qq"])?;
    }
    Ok(Some(release))
}

/// Returns the major version of the QEMU that is installed.
fn qemu_major() -> Option<u32> {
    let program = env::var("VMFILE_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
    qemu_version(Path::new(&program))?.split('.').next()?.parse().ok()
}

fn is_present(what: &str) -> bool {
    if what.starts_with('/') { Path::new(what).exists() } else { find_in_path(what).is_some() }
}
