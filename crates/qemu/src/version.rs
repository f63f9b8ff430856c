//! What each QEMU version can do: one table.

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

/// A QEMU version, ordered by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QemuVersion {
    /// The first number: 10 in 10.0.2.
    pub major: u32,
    /// The second number: 0 in 10.0.2.
    pub minor: u32,
    /// The third number: 2 in 10.0.2; 50 and above before a release.
    pub micro: u32,
}

impl QemuVersion {
    /// Makes a version of its three numbers.
    #[must_use]
    pub const fn new(major: u32, minor: u32, micro: u32) -> QemuVersion {
        QemuVersion { major, minor, micro }
    }

    /// Tells whether this version has `feature`.
    #[must_use]
    pub fn has(self, feature: Feature) -> bool {
        self >= feature.since()
    }

    /// Reads the `qemu` object of QMP's greeting and of `query-version`.
    pub(crate) fn from_json(value: &Value) -> Option<QemuVersion> {
        let number = |name| value.get(name)?.as_u64().and_then(|n| u32::try_from(n).ok());
        Some(QemuVersion::new(number("major")?, number("minor")?, number("micro")?))
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A text is not a version such as `10.0` or `10.0.2`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is not a QEMU version; expected a form like 10.0 or 10.0.2")]
pub struct VersionError {
    /// The text.
    pub found: String,
}

impl FromStr for QemuVersion {
    type Err = VersionError;

    /// Reads `10.0` and `10.0.2`.
    fn from_str(text: &str) -> Result<QemuVersion, VersionError> {
        let numbers: Option<Vec<u32>> = text.split('.').map(|part| part.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[major, minor]) => Ok(QemuVersion::new(major, minor, 0)),
            Some(&[major, minor, micro]) => Ok(QemuVersion::new(major, minor, micro)),
            _ => Err(VersionError { found: text.to_owned() }),
        }
    }
}

/// Something that only newer versions of QEMU can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// `x-query-ramblock` prints where each block lies in QEMU's memory.
    ///
    /// The patch was mailed and reviewed on 5 December 2022, in the freeze before 7.2; 7.2 itself
    /// prints no address, so 8.0 is the first release that can have it. The code asks the output,
    /// not this table.
    RamBlockAddresses,
    /// `memory-backend-file` takes `offset`.
    BackendOffset,
    /// `memory-backend-file` takes `rom`.
    BackendRom,
    /// The capability `mapped-ram`.
    MappedRam,
    /// The migration parameter `direct-io`, and `file:/dev/fdset/N`.
    MigrationDirectIo,
    /// `migrate-incoming` takes `exit-on-error`.
    ExitOnError,
    /// Machine types of this version send SWITCHOVER_START.
    SwitchoverStart,
}

/// Every feature with its first version and what it is called in QEMU.
const TABLE: [(Feature, QemuVersion, &str); 7] = [
    (Feature::RamBlockAddresses, QemuVersion::new(8, 0, 0), "addresses in x-query-ramblock"),
    (Feature::BackendOffset, QemuVersion::new(8, 1, 0), "memory-backend-file,offset="),
    (Feature::BackendRom, QemuVersion::new(8, 2, 0), "memory-backend-file,rom="),
    (Feature::MappedRam, QemuVersion::new(9, 0, 0), "capability mapped-ram"),
    (Feature::MigrationDirectIo, QemuVersion::new(9, 1, 0), "migration parameter direct-io"),
    (Feature::ExitOnError, QemuVersion::new(9, 1, 0), "migrate-incoming exit-on-error"),
    (Feature::SwitchoverStart, QemuVersion::new(10, 0, 0), "command SWITCHOVER_START"),
];

impl Feature {
    /// Returns every feature, oldest first.
    pub fn all() -> impl Iterator<Item = Feature> {
        TABLE.iter().map(|&(feature, _, _)| feature)
    }

    /// Returns the first version that has this feature.
    #[must_use]
    pub fn since(self) -> QemuVersion {
        self.row().1
    }

    fn row(self) -> (Feature, QemuVersion, &'static str) {
        let row = TABLE.iter().find(|(feature, _, _)| *feature == self);
        *row.expect("the table has a row for every feature")
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().2)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn versions_compare_by_number_and_not_by_text() {
        let parse = |text: &str| text.parse::<QemuVersion>().unwrap();
        assert!(parse("10.0.2") > parse("9.2"));
        assert!(parse("9.1.0") == parse("9.1"));
        assert_eq!(parse("10.0.2").to_string(), "10.0.2");
    }

    #[test]
    fn a_text_that_is_no_version_is_refused() {
        for text in ["", "10", "10.0.2.1", "v10.0", "10.x", "10..0"] {
            assert!(text.parse::<QemuVersion>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_feature_has_one_row() {
        assert_eq!(Feature::all().count(), TABLE.len());
        for feature in Feature::all() {
            assert!(feature.since() <= QemuVersion::new(10, 0, 0), "{feature}");
        }
        assert!(!QemuVersion::new(8, 1, 5).has(Feature::BackendRom));
        assert!(QemuVersion::new(8, 2, 0).has(Feature::BackendRom));
    }

    #[test]
    fn the_version_of_a_greeting_is_read() {
        let version = json!({"micro": 2, "minor": 0, "major": 10});
        assert_eq!(QemuVersion::from_json(&version), Some(QemuVersion::new(10, 0, 2)));
        assert_eq!(QemuVersion::from_json(&json!({"major": 10})), None);
    }
}
