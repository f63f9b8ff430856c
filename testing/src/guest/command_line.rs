//! QEMU's command line for a guest.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::config::{Firmware, GuestConfig, Machine, Program, copy_once};
use super::ram::RamKind;
use crate::TestResult;
use crate::image::make_image;
use crate::qemu::Qemu;

const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const OVMF_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// What a command line is made from.
pub(crate) struct CommandLine<'a> {
    pub(crate) config: &'a GuestConfig,
    pub(crate) qemu: &'a Qemu,
    /// The directory of the VM's sockets and logs.
    pub(crate) directory: &'a Path,
    /// The directory of the files that back RAM; `None` if RAM is not in files.
    pub(crate) ram_directory: Option<&'a Path>,
}

impl CommandLine<'_> {
    /// Makes the files that the command line names, and returns its arguments.
    pub(crate) fn build(&self) -> TestResult<Vec<OsString>> {
        let mut arguments = Arguments::default();
        for directory in self.qemu.firmware_directories() {
            arguments.option("-L", directory);
        }
        if !self.config.default_devices {
            arguments.flag("-nodefaults");
        }
        arguments.flag("-no-user-config");
        arguments.flag("-no-reboot");
        arguments.option("-display", "none");
        arguments.option("-smp", format!("cores={}", self.config.vcpus));
        self.add_memory(&mut arguments);
        self.add_firmware(&mut arguments)?;
        self.add_program(&mut arguments)?;
        self.add_devices(&mut arguments)?;
        self.add_channels(&mut arguments);
        arguments.list.extend(self.config.more_arguments.iter().cloned());
        Ok(arguments.list)
    }

    fn add_memory(&self, arguments: &mut Arguments) {
        let config = self.config;
        let machine = match (config.machine, config.machine_version) {
            (Machine::Pc, None) => "pc".to_owned(),
            (Machine::Q35, None) => "q35".to_owned(),
            (Machine::Pc, Some(version)) => format!("pc-i440fx-{version}"),
            (Machine::Q35, Some(version)) => format!("pc-q35-{version}"),
        };
        let size = config.ram.size_mib;
        if config.dimm_sizes_mib.is_empty() {
            arguments.option("-m", format!("{size}M"));
        } else {
            let most = size + config.dimm_sizes_mib.iter().sum::<u64>() + 1024;
            arguments.option("-m", format!("{size}M,slots=4,maxmem={most}M"));
        }
        if config.ram.kind == RamKind::Machine {
            arguments.option("-machine", format!("{machine},accel=tcg"));
        } else if config.node_sizes_mib.is_empty() {
            // QEMU's own name for the machine's RAM, so that a file restores into any kind of RAM.
            self.add_backend(arguments, "pc.ram", size);
            arguments.option("-machine", format!("{machine},accel=tcg,memory-backend=pc.ram"));
        } else {
            arguments.option("-machine", format!("{machine},accel=tcg"));
            for (node, size) in (0_u32..).zip(&config.node_sizes_mib) {
                let id = format!("ram-node{node}");
                self.add_backend(arguments, &id, *size);
                arguments.option("-numa", format!("node,nodeid={node},memdev={id}"));
            }
            let node_count = u32::try_from(config.node_sizes_mib.len()).unwrap_or(u32::MAX);
            for cpu in 0..config.vcpus {
                let node = cpu % node_count;
                arguments.option("-numa", format!("cpu,node-id={node},core-id={cpu},{REST}"));
            }
        }
        for (index, size) in config.dimm_sizes_mib.iter().enumerate() {
            let id = format!("ram-dimm{index}");
            self.add_backend(arguments, &id, *size);
            arguments.option("-device", format!("pc-dimm,id=dimm{index},memdev={id}"));
        }
    }

    fn add_backend(&self, arguments: &mut Arguments, id: &str, size_mib: u64) {
        let file = self.ram_directory.map_or_else(PathBuf::new, |directory| directory.join(id));
        arguments.option("-object", self.config.ram.backend(id, size_mib, &file));
    }

    fn add_firmware(&self, arguments: &mut Arguments) -> TestResult {
        if self.config.firmware == Firmware::Bios {
            return Ok(());
        }
        let variables = self.config.files.path().join("ovmf_variables");
        copy_once(Path::new(OVMF_VARIABLES), &variables)?;
        let flash = "if=pflash,format=raw";
        arguments.option("-drive", format!("{flash},unit=0,readonly=on,file={OVMF_CODE}"));
        arguments.option("-drive", format!("{flash},unit=1,file={}", variables.display()));
        Ok(())
    }

    fn add_program(&self, arguments: &mut Arguments) -> TestResult {
        match &self.config.program {
            Program::BootSector(program) => {
                let image = self.config.files.path().join("boot.img");
                if !image.exists() {
                    program.write_image(&self.qemu.parts().boot_sector, &image)?;
                }
                // The guest does not write to this image, so two VMs may have it open at the same
                // time.
                let image = image.display();
                arguments.option("-drive", format!("file={image},format=raw,file.locking=off"));
            }
            Program::Linux(program) => {
                let disk = u8::from(self.config.disk_mib.is_some());
                let busy = u8::from(program.busy);
                let moment = u8::from(self.config.one_moment);
                let sleep = self.config.sleeps_after.map(|pass| format!(" vmfile.sleep={pass}"));
                arguments.option("-kernel", self.qemu.parts().kernel.as_os_str());
                arguments.option("-initrd", self.qemu.parts().initramfs.as_os_str());
                arguments.option(
                    "-append",
                    format!(
                        "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off \
                         vmfile.seed={} vmfile.fill={} vmfile.data={} vmfile.busy={busy} \
                         vmfile.disk={disk} vmfile.moment={moment}{}",
                        program.seed,
                        program.fill_mib,
                        program.data_share,
                        sleep.unwrap_or_default()
                    ),
                );
            }
        }
        Ok(())
    }

    fn add_devices(&self, arguments: &mut Arguments) -> TestResult {
        if let Some(disk_mib) = self.config.disk_mib {
            let disk = self.config.disk_path();
            if !disk.exists() {
                make_image(&disk, &["-f", "qcow2"], disk_mib)?;
            }
            let disk = disk.display();
            arguments.option("-drive", format!("file={disk},format=qcow2,if=none,id=disk0"));
            arguments.option("-device", "virtio-blk-pci,drive=disk0");
        }
        if self.config.virtio {
            arguments.option("-device", "virtio-rng-pci");
            arguments.option("-device", "virtio-balloon-pci");
            arguments.option("-netdev", "user,id=net0,restrict=on");
            arguments.option("-device", "virtio-net-pci,netdev=net0");
        }
        Ok(())
    }

    fn add_channels(&self, arguments: &mut Arguments) {
        let path = |name: &str| self.directory.join(name).display().to_string();
        arguments.option("-chardev", format!("file,id=serial0,path={}", path("serial")));
        arguments.option("-serial", "chardev:serial0");
        // One socket for the program under test, one for the test: a socket serves one client at a
        // time.
        for name in ["qmp", "oracle"] {
            arguments.option("-qmp", format!("unix:{},server=on,wait=off", path(name)));
        }
        arguments.option("-pidfile", path("pid"));
    }
}

/// The rest of a CPU's topology: one socket with one core for each CPU.
const REST: &str = "socket-id=0,thread-id=0";

/// The arguments that are collected.
#[derive(Default)]
struct Arguments {
    list: Vec<OsString>,
}

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.list.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.list.push(name.into());
        self.list.push(value.into());
    }
}
