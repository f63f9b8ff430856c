//! How a guest is described before it is started.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::TempDir;

use super::boot_sector::BootSector;
use super::command_line::CommandLine;
use super::ram::{Ram, RamKind};
use super::running::Guest;
use crate::qemu::Qemu;
use crate::{TestError, TestResult};

/// A guest that can be started, more than once: as the source of a save and as its restored VM.
///
/// Disks and firmware variables belong to the description, so all VMs of one description share
/// them; sockets, logs and RAM belong to each VM.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    pub(crate) program: Program,
    pub(crate) machine: Machine,
    pub(crate) machine_version: Option<&'static str>,
    pub(crate) firmware: Firmware,
    pub(crate) ram: Ram,
    pub(crate) vcpus: u32,
    pub(crate) node_sizes_mib: Vec<u64>,
    pub(crate) dimm_sizes_mib: Vec<u64>,
    pub(crate) disk_mib: Option<u64>,
    pub(crate) one_moment: bool,
    pub(crate) default_devices: bool,
    pub(crate) virtio: bool,
    pub(crate) more_arguments: Vec<OsString>,
    pub(crate) files: Arc<TempDir>,
}

/// What runs in the guest.
#[derive(Debug, Clone)]
pub(crate) enum Program {
    BootSector(BootSector),
    Linux(Linux),
}

/// What the Linux guest is told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linux {
    pub(crate) seed: u32,
    pub(crate) fill_mib: u32,
    pub(crate) data_share: u32,
    pub(crate) busy: bool,
}

/// QEMU's machine type, without a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// The i440FX machine.
    Pc,
    /// The Q35 machine.
    Q35,
}

/// What boots the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// UEFI: two flash chips, which are RAM blocks too. Linux guests only.
    Ovmf,
}

impl Guest {
    /// Describes a boot-sector guest that fills all its RAM below 2 GiB.
    #[must_use]
    pub fn boot_sector(ram: Ram) -> GuestConfig {
        let size_mib = u32::try_from(ram.size_mib.min(2048)).unwrap_or(2048);
        GuestConfig::new(
            Program::BootSector(BootSector {
                seed: 1,
                fill_mib: size_mib.saturating_sub(1),
                data_share: 128,
                repeated_share: 26,
                pause_ticks: 1,
            }),
            ram,
        )
    }

    /// Describes a Linux guest that fills 16 MiB; it needs 160 MiB of RAM besides what it fills.
    #[must_use]
    pub fn linux(ram: Ram) -> GuestConfig {
        let linux = Linux { seed: 1, fill_mib: 16, data_share: 128, busy: false };
        GuestConfig::new(Program::Linux(linux), ram)
    }
}

impl GuestConfig {
    #[expect(clippy::expect_used, reason = "without a temporary directory no test can run")]
    fn new(program: Program, ram: Ram) -> GuestConfig {
        let files = tempfile::Builder::new().prefix("vmf-").tempdir();
        GuestConfig {
            program,
            machine: Machine::Pc,
            machine_version: None,
            firmware: Firmware::Bios,
            ram,
            vcpus: 1,
            node_sizes_mib: Vec::new(),
            dimm_sizes_mib: Vec::new(),
            disk_mib: None,
            one_moment: false,
            default_devices: false,
            virtio: false,
            more_arguments: Vec::new(),
            files: Arc::new(files.expect("a temporary directory")),
        }
    }

    /// Chooses what the guest's memory holds.
    #[must_use]
    pub fn seed(mut self, seed: u32) -> GuestConfig {
        match &mut self.program {
            Program::BootSector(program) => program.seed = seed,
            Program::Linux(program) => program.seed = seed,
        }
        self
    }

    /// Chooses how much the guest fills: the boot-sector guest from 1 MiB upwards and below the hole
    /// for devices (2 GiB on q35, 3 GiB on pc), the Linux guest wherever its kernel has free memory.
    #[must_use]
    pub fn fill_mib(mut self, fill_mib: u32) -> GuestConfig {
        match &mut self.program {
            Program::BootSector(program) => program.fill_mib = fill_mib,
            Program::Linux(program) => program.fill_mib = fill_mib,
        }
        self
    }

    /// Chooses how many pages of 256 hold random words.
    #[must_use]
    pub fn data_share(mut self, share: u32) -> GuestConfig {
        match &mut self.program {
            Program::BootSector(program) => program.data_share = share,
            Program::Linux(program) => program.data_share = share,
        }
        self
    }

    /// Lets the guest work without rest between its passes.
    #[must_use]
    pub fn busy(mut self) -> GuestConfig {
        match &mut self.program {
            Program::BootSector(program) => program.pause_ticks = 0,
            Program::Linux(program) => program.busy = true,
        }
        self
    }

    /// Chooses the machine type; it is `pc` otherwise.
    #[must_use]
    pub fn machine(mut self, machine: Machine) -> GuestConfig {
        self.machine = machine;
        self
    }

    /// Chooses the version of the machine type, such as `"7.2"`; it is QEMU's own otherwise. What one
    /// QEMU saves another one loads only as a machine of a version that both have.
    #[must_use]
    pub fn machine_version(mut self, version: &'static str) -> GuestConfig {
        self.machine_version = Some(version);
        self
    }

    /// Chooses the firmware; it is SeaBIOS otherwise.
    #[must_use]
    pub fn firmware(mut self, firmware: Firmware) -> GuestConfig {
        self.firmware = firmware;
        self
    }

    /// Chooses the number of virtual CPUs; it is 1 otherwise.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> GuestConfig {
        self.vcpus = vcpus;
        self
    }

    /// Splits the RAM into NUMA nodes of these sizes, which must add up to all of it.
    #[must_use]
    pub fn numa_nodes(mut self, sizes_mib: &[u64]) -> GuestConfig {
        self.node_sizes_mib = sizes_mib.to_vec();
        self
    }

    /// Adds a memory module of the same kind of RAM.
    #[must_use]
    pub fn dimm(mut self, size_mib: u64) -> GuestConfig {
        self.dimm_sizes_mib.push(size_mib);
        self
    }

    /// Adds a virtio disk on a qcow2 image, empty at first; the Linux guest writes and reads it.
    #[must_use]
    pub fn disk(mut self, size_mib: u64) -> GuestConfig {
        self.disk_mib = Some(size_mib);
        self
    }

    /// Lets the Linux guest see to it that its disk is of no later moment than its memory.
    #[must_use]
    pub fn one_moment(mut self) -> GuestConfig {
        self.one_moment = true;
        self
    }

    /// Leaves the VM the devices that QEMU adds where no `-nodefaults` is given.
    #[must_use]
    pub fn default_devices(mut self) -> GuestConfig {
        self.default_devices = true;
        self
    }

    /// Adds a virtio network card, random number generator and balloon.
    #[must_use]
    pub fn virtio(mut self) -> GuestConfig {
        self.virtio = true;
        self
    }

    /// Adds arguments to QEMU's command line.
    #[must_use]
    pub fn arguments<I: IntoIterator<Item: Into<OsString>>>(mut self, arguments: I) -> GuestConfig {
        self.more_arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Returns the sum that the boot-sector guest must print in pass `pass`; `None` for the Linux
    /// guest, which judges itself.
    #[must_use]
    pub fn expected_sum(&self, pass: u32) -> Option<u64> {
        match &self.program {
            Program::BootSector(program) => Some(program.sum(pass).into()),
            Program::Linux(_) => None,
        }
    }

    /// Returns the word that fills every repeated page of this guest, in memory's order of bytes.
    #[must_use]
    pub fn repeated_word(&self) -> Vec<u8> {
        match &self.program {
            Program::BootSector(program) => (program.seed | 1).to_le_bytes().to_vec(),
            Program::Linux(program) => (spread(program.seed.into()) | 1).to_le_bytes().to_vec(),
        }
    }

    /// Returns the boot-sector guest's oracle, if this is one.
    #[must_use]
    pub fn boot_sector_oracle(&self) -> Option<BootSector> {
        match &self.program {
            Program::BootSector(program) => Some(*program),
            Program::Linux(_) => None,
        }
    }

    /// Returns the image of the disk that [`GuestConfig::disk`] added.
    #[must_use]
    pub fn disk_path(&self) -> PathBuf {
        self.files.path().join("disk.qcow2")
    }

    /// Starts the guest.
    ///
    /// # Errors
    ///
    /// When QEMU does not start, with what it says.
    pub fn boot(&self, qemu: &Qemu) -> TestResult<Guest> {
        self.prepare(qemu)?.start(&[])
    }

    /// Starts a QEMU that waits for this VM: `defer`, or an address that it listens to.
    ///
    /// # Errors
    ///
    /// When QEMU does not start, with what it says.
    pub fn incoming(&self, qemu: &Qemu, address: &str) -> TestResult<Guest> {
        self.prepare(qemu)?.start(&["-incoming", address])
    }

    /// Makes the files of one VM and its command line, and starts nothing.
    ///
    /// # Errors
    ///
    /// When a file cannot be made.
    pub fn prepare(&self, qemu: &Qemu) -> TestResult<Prepared> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = tempfile::Builder::new().prefix("vmf-").tempdir()?;
        let ram_files = match &self.ram.kind {
            RamKind::File(ram_directory) => Some(RamFiles {
                directory: tempfile::Builder::new()
                    .prefix(&format!("vmf-ram-{number}-"))
                    .tempdir_in(ram_directory)?,
            }),
            _ => None,
        };
        let arguments = CommandLine {
            config: self,
            qemu,
            directory: directory.path(),
            ram_directory: ram_files.as_ref().map(|files| files.directory.path()),
        }
        .build()?;
        Ok(Prepared { config: self.clone(), qemu: qemu.clone(), directory, ram_files, arguments })
    }
}

/// A VM whose files and command line are ready.
#[derive(Debug)]
pub struct Prepared {
    pub(crate) config: GuestConfig,
    pub(crate) qemu: Qemu,
    pub(crate) directory: TempDir,
    pub(crate) ram_files: Option<RamFiles>,
    arguments: Vec<OsString>,
}

/// The files that hold a VM's RAM; they vanish with it.
#[derive(Debug)]
pub(crate) struct RamFiles {
    pub(crate) directory: TempDir,
}

impl Prepared {
    /// Returns the command line, the program first.
    #[must_use]
    pub fn command_line(&self) -> Vec<OsString> {
        let program = self.qemu.program().as_os_str().to_owned();
        [program].into_iter().chain(self.arguments.iter().cloned()).collect()
    }

    /// Returns the directory of this VM's sockets and logs, which its command line names.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the QMP socket of this VM for the program under test.
    #[must_use]
    pub fn qmp_path(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// Starts QEMU with `more` arguments.
    ///
    /// # Errors
    ///
    /// When QEMU does not start, with what it says.
    pub fn start(self, more: &[&str]) -> TestResult<Guest> {
        let child = self.spawn(more)?;
        Guest::connect(self, Some(child))
    }

    /// Takes charge of a QEMU that somebody else started with [`Prepared::command_line`].
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub fn attach(self) -> TestResult<Guest> {
        Guest::connect(self, None)
    }

    fn spawn(&self, more: &[&str]) -> TestResult<Child> {
        let errors = File::options().create_new(true).append(true).open(self.stderr_path())?;
        Command::new(self.qemu.program())
            .args(&self.arguments)
            .args(more)
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors)
            .spawn()
            .map_err(|error| format!("{}: {error}", self.qemu.program().display()).into())
    }

    pub(crate) fn stderr_path(&self) -> PathBuf {
        self.directory.path().join("stderr")
    }

    pub(crate) fn serial_path(&self) -> PathBuf {
        self.directory.path().join("serial")
    }
}

/// Spreads the bits of `x`, as `mix` in the Linux guest's `pattern.rs` does.
fn spread(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// Makes an empty qcow2 image.
pub(crate) fn make_qcow2(path: &Path, size_mib: u64) -> TestResult {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(format!("{size_mib}M"));
    let output = command.output().map_err(|error| format!("qemu-img: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("qemu-img: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// Copies `source` unless `target` is there already.
pub(crate) fn copy_once(source: &Path, target: &Path) -> TestResult {
    if !target.exists() {
        fs::copy(source, target)
            .map_err(|error| TestError::from(format!("{}: {error}", source.display())))?;
    }
    Ok(())
}
