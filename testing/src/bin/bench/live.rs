//! A guest that runs while it is saved: how long it stands still, and how long the file becomes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vmfile_testing::{Guest, Ram, TestResult};

use crate::Bench;
use crate::report::Report;
use crate::saving::mib;
use crate::series::Series;

/// RAM of the guests whose pause is measured, and how much of it is data, in MiB.
const SIZES: [(u64, u32); 3] = [(1024, 700), (4096, 1500), (8192, 1500)];

/// Each round boots a guest and fills it, which takes long; a pause of milliseconds needs no more.
const ROUNDS: usize = 3;

/// How long a guest is sent that writes faster.
const BUSY: Duration = Duration::from_secs(15);

const TIMEOUT: Duration = Duration::from_secs(120);

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> TestResult {
    for (ram_mib, fill_mib) in SIZES {
        if ram_mib <= bench.scale.ram_mib * 2 {
            pause(bench, (ram_mib, fill_mib), report)?;
        }
    }
    growth(bench, report)
}

/// The first save of a guest that has just filled its memory, each time anew: QEMU splits huge pages
/// to write-protect them, and a second save meets the pieces.
fn pause(bench: &Bench, (ram_mib, fill_mib): (u64, u32), report: &mut Report) -> TestResult {
    let config = Guest::linux(Ram::private(ram_mib)).fill_mib(fill_mib).data_share(230);
    let mut first = Series::new(format!("save --live, {ram_mib} MiB: pause, first save"));
    let mut second = Series::new(format!("save --live, {ram_mib} MiB: pause, second save"));
    let mut whole = Series::new(format!("save --live, {ram_mib} MiB: all of it"));
    for _ in 0..ROUNDS {
        let guest = config.boot(&bench.qemu)?;
        guest.wait_for_count(1)?;
        let run = save_live(bench, &guest)?;
        first.push(run.number("pause_seconds")?);
        whole.push(run.seconds);
        second.push(save_live(bench, &guest)?.number("pause_seconds")?);
    }
    for series in [&first, &second, &whole] {
        report.row(series);
    }
    let what = format!("pause, --live: {ram_mib} MiB of RAM, first save");
    report.at_most(&what, first.median() * 1e3, 10.0, "ms");
    Ok(())
}

/// Waits until QEMU has sent the guest.
fn wait_for_completion(guest: &mut Guest) -> TestResult {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let status = guest.qmp("query-migrate", json!({}))?;
        match status["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                return Err(format!("QEMU's migration: {status}").into());
            }
            _ if Instant::now() > deadline => return Err("QEMU does not end".into()),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn save_live(bench: &Bench, guest: &Guest) -> TestResult<crate::tools::Run> {
    let (file, socket) = (bench.tools.file("live.vmf"), guest.qmp_path());
    bench.tools.make_way(&file)?;
    let words = ["save", "--live"].map(OsStr::new);
    bench.tools.run(&[&words[..], &[socket.as_os_str(), file.as_os_str()]].concat())
}

/// A guest that rewrites its memory faster than it is sent at 100 MiB/s, and is stopped at last:
/// QEMU's `file:` grows with every page that is sent again.
fn growth(bench: &Bench, report: &mut Report) -> TestResult {
    let config = Guest::boot_sector(Ram::private(256)).data_share(200).busy();
    let file = bench.tools.file("growth");
    let mut lengths = [0.0, 0.0];
    for (length, ours) in lengths.iter_mut().zip([true, false]) {
        let mut guest = config.boot(&bench.qemu)?;
        guest.wait_for_count(1)?;
        bench.tools.make_way(&file)?;
        let limits = json!({ "max-bandwidth": 100 << 20, "downtime-limit": 300 });
        guest.qmp("migrate-set-parameters", limits)?;
        let uri = if ours {
            let program = bench.tools.program().display();
            format!("exec:'{program}' receive --quiet '{}'", file.display())
        } else {
            format!("file:{}", file.display())
        };
        guest.qmp("migrate", json!({ "uri": uri }))?;
        thread::sleep(BUSY);
        guest.stop()?;
        wait_for_completion(&mut guest)?;
        let sent = Instant::now();
        while !file.exists() {
            if sent.elapsed() > BUSY {
                return Err("the file has not appeared".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        *length = mib(fs::metadata(&file)?.blocks() / 2);
    }
    bench.tools.make_way(&file)?;
    let [ours, theirs] = lengths;
    report.note(format!(
        "A guest of 256 MiB that rewrites its memory for {} s while it is sent at 100 MiB/s:\n\
         {ours:.0} MiB on the disk by `vmfile receive`, {theirs:.0} MiB by QEMU's `file:`.",
        BUSY.as_secs()
    ));
    Ok(())
}
