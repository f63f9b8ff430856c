//! Saves one paused VM in every way that this host has.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use vmfile_engine::resident_bytes;

use crate::bench::Bench;
use crate::error::BenchError;
use crate::fio;
use crate::guest::Subject;
use crate::libvirt::{Libvirt, VirshWay};
use crate::process;
use crate::qemu_ways::{QemuWay, save_by_shell};
use crate::report::{Family, Run};
use crate::rounds::Measured;

/// A way of saving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SaveWay {
    /// fio writes as many bytes as a save.
    Disk,
    /// `vmfile save`, by the route that it chooses.
    Vmfile,
    VmfileStream,
    VmfileNative,
    /// `vmfile save --live`, while the guest runs.
    VmfileLive,
    /// The same, with QEMU sending the memory.
    VmfileLiveStream,
    /// `migrate "exec:vmfile receive"`.
    VmfileReceive,
    Qemu(QemuWay),
    Virsh(VirshWay),
}

impl Measured for SaveWay {
    fn name(&self) -> String {
        match self {
            SaveWay::Disk => "fio write limit".to_owned(),
            SaveWay::Vmfile => "vmfile save".to_owned(),
            SaveWay::VmfileStream => "vmfile save --route stream".to_owned(),
            SaveWay::VmfileNative => "vmfile save --route native".to_owned(),
            SaveWay::VmfileLive => "vmfile save --live".to_owned(),
            SaveWay::VmfileLiveStream => "vmfile save --live --route stream".to_owned(),
            SaveWay::VmfileReceive => "QEMU exec:vmfile receive".to_owned(),
            SaveWay::Qemu(way) => way.name(),
            SaveWay::Virsh(way) => way.name(),
        }
    }

    fn short(&self) -> String {
        match self {
            SaveWay::Disk => "fio".to_owned(),
            SaveWay::Vmfile => "vmfile".to_owned(),
            SaveWay::VmfileStream => "stream".to_owned(),
            SaveWay::VmfileNative => "native".to_owned(),
            SaveWay::VmfileLive => "live".to_owned(),
            SaveWay::VmfileLiveStream => "live, stream".to_owned(),
            SaveWay::VmfileReceive => "receive".to_owned(),
            SaveWay::Qemu(way) => way.short(),
            SaveWay::Virsh(way) => way.short(),
        }
    }

    fn family(&self) -> Family {
        match self {
            SaveWay::Disk => Family::Disk,
            SaveWay::Qemu(_) => Family::Qemu,
            SaveWay::Virsh(_) => Family::Libvirt,
            _ => Family::Vmfile,
        }
    }
}

/// Saves the subject in one way. `data_bytes` is how many bytes of pages a save writes.
pub(crate) fn save(
    bench: &Bench<'_>,
    subject: &Subject,
    libvirt: Option<&Libvirt>,
    way: SaveWay,
    (file, data_bytes): (&Path, u64),
) -> Result<Run, BenchError> {
    bench.remove_and_sync(file)?;
    let route = |route: &'static str| vmfile(bench, subject, file, &["--route", route]);
    let mut run = match way {
        SaveWay::Disk => {
            Run { seconds: fio::write(file, data_bytes, bench.stop)?, ..Run::default() }
        }
        SaveWay::Vmfile => route("auto")?,
        SaveWay::VmfileStream => route("stream")?,
        SaveWay::VmfileNative => route("native")?,
        SaveWay::VmfileLive => live(bench, subject, file, &["--live"])?,
        SaveWay::VmfileLiveStream => live(bench, subject, file, &["--live", "--route", "stream"])?,
        SaveWay::VmfileReceive => stands_still(receive(bench, subject, file)?),
        SaveWay::Qemu(way) => stands_still(way.save(subject, file, bench.stop)?),
        SaveWay::Virsh(way) => {
            let libvirt = libvirt.ok_or_else(|| BenchError::program("virsh", "no libvirt"))?;
            let seconds = libvirt.save(way, file, bench.stop)?;
            Run { seconds, pause_seconds: Some(seconds), ..Run::default() }
        }
    };
    if way != SaveWay::Disk {
        run.cached_bytes = File::open(file)
            .and_then(|file| resident_bytes(file.as_fd(), 0..file.metadata()?.len()))
            .ok();
    }
    run.gib_per_second = gib(data_bytes) / run.seconds;
    Ok(run)
}

/// Returns bytes as GiB.
pub(crate) fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64
}

/// Returns the run of a way during which the guest stands still all the time.
fn stands_still(usage: process::Usage) -> Run {
    Run { pause_seconds: Some(usage.seconds), ..used(usage) }
}

pub(crate) fn used(usage: process::Usage) -> Run {
    Run {
        seconds: usage.seconds,
        cpu_seconds: Some(usage.cpu_seconds),
        peak_memory_bytes: Some(usage.peak_bytes),
        ..Run::default()
    }
}

fn vmfile(
    bench: &Bench<'_>,
    subject: &Subject,
    file: &Path,
    more: &[&str],
) -> Result<Run, BenchError> {
    let meter = process::Meter::start(subject.pid());
    let mut words: Vec<&OsStr> = ["save", "--force"].map(OsStr::new).to_vec();
    words.extend(more.iter().map(OsStr::new));
    if !more.contains(&"--live") {
        words.extend(["--after", "pause"].map(OsStr::new));
    }
    words.extend([subject.socket().as_os_str(), file.as_os_str()]);
    let (report, usage) = bench.vmfile(&words)?;
    let theirs = meter.finish();
    let mut run = used(usage);
    run.cpu_seconds = Some(usage.cpu_seconds + theirs.cpu_seconds);
    run.pause_seconds = report["pause_seconds"].as_f64();
    if report["route"] != "direct" && !more.contains(&"--live") {
        // QEMU leaves a VM that was sent in the state postmigrate: after `cont` and `stop` it is
        // paused as before.
        let mut vm = subject.connect()?;
        vm.cont()?;
        vm.stop()?;
    }
    Ok(run)
}

/// Lets the guest run during the save, and pauses it again afterwards.
fn live(
    bench: &Bench<'_>,
    subject: &Subject,
    file: &Path,
    words: &[&str],
) -> Result<Run, BenchError> {
    subject.connect()?.cont()?;
    let run = vmfile(bench, subject, file, words);
    subject.connect()?.stop()?;
    run
}

fn receive(
    bench: &Bench<'_>,
    subject: &Subject,
    file: &Path,
) -> Result<process::Usage, BenchError> {
    let program = bench.options.program.display();
    let command = format!("'{program}' receive --quiet --force '{}'", file.display());
    save_by_shell(subject, &command, file, bench.stop)
}
