//! The connection to QEMU's monitor breaks in the middle of a save, while QEMU runs on.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use serde_json::json;
use vmfile_testing::{Guest, Ram, TestResult, requires};

use crate::guests::directory;
use crate::run::{names_in, vmfile};
use crate::words;

/// A proxy between vmfile and a monitor. It closes the first connection once it has forwarded
/// `last`, and forwards later ones to their end.
fn stand_between(listener: UnixListener, monitor: PathBuf, last: &'static str) {
    let mut is_first = true;
    while let Ok((client, _)) = listener.accept() {
        let upstream = UnixStream::connect(&monitor).expect("QEMU lives");
        let (mut to_client, from_qemu) = (
            client.try_clone().expect("a descriptor"),
            upstream.try_clone().expect("a descriptor"),
        );
        let back = thread::spawn(move || {
            for line in BufReader::new(from_qemu).lines().map_while(Result::ok) {
                if to_client.write_all(format!("{line}\n").as_bytes()).is_err() {
                    break;
                }
            }
            let _ = to_client.shutdown(Shutdown::Both);
        });
        for line in BufReader::new(&client).lines().map_while(Result::ok) {
            if (&upstream).write_all(format!("{line}\n").as_bytes()).is_err() {
                break;
            }
            if is_first && line.contains(last) {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = upstream.shutdown(Shutdown::Both);
        back.join().expect("it does not panic");
        is_first = false;
    }
}

/// A proxy between vmfile and the monitor closed the connection after `stop`: the save said "QEMU
/// is gone", and the guest stayed paused for ever.
#[test]
fn a_vm_whose_monitor_is_cut_off_is_put_back_by_a_new_connection() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(31).fill_mib(32).boot_to(&qemu, 1)?;
    let settings = guest.qmp("query-migrate-parameters", json!({}))?;
    // The last command that QEMU gets: `stop`, a change of its settings, the start of the stream.
    for last in ["\"stop\"", "migrate-set-parameters", "\"migrate\""] {
        let directory = directory()?;
        let (socket, file) = (directory.path().join("proxy"), directory.path().join("vm.vmf"));
        let listener = UnixListener::bind(&socket)?;
        let monitor = guest.qmp_path().to_owned();
        thread::spawn(move || stand_between(listener, monitor, last));
        let route = ["--route", "stream", "--channels", "2"];
        let said = vmfile(
            words!["save", socket, file, "--after", "resume"].iter().chain(&route.map(Into::into)),
        );
        said.assert(3, &["the connection to QEMU's monitor broke", "the VM is as it was"]);
        assert_eq!(names_in(directory.path()), ["proxy"], "{last}");
        assert_eq!(guest.status()?, "running", "{last}");
        assert_eq!(guest.qmp("query-migrate-parameters", json!({}))?, settings, "{last}");
        guest.counts_on(1)?;
    }
    let file = directory()?;
    let file = file.path().join("vm.vmf");
    vmfile(words!["save", guest.qmp_path(), file, "--after", "resume"]).assert(0, &["saved"]);
    Ok(())
}
