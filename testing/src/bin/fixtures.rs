//! Makes the golden files of `crates/format/tests/golden`: what real QEMU writes, without the pages.
//!
//! Run by `cargo run -p vmfile-testing --bin fixtures`. Each file is a list of pieces: big-endian
//! 64-bit offset and length, then the bytes. A piece of offset 2^64 - 1 comes first; its bytes are a
//! text that says which QEMU wrote the file, and how.

#![expect(clippy::print_stdout, reason = "a program, not a library")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::json;
use vmfile::Snapshot;
use vmfile_testing::{Guest, Machine, Qemu, Ram, TestResult};

fn main() -> TestResult {
    let qemu = Qemu::find().map_err(|missing| format!("{missing:?}"))?;
    for (machine, name) in [(Machine::Pc, "pc"), (Machine::Q35, "q35")] {
        for multifd in [false, true] {
            let way = if multifd { "multifd" } else { "plain" };
            let name = format!("qemu-{}-{name}-{way}.pieces", qemu.version());
            let bytes = record(&qemu, machine, multifd)?;
            let path = Path::new(env!("CARGO_MANIFEST_DIR"));
            let path = path.join("../crates/format/tests/golden").join(name);
            fs::write(&path, bytes)?;
            println!("{}", path.display());
        }
    }
    Ok(())
}

fn record(qemu: &Qemu, machine: Machine, multifd: bool) -> TestResult<Vec<u8>> {
    let mut guest = Guest::boot_sector(Ram::private(16)).machine(machine).boot(qemu)?;
    guest.wait_for_count(1)?;
    guest.stop()?;
    let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
    let list = [capability("mapped-ram", true), capability("multifd", multifd)];
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": list }))?;
    let path = guest.directory().join("golden.mig");
    guest.qmp("migrate", json!({ "uri": format!("file:{}", path.display()) }))?;
    while guest.qmp("query-migrate", json!({}))?["status"] != "completed" {
        thread::sleep(Duration::from_millis(10));
    }
    let snapshot = Snapshot::open(&path, 0)?;
    let file = File::open(&path)?;
    let words = format!("QEMU {}, mapped-ram, multifd {multifd}, 16 MiB", qemu.version());
    let mut bytes = piece(u64::MAX, words.as_bytes());
    let structure = snapshot.structure();
    let head = 0..structure.head_end;
    let mut ranges = Vec::from([head]);
    for placed in &structure.blocks {
        ranges.push(placed.record_offset..placed.bitmap_offset + placed.bitmap_len());
    }
    ranges.push(structure.ram_end_offset..snapshot.file_len());
    for range in ranges {
        let mut part = vec![0; usize::try_from(range.end - range.start)?];
        file.read_exact_at(&mut part, range.start)?;
        bytes.extend(piece(range.start, &part));
    }
    Ok(bytes)
}

fn piece(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut piece = offset.to_be_bytes().to_vec();
    piece.extend((bytes.len() as u64).to_be_bytes());
    piece.extend(bytes);
    piece
}
