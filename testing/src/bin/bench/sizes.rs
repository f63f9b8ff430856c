//! RAM that is not data: it must cost nothing.

use std::ffi::OsStr;
use std::path::Path;

use vmfile_bench::page_cache::make_cold;
use vmfile_testing::{Guest, GuestConfig, Ram, TestResult};

use crate::Bench;
use crate::report::Report;
use crate::saving::boot;
use crate::series::Series;

/// Pages of 256 with random words, so that what the guest fills is data.
const DATA_SHARE: u32 = 230;

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> TestResult {
    untouched(bench, report)?;
    reserved(bench, report)
}

/// 16 GiB of which the guest touches a MiB.
fn untouched(bench: &Bench, report: &mut Report) -> TestResult {
    let file = bench.tools.file("zero.vmf");
    let kinds = [("private", Ram::private(16 << 10)), ("shared", Ram::memfd(16 << 10))];
    for (kind, ram) in kinds {
        let config = Guest::boot_sector(ram.without_reserve()).fill_mib(1);
        let guest = boot(bench, &config)?;
        let mut series = Series::new(format!("save 16 GiB of untouched RAM, {kind}"));
        for round in 0..=bench.scale.rounds {
            let seconds = bench.tools.save(&guest, &file)?.seconds;
            if round > 0 {
                series.push(seconds);
            }
        }
        report.row(&series);
        report.at_most(&format!("zero memory: 16 GiB, {kind}"), series.median(), 0.3, "s");
    }
    bench.tools.make_way(&file)
}

/// A guest of 2 GiB and one of 256 GiB that hold the same 1 GiB of data.
fn reserved(bench: &Bench, report: &mut Report) -> TestResult {
    let config = |gib: u64| {
        let ram = Ram::private(gib << 10).without_reserve();
        Guest::boot_sector(ram).fill_mib(1024).data_share(DATA_SHARE)
    };
    let configs = [config(2), config(256)];
    let files = [bench.tools.file("2.vmf"), bench.tools.file("256.vmf")];
    let series = |verb: &str| {
        [2, 256].map(|gib| Series::new(format!("{verb} {gib} GiB of RAM, 1 GiB of data")))
    };
    let (mut saves, mut checks, mut restores) =
        (series("save"), series("check"), series("restore by map"));
    let guests = [boot(bench, &configs[0])?, boot(bench, &configs[1])?];
    for round in 0..=bench.scale.rounds {
        for ((guest, file), save) in guests.iter().zip(&files).zip(&mut saves) {
            let seconds = bench.tools.save(guest, file)?.seconds;
            if round > 0 {
                save.push(seconds);
            }
        }
    }
    drop(guests);
    for round in 0..=bench.scale.rounds {
        for (index, (config, file)) in configs.iter().zip(&files).enumerate() {
            let (check, restore) = check_and_restore(bench, config, file)?;
            if round > 0 {
                checks[index].push(check);
                restores[index].push(restore);
            }
        }
    }
    for (verb, [small, large]) in [("save", &saves), ("check", &checks), ("restore", &restores)] {
        report.row(small);
        report.row(large);
        let what = format!("RAM size: {verb}, 256 GiB / 2 GiB");
        report.at_most(&what, large.ratio(small), 1.3, "x");
    }
    info(bench, &files[1], report)?;
    files.iter().try_for_each(|file| bench.tools.make_way(file))
}

fn check_and_restore(bench: &Bench, config: &GuestConfig, file: &Path) -> TestResult<(f64, f64)> {
    make_cold(file)?;
    let check = bench.tools.run(&[OsStr::new("check"), file.as_os_str()])?;
    make_cold(file)?;
    let (restore, _guest) = bench.tools.restore(&bench.qemu, config, file, "map")?;
    Ok((check.seconds, restore.seconds))
}

fn info(bench: &Bench, file: &Path, report: &mut Report) -> TestResult {
    let mut series = Series::new("info, 256 GiB of RAM");
    for _ in 0..bench.scale.rounds {
        make_cold(file)?;
        series.push(bench.tools.run(&[OsStr::new("info"), file.as_os_str()])?.seconds);
    }
    report.row(&series);
    report.at_most("info: 256 GiB of RAM, cold", series.median() * 1e3, 10.0, "ms");
    Ok(())
}
