//! A disk that keeps every write and flush, so that a test can see what a power cut leaves.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use crate::fixture::Mount;
use crate::random::Random;
use crate::require::{Missing, root};
use crate::{TestError, TestResult};

/// The first bytes of a log, in the format of Linux's `dm-log-writes`.
const MAGIC: u64 = 0x006a_7366_7773_6872;

const SECTOR: usize = 512;

/// What a disk writes whole or not at all: ext4 relies on that for its superblock.
const BLOCK: usize = 4096;

/// How long the daemon may take to export the disk, or to end.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A file system in an image, on a loop device over a file that qemu-storage-daemon serves and logs.
/// Dropping it unmounts it and ends the daemon; the image then has all that was written.
#[derive(Debug)]
pub struct LoggedDisk {
    /// `None` only inside `drop`.
    mount: Option<Mount>,
    daemon: Child,
    directory: TempDir,
}

/// A write, or a flush, to which no bytes belong.
#[derive(Debug)]
pub struct Logged {
    offset: u64,
    bytes: Vec<u8>,
    /// Whether everything before it is on the disk.
    is_flush: bool,
}

impl LoggedDisk {
    /// Mounts the file system in `image`.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, qemu-storage-daemon with FUSE, or a loop device.
    pub fn start(image: &Path) -> Result<LoggedDisk, Missing> {
        root()?;
        let missing = |error: TestError| Missing::new(format!("no logged disk: {error}"));
        let attempt = || -> TestResult<(Child, TempDir)> {
            let directory = tempfile::Builder::new().prefix("vmf-log-").tempdir()?;
            let (log, disk) = (directory.path().join("log"), directory.path().join("disk"));
            File::create_new(&log)?.set_len(8 << 30)?;
            File::create_new(&disk)?;
            let file = |name: &str, path: &Path| {
                format!("file,node-name={name},filename={}", path.display())
            };
            let daemon = Command::new("qemu-storage-daemon")
                .args(["--blockdev", &file("image", image), "--blockdev", &file("log", &log)])
                .arg("--blockdev")
                .arg("blklogwrites,node-name=logged,file=image,log=log,log-super-update-interval=1")
                .arg("--export")
                .arg(format!(
                    "fuse,id=disk,node-name=logged,writable=on,mountpoint={}",
                    disk.display()
                ))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()?;
            Ok((daemon, directory))
        };
        let (daemon, directory) = attempt().map_err(missing)?;
        let mut logged = LoggedDisk { mount: None, daemon, directory };
        let disk = logged.disk();
        let len = fs::metadata(image).map_err(|error| missing(error.into()))?.len();
        let deadline = Instant::now() + TIMEOUT;
        while fs::metadata(&disk).is_ok_and(|found| found.size() != len) {
            let ended = logged.daemon.try_wait().ok().flatten().is_some();
            if ended || Instant::now() > deadline {
                return Err(missing("qemu-storage-daemon exports nothing".into()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        logged.mount = Some(Mount::of_image(&disk)?);
        Ok(logged)
    }

    fn disk(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// Returns where the file system is mounted.
    ///
    /// # Panics
    ///
    /// Never: a disk that was started is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount.as_ref().expect("mounted until it is dropped").path()
    }

    /// Returns what was written and flushed so far, in the order in which it was completed.
    ///
    /// # Errors
    ///
    /// If the log cannot be read or is in another format.
    pub fn log(&self) -> TestResult<Vec<Logged>> {
        let mut log = File::open(self.directory.path().join("log"))?;
        let mut sector = [0; SECTOR];
        log.read_exact(&mut sector)?;
        let number = |sector: &[u8], at: usize| {
            u64::from_le_bytes(sector[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
        };
        if number(&sector, 0) != MAGIC {
            return Err("no log of writes".into());
        }
        let mut entries = Vec::new();
        for _ in 0..number(&sector, 2) {
            log.read_exact(&mut sector)?;
            let (first, count, flags) =
                (number(&sector, 0), number(&sector, 1), number(&sector, 2));
            let (is_flush, is_discard) = (flags & 1 != 0, flags & 4 != 0);
            let mut bytes = vec![0; usize::try_from(count)? * SECTOR];
            if !is_discard {
                log.read_exact(&mut bytes)?;
            }
            entries.push(Logged { offset: first * SECTOR as u64, bytes, is_flush });
        }
        Ok(entries)
    }
}

impl Drop for LoggedDisk {
    fn drop(&mut self) {
        drop(self.mount.take());
        // All of this fails only if the daemon has ended by itself.
        let pid = i32::try_from(self.daemon.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + TIMEOUT;
        while self.daemon.try_wait().is_ok_and(|ended| ended.is_none()) {
            if Instant::now() > deadline {
                let _ = self.daemon.kill();
                let _ = self.daemon.wait();
                let _ = unmount(self.disk(), UnmountFlags::DETACH);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Returns the moments right before and right after each flush: how many entries of the log came before.
#[must_use]
pub fn around_flushes(log: &[Logged]) -> Vec<usize> {
    let flushes = log.iter().enumerate().filter(|(_, entry)| entry.is_flush);
    flushes.flat_map(|(number, _)| [number, number + 1]).collect()
}

/// Writes to `image` what a power cut leaves after the first `count` entries of `log`: everything up to
/// the last flush. Of each later write, `chance` decides whether the disk has it, has its first blocks of 4 KiB, or
/// has nothing of it; without `chance` it has nothing.
///
/// # Errors
///
/// The kernel's error.
pub fn cut_power(
    image: &Path,
    (log, count): (&[Logged], usize),
    mut chance: Option<&mut Random>,
) -> TestResult {
    let file = File::options().write(true).open(image)?;
    let log = &log[..count];
    let flushed = log.iter().rposition(|entry| entry.is_flush).map_or(0, |last| last + 1);
    for (number, entry) in log.iter().enumerate() {
        let blocks = entry.bytes.len().div_ceil(BLOCK);
        let kept = match &mut chance {
            _ if number < flushed => blocks,
            None => 0,
            Some(chance) => match chance.next_number() % 3 {
                0 => 0,
                1 => usize::try_from(chance.next_number() % (blocks as u64 + 1))?,
                _ => blocks,
            },
        };
        file.write_all_at(&entry.bytes[..entry.bytes.len().min(kept * BLOCK)], entry.offset)?;
    }
    Ok(())
}
