//! Measures one guest in all ways, round by round.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use vmfile_engine::available_memory;
use vmfile_qemu::{Feature, QemuVersion};

use crate::bench::Bench;
use crate::checkpoints::CheckpointWay;
use crate::error::BenchError;
use crate::guest::Subject;
use crate::host::said;
use crate::libvirt::{Libvirt, VirshWay};
use crate::options::BenchOptions;
use crate::progress::Progress;
use crate::qemu_ways::QemuWay;
use crate::reading::ReadWay;
use crate::report::{GuestResults, GuestShape, Way};
use crate::restoring::{By, RestoreWay, restore};
use crate::rounds::{self, Entry, Measured as _};
use crate::saving::{SaveWay, gib, save};

/// How many files, each as long as the guest's data, are on the disk at once.
const FILES: u64 = 7;

/// Measures one guest.
pub(crate) fn measure(
    bench: &mut Bench<'_>,
    subject: &Subject,
    shape: GuestShape,
    version: QemuVersion,
    progress: &Progress<'_>,
) -> Result<GuestResults, BenchError> {
    progress.say(&format!("guest: {}", shape.name));
    let data_bytes = data_of(bench, subject)?;
    check_room(bench, data_bytes)?;
    let libvirt = libvirt(bench, subject);
    let ways = ways(bench, version, libvirt.is_some());
    let ways = tuned(bench, subject, ways, version, data_bytes, progress);
    let entries = ways.into_iter().map(|way| Entry::new(way, bench.file(file_name(way)))).collect();
    let saves = rounds::measure(bench, entries, progress, |bench, entry: &Entry<SaveWay>| {
        let run = save(bench, subject, libvirt.as_ref(), entry.way, (&entry.file, data_bytes))?;
        if !is_kept(entry.way) {
            bench.remove_and_sync(&entry.file)?;
        }
        Ok(run)
    });
    let reads = reads(bench, data_bytes, progress);
    let checkpoints = checkpoints(bench, subject, progress);
    let restores = restores(bench, subject, libvirt.as_ref(), (version, data_bytes), progress)?;
    Ok(GuestResults {
        guest: GuestShape { data_bytes, ..shape },
        saves,
        restores,
        reads,
        checkpoints,
    })
}

/// Saves once to find out how many bytes of data the guest has.
fn data_of(bench: &Bench<'_>, subject: &Subject) -> Result<u64, BenchError> {
    let file = bench.file("first.vmf");
    let words = ["save", "--force", "--after", "pause"].map(std::ffi::OsStr::new);
    let words = [&words[..], &[subject.socket().as_os_str(), file.as_os_str()]].concat();
    let (report, _) = bench.vmfile(&words)?;
    bench.remove_and_sync(&file)?;
    let bytes = report["bytes_written"].as_u64();
    bytes.ok_or_else(|| BenchError::program("vmfile", "the report has no bytes_written"))
}

fn check_room(bench: &Bench<'_>, data_bytes: u64) -> Result<(), BenchError> {
    let needed_bytes = data_bytes * FILES;
    let directory = std::fs::File::open(bench.directory.path());
    let available = directory.and_then(|directory| vmfile_engine::available_space(&directory));
    let available_bytes = available.map_err(BenchError::system("ask for free space"))?;
    if needed_bytes > available_bytes {
        return Err(BenchError::NoRoom { needed_bytes, available_bytes });
    }
    Ok(())
}

/// Starts libvirt if it is installed and the host has memory for its guest.
fn libvirt(bench: &mut Bench<'_>, subject: &Subject) -> Option<Libvirt> {
    const WHAT: &str = "virsh save";
    if !VirshWay::ALL.iter().any(|way| bench.measures(&SaveWay::Virsh(*way).name())) {
        return None;
    }
    let Some(machine) = subject.machine() else {
        bench.note(WHAT, "the VM is not libvirt's");
        return None;
    };
    let is_here = ["virsh", "libvirtd"]
        .iter()
        .all(|name| said(std::process::Command::new(name).arg("--version")).is_some());
    if !is_here {
        bench.note(WHAT, "libvirt is not installed: virsh, libvirtd and its driver for QEMU");
        return None;
    }
    if available_memory() < machine.ram_bytes + (1 << 30) {
        bench.note(
            WHAT,
            format!("no memory for another guest of {:.0} GiB", gib(machine.ram_bytes)),
        );
        return None;
    }
    let started = Libvirt::start(machine, bench.options.contents, bench.stop);
    started.map_err(|error| bench.note(WHAT, error.in_words())).ok()
}

/// Returns the ways of saving that this host has.
fn ways(bench: &mut Bench<'_>, version: QemuVersion, with_libvirt: bool) -> Vec<SaveWay> {
    let mut ways = Vec::new();
    if said(std::process::Command::new("fio").arg("--version")).is_some() {
        ways.push(SaveWay::Disk);
    } else {
        bench.note("fio write limit", "fio is not installed");
    }
    ways.extend([SaveWay::Vmfile, SaveWay::VmfileStream]);
    let mut since = |way: SaveWay, feature: Feature| {
        if version.has(feature) {
            ways.push(way);
        } else {
            let why = format!("QEMU {version} cannot, {} can", feature.since());
            bench.note(&way.name(), why);
        }
    };
    since(SaveWay::VmfileNative, Feature::MigrationDirectIo);
    since(SaveWay::VmfileLive, Feature::BackgroundSnapshot);
    since(SaveWay::VmfileLiveStream, Feature::BackgroundSnapshot);
    since(SaveWay::Qemu(QemuWay::Stream), Feature::FileUri);
    since(SaveWay::Qemu(QemuWay::MappedRam), Feature::MappedRam);
    ways.extend([SaveWay::VmfileReceive, SaveWay::Qemu(QemuWay::Exec)]);
    if with_libvirt {
        ways.extend(VirshWay::ALL.map(SaveWay::Virsh));
    }
    ways
}

/// Adds QEMU's multifd with the best number of channels; tries each number twice.
fn tuned(
    bench: &mut Bench<'_>,
    subject: &Subject,
    mut ways: Vec<SaveWay>,
    version: QemuVersion,
    data_bytes: u64,
    progress: &Progress<'_>,
) -> Vec<SaveWay> {
    let file = bench.file("tuned");
    for (direct_io, feature) in [(false, Feature::MappedRam), (true, Feature::MigrationDirectIo)] {
        let any = QemuWay::Multifd { channels: 1, direct_io };
        if !version.has(feature) || !bench.measures(&any.name()) {
            continue;
        }
        let mut best: Option<(f64, QemuWay)> = None;
        for channels in [BenchOptions::CHANNELS, BenchOptions::CHANNELS].concat() {
            let way = QemuWay::Multifd { channels, direct_io };
            progress.say(&format!("trying {}", way.name()));
            match save(bench, subject, None, SaveWay::Qemu(way), (&file, data_bytes)) {
                Ok(run) if best.is_none_or(|(seconds, _)| run.seconds < seconds) => {
                    best = Some((run.seconds, way));
                }
                Ok(_) => {}
                Err(error) => bench.note(&way.name(), error.in_words()),
            }
        }
        // Next to QEMU's other ways.
        let at = ways.iter().position(|way| *way == SaveWay::VmfileReceive).unwrap_or(ways.len());
        ways.splice(at..at, best.map(|(_, way)| SaveWay::Qemu(way)));
    }
    // If this fails, the file is removed with its directory.
    let _ = bench.remove_and_sync(&file);
    ways
}

/// Whether what was saved is restored later.
fn is_kept(way: SaveWay) -> bool {
    let kept = [SaveWay::Disk, SaveWay::Vmfile, SaveWay::Qemu(QemuWay::Exec)];
    kept.contains(&way) || matches!(way, SaveWay::Virsh(_))
}

fn file_name(way: SaveWay) -> &'static str {
    match way {
        SaveWay::Disk => "fio",
        SaveWay::Vmfile => "saved.vmf",
        SaveWay::Qemu(QemuWay::Exec) => "stream",
        SaveWay::Virsh(way) => way.file_name(),
        _ => "other",
    }
}

/// Restores what was saved.
fn restores(
    bench: &mut Bench<'_>,
    subject: &Subject,
    libvirt: Option<&Libvirt>,
    (version, data_bytes): (QemuVersion, u64),
    progress: &Progress<'_>,
) -> Result<Vec<Way>, BenchError> {
    if !bench.options.restores {
        return Ok(Vec::new());
    }
    let Some(machine) = subject.machine().cloned() else {
        bench.note("restore", "the VM runs, and a second one would take its sockets and disks");
        return Ok(Vec::new());
    };
    let ways = restore_ways(bench, version, libvirt.is_some());
    let entries = ways.into_iter().map(|way| Entry::new(way.clone(), way.file)).collect();
    Ok(rounds::measure(bench, entries, progress, |bench, entry: &Entry<RestoreWay>| {
        restore(bench, &machine, libvirt, &entry.way, data_bytes)
    }))
}

/// Measures the verbs that read what vmfile saved.
fn reads(bench: &mut Bench<'_>, data_bytes: u64, progress: &Progress<'_>) -> Vec<Way> {
    let file = bench.file("saved.vmf");
    if !bench.options.restores || !file.exists() {
        return Vec::new();
    }
    let entries = ReadWay::ALL.map(|way| Entry::new(way, file.clone()));
    rounds::measure(bench, entries.into(), progress, |bench, entry: &Entry<ReadWay>| {
        entry.way.read(bench, &entry.file, data_bytes)
    })
}

/// Measures saves with what vmfile saved as the base.
fn checkpoints(bench: &mut Bench<'_>, subject: &Subject, progress: &Progress<'_>) -> Vec<Way> {
    let base = bench.file("saved.vmf");
    if !bench.options.restores || !base.exists() {
        return Vec::new();
    }
    let Some(machine) = subject.machine().cloned() else {
        bench.note("save --base", "the VM runs, and its memory is not ours to change");
        return Vec::new();
    };
    let entries = CheckpointWay::ALL.map(|way| Entry::new(way, base.clone()));
    let round = AtomicU64::new(0);
    let once = |bench: &Bench<'_>, entry: &Entry<CheckpointWay>| {
        let round = round.fetch_add(1, Ordering::Relaxed);
        entry.way.once(bench, (subject, &machine), &entry.file, round)
    };
    let ways = rounds::measure(bench, entries.into(), progress, once);
    // If this fails, the file is removed with its directory.
    let _ = bench.remove_and_sync(&bench.file("thin.vmf"));
    ways
}

fn restore_ways(bench: &Bench<'_>, version: QemuVersion, with_libvirt: bool) -> Vec<RestoreWay> {
    let file = |name: &str| bench.file(name);
    let exists = |path: &Path| path.exists();
    let mut ways = Vec::new();
    for is_cold in [false, true] {
        let mut add = |by, file: PathBuf| {
            if exists(&file) {
                ways.push(RestoreWay { by, file, is_cold });
            }
        };
        if is_cold {
            add(By::Disk, file("fio"));
        }
        for mode in ["map", "load", "stream"] {
            add(By::Vmfile(mode), file("saved.vmf"));
        }
        if version.has(Feature::MappedRam) {
            add(By::Qemu(QemuWay::MappedRam), file("saved.vmf"));
        }
        if version.has(Feature::MigrationDirectIo) {
            let way = QemuWay::Multifd { channels: 2, direct_io: true };
            add(By::Qemu(way), file("saved.vmf"));
        }
        add(By::Qemu(QemuWay::Exec), file("stream"));
        if with_libvirt {
            for way in VirshWay::ALL {
                add(By::Virsh(way), file(way.file_name()));
            }
        }
    }
    ways
}
