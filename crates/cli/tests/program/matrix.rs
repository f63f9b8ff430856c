//! Every QEMU, every way to receive a file, every way to restore it: the guest judges its memory
//! each time.
//!
//! One guest for each QEMU is received in all ways, paused and running, and each file is restored
//! in all ways.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Child;
use std::thread;

use serde_json::json;
use vmfile::restore::Mode;
use vmfile_testing::migration::{migrate_all, qemu_reads};
use vmfile_testing::verbs::restore;
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, requires};

use crate::guests::directory;
use crate::run::{Said, command, program, vmfile, wait_until};
use crate::words;

/// How the stream gets from QEMU to vmfile.
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

fn ends_well(child: Child) -> TestResult {
    Said::from(child.wait_with_output()?).assert(0, &["received"]);
    Ok(())
}

/// Has QEMU send the guest to `vmfile receive`, which writes `file`. The guest then stays paused
/// until `cont`.
fn receive(guest: &mut Guest, way: Way, file: &Path) -> TestResult {
    set_up(guest, way)?;
    let socket = file.with_extension("socket");
    let uri = format!("unix:{}", socket.display());
    let mut receiver = command();
    receiver.arg("receive").arg(file);
    receiver.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    match way {
        Way::Exec => {
            migrate_all(
                guest,
                &format!("exec:{} receive -q {}", program().display(), file.display()),
            )?;
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
            migrate_all(guest, &uri)?;
            ends_well(receiver)
        }
    }
}

fn all_ways(source: Release, destination: Release, config: &GuestConfig) -> TestResult {
    let (source, destination) = (requires!(Qemu::of(source)), requires!(Qemu::of(destination)));
    let mut guest = config.boot_to(&source, 2)?;
    let directory = directory()?;
    let restores = [Some(Mode::Map), Some(Mode::Load), Some(Mode::Stream), None];
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
        vmfile(words!["check", file]).assert(0, &["0 findings"]);
        for mode in restores {
            let back = || -> TestResult {
                let mut back = match mode {
                    Some(mode) => restore(&destination, config, &file, mode)?,
                    None => qemu_reads(&destination, config, &file)?,
                };
                assert_eq!(back.status()?, if live { "running" } else { "paused" });
                if !live {
                    back.resume()?;
                }
                back.counts_on(1)
            };
            back().map_err(|error| format!("{way:?}, live {live}, back by {mode:?}: {error}"))?;
        }
        guest.wait_for_passes(1)?;
        // Frees the file's space on the disk and in the page cache.
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
