//! vmfile beside QEMU's own ways, libvirt and the disk's limit, measured on this host.
//!
//! Every comparison is made in rounds: A B C, A B C, never A A B B, because a disk that others share
//! changes its mind within seconds. The first round warms up and is not counted; ratios are medians
//! of the rounds' ratios. Every program makes its file durable within the time that is measured.

mod bench;
mod compare;
mod contents;
mod error;
mod fio;
mod grid;
mod guest;
mod host;
pub mod html;
mod libvirt;
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
mod scene;
pub mod series;
mod sweep;

pub use error::BenchError;
pub use options::{Backing, BenchOptions, Contents};
pub use run::run;
pub mod table;
