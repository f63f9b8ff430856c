//! How a VM is saved: what the caller chooses.

use std::path::PathBuf;
use std::time::Duration;

use derive_setters::Setters;
use vmfile_engine::{Backend, DirectIo, Existing};
use vmfile_pages::jobs::Jobs;
use vmfile_stream::Channels;

use crate::error::SaveError;

/// What becomes of the VM once the file is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// QEMU ends, as after `virsh save`.
    #[default]
    Quit,
    /// The guest runs on, if it ran before.
    Resume,
    /// The guest stays paused.
    Pause,
}

/// How RAM gets from the VM into the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Route {
    /// `Direct` if possible, else `Stream`; the report says which and why.
    #[default]
    Auto,
    /// From the memory of QEMU's process.
    Direct,
    /// From the migration stream, which every QEMU has.
    Stream,
    /// QEMU itself (9.1 and later) writes the pages into the file.
    Native,
}

/// The file of which a new one keeps the pages that have not changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BaseFile {
    /// This file.
    File(PathBuf),
    /// The file to which this VM was last saved, or from which it was restored. If there is none, or if
    /// it cannot be used, the whole VM is saved; the report says why.
    Auto,
}

/// How a guest is saved while it runs.
#[derive(Clone, Copy, Debug, Setters)]
#[non_exhaustive]
pub struct Live {
    /// How long the save may take until it fails: a guest may write faster than it is saved.
    pub timeout: Duration,
    /// How long the guest may stand still while its memory is copied aside, or at the end of a
    /// pre-copy save, which sends changed pages again.
    pub pause_max: Duration,
}

impl Default for Live {
    fn default() -> Live {
        Live { timeout: Duration::from_secs(600), pause_max: Duration::from_millis(300) }
    }
}

/// How a VM is saved.
#[derive(Clone, Debug, Setters)]
#[non_exhaustive]
pub struct SaveOptions {
    /// Let the guest run while its memory is written; the file holds the state of one moment. A
    /// guest that is already paused is saved as if this were `None`.
    pub live: Option<Live>,
    /// Put an overlay on top of every disk that the guest can write, at the saved moment: the
    /// images below stay as they were then, and belong to the file.
    pub with_disks: bool,
    /// Store the secrets on QEMU's command line, such as the data of a secret object. Otherwise they are
    /// left out, and a restore needs them.
    pub with_secrets: bool,
    /// Keep the pages of another file that have not changed: they are neither read from it nor written.
    /// Where the file system shares extents (XFS, btrfs), the new file is whole all the same; elsewhere
    /// it is thin, and needs the other one.
    pub base: Option<BaseFile>,
    /// Make the file thin even if the file system shares extents.
    pub thin: bool,
    /// How RAM gets from the VM into the file.
    pub route: Route,
    /// What becomes of the VM.
    pub after: After,
    /// Whether pages are written past the page cache.
    pub direct_io: DirectIo,
    /// Which back end does the I/O.
    pub io: Backend,
    /// How many threads read, hash and write.
    pub jobs: Jobs,
    /// How many threads of QEMU send (route `stream`) or write (route `native`): QEMU's parameter
    /// `multifd-channels`. `None`: one stream without channels, or two threads that write.
    pub channels: Option<Channels>,
    /// Whether a file of that name may be replaced.
    pub existing: Existing,
    /// Save and end a VM even if it is not what its command line would make, if block jobs or
    /// exports end with it, or if QEMU does not say that its disks are durable.
    pub changed_ok: bool,
}

impl SaveOptions {
    /// Checks what the options say by themselves; a save begins with this.
    ///
    /// # Errors
    ///
    /// [`SaveError::NotLive`], [`SaveError::NoChannels`], [`SaveError::BaseNeedsMemory`] or
    /// [`SaveError::ThinWithoutBase`]: two of them exclude one another.
    pub fn check(&self) -> Result<(), SaveError> {
        if self.thin && self.base.is_none() {
            return Err(SaveError::ThinWithoutBase);
        }
        match self.route {
            Route::Stream | Route::Native if matches!(self.base, Some(BaseFile::File(_))) => {
                let reason = "another route was asked for".to_owned();
                Err(SaveError::BaseNeedsMemory { reason })
            }
            Route::Native if self.live.is_some() => Err(SaveError::NotLive),
            Route::Direct if self.channels.is_some() => Err(SaveError::NoChannels),
            _ => Ok(()),
        }
    }
}

impl Default for SaveOptions {
    fn default() -> SaveOptions {
        SaveOptions {
            live: None,
            with_disks: false,
            with_secrets: false,
            base: None,
            thin: false,
            route: Route::default(),
            after: After::default(),
            direct_io: DirectIo::Preferred,
            io: Backend::Auto,
            jobs: Jobs::default(),
            channels: None,
            existing: Existing::Refuse,
            changed_ok: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_exclude_one_another_are_refused_before_the_vm_is_asked() {
        let live = SaveOptions::default().live(Some(Live::default()));
        let error = live.clone().route(Route::Native).check().unwrap_err();
        assert!(matches!(error, SaveError::NotLive), "{error}");
        for route in [Route::Auto, Route::Stream, Route::Direct] {
            assert!(live.clone().route(route).check().is_ok(), "{route:?}");
        }
        let channels = SaveOptions::default().channels(Channels::new(2));
        let error = channels.clone().route(Route::Direct).check().unwrap_err();
        assert!(matches!(error, SaveError::NoChannels), "{error}");
        for route in [Route::Auto, Route::Stream, Route::Native] {
            assert!(channels.clone().route(route).check().is_ok(), "{route:?}");
        }
    }
}
