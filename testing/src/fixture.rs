//! Pieces of the machine that a test changes and puts back: mounts and huge pages.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

use crate::require::{Missing, root};
use crate::{TestError, TestResult};

/// How long something may use a file system that is to be unmounted.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(60);

const USERFAULT: &str = "/proc/sys/vm/unprivileged_userfaultfd";

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Returns the processes that have a file open in `directory`.
fn processes_with_files_in(directory: &Path) -> Vec<String> {
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let is_user = |process: &Path| {
        let links = entries(&process.join("fd")).filter_map(|fd| fs::read_link(fd.path()).ok());
        links.into_iter().any(|file| file.starts_with(directory))
    };
    let users = entries(Path::new("/proc")).map(|entry| entry.path());
    users.filter(|process| is_user(process)).map(|process| process.display().to_string()).collect()
}

/// A file system for one test; dropping it unmounts it.
#[derive(Debug)]
pub struct Mount {
    directory: TempDir,
    /// Directory with the image of a file system on a loop device; `None` for tmpfs and hugetlbfs.
    _image: Option<TempDir>,
}

impl Mount {
    /// Mounts a tmpfs of at most `size_mib`.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, or the file system.
    pub fn tmpfs(size_mib: u64) -> Result<Mount, Missing> {
        Mount::virtual_file_system("tmpfs", &format!("size={size_mib}m"))
    }

    /// Mounts a hugetlbfs of 2 MiB pages; [`HugePages`] must supply them.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, or the file system.
    pub fn hugetlbfs() -> Result<Mount, Missing> {
        Mount::virtual_file_system("hugetlbfs", "pagesize=2M")
    }

    /// Mounts the hierarchy of control groups, version 2.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, or a kernel that has it.
    pub fn control_groups() -> Result<Mount, Missing> {
        Mount::virtual_file_system("cgroup2", "")
    }

    /// Makes an ext4 of `size_mib` in a file and mounts it.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, a loop device, or the file system.
    pub fn ext4(size_mib: u64) -> Result<Mount, Missing> {
        Mount::on_loop_device(&EXT4, size_mib)
    }

    /// Makes an xfs of `len` bytes, at least 300 MiB, in a new image.
    ///
    /// # Errors
    ///
    /// Says what is missing.
    pub fn make_xfs(image: &Path, len: u64) -> Result<(), Missing> {
        let made = make_image(&XFS, image, len);
        made.map_err(|error| Missing::new(format!("no xfs: {error}")))
    }

    /// Unmounts the file system as soon as nothing uses it, and mounts the one in `image` in its
    /// place.
    ///
    /// # Errors
    ///
    /// The kernel's error, also if something uses it for too long.
    pub fn again(&mut self, image: &Path) -> TestResult {
        let deadline = Instant::now() + UNMOUNT_TIMEOUT;
        while let Err(errno) = unmount(self.path(), UnmountFlags::empty()) {
            if errno != Errno::BUSY || Instant::now() > deadline {
                let users = processes_with_files_in(self.path());
                let path = self.path().display();
                return Err(format!("unmount {path}: {errno}, used by {users:?}").into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        run(Command::new("mount").args(["-o", "loop"]).args([image, self.path()]))
    }

    /// Makes an xfs of `size_mib`, at least 300, in a file and mounts it.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, a loop device, or the file system.
    pub fn xfs(size_mib: u64) -> Result<Mount, Missing> {
        Mount::on_loop_device(&XFS, size_mib)
    }

    /// Makes an ext4 of `len` bytes in a new image, in place of one that is there.
    ///
    /// # Errors
    ///
    /// Says what is missing.
    pub fn make_ext4(image: &Path, len: u64) -> Result<(), Missing> {
        let made = make_image(&EXT4, image, len);
        made.map_err(|error| Missing::new(format!("no ext4: {error}")))
    }

    /// Mounts the file system in an image.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, a loop device, or the file system.
    pub fn of_image(image: &Path) -> Result<Mount, Missing> {
        root()?;
        Mount::by_loop_device(image, None).map_err(|error| no_loop_device(&error))
    }

    /// Returns where the file system is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    fn virtual_file_system(kind: &str, options: &str) -> Result<Mount, Missing> {
        root()?;
        let missing =
            |error: &dyn std::fmt::Display| Missing::beyond_setup(format!("no {kind}: {error}"));
        let directory = mount_point().map_err(|error| missing(&error))?;
        let data = std::ffi::CString::new(options).map_err(|error| missing(&error))?;
        mount(kind, directory.path(), kind, MountFlags::empty(), Some(data.as_c_str()))
            .map_err(|error| missing(&error))?;
        Ok(Mount { directory, _image: None })
    }

    fn on_loop_device(make: &[&str], size_mib: u64) -> Result<Mount, Missing> {
        root()?;
        let attempt = || -> TestResult<Mount> {
            let directory = mount_point()?;
            let image = directory.path().join("image");
            make_image(make, &image, size_mib << 20)?;
            Mount::by_loop_device(&image, Some(directory))
        };
        attempt().map_err(|error| no_loop_device(&error))
    }

    /// Mounts the file system in `image`; `kept` is removed with the mount.
    fn by_loop_device(image: &Path, kept: Option<TempDir>) -> TestResult<Mount> {
        let directory = mount_point()?;
        run(Command::new("mount").args(["-o", "loop"]).args([image, directory.path()]))?;
        Ok(Mount { directory, _image: kept })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Detached: a QEMU that is being killed may still hold its RAM here.
        let _ = unmount(self.directory.path(), UnmountFlags::DETACH);
    }
}

/// 2 MiB huge pages in the host's pool; dropping it releases them.
#[derive(Debug)]
pub struct HugePages {
    count_before: u64,
}

impl HugePages {
    /// Adds `size_mib` of huge pages to the pool.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, huge pages in this kernel, or enough free memory in one piece.
    pub fn reserve(size_mib: u64) -> Result<HugePages, Missing> {
        root()?;
        let read = || -> Option<u64> { fs::read_to_string(HUGE_PAGES).ok()?.trim().parse().ok() };
        let count_before =
            read().ok_or_else(|| Missing::beyond_setup("this kernel has no 2 MiB huge pages"))?;
        let guard = HugePages { count_before };
        let wanted = count_before + size_mib.div_ceil(2);
        fs::write(HUGE_PAGES, wanted.to_string())
            .map_err(|error| Missing::beyond_setup(format!("{HUGE_PAGES}: {error}")))?;
        if read() < Some(wanted) {
            return Err(Missing::beyond_setup(format!("no {size_mib} MiB of huge pages")));
        }
        Ok(guard)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE_PAGES, self.count_before.to_string());
    }
}

/// What users who are not root may do; dropping it puts back what was so before.
#[derive(Debug)]
pub struct Unprivileged {
    before: String,
}

impl Unprivileged {
    /// Chooses whether they may make a userfaultfd for faults of the kernel, as QEMU does.
    ///
    /// # Errors
    ///
    /// Says what is missing: root, or this setting, which Linux has since 5.2.
    pub fn userfault(is_allowed: bool) -> Result<Unprivileged, Missing> {
        root()?;
        let missing =
            |error: std::io::Error| Missing::beyond_setup(format!("{USERFAULT}: {error}"));
        let before = fs::read_to_string(USERFAULT).map_err(missing)?;
        let setting = Unprivileged { before };
        fs::write(USERFAULT, u8::from(is_allowed).to_string()).map_err(missing)?;
        Ok(setting)
    }
}

impl Drop for Unprivileged {
    fn drop(&mut self) {
        let _ = fs::write(USERFAULT, &self.before);
    }
}

/// The command that makes an ext4 in an image.
const EXT4: [&str; 3] = ["mkfs.ext4", "-q", "-F"];

/// The command that makes an xfs in an image.
const XFS: [&str; 2] = ["mkfs.xfs", "-q"];

/// Makes a file system by the command `make` in an image of `len` bytes, in place of one that is there.
fn make_image(make: &[&str], image: &Path, len: u64) -> TestResult {
    File::options().create(true).write(true).truncate(true).open(image)?.set_len(len)?;
    let (program, arguments) = make.split_first().ok_or("no program")?;
    run(Command::new(program).args(arguments).arg(image))
}

fn no_loop_device(error: &TestError) -> Missing {
    Missing::beyond_setup(format!("no file system on a loop device: {error}"))
}

fn mount_point() -> std::io::Result<TempDir> {
    tempfile::Builder::new().prefix("vmf-mnt-").tempdir()
}

fn run(command: &mut Command) -> TestResult {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let program = PathBuf::from(command.get_program());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(TestError::from(format!("{}: {}", program.display(), said.trim())))
}
