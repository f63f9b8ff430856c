//! Features, by name: what a file has that not every file has.
//!
//! A version number says only that something is newer. A name says what, so that a reader can
//! refuse the files that it would misread and read all others, as with ext4 and qcow2.
//!
//! If a reader that does not know a feature would misread RAM or device state, the head names the
//! feature as well: see [`FEATURE_PREFIX`](crate::stream::configuration::FEATURE_PREFIX).

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::error::FormatErrorKind;

/// The page hashes have a key, [`Meta::page_hash_seed`](super::Meta::page_hash_seed).
pub const PAGE_HASH_SEED: &str = "page-hash-seed";

/// Some pages are in another file, [`Meta::base`](super::Meta::base).
pub const THIN: &str = "thin";

/// The incompatible features that this crate reads.
const KNOWN: &[&str] = &[PAGE_HASH_SEED, THIN];

/// Returns whether this crate reads files with the incompatible feature `name`.
pub(crate) fn is_known(name: &str) -> bool {
    KNOWN.contains(&name)
}

/// The features of a file, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Those that a reader may ignore.
    #[serde(default)]
    pub compatible: Vec<String>,
    /// Those that a reader must know, or refuse the file.
    #[serde(default)]
    pub incompatible: Vec<String>,
}

impl Features {
    /// Returns whether the file has the incompatible feature `name`.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.incompatible.iter().any(|known| known == name)
    }

    /// Refuses an incompatible feature that this crate does not know.
    pub(super) fn check(&self) -> Result<(), FormatErrorKind> {
        let unknown = self.incompatible.iter().find(|name| !is_known(name));
        unknown.map_or(Ok(()), |name| Err(FormatErrorKind::UnknownFeature { name: name.clone() }))
    }
}
