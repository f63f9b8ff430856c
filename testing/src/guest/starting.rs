//! Starts a guest from its description.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::boot_sector::BootSector;
use super::command_line::CommandLine;
use super::config::{GuestConfig, Linux, Program};
use super::prepared::{Prepared, RamFiles};
use super::ram::{Ram, RamKind};
use super::running::Guest;
use crate::TestResult;
use crate::ordinary_user::OrdinaryUser;
use crate::qemu::Qemu;

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
    /// Starts the guest.
    ///
    /// # Errors
    ///
    /// When QEMU does not start, with what it says.
    pub fn boot(&self, qemu: &Qemu) -> TestResult<Guest> {
        self.prepare(qemu)?.start(&[])
    }

    /// Starts a QEMU that waits for an incoming migration of this VM. `address` is `defer`, or the
    /// address that QEMU listens on.
    ///
    /// # Errors
    ///
    /// When QEMU does not start, with what it says.
    pub fn incoming(&self, qemu: &Qemu, address: &str) -> TestResult<Guest> {
        self.prepare(qemu)?.start(&["-incoming", address])
    }

    /// Makes the files and the command line of one VM, and starts nothing.
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

impl Prepared {
    /// Starts QEMU with `more` arguments.
    ///
    /// # Errors
    ///
    /// When QEMU does not start, with what it says.
    pub fn start(self, more: &[&str]) -> TestResult<Guest> {
        let child = self.spawn(Command::new(self.qemu.program()), more)?;
        Guest::connect(self, Some(child))
    }

    /// Starts QEMU as `user`, to whom all files of this VM then belong, and waits until the guest has
    /// reported a pass.
    ///
    /// # Errors
    ///
    /// When QEMU does not start, with what it says.
    pub fn start_as(self, user: &OrdinaryUser) -> TestResult<Guest> {
        self.belongs_to(user)?;
        let child = self.spawn(user.command(self.qemu.program()), &[])?;
        let guest = Guest::connect(self, Some(child))?;
        guest.wait_for_count(1)?;
        Ok(guest)
    }

    /// Takes charge of a QEMU that another program started with [`Prepared::command_line`].
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub fn attach(self) -> TestResult<Guest> {
        Guest::connect(self, None)
    }
}
