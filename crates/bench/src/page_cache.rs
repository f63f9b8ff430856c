//! A file in the page cache, or not.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, fadvise};

/// Drops the file from the page cache.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn make_cold(file: &Path) -> io::Result<()> {
    let file = File::open(file)?;
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

/// Reads the file into the page cache, until `stop` is set.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn make_warm(file: &Path, stop: &AtomicBool) -> io::Result<()> {
    let mut file = File::open(file)?;
    let mut buffer = vec![0; 1 << 20];
    while !stop.load(Ordering::Relaxed) && file.read(&mut buffer)? > 0 {}
    Ok(())
}
