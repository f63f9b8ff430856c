//! The manifest's metadata: who, when and how, where everything lies, and checksums.
//!
//! It is JSON, so that any language and any eye can read it. Members that a reader does not know
//! are ignored; members are added, never renamed.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use super::disks::{DiskMeta, EmptyDriveMeta};
use super::footer::Footer;
use super::machine::{ChangeMeta, PartsMeta};
use super::page_hashes::{TABLE_ALIGNMENT, table_len};
use crate::checksum;
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::{BLOCKS_MAX, FILE_LEN_MAX};
use crate::mapped_ram::MappedRamFile;

/// The metadata of a vmfile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// The version of vmfile that wrote the file.
    pub vmfile_version: String,
    /// When, in seconds since 1970-01-01 UTC.
    pub saved_at_unix_seconds: u64,
    /// How RAM was taken: `direct`, `stream` or `native`.
    pub route: String,
    /// Whether the guest ran meanwhile, where that is known.
    pub live: Option<bool>,
    /// How long the guest had stood still when the metadata was written, in seconds, where that is
    /// known.
    pub pause_seconds: Option<f64>,
    /// The VM.
    pub vm: VmMeta,
    /// The RAM blocks, in the order of the stream.
    pub blocks: Vec<BlockMeta>,
    /// The parts that a checksum covers: everything but pages, their hashes, and zeros.
    pub extents: Vec<ExtentMeta>,
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
    /// What was not as the command line makes it.
    #[serde(default)]
    pub changes: Vec<ChangeMeta>,
    /// The drives that had no medium.
    #[serde(default)]
    pub empty_drives: Vec<EmptyDriveMeta>,
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
            command_line: Vec::new(),
            working_directory: None,
            disks: Vec::new(),
            parts: None,
            changes: Vec::new(),
            empty_drives: Vec::new(),
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
    /// What it is: `head`, `mark`, `record`, `bitmap`, `device_state`, `vm_description`.
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
            stream_end,
            metadata_offset,
            metadata_len: bytes.len() as u64,
            metadata_hash: checksum(&bytes),
        };
        bytes.extend_from_slice(&footer.encode());
        bytes
    }

    /// Decodes the metadata that `footer` found.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if the checksum does not match or the JSON is not what it should be.
    pub fn decode(bytes: &[u8], footer: &Footer) -> Result<Meta, FormatError> {
        let error = |kind| FormatError::new(footer.metadata_offset, kind);
        if checksum(bytes) != footer.metadata_hash {
            return Err(error(FormatErrorKind::Checksum { field: "metadata" }));
        }
        serde_json::from_slice(bytes)
            .map_err(|cause| error(FormatErrorKind::BadManifest { message: cause.to_string() }))
    }

    /// Checks the metadata against the file's structure, so that what it says about places can be
    /// relied on.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if blocks differ or if a part lies outside the manifest's place.
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
        let mut extents_len = 0_u64;
        for extent in &self.extents {
            extents_len = extents_len.saturating_add(extent.bytes);
            let end = extent.offset.saturating_add(extent.bytes);
            let limit = footer.stream_end.min(FILE_LEN_MAX);
            if end > limit {
                return error(FormatErrorKind::Outside { field: "checked extent", end, limit });
            }
        }
        // Extents that overlap would make a check take as long as their author likes.
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
                command_line: vec!["qemu-system-x86_64".into(), "-m".into(), "64M".into()],
                working_directory: Some("/".into()),
                disks: Vec::new(),
                parts: None,
                changes: Vec::new(),
                empty_drives: Vec::new(),
            },
            blocks: Vec::new(),
            extents: vec![ExtentMeta::of("head", 0, b"QEVM")],
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

    #[test]
    fn an_extent_matches_its_bytes_only() {
        let extent = ExtentMeta::of("head", 0, b"QEVM");
        assert!(extent.matches(b"QEVM"));
        assert!(!extent.matches(b"QEVN"));
        assert!(!extent.matches(b"QEV"));
    }
}
