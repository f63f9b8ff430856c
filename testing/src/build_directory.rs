//! The directory where cargo builds, and where the tests keep files that they share.

use std::env;
use std::path::{Path, PathBuf};

/// Returns cargo's build directory, where setup puts the guests.
pub(crate) fn target_directory() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    root.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}
