//! What a VM is: the parts that run, and the parts that its command line would make.
//!
//! Devices, memory and CPUs come and go while a VM runs, and its command line stays the same. So
//! vmfile asks QEMU before it relies on that line: [`Parts`] is what the VM has, and [`compare`]
//! finds what a QEMU started with the line would lack, or have in addition. A [`Difference`] says
//! how to change the line, if QEMU's answers tell that.
//!
//! A part counts as different only on proof: QEMU marks it as hot-plugged, or the line defines it
//! and QEMU has it no longer. If the line does not mention a part that QEMU has from the start, the
//! machine type made it.

mod compare;
mod difference;
mod drives;
mod networks;
mod parts;
mod plugged;
mod questions;
mod usb;

pub use compare::{Compared, compare};
pub use difference::{Difference, Remedy};
pub use parts::{Cpu, Device, MemoryDevice, Parts};
