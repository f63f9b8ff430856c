//! QEMU's own ways of writing a stopped guest to a file, each with everything that makes it fast.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vmfile_testing::{Guest, TestResult};

/// A way of QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The stream, to `file:`.
    Stream,
    /// Pages at fixed offsets, one thread.
    MappedRam,
    /// Pages at fixed offsets, direct I/O, this many channels.
    Multifd(u32),
    /// The stream, through a pipe, to `cat`.
    Exec,
}

const TIMEOUT: Duration = Duration::from_secs(120);

impl Way {
    pub(crate) fn name(self) -> String {
        match self {
            Way::Stream => "QEMU `file:` stream".to_owned(),
            Way::MappedRam => "QEMU mapped-ram".to_owned(),
            Way::Multifd(channels) => format!("QEMU mapped-ram, multifd {channels}, direct-io"),
            Way::Exec => "QEMU `exec:cat >`".to_owned(),
        }
    }

    /// Writes the stopped guest to `file`, durably, and returns the seconds; the guest is stopped
    /// again afterwards.
    pub(crate) fn save(self, guest: &mut Guest, file: &Path) -> TestResult<f64> {
        self.prepare(guest)?;
        if self == Way::Exec {
            let file = file.display();
            return send(guest, &format!("cat > '{file}' && sync '{file}'"));
        }
        let started = Instant::now();
        guest.qmp("migrate", json!({ "uri": format!("file:{}", file.display()) }))?;
        wait_for_completion(guest)?;
        File::open(file)?.sync_all()?;
        let seconds = started.elapsed().as_secs_f64();
        as_before(guest)?;
        Ok(seconds)
    }

    /// Tells QEMU how to write.
    pub(crate) fn prepare(self, guest: &mut Guest) -> TestResult {
        let (mapped_ram, channels) = match self {
            Way::Stream | Way::Exec => (false, None),
            Way::MappedRam => (true, None),
            Way::Multifd(channels) => (true, Some(channels)),
        };
        let capabilities = json!([
            { "capability": "multifd", "state": channels.is_some() },
            { "capability": "mapped-ram", "state": mapped_ram },
        ]);
        guest.qmp("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let parameters = json!({
            "max-bandwidth": 0,
            "multifd-channels": channels.unwrap_or(2),
            "direct-io": channels.is_some(),
        });
        guest.qmp("migrate-set-parameters", parameters).map(drop)
    }
}

/// Sends the stopped guest through a pipe to a shell's `command`, which makes durable what it writes;
/// returns the seconds until that has ended. The guest is stopped again afterwards.
pub(crate) fn send(guest: &mut Guest, command: &str) -> TestResult<f64> {
    let done = guest.directory().join("done");
    let uri = format!("exec:{command} && touch '{}'", done.display());
    let started = Instant::now();
    guest.qmp("migrate", json!({ "uri": uri }))?;
    wait_for_completion(guest)?;
    wait_for(|| Ok(done.exists()))?;
    let seconds = started.elapsed().as_secs_f64();
    std::fs::remove_file(&done)?;
    as_before(guest)?;
    Ok(seconds)
}

/// After a migration a VM waits for its end: one that has run once more is as it was.
pub(crate) fn as_before(guest: &mut Guest) -> TestResult {
    guest.resume()?;
    guest.stop()
}

/// Waits until QEMU has sent the guest.
pub(crate) fn wait_for_completion(guest: &mut Guest) -> TestResult {
    wait_for(|| {
        let status = guest.qmp("query-migrate", json!({}))?;
        match status["status"].as_str() {
            Some("completed") => Ok(true),
            Some("failed" | "cancelled") => Err(format!("QEMU's migration: {status}").into()),
            _ => Ok(false),
        }
    })
}

fn wait_for(mut is_done: impl FnMut() -> TestResult<bool>) -> TestResult {
    let deadline = Instant::now() + TIMEOUT;
    while !is_done()? {
        if Instant::now() > deadline {
            return Err(format!("not done in {} s", TIMEOUT.as_secs()).into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
