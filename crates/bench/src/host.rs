//! Describes the machine, as its kernel and programs describe it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use vmfile_qemu::program_version;

use crate::options::BenchOptions;
use crate::process::number_of;
use crate::report::Host;

/// Returns what a reader of the figures must know about the machine.
pub(crate) fn describe(options: &BenchOptions, command: Vec<String>) -> Host {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpu_info = read("/proc/cpuinfo");
    let cpu = cpu_info.lines().find_map(|line| line.strip_prefix("model name"));
    let cpu = cpu.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, name)| name);
    let processors = cpu_info.lines().filter(|line| line.starts_with("processor")).count();
    let release = read("/proc/sys/kernel/osrelease");
    let version = program_version(&options.qemu).map(|version| version.to_string());
    let load = read("/proc/loadavg");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Host {
        cpu: format!("{processors} x {cpu}"),
        memory_bytes: number_of(&read("/proc/meminfo"), "MemTotal").unwrap_or(0),
        // Without the builder's suffix.
        kernel: format!("Linux {}", release.trim().split('-').next().unwrap_or_default()),
        file_system: file_system(&options.directory),
        qemu: version.unwrap_or_else(|_| "unknown".to_owned()),
        kvm: false,
        fio: said(Command::new("fio").arg("--version")),
        libvirt: said(Command::new("libvirtd").arg("--version"))
            .and_then(|text| text.rsplit(' ').next().map(str::to_owned)),
        vmfile: said(Command::new(&options.program).arg("--version"))
            .and_then(|text| text.rsplit(' ').next().map(str::to_owned))
            .unwrap_or_default(),
        began_unix_seconds: now.as_secs(),
        load: load.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0),
        command,
    }
}

/// Returns the kind of the file system and its device; where it is mounted is not reported.
fn file_system(directory: &Path) -> String {
    let find =
        |column| said(Command::new("findmnt").args(["-n", "-o", column, "-T"]).arg(directory));
    let device = find("MAJ:MIN").and_then(|number| {
        let path = fs::canonicalize(Path::new("/sys/dev/block").join(number)).ok()?;
        Some(path.file_name()?.to_string_lossy().into_owned())
    });
    let kind = find("FSTYPE").unwrap_or_else(|| "an unknown file system".to_owned());
    device.map_or(kind.clone(), |device| format!("{kind} on {device}"))
}

/// Returns what a program prints; `None` if it does not run.
pub(crate) fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
