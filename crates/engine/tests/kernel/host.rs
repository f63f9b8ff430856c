//! Resources of the machine that the tests use and release.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

/// Returns a directory on the file system of the target directory, which more often than `/tmp` is
/// on a disk.
pub(crate) fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A mounted file system; dropping it unmounts and removes it.
pub(crate) struct Mounted {
    point: TempDir,
    _image: Option<TempDir>,
}

impl Mounted {
    /// Mounts a tmpfs of `len` bytes.
    pub(crate) fn tmpfs(len: u64) -> Result<Mounted, String> {
        let point = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={len}")).unwrap();
        rustix::mount::mount(
            "tmpfs",
            point.path(),
            "tmpfs",
            MountFlags::empty(),
            options.as_c_str(),
        )
        .map_err(|errno| format!("mount tmpfs: {errno}"))?;
        Ok(Mounted { point, _image: None })
    }

    /// Makes and mounts an ext4 of `len` bytes in a loop device.
    pub(crate) fn ext4(len: u64) -> Result<Mounted, String> {
        let image = directory();
        let path = image.path().join("image");
        fs::write(&path, []).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
        let point = tempfile::tempdir().unwrap();
        run(Command::new("mkfs.ext4").arg("-q").args(["-O", "^has_journal"]).arg(&path))?;
        run(Command::new("mount").args(["-o", "loop"]).args([&path, point.path()]))?;
        Ok(Mounted { point, _image: Some(image) })
    }

    pub(crate) fn path(&self) -> &Path {
        self.point.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.point.path(), UnmountFlags::DETACH);
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Huge pages of 2 MiB, reserved until this is dropped; only one test at a time has them.
pub(crate) struct HugePages {
    before: String,
    path: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl HugePages {
    pub(crate) const SIZE: u64 = 2 << 20;

    pub(crate) fn reserve(count: u64) -> Result<HugePages, String> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = PathBuf::from("/sys/kernel/mm/hugepages/hugepages-2048kB");
        let path = pool.join("nr_hugepages");
        let before = read(&path)?;
        let free: u64 = number(&read(&pool.join("free_hugepages"))?);
        let wanted = number(&before) + count;
        fs::write(&path, wanted.to_string()).map_err(|error| format!("nr_hugepages: {error}"))?;
        let pages = HugePages { before, path, _turn: turn };
        let now: u64 = number(&read(&pool.join("free_hugepages"))?);
        if now < free + count {
            return Err(format!("{} huge pages of {count} could be had", now.saturating_sub(free)));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, self.before.trim());
    }
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error: io::Error| format!("{}: {error}", path.display()))
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap()
}
