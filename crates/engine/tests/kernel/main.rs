//! The engine against the real kernel.
//!
//! Nothing is simulated: files lie on the file system of the target directory, on tmpfs and on ext4
//! in a loop device, and the tests start real other processes. A test that this machine does not
//! allow prints `skipped: ` and the reason (`cargo test -- --nocapture` shows it).

#![expect(unsafe_code, reason = "maps memory to look at, in this process and in children")]
#![expect(clippy::print_stdout, reason = "a skipped test says why")]
#![expect(clippy::single_range_in_vec_init, reason = "the answers are lists of ranges")]
#![expect(clippy::unwrap_used, reason = "a test may panic, and so may what only tests call")]

mod child;
mod direct_io;
mod extents;
#[path = "../memory/guarded.rs"]
mod guarded;
mod guardian;
mod host;
#[path = "../memory/mapped.rs"]
#[expect(dead_code, reason = "the tests of pages need more of it")]
mod mapped;
mod process_memory;
mod publish;
mod storage;
mod userfault;
