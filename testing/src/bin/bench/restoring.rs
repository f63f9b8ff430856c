//! Restore by map: its time must not grow with RAM, and clones must share it.

use std::ffi::OsString;
use std::fs;
use std::process::Stdio;
use std::time::Instant;

use serde_json::Value;
use vmfile_bench::page_cache::make_cold;
use vmfile_testing::{Guest, Prepared, Ram, TestResult};

use crate::host::number_of;
use crate::report::Report;
use crate::saving::{boot, mib};
use crate::series::Series;
use crate::{Bench, Saved};

/// How many guests run from one file.
const CLONES: usize = 32;

pub(crate) fn measure(bench: &Bench, saved: &Saved, report: &mut Report) -> TestResult {
    resume(bench, saved, report)?;
    clones(bench, saved, report)
}

/// From QEMU's first answer to the running guest, for a small and a large one.
fn resume(bench: &Bench, saved: &Saved, report: &mut Report) -> TestResult {
    let config = Guest::linux(Ram::memfd(1024)).fill_mib(700).data_share(230);
    let file = bench.tools.file("1.vmf");
    let mut guest = boot(bench, &config)?;
    guest.resume()?;
    let socket = guest.qmp_path();
    bench.tools.run(&["save".as_ref(), socket.as_os_str(), file.as_os_str()])?;
    drop(guest);

    let cases = [(1024, &config, &file), (bench.scale.ram_mib, &saved.config, &saved.file)];
    let series = |what: &str| {
        cases.map(|(ram_mib, _, _)| Series::new(format!("restore by map, {ram_mib} MiB: {what}")))
    };
    let (mut starts, mut resumes) = (series("QEMU starts"), series("guest runs, after that"));
    for round in 0..=bench.scale.rounds {
        for (index, (_, config, file)) in cases.iter().enumerate() {
            make_cold(file)?;
            let (run, guest) = bench.tools.restore(&bench.qemu, config, file, "map")?;
            if round == 0 {
                guest.wait_for_passes(1)?;
            } else {
                starts[index].push(run.number("qemu_start_seconds")?);
                resumes[index].push(run.number("resume_seconds")?);
            }
        }
    }
    for (index, (ram_mib, _, _)) in cases.iter().enumerate() {
        report.row(&starts[index]);
        report.row(&resumes[index]);
        let what = format!("restore, map: guest runs, {ram_mib} MiB of RAM, cold");
        report.at_most(&what, resumes[index].median() * 1e3, 20.0, "ms");
    }
    bench.tools.make_way(&file)
}

/// All at once, as a shell would start them with `&` and `wait`.
fn clones(bench: &Bench, saved: &Saved, report: &mut Report) -> TestResult {
    let mut times = Series::new(format!("restore by map, {CLONES} clones at once"));
    let mut memory_mib: f64 = 0.0;
    // Many QEMUs take long to end; three rounds are enough for a figure of seconds.
    for _ in 0..3 {
        make_cold(&saved.file)?;
        let vms: Vec<Prepared> =
            (0..CLONES).map(|_| saved.config.prepare(&bench.qemu)).collect::<TestResult<_>>()?;
        let started = Instant::now();
        let reports = start_all(bench, saved, &vms)?;
        times.push(started.elapsed().as_secs_f64());
        let memory: Vec<_> = reports.iter().map(memory_of).collect();
        // Whatever failed, those that run are ended.
        let guests: Vec<_> = vms.into_iter().map(Prepared::attach).collect();
        for guest in guests {
            drop(guest?);
        }
        for memory in memory {
            memory_mib = memory_mib.max(memory?);
        }
    }
    report.row(&times);
    let ram_mib = bench.scale.ram_mib;
    let what = format!("restore, map: {CLONES} clones of {ram_mib} MiB, all running, cold");
    report.at_most(&what, times.median(), 4.0, "s");
    let what = format!("restore, map: memory (PSS) of the largest of {CLONES} clones");
    report.at_most(&what, memory_mib, 64.0, "MiB");
    Ok(())
}

fn start_all(bench: &Bench, saved: &Saved, vms: &[Prepared]) -> TestResult<Vec<Value>> {
    let mut restores = Vec::new();
    for vm in vms {
        let mut words = ["--json", "restore", "--mode", "map"].map(OsString::from).to_vec();
        words.extend([saved.file.clone().into(), "--".into()]);
        words.extend(vm.command_line());
        restores.push(bench.tools.vmfile().args(words).stdout(Stdio::piped()).spawn()?);
    }
    let outputs: Vec<_> = restores.into_iter().map(|child| child.wait_with_output()).collect();
    let report = |output: std::io::Result<std::process::Output>| {
        let output = output?;
        // A restore that failed has no report, and its VM nobody to name it.
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    };
    outputs.into_iter().map(report).collect()
}

/// Returns the memory of a clone, with its part of what it shares with others, in MiB.
fn memory_of(report: &Value) -> TestResult<f64> {
    let pid = report["pid"].as_u64().ok_or("a clone was not restored")?;
    let list = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    Ok(mib(number_of(&list, "Pss")?))
}
