//! Restores a saved VM in every way that this host has, from the page cache and from the disk.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmfile_qemu::Vm;

use crate::bench::Bench;
use crate::error::BenchError;
use crate::fio;
use crate::guest::{Machine, Qemu, sockets};
use crate::libvirt::{Libvirt, VirshWay};
use crate::page_cache;
use crate::process;
use crate::qemu_ways::QemuWay;
use crate::report::{Family, Run};
use crate::rounds::Measured;
use crate::saving::gib;

/// How long QEMU may take.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// A way of restoring, and the file that it restores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RestoreWay {
    pub(crate) by: By,
    pub(crate) file: PathBuf,
    pub(crate) is_cold: bool,
}

/// Who restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// fio reads as many bytes as a restore.
    Disk,
    /// `vmfile restore --mode`.
    Vmfile(&'static str),
    /// QEMU alone, from a file that vmfile or QEMU wrote.
    Qemu(QemuWay),
    Virsh(VirshWay),
}

impl Measured for RestoreWay {
    fn name(&self) -> String {
        let by = match self.by {
            By::Disk => "fio read limit".to_owned(),
            By::Vmfile(mode) => format!("vmfile restore --mode {mode}"),
            By::Qemu(QemuWay::Exec) => "QEMU -incoming exec:cat <".to_owned(),
            By::Qemu(way) => way.name().replacen("QEMU", "QEMU -incoming", 1),
            By::Virsh(way) => way.name().replacen("save", "restore", 1),
        };
        format!("{by}, {}", self.state())
    }

    fn short(&self) -> String {
        let by = match self.by {
            By::Disk => "fio".to_owned(),
            By::Vmfile(mode) => mode.to_owned(),
            By::Qemu(way) => way.short(),
            By::Virsh(way) => way.short(),
        };
        format!("{by} {}", self.state())
    }

    fn family(&self) -> Family {
        match self.by {
            By::Disk => Family::Disk,
            By::Vmfile(_) => Family::Vmfile,
            By::Qemu(_) => Family::Qemu,
            By::Virsh(_) => Family::Libvirt,
        }
    }
}

impl RestoreWay {
    fn state(&self) -> &'static str {
        if self.is_cold { "cold" } else { "warm" }
    }
}

/// Restores a VM once, and ends it. `data_bytes` is the length of the pages in the file.
pub(crate) fn restore(
    bench: &Bench<'_>,
    machine: &Machine,
    libvirt: Option<&Libvirt>,
    way: &RestoreWay,
    data_bytes: u64,
) -> Result<Run, BenchError> {
    // Before the page cache is prepared, because the domain frees its memory.
    if let By::Virsh(_) = way.by {
        let libvirt = libvirt.ok_or_else(|| BenchError::program("virsh", "no libvirt"))?;
        libvirt.destroy()?;
    }
    page_cache::prepare(&way.file, way.is_cold, bench.stop)?;
    let mut run = match way.by {
        By::Disk => {
            Run { seconds: fio::read(&way.file, data_bytes, bench.stop)?, ..Run::default() }
        }
        By::Vmfile(mode) => {
            let (run, pid) = by_vmfile(bench, machine, &way.file, mode)?;
            process::end(pid)?;
            run
        }
        By::Qemu(by) => by_qemu(bench, machine, &way.file, by)?,
        By::Virsh(by) => {
            let libvirt = libvirt.ok_or_else(|| BenchError::program("virsh", "no libvirt"))?;
            Run { seconds: libvirt.restore(by, &way.file, bench.stop)?, ..Run::default() }
        }
    };
    run.gib_per_second = gib(data_bytes) / run.seconds;
    Ok(run)
}

/// Restores with vmfile; returns also QEMU's process id.
pub(crate) fn by_vmfile(
    bench: &Bench<'_>,
    machine: &Machine,
    file: &Path,
    mode: &str,
) -> Result<(Run, u32), BenchError> {
    let (run, pid, _) = by_vmfile_in(bench, machine, file, mode)?;
    Ok((run, pid))
}

/// Does the same, and keeps the directory of QEMU's sockets.
pub(crate) fn by_vmfile_in(
    bench: &Bench<'_>,
    machine: &Machine,
    file: &Path,
    mode: &str,
) -> Result<(Run, u32, TempDir), BenchError> {
    let directory = sockets()?;
    let mut words: Vec<OsString> =
        ["restore".into(), file.into(), "--mode".into(), mode.into(), "--".into()].into();
    words.extend(machine.command_line(directory.path()));
    let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
    let (report, usage) = bench.vmfile(&words)?;
    let pid = report["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    let pid = pid.ok_or_else(|| BenchError::program("vmfile", "the report names no process"))?;
    // The CPU time that QEMU has used so far belongs to the restore.
    let theirs = process::cpu_seconds(pid).unwrap_or(0.0);
    let cpu_seconds = Some(usage.cpu_seconds + theirs);
    let run = Run {
        seconds: usage.seconds,
        cpu_seconds,
        qemu_start_seconds: report["qemu_start_seconds"].as_f64(),
        resume_seconds: report["resume_seconds"].as_f64(),
        ..Run::default()
    };
    Ok((run, pid, directory))
}

/// Restores with QEMU alone; measures from QEMU's start until the VM has all its memory.
fn by_qemu(
    bench: &Bench<'_>,
    machine: &Machine,
    file: &Path,
    way: QemuWay,
) -> Result<Run, BenchError> {
    let started = Instant::now();
    let qemu = Qemu::start(machine, &["-incoming", "defer", "-S"])?;
    let mut vm = Vm::connect(&qemu.socket())?;
    way.expect(&mut vm)?;
    let uri = match way {
        QemuWay::Exec => format!("exec:cat '{}'", file.display()),
        _ => format!("file:{}", file.display()),
    };
    vm.execute("migrate-incoming", json!({ "uri": uri }))?;
    loop {
        let answer = vm.execute("query-migrate", Value::Null)?;
        match answer.get("status").and_then(Value::as_str) {
            Some("completed") => break,
            Some("failed") => {
                let said = answer.get("error-desc").and_then(Value::as_str).unwrap_or("it failed");
                return Err(BenchError::program("QEMU", said));
            }
            _ if bench.stop.load(Ordering::Relaxed) => return Err(BenchError::Stopped),
            _ if started.elapsed() > TIMEOUT => {
                let what = "a restore by QEMU".to_owned();
                return Err(BenchError::TimedOut { what, seconds: TIMEOUT.as_secs() });
            }
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let cpu_seconds = process::cpu_seconds(qemu.pid());
    Ok(Run { seconds, cpu_seconds, ..Run::default() })
}
