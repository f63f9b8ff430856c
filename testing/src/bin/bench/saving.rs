//! One stopped guest, saved by everybody.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use vmfile_testing::{Guest, GuestConfig, Ram, TestResult};

use crate::libvirt::{self, Libvirt};
use crate::native::{Way, as_before, send};
use crate::report::Report;
use crate::series::Series;
use crate::tools::Tools;
use crate::{Bench, Saved, Scale, fio, host};

/// Pages of 256 with random words; 26 more are all alike, so that none of the filled ones is zero.
const DATA_SHARE: u32 = 230;

/// Most memory of its own that a save may take.
const MEMORY_KIB_MAX: u64 = 64 << 10;

/// Most that the page cache may change by in a direct save.
const PAGE_CACHE_KIB_MAX: u64 = 16 << 10;

/// Who writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    Disk,
    VmfileShared,
    VmfilePrivate,
    /// By QEMU's stream, from private RAM.
    VmfileStream,
    /// `migrate "exec:vmfile receive"`, from private RAM.
    VmfileReceive,
    Qemu(Way),
    /// As above, but from shared RAM.
    QemuShared(Way),
    /// From shared RAM as well.
    Virsh(libvirt::Way),
}

impl Writer {
    fn name(self) -> String {
        match self {
            Writer::Disk => "fio write limit".to_owned(),
            Writer::VmfileShared => "vmfile save, shared RAM".to_owned(),
            Writer::VmfilePrivate => "vmfile save, private RAM".to_owned(),
            Writer::VmfileStream => "vmfile save --route stream, private RAM".to_owned(),
            Writer::VmfileReceive => "QEMU `exec:vmfile receive`".to_owned(),
            Writer::Qemu(way) => way.name(),
            Writer::QemuShared(way) => format!("{}, shared RAM", way.name()),
            Writer::Virsh(way) => format!("{}, shared RAM", way.name()),
        }
    }
}

/// Saves one guest in all ways and leaves it as a file.
pub(crate) fn measure(bench: &Bench, report: &mut Report) -> TestResult<Saved> {
    let Bench { tools, qemu, scale } = bench;
    let config = |ram| Guest::linux(ram).fill_mib(scale.fill_mib).data_share(DATA_SHARE);
    let shared_config = config(Ram::memfd(scale.ram_mib));
    let mut shared = boot(bench, &shared_config)?;
    let mut private = boot(bench, &config(Ram::private(scale.ram_mib)))?;
    println!(
        "{} is at rest, twice: shared and private RAM of {} MiB",
        qemu.version(),
        scale.ram_mib
    );
    let file = tools.file("saved.vmf");
    let bytes = tools.save(&shared, &file)?.count("bytes_written")?;
    report.data_bytes = bytes;

    let libvirt = match Libvirt::is_here() {
        true => Some(Libvirt::start(&shared_config, qemu, scale.ram_mib)?),
        false => None,
    };
    let writers = writers(*scale, libvirt.is_some());
    let mut all: Vec<(Writer, Series)> =
        writers.into_iter().map(|writer| (writer, Series::new(writer.name()))).collect();
    for round in 0..=scale.rounds {
        for (writer, series) in &mut all {
            let seconds = match writer {
                Writer::Disk => disk(tools, bytes)?,
                Writer::VmfileShared => tools.save(&shared, &file)?.seconds,
                Writer::VmfilePrivate => tools.save(&private, &tools.file("private.vmf"))?.seconds,
                Writer::VmfileStream => by_stream(tools, &mut private)?,
                Writer::VmfileReceive => receive(tools, &mut private)?,
                Writer::Qemu(way) => native(tools, *way, &mut private)?,
                Writer::QemuShared(way) => native(tools, *way, &mut shared)?,
                Writer::Virsh(way) => virsh(tools, *way, libvirt.as_ref())?,
            };
            if round > 0 {
                series.push(seconds);
            }
        }
        println!("round {round} of {}", scale.rounds);
    }
    fs::remove_file(tools.file("private.vmf"))?;
    drop(libvirt);
    judge(&all, report);
    cache_and_memory(tools, &shared, &file, report)?;
    // Saved as it ran, so that it comes back running.
    shared.resume()?;
    tools.make_way(&file)?;
    let socket = shared.qmp_path();
    tools.run(&[OsStr::new("save"), socket.as_os_str(), file.as_os_str()])?;
    Ok(Saved { config: shared_config, file, bytes })
}

fn writers(scale: Scale, with_libvirt: bool) -> Vec<Writer> {
    let mut all = vec![
        Writer::Disk,
        Writer::VmfileShared,
        Writer::VmfilePrivate,
        Writer::VmfileStream,
        Writer::VmfileReceive,
    ];
    all.extend(scale.channels.iter().map(|&channels| Writer::Qemu(Way::Multifd(channels))));
    all.extend([Way::Stream, Way::MappedRam, Way::Exec].map(Writer::Qemu));
    all.push(Writer::QemuShared(Way::Multifd(2)));
    if with_libvirt {
        all.extend(libvirt::Way::ALL.map(Writer::Virsh));
    }
    all
}

/// Boots a guest, waits until its memory is filled and judged, and stops it.
pub(crate) fn boot(bench: &Bench, config: &GuestConfig) -> TestResult<Guest> {
    let mut guest = config.boot(&bench.qemu)?;
    guest.wait_for_count(1)?;
    guest.stop()?;
    Ok(guest)
}

fn disk(tools: &Tools, bytes: u64) -> TestResult<f64> {
    let file = tools.file("fio");
    tools.make_way(&file)?;
    let seconds = fio::write(&file, bytes)?;
    fs::remove_file(&file)?;
    Ok(seconds)
}

fn by_stream(tools: &Tools, guest: &mut Guest) -> TestResult<f64> {
    let (file, socket) = (tools.file("stream.vmf"), guest.qmp_path());
    tools.make_way(&file)?;
    let words = ["save", "--route", "stream", "--after", "pause", "--direct-io", "required"];
    let words = words.map(OsStr::new);
    let run = tools.run(&[&words[..], &[socket.as_os_str(), file.as_os_str()]].concat())?;
    as_before(guest)?;
    fs::remove_file(&file)?;
    Ok(run.seconds)
}

fn receive(tools: &Tools, guest: &mut Guest) -> TestResult<f64> {
    let file = tools.file("received.vmf");
    tools.make_way(&file)?;
    Way::Exec.prepare(guest)?;
    let program = tools.program().display();
    let words = "receive --quiet --direct-io required";
    let seconds = send(guest, &format!("'{program}' {words} '{}'", file.display()))?;
    fs::remove_file(&file)?;
    Ok(seconds)
}

fn native(tools: &Tools, way: Way, guest: &mut Guest) -> TestResult<f64> {
    let file = tools.file("native");
    tools.make_way(&file)?;
    let seconds = way.save(guest, &file)?;
    fs::remove_file(&file)?;
    Ok(seconds)
}

fn virsh(tools: &Tools, way: libvirt::Way, libvirt: Option<&Libvirt>) -> TestResult<f64> {
    let file = tools.file("virsh");
    tools.make_way(&file)?;
    let seconds = libvirt.ok_or("no libvirt")?.save(way, &file)?;
    fs::remove_file(&file)?;
    Ok(seconds)
}

fn best_of_qemu(all: &[(Writer, Series)]) -> Option<&(Writer, Series)> {
    let is_qemu = |writer| matches!(writer, Writer::Qemu(_) | Writer::QemuShared(_));
    let qemu = all.iter().filter(|(writer, _)| is_qemu(*writer));
    qemu.min_by(|(_, a), (_, b)| a.median().total_cmp(&b.median()))
}

fn judge(all: &[(Writer, Series)], report: &mut Report) {
    let series =
        |wanted| all.iter().find(|(writer, _)| *writer == wanted).map(|(_, series)| series);
    let (Some(disk), Some(shared), Some(private), Some(exec), Some((_, best))) = (
        series(Writer::Disk),
        series(Writer::VmfileShared),
        series(Writer::VmfilePrivate),
        series(Writer::Qemu(Way::Exec)),
        best_of_qemu(all),
    ) else {
        return;
    };
    for (_, series) in all {
        report.save_row(series, disk);
    }
    report.at_most("save, shared RAM: / fio write", shared.ratio(disk), 1.05, "x");
    report.at_least("save, shared RAM: QEMU's best / ours", best.ratio(shared), 1.6, "x");
    report.at_least("save, shared RAM: `exec:cat` / ours", exec.ratio(shared), 3.5, "x");
    let what = "save, shared RAM: `virsh save --bypass-cache` / ours";
    match series(Writer::Virsh(libvirt::Way::BypassCache)) {
        Some(virsh) => report.at_least(what, virsh.ratio(shared), 2.2, "x"),
        None => report.not_measured(what, "no libvirt"),
    }
    report.at_most("save, private RAM: / fio write", private.ratio(disk), 1.1, "x");
    report.at_least("save, private RAM: QEMU's best / ours", best.ratio(private), 1.4, "x");
    let (stream, receive) = (series(Writer::VmfileStream), series(Writer::VmfileReceive));
    if let (Some(stream), Some(receive)) = (stream, receive) {
        report.at_least("save, stream: QEMU's best / ours", best.ratio(stream), 1.0, "x");
        let what = "`exec:cat` / `exec:vmfile receive`";
        report.at_least(what, exec.ratio(receive), 2.0, "x");
    }
    report.note(format!("QEMU's best is: {}.", best.name));
}

fn cache_and_memory(tools: &Tools, guest: &Guest, file: &Path, report: &mut Report) -> TestResult {
    tools.make_way(file)?;
    let before = host::page_cache_kib()?;
    tools.save(guest, file)?;
    let change_kib = host::page_cache_kib()?.abs_diff(before);
    report.at_most(
        "page cache: change by a direct save",
        mib(change_kib),
        mib(PAGE_CACHE_KIB_MAX),
        "MiB",
    );
    let peak = tools.memory_of_save(guest, file)?;
    report.at_most("our memory: peak of a save", mib(peak), mib(MEMORY_KIB_MAX), "MiB");
    Ok(())
}

/// Returns KiB as MiB.
pub(crate) fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
