//! QEMU's own ways of writing a paused VM to a file, each with its fastest settings.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile_qemu::{Outgoing, Vm};

use crate::error::BenchError;
use crate::guest::Subject;
use crate::process::{Meter, Usage};

/// How long QEMU may take to write much RAM to a slow disk.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// How long the command at the end of a pipe may take after QEMU is done: it flushes the disk's
/// cache.
const SHELL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long to wait between two queries whether QEMU is done.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// One of QEMU's own ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QemuWay {
    /// The stream, to `file:`.
    Stream,
    /// Pages at fixed offsets, one thread.
    MappedRam,
    /// Pages at fixed offsets, this many channels, with direct I/O or without.
    Multifd { channels: u32, direct_io: bool },
    /// The stream, through a pipe, to `cat`.
    Exec,
}

impl QemuWay {
    pub(crate) fn name(self) -> String {
        match self {
            QemuWay::Stream => "QEMU file: stream".to_owned(),
            QemuWay::MappedRam => "QEMU file: mapped-ram".to_owned(),
            QemuWay::Multifd { channels, direct_io } => {
                let direct_io = if direct_io { ", direct-io" } else { "" };
                format!("QEMU file: mapped-ram, multifd {channels}{direct_io}")
            }
            QemuWay::Exec => "QEMU exec:cat >".to_owned(),
        }
    }

    pub(crate) fn short(self) -> String {
        match self {
            QemuWay::Stream => "file:".to_owned(),
            QemuWay::MappedRam => "mapped-ram".to_owned(),
            QemuWay::Multifd { channels, direct_io: false } => format!("+multifd {channels}"),
            QemuWay::Multifd { channels, direct_io: true } => format!("+{channels} direct"),
            QemuWay::Exec => "exec:cat".to_owned(),
        }
    }

    /// Writes the VM to `file`, durably. Afterwards the VM is paused and QEMU's settings are as
    /// before.
    pub(crate) fn save(
        self,
        subject: &Subject,
        file: &Path,
        stop: &AtomicBool,
    ) -> Result<Usage, BenchError> {
        let name = file.display();
        if self == QemuWay::Exec {
            return save_by_shell(subject, &format!("cat > '{name}' && sync '{name}'"), file, stop);
        }
        let sync = || {
            let synced = File::open(file).and_then(|file| file.sync_all());
            synced.map_err(BenchError::system("sync the file"))
        };
        send(subject, self, &format!("file:{name}"), sync, stop)
    }

    fn capabilities(self) -> Value {
        let is_mapped = !matches!(self, QemuWay::Stream | QemuWay::Exec);
        let is_multifd = matches!(self, QemuWay::Multifd { .. });
        json!([
            { "capability": "mapped-ram", "state": is_mapped },
            { "capability": "multifd", "state": is_multifd },
        ])
    }

    fn parameters(self) -> Value {
        match self {
            QemuWay::Multifd { channels, direct_io } => {
                json!({ "max-bandwidth": 0, "multifd-channels": channels, "direct-io": direct_io })
            }
            _ => json!({ "max-bandwidth": 0 }),
        }
    }

    /// Sets up a QEMU that waits for the VM for a file that was written in this way.
    pub(crate) fn expect(self, vm: &mut Vm) -> Result<(), BenchError> {
        let capabilities = json!({ "capabilities": self.capabilities() });
        vm.execute("migrate-set-capabilities", capabilities)?;
        if let QemuWay::Multifd { .. } = self {
            vm.execute("migrate-set-parameters", self.parameters())?;
        }
        Ok(())
    }
}

/// Sends the VM through a pipe to a shell's `command`, which writes `file` and makes it durable.
/// QEMU may be done before this command is.
pub(crate) fn save_by_shell(
    subject: &Subject,
    command: &str,
    file: &Path,
    stop: &AtomicBool,
) -> Result<Usage, BenchError> {
    let done = file.with_extension("done");
    let uri = format!("exec:{command} && touch '{}'", done.display());
    let wait = || {
        let began = Instant::now();
        while !done.exists() {
            if began.elapsed() > SHELL_TIMEOUT {
                let what = "the shell that QEMU started".to_owned();
                return Err(BenchError::TimedOut { what, seconds: SHELL_TIMEOUT.as_secs() });
            }
            thread::sleep(Duration::from_millis(1));
        }
        fs::remove_file(&done).map_err(BenchError::system("remove a file"))
    };
    send(subject, QemuWay::Exec, &uri, wait, stop)
}

/// Sends the VM to `uri` with the settings of `way`, and calls `sync`, which makes it durable.
fn send(
    subject: &Subject,
    way: QemuWay,
    uri: &str,
    sync: impl FnOnce() -> Result<(), BenchError>,
    stop: &AtomicBool,
) -> Result<Usage, BenchError> {
    let mut vm = subject.connect()?;
    let before = vm.stream_settings()?;
    vm.execute("migrate-set-capabilities", json!({ "capabilities": way.capabilities() }))?;
    vm.execute("migrate-set-parameters", way.parameters())?;
    let changed = vm.stream_settings()?;
    let mut meter = Meter::start(subject.pid());
    let sent = vm.execute("migrate", json!({ "uri": uri })).map_err(BenchError::from);
    let sent = sent.and_then(|_| wait(&mut vm, &mut meter, stop)).and_then(|()| sync());
    let usage = meter.finish();
    // QEMU leaves a VM that was sent in the state postmigrate: after `cont` and `stop` it is paused
    // as before.
    vm.cont()?;
    vm.stop()?;
    vm.change_stream_settings(&changed, &before)?;
    sent.map(|()| usage)
}

fn wait(vm: &mut Vm, meter: &mut Meter, stop: &AtomicBool) -> Result<(), BenchError> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        match vm.outgoing()? {
            Outgoing::Completed => return Ok(()),
            Outgoing::Failed(reason) => return Err(BenchError::program("QEMU", reason)),
            Outgoing::Cancelled => return Err(BenchError::program("QEMU", "cancelled")),
            _ => {}
        }
        if stop.load(Ordering::Relaxed) || Instant::now() > deadline {
            // QEMU's writing threads must become idle first, which `cancel_file` waits for.
            vm.cancel_file(Duration::from_secs(60))?;
            return Err(BenchError::Stopped);
        }
        meter.sample();
        thread::sleep(POLL_INTERVAL);
    }
}
