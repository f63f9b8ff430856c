//! Measures vmfile beside QEMU's own ways, libvirt and the disk's limit, on this host.
//!
//! Every comparison is made in rounds: A B C, A B C, never A A B B, because a shared disk changes
//! its speed within seconds. The first round warms up and does not count; ratios are medians of the
//! rounds' ratios. Every program makes its file durable within the measured time.

mod bench;
mod changing;
mod checkpoints;
mod compare;
mod contents;
mod error;
mod fio;
mod grid;
mod guest;
mod host;
pub mod html;
mod libvirt;
mod one_guest;
mod options;
mod page_cache;
mod process;
mod progress;
mod qemu_ways;
mod reading;
pub mod report;
mod restoring;
mod rounds;
mod run;
mod saving;
pub mod series;
mod sweep;

pub use error::BenchError;
pub use options::{Backing, BenchOptions, Contents};
pub use run::run;
pub mod table;
