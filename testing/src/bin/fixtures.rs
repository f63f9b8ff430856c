//! Makes the golden files of `crates/format/tests/golden`: what a real QEMU writes, without the
//! pages.
//!
//! Run by `cargo run -p vmfile-testing --bin fixtures`. Each file is a list of pieces: big-endian
//! 64-bit offset and length, then the bytes. The first piece has offset 2^64 - 1; its bytes are a
//! text that says which QEMU wrote the file, and how. A golden stream is recorded in the same way.

#![expect(clippy::print_stdout, reason = "a program, not a library")]

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::json;
use vmfile::Snapshot;
use vmfile_format::stream::decoder::{Event, StreamDecoder};
use vmfile_testing::{Guest, Machine, Qemu, Ram, Release, TestResult};

fn main() -> TestResult {
    let qemu = Qemu::find().map_err(|missing| format!("{missing:?}"))?;
    for (machine, name) in [(Machine::Pc, "pc"), (Machine::Q35, "q35")] {
        for multifd in [false, true] {
            let way = if multifd { "multifd" } else { "plain" };
            let name = format!("qemu-{}-{name}-{way}.pieces", qemu.version());
            keep(&name, &record(&qemu, machine, multifd)?)?;
        }
    }
    for release in [Release::Oldest, Release::Distribution, Release::Newest] {
        let qemu = Qemu::of(release).map_err(|missing| format!("{missing:?}"))?;
        let name = format!("qemu-{}-pc-stream.pieces", qemu.version());
        keep(&name, &record_stream(&qemu)?)?;
    }
    Ok(())
}

fn keep(name: &str, bytes: &[u8]) -> TestResult {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = path.join("../crates/format/tests/golden").join(name);
    fs::write(&path, bytes)?;
    println!("{}", path.display());
    Ok(())
}

/// Records a stream without the contents of its pages; the header of each page is kept.
fn record_stream(qemu: &Qemu) -> TestResult<Vec<u8>> {
    let mut guest = Guest::boot_sector(Ram::private(16)).boot(qemu)?;
    guest.wait_for_count(1)?;
    guest.stop()?;
    let path = guest.directory().join("golden.stream");
    guest.qmp("migrate", json!({ "uri": format!("exec:cat > '{}'", path.display()) }))?;
    while guest.qmp("query-migrate", json!({}))?["status"] != "completed" {
        thread::sleep(Duration::from_millis(10));
    }
    let stream = fs::read(&path)?;
    let mut decoder = StreamDecoder::new();
    let (mut taken, mut kept_from) = (0, 0);
    let mut ranges: Vec<Range<usize>> = Vec::new();
    loop {
        let step = decoder.next(&stream[taken..])?;
        taken += step.consumed;
        match step.event {
            None => break,
            Some(Event::Page { data, .. }) => {
                ranges.push(kept_from..taken - data.len());
                kept_from = taken;
            }
            Some(_) => {}
        }
    }
    decoder.finish()?;
    ranges.push(kept_from..stream.len());
    let words = format!("QEMU {}, stream, 16 MiB", qemu.version());
    let mut bytes = piece(u64::MAX, words.as_bytes());
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        bytes.extend(piece(range.start as u64, &stream[range]));
    }
    Ok(bytes)
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
