//! The base of a save: which file it is, and whether it can be one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use vmfile_format::manifest::SnapshotId;
use vmfile_pages::base::{Base, BaseError, KeptPages};
use vmfile_pages::draft::Draft;
use vmfile_pages::snapshot::Snapshot;
use vmfile_qemu::{RamBlockInfo, Vm};

use super::{BaseFile, SaveOptions};
use crate::error::{SaveError, with_sources};

/// The base that was used, or why none was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum BaseUsed {
    /// It was used.
    Yes {
        /// The file.
        file: PathBuf,
        /// Its identity.
        id: SnapshotId,
        /// Whether the new file needs it.
        thin: bool,
        /// Why the pages are not shared, if it does.
        thin_reason: Option<String>,
        /// How many pages with data are those of the base.
        pages: u64,
        /// How many bytes of the guest's RAM were read, to compare them with the base.
        bytes_read: u64,
    },
    /// The whole VM was saved.
    No {
        /// Why.
        reason: String,
    },
}

/// What was chosen before the save.
#[derive(Debug)]
pub(super) enum ChosenBase {
    /// None was asked for.
    None,
    /// This one.
    File(Arc<Base>),
    /// [`BaseFile::Auto`] has found none.
    Unusable(String),
}

impl ChosenBase {
    /// Finds the base that the options name.
    ///
    /// # Errors
    ///
    /// Returns [`SaveError`] if a file that was named cannot be the base.
    pub(super) fn choose(
        vm: &mut Vm,
        options: &SaveOptions,
        (draft, destination): (&Draft, &Path),
    ) -> Result<ChosenBase, SaveError> {
        match &options.base {
            None => Ok(ChosenBase::None),
            Some(BaseFile::File(path)) => {
                let snapshot = Snapshot::open(path, 0).map_err(BaseError::from)?;
                let base = usable(vm, options, snapshot, (draft, destination))?;
                Ok(ChosenBase::File(Arc::new(base)))
            }
            Some(BaseFile::Auto) => {
                let Some((id, path)) = vm.last_file()? else {
                    let reason =
                        "vmfile has neither saved nor restored this VM since its QEMU started";
                    return Ok(ChosenBase::Unusable(reason.to_owned()));
                };
                let snapshot = match last(&id, &path) {
                    Ok(snapshot) => snapshot,
                    Err(reason) => return Ok(ChosenBase::Unusable(reason)),
                };
                match usable(vm, options, snapshot, (draft, destination)) {
                    Ok(base) => Ok(ChosenBase::File(Arc::new(base))),
                    // Without the base the file would be replaced that others may need.
                    Err(error @ SaveError::BaseIsDestination { .. }) => Err(error),
                    Err(error) => Ok(ChosenBase::Unusable(with_sources(&error))),
                }
            }
        }
    }

    /// Gives up the base if the route cannot use one, as `reason` says.
    ///
    /// # Errors
    ///
    /// [`SaveError::BaseNeedsMemory`] if the base was named.
    pub(super) fn without_memory(
        &mut self,
        options: &SaveOptions,
        reason: &str,
    ) -> Result<(), SaveError> {
        let ChosenBase::File(_) = self else { return Ok(()) };
        let error = SaveError::BaseNeedsMemory { reason: reason.to_owned() };
        if options.base != Some(BaseFile::Auto) {
            return Err(error);
        }
        *self = ChosenBase::Unusable(error.to_string());
        Ok(())
    }

    /// Returns the base.
    pub(super) fn file(&self) -> Option<&Arc<Base>> {
        match self {
            ChosenBase::File(base) => Some(base),
            ChosenBase::None | ChosenBase::Unusable(_) => None,
        }
    }

    /// Says that no base was found, if one was asked for.
    pub(super) fn warning(&self) -> Option<String> {
        let ChosenBase::Unusable(reason) = self else { return None };
        Some(format!("--base auto found no base, and the whole VM was saved: {reason}"))
    }

    /// Returns what the report says, when `pages` were those of the base, and so much was read.
    pub(super) fn used(&self, pages: u64, bytes_read: u64) -> Option<BaseUsed> {
        match self {
            ChosenBase::None => None,
            ChosenBase::Unusable(reason) => Some(BaseUsed::No { reason: reason.clone() }),
            ChosenBase::File(base) => {
                let snapshot = base.snapshot();
                let thin_reason = match base.kept() {
                    KeptPages::Thin { reason } => Some(reason.clone()),
                    _ => None,
                };
                Some(BaseUsed::Yes {
                    file: snapshot.path().to_path_buf(),
                    id: snapshot.id().expect("a base has a manifest"),
                    thin: thin_reason.is_some(),
                    thin_reason,
                    pages,
                    bytes_read,
                })
            }
        }
    }
}

/// Opens the file at `path` if it is still the one with this id; otherwise says why not.
fn last(id: &str, path: &Path) -> Result<Snapshot, String> {
    let snapshot = Snapshot::open(path, 0).map_err(|error| with_sources(&error))?;
    let found = snapshot.id().map(|id| id.to_string());
    if found.as_deref() == Some(id) {
        return Ok(snapshot);
    }
    let found = found.unwrap_or_else(|| "none".to_owned());
    Err(format!("{} has the id {found}, expected {id}", path.display()))
}

/// Compares the file with the VM, and takes it as the base.
fn usable(
    vm: &mut Vm,
    options: &SaveOptions,
    snapshot: Snapshot,
    (draft, destination): (&Draft, &Path),
) -> Result<Base, SaveError> {
    let path = || snapshot.path().to_path_buf();
    let (found, expected) = (&snapshot.structure().configuration.machine, vm.machine_type()?);
    if *found != expected {
        let what = format!("its machine type is {found}, expected {expected}");
        return Err(SaveError::BaseOfAnotherVm { path: path(), what });
    }
    let blocks = vm.ram_blocks()?;
    let largest = blocks.iter().max_by_key(|block| block.used_length);
    let has = |block: &RamBlockInfo| {
        let found = snapshot.structure().block(&block.name);
        found.is_some_and(|placed| placed.block.used_length() == block.used_length)
    };
    if let Some(block) = largest.filter(|block| !has(block)) {
        let (name, bytes) = (&block.name, block.used_length);
        let what = format!("it has no RAM block {name:?} of {bytes} bytes");
        return Err(SaveError::BaseOfAnotherVm { path: path(), what });
    }
    let base = Base::new(snapshot, draft.file(), options.thin)?;
    // A file that shares its pages needs the base no more once it is complete.
    let is_needed = *base.kept() != KeptPages::Shared;
    if is_needed && base.snapshot().chain().any(|file| file.is_at(destination)) {
        return Err(SaveError::BaseIsDestination { path: destination.to_path_buf() });
    }
    Ok(base)
}
