//! The QEMUs that the tests run, and the parts of the guests.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::TestResult;
use crate::build_directory::target_directory;
use crate::lock::VmLock;
use crate::require::Missing;

/// Where firmware lies in the unpacked packages of a QEMU that is not installed.
///
/// Debian's QEMU 7.2 looks for firmware beside its program, 11.1 only in the system's directories.
/// There it would find the firmware of another version, which makes RAM blocks of other lengths.
const FIRMWARE_DIRECTORIES: [&str; 3] =
    ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];

/// A QEMU program; while it lives, no other test runs VMs.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    version: Version,
    /// Where this QEMU finds its firmware; empty for an installed QEMU, which finds it by itself.
    firmware_directories: Vec<PathBuf>,
    parts: GuestParts,
    _lock: Arc<VmLock>,
}

/// One of the QEMUs that the tests use; `cargo xtask setup` fetches those that are not installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The oldest that is tested, 7.2: it does not report the addresses of guest RAM and lacks
    /// mapped RAM.
    Oldest,
    /// The one that is installed, as [`Qemu::find`] finds it.
    Distribution,
    /// The newest that Debian had when setup fetched it.
    Newest,
}

/// A version of QEMU, such as 10.0.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number.
    pub micro: u32,
}

/// The files that `cargo xtask setup` makes.
#[derive(Debug, Clone)]
pub(crate) struct GuestParts {
    pub(crate) boot_sector: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

impl Qemu {
    /// Finds the QEMU named by `VMFILE_QEMU`, or `qemu-system-x86_64` in `PATH`, and waits until no
    /// other test uses it.
    ///
    /// # Errors
    ///
    /// Says what is missing: QEMU, or a part of the guests.
    pub fn find() -> Result<Qemu, Missing> {
        let program = env::var_os("VMFILE_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
        let program = PathBuf::from(program);
        let version = version_of(&program)
            .ok_or_else(|| Missing::new(format!("no QEMU runs as {}", program.display())))?;
        Qemu::ready(program, version, Vec::new())
    }

    /// Finds the QEMU of `release`, and waits until no other test uses any.
    ///
    /// # Errors
    ///
    /// As [`Qemu::find`].
    pub fn of(release: Release) -> Result<Qemu, Missing> {
        let Some(suite) = release.suite() else { return Qemu::find() };
        let tree = target_directory().join("qemu").join(suite);
        let program = tree.join("usr/bin/qemu-system-x86_64");
        let version = version_of(&program).ok_or_else(|| {
            let program = program.display();
            Missing::new(format!("no QEMU runs as {program}: run `cargo xtask setup`"))
        })?;
        let directories = FIRMWARE_DIRECTORIES.iter().map(|directory| tree.join(directory));
        Qemu::ready(program, version, directories.filter(|path| path.exists()).collect())
    }

    fn ready(
        program: PathBuf,
        version: Version,
        firmware_directories: Vec<PathBuf>,
    ) -> Result<Qemu, Missing> {
        let parts = GuestParts::find()?;
        let lock = VmLock::acquire()
            .map_err(|error| Missing::new(format!("the lock of the VM tests: {error}")))?;
        Ok(Qemu { program, version, firmware_directories, parts, _lock: lock })
    }

    /// As [`Qemu::find`], but asks for the version `minimum`, such as `"9.0"`, or later.
    ///
    /// # Errors
    ///
    /// Says what is missing, or which version was found.
    pub fn at_least(minimum: &str) -> Result<Qemu, Missing> {
        let wanted = Version::parse(minimum)
            .ok_or_else(|| Missing::new(format!("{minimum:?} is no version")))?;
        let qemu = Qemu::find()?;
        if qemu.version < wanted {
            let found = qemu.version;
            return Err(Missing::new(format!("needs QEMU {wanted} or later, found {found}")));
        }
        Ok(qemu)
    }

    /// Returns the program's path, or its name in `PATH`.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Returns the same QEMU, whose program lies elsewhere.
    #[must_use]
    pub fn as_program(&self, program: &Path) -> Qemu {
        Qemu { program: program.to_path_buf(), ..self.clone() }
    }

    /// Returns the file of the program.
    ///
    /// # Errors
    ///
    /// If no directory of `PATH` has it.
    pub fn executable(&self) -> TestResult<PathBuf> {
        let directories = env::var_os("PATH").unwrap_or_default();
        let mut files = env::split_paths(&directories).map(|path| path.join(&self.program));
        Ok(files.find(|path| path.is_file()).ok_or("QEMU is there")?)
    }

    /// Returns the version of the program.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    pub(crate) fn firmware_directories(&self) -> &[PathBuf] {
        &self.firmware_directories
    }

    pub(crate) fn parts(&self) -> &GuestParts {
        &self.parts
    }
}

impl Release {
    /// Returns the suite of Debian that setup fetches this QEMU from, or `None` for the installed
    /// one; `xtask/src/qemus.rs` lists the same suites.
    fn suite(self) -> Option<&'static str> {
        match self {
            Release::Oldest => Some("bookworm"),
            Release::Distribution => None,
            Release::Newest => Some("sid"),
        }
    }
}

impl Version {
    /// Parses `10.0.2` or `9.0`.
    fn parse(text: &str) -> Option<Version> {
        let mut numbers = text.split('.').map(str::parse);
        let major = numbers.next()?.ok()?;
        let minor = numbers.next()?.ok()?;
        let micro = numbers.next().unwrap_or(Ok(0)).ok()?;
        Some(Version { major, minor, micro })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl GuestParts {
    fn find() -> Result<GuestParts, Missing> {
        let directory = target_directory().join("guest");
        let boot = directory.join("kernel/boot");
        let kernel = fs::read_dir(&boot).ok().and_then(|entries| {
            let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
            paths.find(|path| path.to_string_lossy().contains("/vmlinuz-"))
        });
        let parts = GuestParts {
            boot_sector: directory.join("boot_sector.bin"),
            kernel: kernel.unwrap_or_else(|| boot.join("vmlinuz")),
            initramfs: directory.join("initramfs.cpio"),
        };
        for part in [&parts.boot_sector, &parts.kernel, &parts.initramfs] {
            if !part.exists() {
                let part = part.display();
                return Err(Missing::new(format!("no {part}: run `cargo xtask setup`")));
            }
        }
        Ok(parts)
    }
}

fn version_of(program: &Path) -> Option<Version> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let rest = text.strip_prefix("QEMU emulator version ")?;
    let end = rest.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(rest.len());
    Version::parse(rest.get(..end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_number_by_number() {
        let version = |text| Version::parse(text).unwrap();
        assert!(version("10.0") > version("9.2.4"));
        assert!(version("9.0") <= version("9.0.0"));
        assert_eq!(Version::parse("nine"), None);
    }
}
