//! What this guest needs from its kernel: mounts, modules, hot-plugged memory, and lists of CPUs,
//! memory and devices.

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use rustix::system::finit_module;

/// The directory of the modules in the initramfs; the order of their names is the order of loading.
const MODULES: &str = "/modules";

pub(crate) fn mount_kernel_file_systems() -> io::Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target)?;
        mount(kind, target, kind, MountFlags::empty(), None)?;
    }
    Ok(())
}

/// Loads every module of the initramfs and returns their names.
pub(crate) fn load_modules() -> Result<Vec<String>, Box<dyn Error>> {
    let mut names = Vec::new();
    for name in sorted_names(MODULES)? {
        let path = Path::new(MODULES).join(&name);
        let name = name.to_string_lossy().into_owned();
        finit_module(&File::open(path)?, c"", 0).map_err(|error| format!("{name}: {error}"))?;
        names.push(name);
    }
    Ok(names)
}

/// Lets the machine sleep (ACPI S3); returns once something has woken it.
pub(crate) fn sleep() -> io::Result<()> {
    fs::write("/sys/power/state", "mem")
}

/// Tells the kernel to use memory that was plugged in: the kernel leaves this to user space.
pub(crate) fn bring_memory_online() -> io::Result<()> {
    let blocks = match fs::read_dir("/sys/devices/system/memory") {
        Ok(blocks) => blocks,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for block in blocks {
        let state = block?.path().join("state");
        if fs::read_to_string(&state).is_ok_and(|state| state.trim() == "offline") {
            fs::write(&state, "online")?;
        }
    }
    Ok(())
}

/// Describes CPUs, memory, NUMA nodes and devices, a line for each.
pub(crate) fn describe() -> Result<Vec<String>, Box<dyn Error>> {
    let mut lines = vec![
        format!("cpus {}", online_cpus()?),
        format!("memory {} MiB", memory_mib()?),
        format!("nodes {}", numbered_entries("/sys/devices/system/node", "node")),
    ];
    let mut drivers = Vec::new();
    for device in sorted_names("/sys/bus/virtio/devices").unwrap_or_default() {
        let driver = Path::new("/sys/bus/virtio/devices").join(device).join("driver");
        if let Ok(driver) = fs::read_link(driver) {
            let name = driver.file_name().unwrap_or_default().to_string_lossy().into_owned();
            lines.push(format!("device {name} present"));
            drivers.push(name);
        }
    }
    if drivers.iter().any(|name| name == "virtio_rng") {
        let mut bytes = [0; 16];
        File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
        lines.push(format!("hwrng {} bytes", bytes.len()));
    }
    let interfaces = sorted_names("/sys/class/net").unwrap_or_default();
    let interfaces: Vec<_> = interfaces.iter().map(|name| name.to_string_lossy()).collect();
    lines.push(format!("interfaces: {}", interfaces.join(" ")));
    lines.push(format!("devices: {}", drivers.join(" ")));
    Ok(lines)
}

/// Returns how many CPUs are online.
pub(crate) fn online_cpus() -> io::Result<usize> {
    let stat = fs::read_to_string("/proc/stat")?;
    Ok(stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count())
}

/// Returns the kernel's `MemTotal` in MiB.
pub(crate) fn memory_mib() -> Result<u64, Box<dyn Error>> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .ok_or("no MemTotal in /proc/meminfo")?;
    Ok(kib.parse::<u64>()? / 1024)
}

/// Counts the entries of `directory` that are `prefix` and a number.
fn numbered_entries(directory: &str, prefix: &str) -> usize {
    sorted_names(directory)
        .unwrap_or_default()
        .iter()
        .filter_map(|name| name.to_str()?.strip_prefix(prefix)?.parse::<u32>().ok())
        .count()
}

fn sorted_names(directory: &str) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name());
    }
    names.sort();
    Ok(names)
}
