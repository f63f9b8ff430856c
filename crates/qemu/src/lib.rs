//! Talks to QEMU: finds VMs, starts them, and sends commands to their monitors.
//!
//! ```
//! use vmfile_qemu::{Feature, QemuVersion};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // What can a QEMU of this version do?
//! let version: QemuVersion = "10.0.2".parse()?;
//! assert!(version.has(Feature::MappedRam));
//! # Ok(())
//! # }
//! ```
//!
//! ```no_run
//! use vmfile_qemu::Vm;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // What does a running VM say of itself?
//! let mut vm = Vm::connect("/run/vm.qmp".as_ref())?;
//! println!("{}: {:?}", vm.version()?, vm.run_state()?);
//! for block in vm.ram_blocks()? {
//!     println!("{}: {} bytes", block.name, block.used_length);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | module | subject |
//! |---|---|
//! | [`qmp`] | the monitor's protocol: one command, one answer, events aside |
//! | [`vm`] | a running QEMU: its state, RAM blocks, disks, device state, and what forbids a save |
//! | [`migration`] | a waiting QEMU that loads a stream |
//! | [`outgoing`] | a running VM that sends itself: as a stream, or as a file |
//! | [`command_line`] | a QEMU command line, understood enough to start the VM again |
//! | [`launch`] | a QEMU that this process starts, and kills unless the caller keeps it |
//! | [`program`] | a QEMU on disk: its version |
//! | [`identity`] | what a VM is made of, and how that differs from what its command line would make |
//! | [`image_format`] | formats of disk images |
//! | [`discover`] | the VMs that run on this host |
//! | [`unix_socket`] | connecting without waiting in the kernel |
//! | [`files`] | which QEMU of this host uses a file |
//! | [`version`] | what each QEMU version can do |
//!
//! This crate never reads guest RAM nor a snapshot: it passes descriptors. It prints nothing.
//! Command lines may hold secrets, so errors name the option at fault and not its value.

#![forbid(unsafe_code)]

mod below;
pub mod command_line;
pub mod discover;
pub mod files;
pub mod identity;
pub mod image_format;
pub mod launch;
pub mod migration;
pub mod outgoing;
mod pass_fd;
mod proc;
pub mod program;
pub mod qmp;
mod raw_window;
mod size;
mod stream_settings;
mod surroundings;
pub mod unix_socket;
pub mod version;
pub mod vm;

pub use command_line::{
    CommandLine, CommandLineError, EmptiedFile, LineDevice, LineDrive, LineImage, MappedBlock,
    Medium, Pin, redact_image,
};
pub use discover::{DiscoverError, Found, VmAddress, list, resolve};
pub use files::{FileUse, FileUser, user_of_file};
pub use identity::{Compared, Cpu, Device, Difference, MemoryDevice, Parts, Remedy};
pub use launch::{
    Launch, LaunchError, LaunchedQemu, MonitorPair, find_program, high_descriptor, output_of,
};
pub use migration::LoadError;
pub use outgoing::{KeptFile, Outgoing, SentRam};
pub use proc::is_process_stopped;
pub use program::program_version;
pub use qmp::{Event, Qmp, QmpError};
pub use raw_window::RawWindow;
pub use stream_settings::{SettingsChange, StreamSettings};
pub use surroundings::Surroundings;
pub use version::{Feature, QemuVersion};
pub use vm::{
    Blocker, BlockerKind, DeviceName, DeviceStateFile, Drive, FileId, Footprint, Holder, Image,
    IoLimits, MemoryBackend, MemoryRange, Overlay, PUT_BACK_TIMEOUT, Paused, ProcessInfo,
    RamBlockInfo, RunState, SaveRecord, UndoStep, Vm, VmError, sender, steps_to_end, steps_to_run,
    undo_steps,
};
