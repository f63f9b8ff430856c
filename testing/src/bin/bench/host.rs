//! The machine, in the words that its kernel and its programs use.

use std::fs;
use std::path::Path;
use std::process::Command;

use vmfile_testing::{Qemu, TestResult};

use crate::tools::Tools;

/// Returns what a reader must know to judge the figures: a name and a value each.
pub(crate) fn describe(tools: &Tools, qemu: &Qemu) -> TestResult<Vec<(&'static str, String)>> {
    let cpu_info = fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpu_info.lines().find_map(|line| line.strip_prefix("model name"));
    let cpu = cpu.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, name)| name);
    let processors = cpu_info.lines().filter(|line| line.starts_with("processor")).count();
    let commit = said(Command::new("git").args(["rev-parse", "--short=12", "HEAD"]));
    let changed = said(Command::new("git").args(["status", "--porcelain", "--", "crates"]));
    let changed = if changed.is_empty() { "" } else { ", with changes in crates/" };
    Ok(vec![
        ("CPU", format!("{processors} x {cpu}")),
        ("memory", format!("{} MiB", memory_kib("MemTotal")? >> 10)),
        ("kernel", kernel()?),
        ("file system", file_system(tools.directory())?),
        ("QEMU", format!("{}, emulation (no KVM)", qemu.version())),
        ("fio", said(Command::new("fio").arg("--version"))),
        ("vmfile", format!("{}, commit {commit}{changed}", said(tools.vmfile().arg("--version")))),
        ("date", said(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]))),
        ("load before", load()?),
    ])
}

/// Reads a line of `/proc/meminfo`.
pub(crate) fn memory_kib(name: &str) -> TestResult<u64> {
    number_of(&fs::read_to_string("/proc/meminfo")?, name)
}

/// Reads `NAME:  N kB` from one of the kernel's lists.
pub(crate) fn number_of(list: &str, name: &str) -> TestResult<u64> {
    let line = list.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
    number.ok_or_else(|| format!("the kernel names no {name}").into())
}

/// Returns the kernel's version without what its builder appended.
fn kernel() -> TestResult<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(format!("Linux {}", release.trim().split('-').next().unwrap_or_default()))
}

/// Returns how busy the machine was in the last 1, 5 and 15 minutes.
fn load() -> TestResult<String> {
    let averages = fs::read_to_string("/proc/loadavg")?;
    Ok(averages.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

/// Returns the kind of the file system and its device; where it is mounted is nobody's business.
fn file_system(directory: &Path) -> TestResult<String> {
    let find =
        |column| said(Command::new("findmnt").args(["-n", "-o", column, "-T"]).arg(directory));
    let device = fs::canonicalize(Path::new("/sys/dev/block").join(find("MAJ:MIN")));
    let device =
        device.ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let device = device.unwrap_or_else(|| "an unknown device".to_owned());
    Ok(format!("{} on {device}", find("FSTYPE")))
}

/// Returns what a program prints, or "unknown".
fn said(command: &mut Command) -> String {
    match command.output() {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => "unknown".to_owned(),
    }
}
