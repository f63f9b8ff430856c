//! Saves of a guest of which little has changed since the file before, and what becomes of such files.

use std::ffi::OsStr;
use std::path::Path;

use crate::bench::Bench;
use crate::contents::change;
use crate::error::BenchError;
use crate::guest::{Machine, Subject};
use crate::page_cache;
use crate::process;
use crate::report::{Family, Run};
use crate::restoring::by_vmfile;
use crate::rounds::Measured;
use crate::saving::used;

/// How much the guest has changed, in percent of its RAM.
const CHANGED_PERCENT: u64 = 1;

/// How much a clone has written, in bytes.
const WRITTEN_LEN: u64 = 64 << 20;

/// Something that is done with a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckpointWay {
    /// All of the guest is saved, for comparison.
    Full,
    /// Of the guest, what changed.
    Base,
    /// The same, while it runs.
    BaseLive,
    /// The file that `Base` made is restored by mapping.
    RestoreThin,
    /// A guest that was restored by mapping, and has written since, is saved while it runs.
    Clone,
}

impl CheckpointWay {
    pub(crate) const ALL: [CheckpointWay; 5] = [
        CheckpointWay::Full,
        CheckpointWay::Base,
        CheckpointWay::BaseLive,
        CheckpointWay::RestoreThin,
        CheckpointWay::Clone,
    ];

    /// Does it once, with `base` as the base.
    pub(crate) fn once(
        self,
        bench: &Bench<'_>,
        (subject, machine): (&Subject, &Machine),
        base: &Path,
        round: u64,
    ) -> Result<Run, BenchError> {
        let thin = bench.file("thin.vmf");
        let on_base = |more: &[&str]| -> Result<Run, BenchError> {
            // The monitor takes one client at a time.
            let blocks = subject.connect()?.ram_blocks()?;
            let len = machine.ram_bytes / 100 * CHANGED_PERCENT;
            change((subject.pid(), &blocks), len, round, bench.stop)?;
            bench.remove_and_sync(&thin)?;
            let mut words = vec![OsStr::new("--base"), base.as_os_str()];
            words.extend(more.iter().map(OsStr::new));
            save(bench, subject.socket(), &thin, &words)
        };
        match self {
            CheckpointWay::Full => {
                let file = bench.file("other");
                let run =
                    save(bench, subject.socket(), &file, &["--after", "pause"].map(OsStr::new))?;
                bench.remove_and_sync(&file)?;
                Ok(run)
            }
            CheckpointWay::Base => on_base(&["--after", "pause"]),
            CheckpointWay::BaseLive => {
                subject.connect()?.cont()?;
                let run = on_base(&["--live"]);
                subject.connect()?.stop()?;
                run
            }
            CheckpointWay::RestoreThin => {
                page_cache::prepare(&thin, false, bench.stop)?;
                page_cache::prepare(base, false, bench.stop)?;
                let (run, pid) = by_vmfile(bench, machine, &thin, "map")?;
                process::end(pid)?;
                Ok(run)
            }
            CheckpointWay::Clone => {
                page_cache::prepare(base, false, bench.stop)?;
                let clone = Clone::start(bench, machine, base)?;
                let mut vm = vmfile_qemu::Vm::connect(&clone.socket())?;
                change((clone.pid, &vm.ram_blocks()?), WRITTEN_LEN, round, bench.stop)?;
                vm.cont()?;
                drop(vm);
                let file = bench.file("clone.vmf");
                let words = ["--live", "--base", "auto"].map(OsStr::new);
                let run = save(bench, &clone.socket(), &file, &words)?;
                bench.remove_and_sync(&file)?;
                Ok(run)
            }
        }
    }
}

/// A guest that was restored by mapping; it ends when this is dropped.
struct Clone {
    pid: u32,
    directory: tempfile::TempDir,
}

impl Clone {
    fn start(bench: &Bench<'_>, machine: &Machine, file: &Path) -> Result<Clone, BenchError> {
        let (_, pid, directory) = crate::restoring::by_vmfile_in(bench, machine, file, "map")?;
        Ok(Clone { pid, directory })
    }

    fn socket(&self) -> std::path::PathBuf {
        crate::guest::socket_in(self.directory.path())
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        // It fails only if the process has ended already.
        let _ = process::end(self.pid);
    }
}

fn save(bench: &Bench<'_>, socket: &Path, file: &Path, more: &[&OsStr]) -> Result<Run, BenchError> {
    let mut words: Vec<&OsStr> = ["save", "--force"].map(OsStr::new).to_vec();
    words.extend(more);
    words.extend([socket.as_os_str(), file.as_os_str()]);
    let (report, usage) = bench.vmfile(&words)?;
    Ok(Run { pause_seconds: report["pause_seconds"].as_f64(), ..used(usage) })
}

impl Measured for CheckpointWay {
    fn name(&self) -> String {
        match self {
            CheckpointWay::Full => "vmfile save".to_owned(),
            CheckpointWay::Base => format!("vmfile save --base, {CHANGED_PERCENT} % changed"),
            CheckpointWay::BaseLive => {
                format!("vmfile save --live --base, {CHANGED_PERCENT} % changed")
            }
            CheckpointWay::RestoreThin => "vmfile restore --mode map, with a base, warm".to_owned(),
            CheckpointWay::Clone => {
                "vmfile save --live --base auto, a clone that wrote 64 MiB".to_owned()
            }
        }
    }

    fn short(&self) -> String {
        match self {
            CheckpointWay::Full => "all",
            CheckpointWay::Base => "base",
            CheckpointWay::BaseLive => "base, live",
            CheckpointWay::RestoreThin => "restore",
            CheckpointWay::Clone => "clone",
        }
        .to_owned()
    }

    fn family(&self) -> Family {
        Family::Vmfile
    }
}
