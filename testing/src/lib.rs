//! Guests, QEMU and oracles for vmfile's tests.
//!
//! A test requires what it needs, boots a guest and waits until the guest reports that its RAM is
//! right:
//!
//! ```no_run
//! use vmfile_testing::{Guest, Ram, TestResult, requires};
//!
//! fn a_guest_counts() -> TestResult {
//!     let qemu = requires!(qemu >= "9.0");
//!     let guest = Guest::boot_sector(Ram::private(64)).seed(7).boot(&qemu)?;
//!     guest.wait_for_count(3)?;
//!     Ok(())
//! }
//! ```
//!
//! A test that cannot run here prints `skipped: ` and the reason on a separate line, and passes.
//! `cargo xtask test` counts and lists those lines. With `CI=true` the test fails instead, so that
//! CI never skips a test unnoticed.
//!
//! A test that tries cases calls [`cases`] with the number that it has tried: `cargo xtask test` adds them
//! up, and docs/reliability.md shows them.

mod build_directory;
mod case;
mod cases;
mod control_group;
mod failing_file;
mod fixture;
mod guest;
mod image;
mod lock;
pub mod logged_disk;
pub mod migration;
mod ordinary_user;
mod qemu;
mod qmp;
mod random;
mod require;
mod saved;
mod slow_disk;
pub mod verbs;

pub use case::Case;
pub use cases::cases;
pub use control_group::ControlGroup;
pub use failing_file::FailingFile;
pub use fixture::{HugePages, Mount, Unprivileged};
pub use guest::boot_sector::BootSector;
pub use guest::config::{Firmware, GuestConfig, Machine};
pub use guest::count::Count;
pub use guest::prepared::Prepared;
pub use guest::ram::{Ram, RamKind};
pub use guest::running::Guest;
pub use image::make_image;
pub use ordinary_user::OrdinaryUser;
pub use qemu::{Qemu, Release, Version};
pub use qmp::Monitor;
pub use random::{Random, given};
pub use require::{Missing, root};
pub use saved::Saved;
pub use slow_disk::SlowDisk;

use std::error::Error;

/// The error of a test: any error, kept with its message.
pub type TestError = Box<dyn Error + Send + Sync>;

/// What a test returns.
pub type TestResult<T = ()> = Result<T, TestError>;
