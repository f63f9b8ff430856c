//! Saves the memory of this process to a file, checks the file, and loads it again: no QEMU is
//! needed.
//!
//! ```text
//! cargo run --release -p vmfile-pages --example own_memory -- FILE [MIB]
//! ```

#![expect(clippy::print_stdout, reason = "an example that shows what it does")]

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use vmfile_pages::check::{CheckOptions, check};
use vmfile_pages::memory_file::{Contents, FileOptions, load, save, state};
use vmfile_pages::process_ram::BlockAt;
use vmfile_pages::{
    Access, Control, OwnMemory, OwnMemoryMut, PageSize, PageSource, ProcessRam, RamBlock,
    RamLayout, Snapshot,
};

const MACHINE: &str = "own-memory-1.0";

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("usage: own_memory FILE [MIB]")?);
    let mib = arguments.next().and_then(|word| word.to_str()?.parse().ok()).unwrap_or(64);
    run(&path, mib << 20)
}

/// Saves `len` bytes of this process to `path`, and loads them again.
///
/// # Errors
///
/// Returns an error if anything fails, or what was loaded is not what was saved.
pub(crate) fn run(path: &Path, len: usize) -> Result<(), Box<dyn Error>> {
    let memory = guest_memory(len);

    // The same memory by two ways: as a slice, and as that of a process, which happens to be this
    // one.
    save_and_check(path, &OwnMemory::new(vec![&memory]), memory.len())?;
    fs::remove_file(path)?;
    let address = memory.as_ptr().addr() as u64;
    let block = BlockAt { name: "ram".to_owned(), address, len: memory.len() as u64 };
    let process = ProcessRam::open(std::process::id(), &[block], Access::Read)?;
    save_and_check(path, &process, memory.len())?;

    let snapshot = Snapshot::open(path, 0)?;
    let mut restored = vec![0xaa; memory.len()];
    let sink = OwnMemoryMut::new(vec![&mut restored]);
    let bytes = load(&snapshot, &sink, &FileOptions::default(), &Control::none())?;
    if restored != memory || state(&snapshot, "cpu0")?.as_deref() != Some(b"registers") {
        return Err("what was loaded is not what was saved".into());
    }
    println!("loaded {bytes} bytes of data and compared them with the memory: the same");
    Ok(())
}

/// What stands for a guest's RAM: a third of its pages hold data.
fn guest_memory(len: usize) -> Vec<u8> {
    let mut memory = vec![0; len];
    for (number, page) in memory.chunks_mut(4096).enumerate().step_by(3) {
        page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
    memory
}

fn save_and_check(path: &Path, source: &dyn PageSource, len: usize) -> Result<(), Box<dyn Error>> {
    let started = Instant::now();
    let block = RamBlock::new("ram".to_owned(), len as u64, PageSize::KIB_4)?;
    let ram = RamLayout::new(vec![block])?;
    let (options, control) = (FileOptions::default(), Control::none());
    let state: [(&str, &[u8]); 1] = [("cpu0", b"registers")];
    let saved = save(path, Contents::new(MACHINE, ram, &state), source, &options, &control)?;
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "saved {} pages, {} of them with data, in {seconds:.3} s; direct I/O: {}",
        saved.pages_total, saved.pages_data, saved.direct_io
    );
    let report = check(&Snapshot::open(path, 0)?, &CheckOptions::default(), &control)?;
    println!("checked {} pages: {} findings", report.pages_checked, report.findings_total);
    if report.findings_total == 0 { Ok(()) } else { Err("the file is damaged".into()) }
}
