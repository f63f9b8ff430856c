//! The init of the Linux guest that vmfile's tests boot.
//!
//! It fills a known share of the guest's RAM and then repeats for ever: compare every word with
//! what it must be, sum them all, print one line on the first serial port, rewrite every tenth
//! page, rest. What a page holds is a function of the seed, its index and the pass in which it was
//! last written, so the guest itself says when a page is wrong:
//!
//! ```text
//! count 3 sum 8c1f0b7e22d0a94d ok cpus 2 memory 981 MiB
//! count 4 CORRUPT page 17 of 16384
//! ```
//!
//! The kernel's command line chooses: `vmfile.seed=N`, `vmfile.fill=MIB`, `vmfile.data=N` (pages
//! with random words, of 256), `vmfile.busy=1` (do not rest), `vmfile.disk=1` (write a block of
//! `/dev/vda` in every pass, and read the last ones back), `vmfile.moment=1` (check that the
//! disk does not yet have the block of this pass: it would be from a later moment than the memory) and
//! `vmfile.sleep=N` (sleep, as ACPI S3, after pass N, until something wakes the machine).

mod console;
mod disk;
mod memory;
mod options;
mod pattern;
mod system;

use std::error::Error;
use std::thread;
use std::time::Duration;

use crate::console::Console;
use crate::disk::Disk;
use crate::memory::Memory;
use crate::options::Options;

/// The rest between two passes of a guest that is not busy.
const REST: Duration = Duration::from_millis(200);

fn main() {
    // The kernel panics when its init returns, and `panic=-1` with `-no-reboot` then ends QEMU, so
    // that a test sees at once that its guest is gone.
    if let Err(error) = run() {
        if let Ok(mut console) = Console::open() {
            let _ = console.line(&format!("init stops: {error}"));
            thread::sleep(Duration::from_millis(500));
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    system::mount_kernel_file_systems()?;
    let mut console = Console::open()?;
    let options = Options::of_this_kernel()?;
    let modules = system::load_modules()?;
    system::bring_memory_online()?;
    console.line(&format!("modules: {}", modules.join(" ")))?;
    for line in system::describe()? {
        console.line(&line)?;
    }

    let mut disk = if options.disk { Some(Disk::open("/dev/vda", options.moment)?) } else { None };
    let mut memory = Memory::filled(options.fill_mib, options.seed, options.data_share)?;
    console.line(&format!("filled {} MiB", options.fill_mib))?;
    for count in 1_u64.. {
        let outcome = memory.check(system::online_cpus()?);
        let mut line = match outcome {
            Ok(sum) => format!("count {count} sum {sum:016x} ok"),
            Err(damage) => format!("count {count} CORRUPT {damage}"),
        };
        line += &format!(" cpus {} memory {} MiB", system::online_cpus()?, system::memory_mib()?);
        if let Some(disk) = &mut disk {
            line += &format!(" disk {}", disk.check_and_write(count)?);
        }
        console.line(&line)?;
        memory.change(count);
        if options.sleep == Some(count) {
            system::sleep()?;
        }
        system::bring_memory_online()?;
        if !options.busy {
            thread::sleep(REST);
        }
    }
    Ok(())
}
