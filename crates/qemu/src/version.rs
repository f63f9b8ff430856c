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
        self >= feature.since() && feature.until().is_none_or(|until| self < until)
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

/// Something that some versions of QEMU can do and others cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// `fd:` with a descriptor of a plain file; 9.1 and later warn. Pipes and sockets go on
    /// working.
    PlainFileDescriptor,
    /// The capability `compress`, whose pages are in a stream as COMPRESS_PAGE.
    CompressedPages,
    /// The capability `background-snapshot`.
    BackgroundSnapshot,
    /// `x-query-ramblock` prints where each block lies in QEMU's memory.
    ///
    /// The patch was mailed and reviewed on 5 December 2022, in the freeze before 7.2; 7.2 itself
    /// prints no address, so 8.0 is the first release that can have it. The code relies on the
    /// output, not on this table.
    RamBlockAddresses,
    /// `memory-backend-file` takes `offset`.
    BackendOffset,
    /// Machine types of this version send MULTIFD_FLUSH once a round.
    MultifdFlush,
    /// `memory-backend-file` takes `rom`.
    BackendRom,
    /// The URI `file:PATH`, with `,offset=N` or without.
    FileUri,
    /// The guest goes on after a `background-snapshot` that is cancelled or fails.
    ///
    /// QEMU 7.2 then leaves the guest's memory write-protected, with no thread that handles the
    /// faults: the guest hangs for ever. QEMU's developers mended that while the lock was still
    /// called `qemu_mutex_lock_iothread`, that is in 8.2 or before.
    StoppableSnapshot,
    /// The capability `mapped-ram`.
    MappedRam,
    /// The migration parameter `zero-page-detection`, and machine types of this version name zero
    /// pages in multifd packets.
    MultifdZeroPages,
    /// The migration parameter `direct-io`, and `file:/dev/fdset/N`.
    MigrationDirectIo,
    /// `migrate-incoming` takes `exit-on-error`.
    ExitOnError,
    /// The command `blockdev-set-active`, whose answer says whether the disks could be flushed.
    BlockdevSetActive,
    /// A VM that was paused is paused again after a `background-snapshot`, and not in the state
    /// `postmigrate`, from which QEMU does not send it again. Tried with 10.0.2 and 11.1; 7.2 lets
    /// the guest run.
    PausedSnapshot,
    /// Machine types of this version send SWITCHOVER_START.
    SwitchoverStart,
    /// Multifd packets of device state.
    MultifdDeviceState,
    /// The capabilities `mapped-ram` and `x-ignore-shared` together, with records of blocks that
    /// have no pages.
    MappedRamIgnoreShared,
    /// A guest that sleeps can be stopped, and its migration stream says that it slept.
    StoppedSleep,
    /// The object `monitor-qmp`, which takes the place of `-mon`.
    MonitorObject,
}

/// A feature, the versions that have it, its name in QEMU's terms, and what it matters to.
struct Row {
    feature: Feature,
    since: QemuVersion,
    /// The first version that no longer has it.
    until: Option<QemuVersion>,
    name: &'static str,
    matters_to: &'static str,
}

impl Row {
    const fn new(
        feature: Feature,
        since: (u32, u32),
        name: &'static str,
        matters_to: &'static str,
    ) -> Row {
        let since = QemuVersion::new(since.0, since.1, 0);
        Row { feature, since, until: None, name, matters_to }
    }

    const fn until(self, until: (u32, u32)) -> Row {
        Row { until: Some(QemuVersion::new(until.0, until.1, 0)), ..self }
    }
}

/// Every feature, oldest first. docs/qemu.md has the same table, which a test compares; another
/// compares both with QEMUs (testing/tests/versions.rs).
// Each row stays on two lines, however long they are.
#[rustfmt::skip]
const TABLE: [Row; 20] = [
    Row::new(Feature::PlainFileDescriptor, (0, 0), "`fd:` with a plain file",
        "having QEMU write a stream").until((11, 0)),
    Row::new(Feature::CompressedPages, (2, 4), "capability `compress`",
        "reading a stream").until((9, 1)),
    Row::new(Feature::BackgroundSnapshot, (6, 0), "capability `background-snapshot`",
        "having QEMU write a stream while the guest runs"),
    Row::new(Feature::RamBlockAddresses, (8, 0), "addresses in `x-query-ramblock`",
        "`save` and `load`, which find RAM by them"),
    Row::new(Feature::BackendOffset, (8, 1), "`memory-backend-file,offset=`",
        "`map`: pages lie inside the file"),
    Row::new(Feature::MultifdFlush, (8, 1), "MULTIFD_FLUSH, by machine type",
        "reading a multifd stream"),
    Row::new(Feature::BackendRom, (8, 2), "`memory-backend-file,rom=`",
        "`map`: the file is opened read-only"),
    Row::new(Feature::FileUri, (8, 2), "`file:PATH` and `,offset=`",
        "having QEMU write a stream to a file"),
    Row::new(Feature::StoppableSnapshot, (8, 2), "`background-snapshot` that can be cancelled",
        "`save --live`, which takes `pre-copy` without it"),
    Row::new(Feature::MappedRam, (9, 0), "capability `mapped-ram`",
        "QEMU loading a vmfile by itself, and writing a file that vmfile reads"),
    Row::new(Feature::StoppedSleep, (9, 0), "`stop` of a guest that sleeps (ACPI S3)",
        "`save` and `restore` of a guest that sleeps"),
    Row::new(Feature::MultifdZeroPages, (9, 0), "zero pages in multifd packets, by machine type",
        "reading a multifd stream, and writing zeros into its short gaps"),
    Row::new(Feature::MigrationDirectIo, (9, 1), "migration parameter `direct-io`",
        "`save --route native`: QEMU writes past the page cache"),
    Row::new(Feature::ExitOnError, (9, 1), "`migrate-incoming` with `exit-on-error`",
        "`restore`: QEMU stays and says why it refused"),
    Row::new(Feature::BlockdevSetActive, (10, 0), "`blockdev-set-active`",
        "`save --after quit`: disks are released before their images are recorded"),
    Row::new(Feature::PausedSnapshot, (10, 0), "`background-snapshot` of a paused VM",
        "`save --route stream` of a VM that stays paused; `save --live --with-disks` by QEMU's \
         stream, which takes `pre-copy` without it"),
    Row::new(Feature::SwitchoverStart, (10, 0), "SWITCHOVER_START, by machine type",
        "reading a stream"),
    Row::new(Feature::MultifdDeviceState, (10, 0), "multifd packets of device state",
        "reading a multifd stream of a VM with VFIO devices"),
    Row::new(Feature::MappedRamIgnoreShared, (11, 0), "`mapped-ram` with `x-ignore-shared`",
        "reading a file that QEMU wrote"),
    Row::new(Feature::MonitorObject, (11, 1), "`-object monitor-qmp`",
        "a monitor of vmfile's own: `restore` adds it without `-mon`, which is deprecated, and `save` \
         makes it, so that others can use the VM's monitor"),
];

impl Feature {
    /// Returns every feature, oldest first.
    pub fn all() -> impl Iterator<Item = Feature> {
        TABLE.iter().map(|row| row.feature)
    }

    /// Returns the first version that has this feature; 0.0.0 if all early versions have it.
    #[must_use]
    pub fn since(self) -> QemuVersion {
        self.row().since
    }

    /// Returns the first version that no longer has this feature, if it is gone.
    #[must_use]
    pub fn until(self) -> Option<QemuVersion> {
        self.row().until
    }

    /// Returns what depends on this feature, as a text for people.
    #[must_use]
    pub fn matters_to(self) -> &'static str {
        self.row().matters_to
    }

    fn row(self) -> &'static Row {
        let row = TABLE.iter().find(|row| row.feature == self);
        row.expect("the table has a row for every feature")
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().name)
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
    fn every_feature_has_one_row_and_the_oldest_come_first() {
        let features: Vec<Feature> = Feature::all().collect();
        assert!(features.iter().all(|a| features.iter().filter(|b| a == *b).count() == 1));
        assert!(features.is_sorted_by_key(|feature| feature.since()));
    }

    #[test]
    fn a_feature_is_there_from_its_first_version_until_it_is_gone() {
        assert!(!QemuVersion::new(8, 1, 5).has(Feature::BackendRom));
        assert!(QemuVersion::new(8, 2, 0).has(Feature::BackendRom));
        assert!(QemuVersion::new(10, 2, 9).has(Feature::PlainFileDescriptor));
        assert!(!QemuVersion::new(11, 0, 0).has(Feature::PlainFileDescriptor));
    }

    #[test]
    fn the_version_of_a_greeting_is_read() {
        let version = json!({"micro": 2, "minor": 0, "major": 10});
        assert_eq!(QemuVersion::from_json(&version), Some(QemuVersion::new(10, 0, 2)));
        assert_eq!(QemuVersion::from_json(&json!({"major": 10})), None);
    }
}
