//! What a VM is: the parts that run, and the parts that its command line would make.
//!
//! Devices, memory and CPUs come and go while a VM runs, and its command line stays what it was. A
//! VM that is to be started again from that line is therefore asked first: [`Parts`] is what QEMU
//! says it has, and [`compare`] is what a QEMU started with the line would not have, or would
//! have too much. A [`Difference`] says how to make it good, where QEMU's own answers tell.
//!
//! A part counts as different only on proof: QEMU marks it as hot-plugged, or the line defines it
//! and QEMU has it no longer. What the line does not mention and QEMU has from the start was made by
//! the machine type.

mod compare;
mod difference;
mod drives;
mod networks;
mod parts;
mod plugged;
mod questions;

pub use compare::{Compared, compare};
pub use difference::{Difference, Remedy};
pub use parts::{Cpu, Device, MemoryDevice, Parts};
