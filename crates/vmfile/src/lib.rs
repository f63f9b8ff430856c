//! Saves a running QEMU virtual machine to a file and brings it back.
//!
//! ```no_run
//! use vmfile::restore::{Destination, RestoreOptions, restore};
//! use vmfile::save::{After, SaveOptions, save};
//! use vmfile::{Control, Snapshot, Vm};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The VM whose QEMU was started with -qmp unix:/run/vm.qmp,server=on,wait=off.
//! let mut vm = Vm::connect("/run/vm.qmp".as_ref())?;
//! let options = SaveOptions::default().after(After::Quit);
//! let report = save(&mut vm, "/var/lib/vms/vm.vmf".as_ref(), &options, &Control::none())?;
//! println!("paused for {:.3} s, {} bytes", report.pause_seconds, report.bytes_written);
//!
//! // A new QEMU, started with the command line that was saved; its RAM is mapped from the file.
//! // The snapshot begins at byte 0 of its file.
//! let snapshot = Snapshot::open("/var/lib/vms/vm.vmf".as_ref(), 0)?;
//! let options = RestoreOptions::default();
//! let restored = restore(&snapshot, Destination::Saved, &options, &Control::none())?;
//! println!("{:?} runs: {}", restored.report.pid, restored.report.running);
//! # Ok(())
//! # }
//! ```
//!
//! Reading what is in a file needs no QEMU:
//!
//! ```
//! # use vmfile_pages::memory_file::{Contents, FileOptions, save};
//! # use vmfile_pages::{OwnMemory, PageSize, RamBlock, RamLayout};
//! use vmfile::check::{CheckOptions, check};
//! use vmfile::info::info;
//! use vmfile::{Control, Snapshot};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("vm.vmf");
//! # let block = RamBlock::new("pc.ram".to_owned(), 1 << 20, PageSize::KIB_4)?;
//! # let ram = RamLayout::new(vec![block])?;
//! # let memory = OwnMemory::new(vec![&[7; 1 << 20]]);
//! # let options = FileOptions::default();
//! # let contents = Contents::new("example-1.0", ram, &[("cpu", b"state")]);
//! # save(&path, contents, &memory, &options, &Control::none())?;
//! let snapshot = Snapshot::open(&path, 0)?;
//! let info = info(&snapshot)?;
//! assert_eq!(info.blocks[0].name, "pc.ram");
//!
//! // Checks every byte of the file.
//! let report = check(&snapshot, &CheckOptions::default(), &Control::none())?;
//! assert_eq!((report.pages_checked, report.findings_total), (256, 0));
//! # Ok(())
//! # }
//! ```
//!
//! Each verb has a module: [`save`](mod@save), [`restore`](mod@restore), [`check`](mod@check),
//! [`info`](mod@info), [`list`](mod@list), and for QEMU's migration streams
//! [`receive`](mod@receive), [`send`](mod@send) and [`convert`](mod@convert). Each takes options,
//! with a setter for each field, and a [`Control`], with which the caller stops the verb and
//! follows its progress; it returns a report, or an error that says what was found and what was
//! expected.
//!
//! The library never prints, never exits and never reads the environment. If a save fails, the VM
//! runs on as it did; if that cannot be done either, the error says so
//! ([`SaveError::leaves_paused`](error::SaveError::leaves_paused)). A process that saves has a
//! child process, its guardian, which lets the VM run on if the saving process is killed.
//!
//! For a VMM other than QEMU, use the crate `vmfile-pages` alone.

#![forbid(unsafe_code)]

mod change;
pub mod convert;
pub mod error;
mod guard;
mod image_facts;
mod image_path;
pub mod info;
mod leftover;
pub mod list;
mod new_file;
pub mod receive;
pub mod restore;
mod restore_error;
pub mod save;
mod secrets;
pub mod send;
mod surroundings;
mod trust;
mod whole;

pub use guard::GuardError;
pub use new_file::new_file;
pub use restore_error::{ImageChange, Mismatch, RestoreError};
pub use vmfile_engine::{
    Backend, BackendInUse, DirectIo, DirectIoInUse, Existing, PublishError, Unpublished, inherited,
};
pub use vmfile_format::FormatError;
pub use vmfile_format::manifest::{
    CpuSectionMeta, DiskMeta, Features, FileMeta, ImageMeta, MemoryRangeMeta,
};
pub use vmfile_pages::PagesError;
pub use vmfile_pages::check;
pub use vmfile_pages::control::{Control, Progress};
pub use vmfile_pages::jobs::Jobs;
pub use vmfile_pages::process_ram::ProcessRamError;
pub use vmfile_pages::reading::Verified;
pub use vmfile_pages::snapshot::{FileFormat, Manifest, Snapshot, SnapshotError};
pub use vmfile_qemu::{
    Blocker, BlockerKind, CommandLineError, DiscoverError, LaunchError, LaunchedQemu, LoadError,
    QmpError, Vm, VmAddress, VmError, resolve,
};
pub use vmfile_stream::Channels;
pub use vmfile_stream::error::ChannelsError;
