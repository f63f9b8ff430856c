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

/// The incompatible features that this crate reads.
const KNOWN: &[&str] = &[];

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
    /// Refuses an incompatible feature that this crate does not know.
    pub(super) fn check(&self) -> Result<(), FormatErrorKind> {
        let unknown = self.incompatible.iter().find(|name| !KNOWN.contains(&name.as_str()));
        unknown.map_or(Ok(()), |name| Err(FormatErrorKind::UnknownFeature { name: name.clone() }))
    }
}
