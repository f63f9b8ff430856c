//! The ways of reading a file: restore by load, check, info.

use std::ffi::OsStr;
use std::fs;
use std::sync::atomic::AtomicBool;

use vmfile_bench::fio;
use vmfile_bench::page_cache::{make_cold, make_warm};
use vmfile_testing::TestResult;

use crate::report::Report;
use crate::series::Series;
use crate::{Bench, Saved};

pub(crate) fn measure(bench: &Bench, saved: &Saved, report: &mut Report) -> TestResult {
    let Bench { tools, qemu, scale } = bench;
    let never = AtomicBool::new(false);
    let dense = tools.file("dense");
    tools.make_way(&dense)?;
    fio::write(&dense, saved.bytes, &never)?;
    let mut limit = Series::new("fio read limit");
    let mut load = Series::new("restore by load: guest runs, after QEMU's start");
    let mut whole_load = Series::new("restore by load, with QEMU's start");
    let mut cold = Series::new("check, cold");
    let mut cached = Series::new("check, cached");
    let mut info = Series::new("info");
    let file = saved.file.as_os_str();
    for round in 0..=scale.rounds {
        make_cold(&dense)?;
        let limit_seconds = fio::read(&dense, saved.bytes, &never)?;
        make_cold(&saved.file)?;
        let (run, guest) = tools.restore(qemu, &saved.config, &saved.file, "load")?;
        drop(guest);
        make_cold(&saved.file)?;
        let cold_seconds = tools.run(&[OsStr::new("check"), file])?.seconds;
        make_cold(&saved.file)?;
        let info_seconds = tools.run(&[OsStr::new("info"), file])?.seconds;
        make_warm(&saved.file, &never)?;
        let cached_seconds = tools.run(&[OsStr::new("check"), file])?.seconds;
        if round == 0 {
            continue;
        }
        limit.push(limit_seconds);
        load.push(run.number("resume_seconds")?);
        whole_load.push(run.seconds);
        cold.push(cold_seconds);
        cached.push(cached_seconds);
        info.push(info_seconds);
        println!("round {round} of {}", scale.rounds);
    }
    fs::remove_file(&dense)?;
    for series in [&limit, &load, &whole_load, &cold, &cached, &info] {
        report.row(series);
    }
    report.at_most("restore, load: / fio read, cold", load.ratio(&limit), 1.1, "x");
    report.at_least("check: speed / fio read's, cold", limit.ratio(&cold), 0.9, "x");
    let rate = saved.bytes as f64 / 1e9 / cached.median();
    report.at_least("check: speed, cached", rate, 6.0, "GB/s");
    let ram_mib = scale.ram_mib;
    let what = format!("info: {ram_mib} MiB of RAM, cold");
    report.at_most(&what, info.median() * 1e3, 10.0, "ms");
    Ok(())
}
