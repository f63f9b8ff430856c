//! `vmfile info`: what is in a file, without reading a page.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use serde::Serialize;
use vmfile_format::manifest::{
    BaseMeta, CpuSectionMeta, DiskMeta, Features, MemoryRangeMeta, SnapshotId,
};
use vmfile_pages::snapshot::FileFormat;
use vmfile_pages::snapshot::{Snapshot, SnapshotError};

/// What is in a file.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Info {
    /// `vmfile`, or `mapped-ram` for a file that QEMU wrote.
    pub format: FileFormat,
    /// The VM, where the file names it: `None` in a file that QEMU wrote.
    pub vm: Option<VmInfo>,
    /// The versioned machine type.
    pub machine: String,
    /// The version of the QEMU that ran the VM, where the file says it.
    pub qemu_version: Option<String>,
    /// When the VM was saved, in seconds since 1970-01-01 UTC, where the file says it.
    pub saved_at_unix_seconds: Option<u64>,
    /// The route by which RAM got into the file, where the file says it.
    pub route: Option<String>,
    /// How long the guest stood still, in seconds, where the file says it.
    pub pause_seconds: Option<f64>,
    /// The file's length, in bytes; holes count.
    pub file_bytes: u64,
    /// How many bytes it takes on the disk; bytes that it shares with other files count.
    pub allocated_bytes: u64,
    /// The RAM blocks, in the order of the file.
    pub blocks: Vec<BlockInfo>,
    /// The devices' sections, in the order of the file.
    pub device_sections: Vec<SectionInfo>,
    /// Length of all device sections, in bytes.
    pub device_state_bytes: u64,
    /// The disks that must be kept as they were; empty in a file that QEMU wrote.
    pub disks: Vec<DiskMeta>,
    /// Which memory the guest saw at which address, where the file says it.
    pub memory_map: Option<Vec<MemoryRangeMeta>>,
    /// The device sections that hold the CPUs' registers; empty where the file does not say it.
    pub cpu_sections: Vec<CpuSectionMeta>,
    /// The file's identity; `None` if QEMU wrote it.
    pub id: Option<SnapshotId>,
    /// The file that has the pages that this one lacks, if it is thin.
    pub base: Option<BaseInfo>,
    /// The features of the format that this file uses.
    pub features: Features,
}

/// The base of a thin file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BaseInfo {
    /// Its identity.
    pub id: SnapshotId,
    /// Where it was.
    pub path: String,
    /// How many pages are in it, or below it.
    pub pages: u64,
    /// The files below, from the base to the lowest one, as they were found.
    pub files: Vec<PathBuf>,
    /// Why the next one was not found; `None` if all are there.
    pub missing: Option<String>,
}

/// The VM that was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct VmInfo {
    /// Its name, where it has one.
    pub name: Option<String>,
    /// Its uuid, where it has one.
    pub uuid: Option<String>,
    /// `running` or `paused`: how a restore leaves it.
    pub run_state: String,
    /// The command line it ran with; empty where it is not known. It may hold secrets.
    pub command_line: Vec<String>,
    /// Where it was started, where that is known.
    pub working_directory: Option<String>,
}

/// A RAM block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BlockInfo {
    /// Its name.
    pub name: String,
    /// Its length, in bytes.
    pub bytes: u64,
    /// File offset of its first page.
    pub pages_offset: u64,
    /// How many pages have their data in the file.
    pub pages_data: u64,
    /// How many pages are zero.
    pub pages_zero: u64,
}

/// A device's section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SectionInfo {
    /// The device's name.
    pub name: String,
    /// Tells devices of one name apart.
    pub instance: u32,
    /// The version of the device's format.
    pub version: u32,
    /// File offset of its first byte.
    pub offset: u64,
    /// Its length, in bytes.
    pub bytes: u64,
}

/// Returns what is in `snapshot`.
///
/// Reads no page, and the page bitmaps only if there is no manifest, which has their counts.
///
/// # Errors
///
/// Returns [`SnapshotError::Read`] if the kernel refuses to read a bitmap.
pub fn info(snapshot: &Snapshot) -> Result<Info, SnapshotError> {
    let structure = snapshot.structure();
    let meta = snapshot.manifest().map(|manifest| &manifest.meta);
    let state = &structure.device_state;
    let device_sections = state.sections.iter().map(|section| SectionInfo {
        name: section.name.clone(),
        instance: section.instance,
        version: section.version,
        offset: section.offset,
        bytes: section.len,
    });
    Ok(Info {
        format: snapshot.format(),
        vm: meta.map(|meta| VmInfo {
            name: meta.vm.name.clone(),
            uuid: meta.vm.uuid.clone(),
            run_state: meta.vm.run_state.clone(),
            command_line: meta.vm.command_line.clone(),
            working_directory: meta.vm.working_directory.clone(),
        }),
        machine: structure.configuration.machine.clone(),
        qemu_version: meta.and_then(|meta| meta.vm.qemu_version.clone()),
        saved_at_unix_seconds: meta.map(|meta| meta.saved_at_unix_seconds),
        route: meta.map(|meta| meta.route.clone()),
        pause_seconds: meta.and_then(|meta| meta.pause_seconds),
        file_bytes: snapshot.file_len(),
        allocated_bytes: allocated(snapshot)?,
        blocks: blocks(snapshot)?,
        device_sections: device_sections.collect(),
        device_state_bytes: state.sections_len(),
        disks: meta.map(|meta| meta.vm.disks.clone()).unwrap_or_default(),
        memory_map: meta.and_then(|meta| meta.vm.memory_map.clone()),
        cpu_sections: meta.map(|meta| meta.cpu_sections.clone()).unwrap_or_default(),
        id: snapshot.id(),
        base: base(snapshot)?,
        features: meta.map(|meta| meta.features.clone()).unwrap_or_default(),
    })
}

fn base(snapshot: &Snapshot) -> Result<Option<BaseInfo>, SnapshotError> {
    let meta = snapshot.manifest().and_then(|manifest| manifest.meta.base.clone());
    let (Some(BaseMeta { id, path }), Some(pages)) = (meta, snapshot.count_in_base()?) else {
        return Ok(None);
    };
    let (files, missing) = snapshot.look_below();
    let missing = missing.map(|error| error.to_string());
    Ok(Some(BaseInfo { id, path, pages, files, missing }))
}

fn allocated(snapshot: &Snapshot) -> Result<u64, SnapshotError> {
    let path = || snapshot.path().to_path_buf();
    let metadata = snapshot.file().metadata();
    let metadata = metadata.map_err(|source| SnapshotError::Open { path: path(), source })?;
    // `stat` counts in units of 512 bytes, whatever the file system.
    Ok(metadata.blocks() * 512)
}

fn blocks(snapshot: &Snapshot) -> Result<Vec<BlockInfo>, SnapshotError> {
    let mut blocks = Vec::new();
    for (index, placed) in snapshot.structure().blocks.iter().enumerate() {
        let counted = snapshot.manifest().map(|manifest| manifest.meta.blocks[index].pages_data);
        let pages_data = match counted {
            Some(pages) => pages,
            None => snapshot.count_data(placed)?,
        };
        blocks.push(BlockInfo {
            name: placed.block.name().to_owned(),
            bytes: placed.block.used_length(),
            pages_offset: placed.pages_offset,
            pages_data,
            pages_zero: placed.block.page_count().0.saturating_sub(pages_data),
        });
    }
    Ok(blocks)
}
