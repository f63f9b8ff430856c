//! The manifest's metadata: which VM was saved, when and how, where everything lies, and checksums.
//!
//! They are JSON, so that people and any language can read them. Members that a reader does not
//! know are ignored; members are added, never renamed.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use super::base::{BASE_PAGES, BaseMeta, hex_seed};
use super::disks::{DiskMeta, EmptyDriveMeta};
use super::features::{Features, PAGE_HASH_SEED, THIN};
use super::footer::Footer;
use super::machine::{ChangeMeta, CpuSectionMeta, MemoryRangeMeta, PartsMeta};
use super::page_hashes::{TABLE_ALIGNMENT, table_len};
use super::surroundings::SurroundingsMeta;
use super::values;
use crate::checksum;
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::{BLOCKS_MAX, FILE_LEN_MAX};
use crate::mapped_ram::{MappedRamFile, PlacedBlock};

/// The metadata of a vmfile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// The version of vmfile that wrote the file.
    pub vmfile_version: String,
    /// When the VM was saved, in seconds since 1970-01-01 UTC.
    pub saved_at_unix_seconds: u64,
    /// How RAM was taken: `direct`, `stream` or `native`.
    pub route: String,
    /// Whether the guest ran during the save, where that is known.
    pub live: Option<bool>,
    /// How long the guest had been paused when the metadata were written, in seconds, where that is
    /// known.
    pub pause_seconds: Option<f64>,
    /// The VM.
    pub vm: VmMeta,
    /// The RAM blocks, in the order of the stream.
    pub blocks: Vec<BlockMeta>,
    /// The parts that a checksum covers: everything but pages, their hashes, further tables, and
    /// zeros.
    pub extents: Vec<ExtentMeta>,
    /// What the file has that not every file has.
    #[serde(default)]
    pub features: Features,
    /// Further tables, after those of the page hashes. A reader ignores a table whose name it does
    /// not know.
    #[serde(default)]
    pub tables: Vec<ExtentMeta>,
    /// Where the CPUs' registers are; empty in files of older versions.
    #[serde(default)]
    pub cpu_sections: Vec<CpuSectionMeta>,
    /// Whether a table says which pages the guest used first after a restore.
    #[serde(default)]
    pub working_set_known: bool,
    /// The seed of the page hashes: secret from the guest. 0 in files of older versions.
    #[serde(default, with = "hex_seed")]
    pub page_hash_seed: u64,
    /// The file that has the pages that this one lacks, if it is thin.
    #[serde(default)]
    pub base: Option<BaseMeta>,
}

/// The VM as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmMeta {
    /// Its name, where it has one.
    pub name: Option<String>,
    /// Its uuid, where it has one.
    pub uuid: Option<String>,
    /// The versioned machine type.
    pub machine: String,
    /// QEMU's version, where it is known.
    pub qemu_version: Option<String>,
    /// `running` or `paused`: how it was before the save, and is after a restore.
    pub run_state: String,
    /// The program, where it is known: a stream does not tell.
    pub executable: Option<String>,
    /// The user whose rights it had, where that is known.
    #[serde(default)]
    pub user: Option<u32>,
    /// What its process had that the saving vmfile had not, where there was something.
    #[serde(default)]
    pub surroundings: Option<SurroundingsMeta>,
    /// Its whole command line, the program's name first; empty where it is not known. It may hold
    /// secrets.
    pub command_line: Vec<String>,
    /// Where it was started, where that is known; relative paths begin here.
    pub working_directory: Option<String>,
    /// The disks, which are not in the file and must be kept as they were.
    pub disks: Vec<DiskMeta>,
    /// The parts that can come and go, where they are known: a stream does not tell.
    #[serde(default)]
    pub parts: Option<PartsMeta>,
    /// What differed from what the command line makes.
    #[serde(default)]
    pub changes: Vec<ChangeMeta>,
    /// The drives that had no medium.
    #[serde(default)]
    pub empty_drives: Vec<EmptyDriveMeta>,
    /// The guest-physical map: which memory the guest saw at which address, in the order of the
    /// addresses. `None` where it is not known: a stream does not tell.
    #[serde(default)]
    pub memory_map: Option<Vec<MemoryRangeMeta>>,
}

impl VmMeta {
    /// Returns a paused VM of which nothing is known but its machine.
    #[must_use]
    pub fn of_machine(machine: &str) -> VmMeta {
        VmMeta {
            name: None,
            uuid: None,
            machine: String::from(machine),
            qemu_version: None,
            run_state: String::from("paused"),
            executable: None,
            user: None,
            surroundings: None,
            command_line: Vec::new(),
            working_directory: None,
            disks: Vec::new(),
            parts: None,
            changes: Vec::new(),
            empty_drives: Vec::new(),
            memory_map: None,
        }
    }
}

/// A RAM block and its page hashes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockMeta {
    /// The block's name.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// How many of its pages hold data.
    pub pages_data: u64,
    /// File offset of its table of page hashes.
    pub hashes_offset: u64,
}

/// A part of the file that one checksum covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentMeta {
    /// What it is: `head`, `mark`, `record`, `bitmap`, `device_state`, `vm_description`, or the
    /// name of a table.
    pub what: String,
    /// File offset, in bytes.
    pub offset: u64,
    /// Length, in bytes.
    pub bytes: u64,
    /// XXH3-128 as 32 lower-case hexadecimal digits.
    pub xxh3_128: String,
}

impl ExtentMeta {
    /// Describes `bytes`, which lie at `offset`.
    #[must_use]
    pub fn of(what: &str, offset: u64, bytes: &[u8]) -> ExtentMeta {
        ExtentMeta {
            what: what.to_string(),
            offset,
            bytes: bytes.len() as u64,
            xxh3_128: alloc::format!("{:032x}", checksum(bytes)),
        }
    }

    /// Returns whether `bytes` have the length and the checksum that were recorded.
    #[must_use]
    pub fn matches(&self, bytes: &[u8]) -> bool {
        self.bytes == bytes.len() as u64 && self.has_hash(checksum(bytes))
    }

    /// Returns whether `hash` is the checksum that was recorded.
    #[must_use]
    pub fn has_hash(&self, hash: u128) -> bool {
        self.xxh3_128 == alloc::format!("{hash:032x}")
    }
}

impl Meta {
    /// Encodes the metadata that goes to `metadata_offset`, with the footer behind it.
    #[must_use]
    pub fn encode(&self, stream_end: u64, metadata_offset: u64) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("plain data has a JSON form");
        let footer = Footer {
            version: self.footer_version(),
            stream_end,
            metadata_offset,
            metadata_len: bytes.len() as u64,
            metadata_hash: checksum(&bytes),
        };
        bytes.extend_from_slice(&footer.encode());
        bytes
    }

    /// Returns the version of the footer that this metadata needs: 1 unless a reader of version 1
    /// would misread the file.
    fn footer_version(&self) -> u32 {
        let is_plain = self.features.incompatible.is_empty() && self.tables.is_empty();
        if is_plain { 1 } else { 2 }
    }

    /// Decodes the metadata that `footer` found.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if the checksum does not match, if the file has an incompatible
    /// feature that this crate does not know, or if the JSON does not have the expected form.
    pub fn decode(bytes: &[u8], footer: &Footer) -> Result<Meta, FormatError> {
        let error = |kind| FormatError::new(footer.metadata_offset, kind);
        if checksum(bytes) != footer.metadata_hash {
            return Err(error(FormatErrorKind::Checksum { field: "metadata" }));
        }
        let json = |cause: serde_json::Error| {
            error(FormatErrorKind::BadManifest { message: cause.to_string() })
        };
        values::refuse_too_many(bytes).map_err(error)?;
        // The features are read first, by themselves: a feature may change the rest so that this
        // crate cannot read it.
        let FeaturesAlone { features } = serde_json::from_slice(bytes).map_err(json)?;
        features.check().map_err(error)?;
        let meta: Meta = serde_json::from_slice(bytes).map_err(json)?;
        let expected = meta.footer_version();
        if footer.version < expected {
            let (field, found) = ("footer version", footer.version.into());
            let kind = FormatErrorKind::Differs { field, found, expected: expected.into() };
            return Err(error(kind));
        }
        Ok(meta)
    }

    /// Checks the metadata against the file's structure, so that what it says about places can be
    /// relied on.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if blocks differ, or if a part lies where it must not.
    pub fn check(&self, file: &MappedRamFile, footer: &Footer) -> Result<(), FormatError> {
        let error = |kind| Err(FormatError::new(footer.metadata_offset, kind));
        if self.blocks.len() != file.blocks.len() || self.blocks.len() > BLOCKS_MAX {
            return error(FormatErrorKind::Differs {
                field: "number of RAM blocks in the manifest",
                found: self.blocks.len() as u64,
                expected: file.blocks.len() as u64,
            });
        }
        let mut free = footer.stream_end;
        for (meta, placed) in self.blocks.iter().zip(&file.blocks) {
            if meta.name != placed.block.name() || meta.bytes != placed.block.used_length() {
                return error(FormatErrorKind::Unsupported {
                    what: "a manifest of another VM: RAM block",
                    name: meta.name.clone(),
                });
            }
            let end = meta.hashes_offset.saturating_add(table_len(placed.block.page_count()));
            let limit = footer.metadata_offset;
            let aligned = meta.hashes_offset % TABLE_ALIGNMENT == 0;
            if !aligned || meta.hashes_offset < free || end > limit {
                return error(FormatErrorKind::Outside { field: "page hashes", end, limit });
            }
            free = end;
        }
        self.check_tables(free, footer.metadata_offset).or_else(error)?;
        self.check_guest(file).or_else(error)?;
        self.check_features(file).or_else(error)?;
        let mut extents_len = 0_u64;
        for extent in &self.extents {
            extents_len = extents_len.saturating_add(extent.bytes);
            let end = extent.offset.saturating_add(extent.bytes);
            let limit = footer.stream_end.min(FILE_LEN_MAX);
            if end > limit {
                return error(FormatErrorKind::Outside { field: "checked extent", end, limit });
            }
        }
        // Without this limit, a file with overlapping extents could make a check take any time.
        if extents_len > footer.stream_end {
            let (field, found, max) = ("sum of the extents", extents_len, footer.stream_end);
            return error(FormatErrorKind::TooLarge { field, found, max });
        }
        if footer.stream_end != file.device_state.stream_end {
            return error(FormatErrorKind::Differs {
                field: "stream end",
                found: footer.stream_end,
                expected: file.device_state.stream_end,
            });
        }
        Ok(())
    }

    /// Checks that the further tables lie one after another from `free` to `limit`.
    fn check_tables(&self, mut free: u64, limit: u64) -> Result<(), FormatErrorKind> {
        for table in &self.tables {
            let end = table.offset.saturating_add(table.bytes);
            let aligned = table.offset % TABLE_ALIGNMENT == 0;
            if !aligned || table.offset < free || end > limit {
                return Err(FormatErrorKind::Outside { field: "table", end, limit });
            }
            free = end;
        }
        Ok(())
    }

    /// Checks that everything that goes with a feature is there, and nothing of it without the
    /// feature.
    fn check_features(&self, file: &MappedRamFile) -> Result<(), FormatErrorKind> {
        let differs = |name| {
            let message = alloc::format!("not all parts of the feature {name:?} are there");
            Err(FormatErrorKind::BadManifest { message })
        };
        if self.features.has(PAGE_HASH_SEED) != (self.page_hash_seed != 0) {
            return differs(PAGE_HASH_SEED);
        }
        let bitmap_len = |placed: &PlacedBlock| placed.bitmap_len();
        let expected = file.blocks.iter().map(bitmap_len).fold(0, u64::saturating_add);
        let tables = self.tables.iter().filter(|table| table.what == BASE_PAGES);
        let is_thin = self.base.is_some();
        let is_whole_table = tables.clone().all(|table| table.bytes == expected);
        let parts = [self.features.has(THIN), file.has_feature(THIN), tables.count() == 1];
        if parts != [is_thin; 3] || !is_whole_table { differs(THIN) } else { Ok(()) }
    }

    /// Returns the table of the pages that the base has; `None` if the file is not thin.
    #[must_use]
    pub fn base_pages(&self) -> Option<&ExtentMeta> {
        self.tables.iter().find(|table| table.what == BASE_PAGES)
    }

    /// Checks that the guest-physical map lies in the RAM blocks of `file`, and the CPUs' registers
    /// in its device state.
    fn check_guest(&self, file: &MappedRamFile) -> Result<(), FormatErrorKind> {
        for range in self.vm.memory_map.iter().flatten() {
            let Some(name) = &range.block else { continue };
            let placed = file.block(name);
            let limit = placed.map_or(0, |placed| placed.block.used_length());
            let end = range.offset.saturating_add(range.bytes);
            let fits = range.guest_address.checked_add(range.bytes).is_some() && end <= limit;
            if !fits {
                return Err(FormatErrorKind::Outside { field: "guest-physical map", end, limit });
            }
        }
        for section in &self.cpu_sections {
            let end = section.offset.saturating_add(section.bytes);
            let limit = file.device_state.end;
            if section.offset < file.device_state.start || end > limit {
                return Err(FormatErrorKind::Outside { field: "registers of a CPU", end, limit });
            }
        }
        Ok(())
    }
}

/// The one member that is read before all others.
#[derive(Deserialize)]
struct FeaturesAlone {
    #[serde(default)]
    features: Features,
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    fn sample() -> Meta {
        Meta {
            vmfile_version: "0.1.0".into(),
            saved_at_unix_seconds: 1_790_000_000,
            route: "direct".into(),
            live: Some(false),
            pause_seconds: Some(0.25),
            vm: VmMeta {
                name: Some("db1".into()),
                uuid: None,
                machine: "pc-i440fx-10.0".into(),
                qemu_version: Some("10.0.2".into()),
                run_state: "running".into(),
                executable: Some("/usr/bin/qemu-system-x86_64".into()),
                user: Some(107),
                surroundings: None,
                command_line: vec!["qemu-system-x86_64".into(), "-m".into(), "64M".into()],
                working_directory: Some("/".into()),
                disks: Vec::new(),
                parts: None,
                changes: Vec::new(),
                empty_drives: Vec::new(),
                memory_map: None,
            },
            blocks: Vec::new(),
            extents: vec![ExtentMeta::of("head", 0, b"QEVM")],
            features: Features::default(),
            tables: Vec::new(),
            cpu_sections: Vec::new(),
            working_set_known: false,
            page_hash_seed: 0,
            base: None,
        }
    }

    #[test]
    fn survives_its_encoding() {
        let meta = sample();
        let bytes = meta.encode(0x900, 0x1000);
        let (json, footer) = bytes.split_at(bytes.len() - 64);
        let footer = Footer::decode(footer, 0x1000 + bytes.len() as u64).unwrap().unwrap();
        assert_eq!(Meta::decode(json, &footer), Ok(meta));
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let bytes = sample().encode(0x900, 0x1000);
        let (json, footer) = bytes.split_at(bytes.len() - 64);
        let footer = Footer::decode(footer, 0x1000 + bytes.len() as u64).unwrap().unwrap();
        for index in 0..json.len() {
            let mut damaged = json.to_vec();
            damaged[index] ^= 1;
            let error = Meta::decode(&damaged, &footer).unwrap_err();
            assert_eq!(error.kind, FormatErrorKind::Checksum { field: "metadata" });
        }
    }

    fn decode(bytes: &[u8]) -> Result<Meta, FormatErrorKind> {
        let (json, footer) = bytes.split_at(bytes.len() - 64);
        let footer = Footer::decode(footer, 0x1000 + bytes.len() as u64).unwrap().unwrap();
        Meta::decode(json, &footer).map_err(|error| error.kind)
    }

    #[test]
    fn an_incompatible_feature_is_refused_by_name_and_a_compatible_one_is_passed_over() {
        let features = |compatible: &[&str], incompatible: &[&str]| Features {
            compatible: compatible.iter().map(ToString::to_string).collect(),
            incompatible: incompatible.iter().map(ToString::to_string).collect(),
        };
        let meta = Meta { features: features(&["hints"], &[]), ..sample() };
        assert_eq!(decode(&meta.encode(0x900, 0x1000)), Ok(meta));
        let meta = Meta { features: features(&["hints"], &["striped"]), ..sample() };
        let bytes = meta.encode(0x900, 0x1000);
        let refused = FormatErrorKind::UnknownFeature { name: "striped".into() };
        assert_eq!(decode(&bytes), Err(refused.clone()));
        // A reader of the first version refuses the version: it does not read the names.
        let version = &bytes[bytes.len() - 56..bytes.len() - 52];
        assert_eq!(version, 2_u32.to_be_bytes());
        // Even where nothing else can be understood.
        let json = br#"{"features":{"incompatible":["striped"]},"blocks":7}"#;
        let footer = Footer {
            version: 2,
            stream_end: 0x900,
            metadata_offset: 0x1000,
            metadata_len: json.len() as u64,
            metadata_hash: checksum(json),
        };
        assert_eq!(Meta::decode(json, &footer).map_err(|error| error.kind), Err(refused));
    }

    #[test]
    fn further_tables_need_the_second_version_of_the_footer() {
        let tables = vec![ExtentMeta::of("working_set", 0x1000, b"pages")];
        let meta = Meta { tables, ..sample() };
        let bytes = meta.encode(0x900, 0x2000);
        let (json, footer) = bytes.split_at(bytes.len() - 64);
        let footer = Footer::decode(footer, 0x2000 + bytes.len() as u64).unwrap().unwrap();
        assert_eq!(footer.version, 2);
        assert_eq!(Meta::decode(json, &footer), Ok(meta));
        let kind = Meta::decode(json, &Footer { version: 1, ..footer }).unwrap_err().kind;
        let field = "footer version";
        assert_eq!(kind, FormatErrorKind::Differs { field, found: 1, expected: 2 });
    }

    #[test]
    fn further_tables_lie_behind_the_hashes_and_do_not_overlap() {
        let table = |offset, bytes| ExtentMeta { bytes, ..ExtentMeta::of("any", offset, b"") };
        let check = |tables: &[ExtentMeta]| {
            Meta { tables: tables.to_vec(), ..sample() }.check_tables(0x3000, 0x6000)
        };
        assert_eq!(check(&[table(0x3000, 0x1000), table(0x4000, 0x2000)]), Ok(()));
        for wrong in [
            &[table(0x2000, 0x1000)][..],
            &[table(0x3800, 0x100)],
            &[table(0x3000, 0x1001), table(0x4000, 0x1000)],
            &[table(0x5000, 0x1001)],
            &[table(0x5000, u64::MAX)],
        ] {
            let refused = check(wrong);
            assert!(matches!(refused, Err(FormatErrorKind::Outside { .. })), "{wrong:?}");
        }
    }

    #[test]
    fn an_extent_matches_its_bytes_only() {
        let extent = ExtentMeta::of("head", 0, b"QEVM");
        assert!(extent.matches(b"QEVM"));
        assert!(!extent.matches(b"QEVN"));
        assert!(!extent.matches(b"QEV"));
    }
}
