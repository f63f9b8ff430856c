//! The disk's limit, as fio measures it.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use serde_json::Value;

use crate::error::BenchError;
use crate::process::run as run_program;

/// Writes `bytes` to a new file as vmfile writes: pieces of 1 MiB, direct I/O, 16 in flight, the
/// file's length set first, one fsync at the end. Returns the seconds.
///
/// # Errors
///
/// What fio says, or that there is none.
pub(crate) fn write(path: &Path, bytes: u64, stop: &AtomicBool) -> Result<f64, BenchError> {
    run(path, bytes, "write", &["--fallocate=truncate", "--end_fsync=1"], stop)
}

/// Reads `bytes` of a file that fio wrote, past the page cache. Returns the seconds.
///
/// # Errors
///
/// What fio says, or that there is none.
pub(crate) fn read(path: &Path, bytes: u64, stop: &AtomicBool) -> Result<f64, BenchError> {
    // Otherwise fio would make or extend a file that is missing or too short, and read zeros from
    // holes.
    run(path, bytes, "read", &["--allow_file_create=0"], stop)
}

fn run(
    path: &Path,
    bytes: u64,
    direction: &str,
    more: &[&str],
    stop: &AtomicBool,
) -> Result<f64, BenchError> {
    let mut file = OsString::from("--filename=");
    file.push(path);
    let mut command = Command::new("fio");
    command
        .arg("--name=limit")
        .arg(file)
        .arg(format!("--size={}", bytes.next_multiple_of(1 << 20)))
        .arg(format!("--rw={direction}"))
        .args(["--bs=1M", "--direct=1", "--ioengine=io_uring", "--iodepth=16"])
        .args(["--thread", "--output-format=json"])
        .args(more);
    let (output, _) = run_program(&mut command, stop)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |start| &text[start..]);
    let value: Value = serde_json::from_str(json).unwrap_or_default();
    let milliseconds = value["jobs"][0][direction]["runtime"].as_f64();
    let seconds = milliseconds.map(|time| time / 1e3);
    seconds.ok_or_else(|| BenchError::program("fio", "it names no runtime"))
}
