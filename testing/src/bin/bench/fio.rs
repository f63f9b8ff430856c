//! What the disk can do, as fio measures it.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use vmfile_testing::TestResult;

/// Writes `bytes` to a new file as vmfile writes: 1 MiB pieces, direct I/O, depth 16, the file's
/// length set first, one fsync at the end. Returns the seconds.
pub(crate) fn write(path: &Path, bytes: u64) -> TestResult<f64> {
    run(path, bytes, "write", &["--fallocate=truncate", "--end_fsync=1"])
}

/// Reads `bytes` of a file, past the page cache. Returns the seconds.
pub(crate) fn read(path: &Path, bytes: u64) -> TestResult<f64> {
    // fio would make a file that is missing or too short, and read zeros from holes.
    File::open(path)?;
    run(path, bytes, "read", &["--allow_file_create=0"])
}

fn run(path: &Path, bytes: u64, direction: &str, more: &[&str]) -> TestResult<f64> {
    let mut file = OsString::from("--filename=");
    file.push(path);
    let output = Command::new("fio")
        .arg("--name=limit")
        .arg(file)
        .arg(format!("--size={}", bytes.next_multiple_of(1 << 20)))
        .arg(format!("--rw={direction}"))
        .args(["--bs=1M", "--direct=1", "--ioengine=io_uring", "--iodepth=16"])
        .args(["--thread", "--output-format=json"])
        .args(more)
        .output()
        .map_err(|error| format!("fio: {error}"))?;
    if !output.status.success() {
        return Err(format!("fio: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |start| &text[start..]);
    let value: Value = serde_json::from_str(json)?;
    let milliseconds = value["jobs"][0][direction]["runtime"].as_f64();
    milliseconds.map(|time| time / 1e3).ok_or_else(|| "fio names no runtime".into())
}
