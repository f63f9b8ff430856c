//! Puts a file into the page cache, or removes it from there.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, fadvise};

use crate::error::BenchError;

/// Removes the file from the page cache if `is_cold`, and reads it into the cache otherwise.
pub(crate) fn prepare(file: &Path, is_cold: bool, stop: &AtomicBool) -> Result<(), BenchError> {
    let made = if is_cold { make_cold(file) } else { make_warm(file, stop) };
    made.map_err(BenchError::system("prepare the page cache"))?;
    if stop.load(Ordering::Relaxed) { Err(BenchError::Stopped) } else { Ok(()) }
}

/// Drops the file from the page cache.
fn make_cold(file: &Path) -> io::Result<()> {
    let file = File::open(file)?;
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

/// Reads the file into the page cache, until `stop` is set.
fn make_warm(file: &Path, stop: &AtomicBool) -> io::Result<()> {
    let mut file = File::open(file)?;
    let mut buffer = vec![0; 1 << 20];
    while !stop.load(Ordering::Relaxed) && file.read(&mut buffer)? > 0 {}
    Ok(())
}
