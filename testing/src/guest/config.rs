//! How a guest is described before it is started.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::boot_sector::BootSector;
use super::ram::Ram;
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
    pub(crate) sleeps_after: Option<u32>,
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

/// Options of the Linux guest; its kernel command line carries them.
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

impl GuestConfig {
    #[expect(clippy::expect_used, reason = "without a temporary directory no test can run")]
    pub(super) fn new(program: Program, ram: Ram) -> GuestConfig {
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
            sleeps_after: None,
            default_devices: false,
            virtio: false,
            more_arguments: Vec::new(),
            files: Arc::new(files.expect("a temporary directory")),
        }
    }

    /// Chooses the seed from which the contents of the guest's memory follow.
    #[must_use]
    pub fn seed(mut self, seed: u32) -> GuestConfig {
        match &mut self.program {
            Program::BootSector(program) => program.seed = seed,
            Program::Linux(program) => program.seed = seed,
        }
        self
    }

    /// Chooses how much the guest fills: the boot-sector guest from 1 MiB upwards and below the
    /// hole for devices (2 GiB on q35, 3 GiB on pc), the Linux guest wherever its kernel has free
    /// memory.
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

    /// Chooses the machine type; the default is `pc`.
    #[must_use]
    pub fn machine(mut self, machine: Machine) -> GuestConfig {
        self.machine = machine;
        self
    }

    /// Chooses the version of the machine type, such as `"7.2"`; the default is QEMU's newest. A
    /// QEMU of another version loads a file only if it has the saved version of the machine type.
    #[must_use]
    pub fn machine_version(mut self, version: &'static str) -> GuestConfig {
        self.machine_version = Some(version);
        self
    }

    /// Chooses the firmware; the default is SeaBIOS.
    #[must_use]
    pub fn firmware(mut self, firmware: Firmware) -> GuestConfig {
        self.firmware = firmware;
        self
    }

    /// Chooses the number of virtual CPUs; the default is 1.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> GuestConfig {
        self.vcpus = vcpus;
        self
    }

    /// Splits the RAM into NUMA nodes of these sizes, which must add up to the size of the RAM.
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

    /// Makes the Linux guest check that its disk is not from a later moment than its memory.
    #[must_use]
    pub fn one_moment(mut self) -> GuestConfig {
        self.one_moment = true;
        self
    }

    /// Makes the Linux guest sleep (ACPI S3) after this pass; `system_wakeup` wakes it.
    #[must_use]
    pub fn sleeps_after(mut self, pass: u32) -> GuestConfig {
        self.sleeps_after = Some(pass);
        self
    }

    /// Leaves out `-nodefaults`, so that QEMU adds its default devices.
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

    /// Returns the word that fills every repeated page of this guest, as its bytes lie in memory.
    #[must_use]
    pub fn repeated_word(&self) -> Vec<u8> {
        match &self.program {
            Program::BootSector(program) => (program.seed | 1).to_le_bytes().to_vec(),
            Program::Linux(program) => (spread(program.seed.into()) | 1).to_le_bytes().to_vec(),
        }
    }

    /// Returns the oracle of the boot-sector guest; `None` for the Linux guest.
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
}

/// Spreads the bits of `x`, as `mix` in the Linux guest's `pattern.rs` does.
fn spread(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// Copies `source` unless `target` is there already.
pub(crate) fn copy_once(source: &Path, target: &Path) -> TestResult {
    if !target.exists() {
        fs::copy(source, target)
            .map_err(|error| TestError::from(format!("{}: {error}", source.display())))?;
    }
    Ok(())
}
