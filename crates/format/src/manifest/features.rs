//! What a reader must know of a file that is not as every file is: features, by name.
//!
//! A version number says only that something is newer. A name says what, so that a reader can refuse
//! the files that it would misread and take all others, as ext4 and qcow2 do.
//!
//! A feature without which RAM or device state would be misread stands in the head as well: see
//! [`FEATURE_PREFIX`](crate::stream::configuration::FEATURE_PREFIX).

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::error::FormatErrorKind;

/// The incompatible features that this crate reads.
const KNOWN: &[&str] = &[];

/// The features of a file, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Those that a reader may pass over.
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
