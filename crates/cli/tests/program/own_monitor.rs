//! QEMU 11.1 and later: a save goes on by a monitor of its own, and others can use the VM's.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use vmfile::Vm;
use vmfile_testing::{Case, Guest, Qemu, Ram, Random, Release, TestResult, cases, given, requires};

use crate::guests::directory;
use crate::run::{Said, pid, start, vmfile, wait_until};
use crate::words;

/// How the name of a save's monitor begins.
const MONITOR: &str = "vmfile-monitor-";

/// How many saves are killed.
const KILLS: u64 = 12;

/// The names of QEMU's objects, character devices and descriptors.
fn belongings(guest: &mut Guest) -> TestResult<BTreeSet<String>> {
    let objects = guest.qmp("qom-list", json!({ "path": "/objects" }))?;
    let backends = guest.qmp("query-chardev", json!({}))?;
    let name = |entry: &Value, key: &str| entry[key].as_str().map(str::to_owned);
    let objects = objects.as_array().into_iter().flatten().filter_map(|it| name(it, "name"));
    let backends = backends.as_array().into_iter().flatten().filter_map(|it| name(it, "label"));
    // A note of the last file stays.
    Ok(objects.chain(backends).filter(|name| name != "vmfile-last").collect())
}

/// Before QEMU 11.1, a client that came while a VM was saved had to wait until the save ended.
#[test]
fn another_client_uses_the_monitor_while_the_newest_is_saved() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(640).boot_to(&qemu, 1)?;
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let before = belongings(&mut guest)?;
    for way in [&["--route", "direct"][..], &["--route", "stream"], &["--live"]] {
        let words = words!["save", guest.qmp_path(), file, "--after", "resume", "--force"];
        let save = start(words.into_iter().chain(way.iter().map(Into::into)))?;
        wait_until("the save has a monitor", || {
            belongings(&mut guest).is_ok_and(|now| now.iter().any(|it| it.starts_with(MONITOR)))
        })?;
        kill_process(pid(save.id()), Signal::STOP)?;
        let asked = Vm::connect_within(&guest.qmp_path(), Duration::from_secs(5))
            .and_then(|mut vm| vm.run_state());
        kill_process(pid(save.id()), Signal::CONT)?;
        Said::from(save.wait_with_output()?).assert(0, &["saved"]);
        asked?;
        assert_eq!(belongings(&mut guest)?, before, "{way:?}");
        guest.runs_on(1)?;
    }
    Ok(())
}

/// QEMU removes the monitor when the save and its guardian have ended, whatever ended them, and `list` what a
/// save has left that was killed while it made one.
#[test]
fn a_killed_save_leaves_no_monitor_in_the_newest() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(641).boot_to(&qemu, 1)?;
    let mut random = Random::of_this_run();
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let before = belongings(&mut guest)?;
    for _ in 0..given("VMFILE_KILLS").unwrap_or(KILLS) {
        let route = ["direct", "stream", "native"][usize::try_from(random.next_number() % 3)?];
        let words = words!["save", guest.qmp_path(), file, "--after", "resume", "--route", route];
        let mut save = start(words)?;
        thread::sleep(Duration::from_millis(random.next_number() % 120));
        save.kill()?;
        save.wait()?;
        cases(1, Case::Kill);
        wait_until("nothing of the save is left", || {
            vmfile(words!["list"]).assert(0, &[]);
            belongings(&mut guest).is_ok_and(|now| now == before)
        })?;
        guest.runs_on(1)?;
        std::fs::remove_file(&file).ok();
    }
    Ok(())
}
