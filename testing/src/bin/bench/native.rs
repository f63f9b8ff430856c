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
        let done = file.with_extension("done");
        let uri = match self {
            Way::Exec => {
                let (file, done) = (file.display(), done.display());
                format!("exec:cat > '{file}' && sync '{file}' && touch '{done}'")
            }
            _ => format!("file:{}", file.display()),
        };
        let started = Instant::now();
        guest.qmp("migrate", json!({ "uri": uri }))?;
        wait_for_completion(guest)?;
        if self == Way::Exec {
            wait_for(|| Ok(done.exists()))?;
        } else {
            File::open(file)?.sync_all()?;
        }
        let seconds = started.elapsed().as_secs_f64();
        if self == Way::Exec {
            std::fs::remove_file(&done)?;
        }
        // After a migration a VM waits for its end: one that has run once more is as it was.
        guest.resume()?;
        guest.stop()?;
        Ok(seconds)
    }

    fn prepare(self, guest: &mut Guest) -> TestResult {
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

fn wait_for_completion(guest: &mut Guest) -> TestResult {
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
