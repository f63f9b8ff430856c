//! Every QEMU, every way into a file, every way back: the guest judges its memory each time.
//!
//! One guest for each QEMU is saved in all ways, stopped and while it runs, and each file comes back
//! in all ways that its QEMU has.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vmfile_testing::verbs::{load, map, stream};
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, requires};

use crate::guests::directory;
use crate::run::{Said, command, program, vmfile, wait_until};
use crate::words;

/// How the stream comes to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Exec,
    Fd,
    Unix,
    Multifd(u32),
}

const WAYS: [Way; 6] =
    [Way::Exec, Way::Fd, Way::Unix, Way::Multifd(1), Way::Multifd(2), Way::Multifd(8)];

fn set_up(guest: &mut Guest, way: Way) -> TestResult {
    let channels = if let Way::Multifd(channels) = way { channels } else { 0 };
    let multifd = json!([{ "capability": "multifd", "state": channels > 0 }]);
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": multifd }))?;
    let parameters = json!({ "max-bandwidth": 0, "multifd-channels": channels.max(1) });
    guest.qmp("migrate-set-parameters", parameters).map(drop)
}

/// Lets QEMU send the guest and waits until it has.
fn migrate(guest: &mut Guest, uri: &str) -> TestResult {
    guest.qmp("migrate", json!({ "uri": uri }))?;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = guest.qmp("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed") => return Err(format!("QEMU: {answer}").into()),
            _ if Instant::now() > deadline => return Err(format!("too long: {answer}").into()),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn ends_well(child: Child) -> TestResult {
    Said::from(child.wait_with_output()?).assert(0, &["received"]);
    Ok(())
}

/// Sends the guest into `file`; it then waits for `cont`.
fn receive(guest: &mut Guest, way: Way, file: &Path) -> TestResult {
    set_up(guest, way)?;
    let socket = file.with_extension("socket");
    let uri = format!("unix:{}", socket.display());
    let mut receiver = command();
    receiver.arg("receive").arg(file);
    receiver.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    match way {
        Way::Exec => {
            migrate(guest, &format!("exec:{} receive -q {}", program().display(), file.display()))?;
            wait_until("the file has its name", || file.exists())
        }
        Way::Fd => {
            let listener = UnixListener::bind(&socket)?;
            let accept = thread::spawn(move || listener.accept());
            guest.qmp("migrate", json!({ "uri": uri }))?;
            let (stream, _) = accept.join().expect("no panic")?;
            std::fs::remove_file(&socket)?;
            let receiver = receiver.args(["--fd", "0"]).stdin(OwnedFd::from(stream)).spawn()?;
            ends_well(receiver)
        }
        Way::Unix | Way::Multifd(_) => {
            if let Way::Multifd(channels) = way {
                receiver.args(["--channels", &channels.to_string()]);
            }
            let receiver = receiver.args(words!["--listen", socket]).spawn()?;
            wait_until("the receiver listens", || socket.exists())?;
            migrate(guest, &uri)?;
            ends_well(receiver)
        }
    }
}

/// QEMU loads the file with nothing of ours.
fn by_qemu_alone(qemu: &Qemu, config: &GuestConfig, file: &Path) -> TestResult<Guest> {
    let mut guest = config.incoming(qemu, "defer")?;
    let mapped_ram = json!([{ "capability": "mapped-ram", "state": true }]);
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": mapped_ram }))?;
    guest.qmp("migrate-incoming", json!({ "uri": format!("file:{}", file.display()) }))?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while guest.qmp("query-migrate", json!({}))?["status"] != "completed" {
        assert!(Instant::now() < deadline, "QEMU loads the file");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(guest)
}

/// A way back.
type Restore = fn(&Qemu, &GuestConfig, &Path) -> TestResult<Guest>;

fn all_ways(source: Release, destination: Release, config: &GuestConfig) -> TestResult {
    let (source, destination) = (requires!(Qemu::of(source)), requires!(Qemu::of(destination)));
    let mut guest = config.boot(&source)?;
    guest.wait_for_count(2)?;
    let directory = directory()?;
    let restores: [(&str, Restore); 4] =
        [("map", map), ("load", load), ("stream", stream), ("QEMU alone", by_qemu_alone)];
    for (number, (way, live)) in
        WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]).enumerate()
    {
        let file = directory.path().join(format!("{number}.vmf"));
        if !live {
            guest.stop()?;
        }
        receive(&mut guest, way, &file)
            .map_err(|error| format!("{way:?}, live {live}: {error}"))?;
        guest.resume()?;
        let before = guest.counts().len();
        vmfile(words!["check", file]).assert(0, &["0 findings"]);
        for (name, restore) in restores {
            let back = || -> TestResult {
                let mut back = restore(&destination, config, &file)?;
                assert_eq!(back.status()?, if live { "running" } else { "paused" });
                if !live {
                    back.resume()?;
                }
                back.wait_for_passes(1)?;
                back.judge_counts()
            };
            back().map_err(|error| format!("{way:?}, live {live}, back by {name}: {error}"))?;
        }
        assert!(guest.counts().len() >= before, "the source counts on");
        // Sparse files of 32 MiB each; the next one begins with an empty page cache of its own.
        File::options().write(true).open(&file)?.set_len(0)?;
    }
    guest.judge_counts()
}

#[test]
fn from_the_oldest_to_the_installed_one() -> TestResult {
    let config = Guest::boot_sector(Ram::private(32)).seed(131).machine_version("7.2");
    all_ways(Release::Oldest, Release::Distribution, &config)
}

#[test]
fn from_the_installed_one_to_itself() -> TestResult {
    let config = Guest::boot_sector(Ram::memfd(32)).seed(132);
    all_ways(Release::Distribution, Release::Distribution, &config)
}

#[test]
fn from_the_newest_to_itself() -> TestResult {
    let config = Guest::boot_sector(Ram::private(32)).seed(133);
    all_ways(Release::Newest, Release::Newest, &config)
}
