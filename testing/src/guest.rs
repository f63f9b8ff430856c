//! The guests: how they are described, started and watched.

pub(crate) mod boot_sector;
mod command_line;
pub(crate) mod config;
pub(crate) mod count;
pub(crate) mod prepared;
pub(crate) mod ram;
pub(crate) mod running;
mod starting;
