//! A small QMP client: JSON lines over a Unix socket.
//!
//! QMP is QEMU's machine protocol: a greeting, then one JSON object per line. This client sends one
//! command at a time, can pass a descriptor with it, bounds everything it keeps, and ignores what
//! it does not know, so that a newer QEMU is not an error.

mod command;
mod connect;
mod connection;
mod error;
mod event;
mod holders;
mod wait;

pub use command::{COMMAND_TIMEOUT, command_line};
pub(crate) use connect::is_of_libvirt;
pub use connection::{LINE_LEN_MAX, Qmp};
pub use error::QmpError;
pub use event::{EVENT_COUNT_MAX, Event};
pub use holders::Holders;

pub(crate) use command::is_missing_command;
pub(crate) use error::{LIBVIRT_HINT, unexpected};
pub(crate) use wait::STILL_TIMEOUT;
