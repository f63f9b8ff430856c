//! The route `native`: QEMU (9.1 and later) writes the file, and vmfile completes it.
//!
//! QEMU writes a mapped-ram file with several threads, past the page cache if possible, into a
//! descriptor from vmfile. QEMU syncs nothing, and the file has no hashes: `native_file` adds them.

use std::fs::{File, OpenOptions};
use std::num::NonZeroU8;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use vmfile_engine::{DataFile, DirectIo, DirectIoInUse};
use vmfile_pages::PagesError;
use vmfile_pages::control::Progress;
use vmfile_pages::draft::Draft;
use vmfile_pages::lane::Workers;
use vmfile_qemu::{
    Feature, KeptFile, Outgoing, PUT_BACK_TIMEOUT, SettingsChange, StreamSettings, Vm,
};
use vmfile_stream::Channels;

use super::sending::{migration_error, wait_until_sent};
use super::sleep::{cannot_migrate, sleeps};
use super::space::refuse_without_space;
use super::{SaveOptions, Work, Written, native_file};
use crate::error::SaveError;

/// How many threads of QEMU write if the caller does not say: QEMU's own default (10.0).
const CHANNELS: NonZeroU8 = NonZeroU8::new(2).expect("2 is not zero");

/// How long to wait between two queries of QEMU's progress.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// How long QEMU may take to stop writing.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(60);

/// QEMU writes single pages, from where they lie in memory: direct I/O must allow this length and
/// alignment.
const PAGE_LEN: usize = 4096;

/// QEMU's migration settings before the save and during it, and what is needed to complete the
/// file.
#[derive(Debug)]
pub(super) struct NativeRoute {
    before: StreamSettings,
    ours: StreamSettings,
    change: SettingsChange,
    /// Whether QEMU writes past the page cache.
    direct_io: DirectIoInUse,
    /// Threads that read the pages again to hash them, started while the VM runs; `None` once they
    /// were used.
    workers: Option<Workers>,
}

impl NativeRoute {
    /// Refuses a QEMU that is too old, and asks for its migration settings, which are put back
    /// later.
    pub(super) fn prepare(
        vm: &mut Vm,
        options: &SaveOptions,
        draft: &Draft,
    ) -> Result<NativeRoute, SaveError> {
        let (feature, version) = (Feature::MigrationDirectIo, vm.version()?);
        if !version.has(feature) {
            let (found, needed) = (version.to_string(), feature.since().to_string());
            return Err(SaveError::QemuTooOld { found, needed });
        }
        let before = vm.stream_settings()?;
        let direct_io = direct_io(&before, draft.file());
        if let (DirectIo::Required, DirectIoInUse::No { reason }) = (options.direct_io, &direct_io)
        {
            return Err(SaveError::NoDirectIo { reason: reason.clone() });
        }
        check_space(vm, draft.file())?;
        let is_direct = matches!(direct_io, DirectIoInUse::Yes { .. });
        let ours = before.mapped_ram(options.channels.map_or(CHANNELS, Channels::count), is_direct);
        let width = (options.io, options.jobs.count());
        let workers = Some(Workers::start(draft.file(), width).map_err(SaveError::Workers)?);
        let change = SettingsChange::new(&before, std::slice::from_ref(&ours));
        Ok(NativeRoute { before, ours, change, direct_io, workers })
    }

    /// Returns what the save may change in QEMU's migration settings.
    pub(super) fn settings(&self) -> &SettingsChange {
        &self.change
    }

    /// Says whether QEMU writes past the page cache.
    pub(super) fn direct_io(&self) -> DirectIoInUse {
        self.direct_io.clone()
    }

    /// Lets QEMU write the paused VM, and then makes the file a vmfile.
    pub(super) fn write(&mut self, work: &mut Work<'_>) -> Result<Written, SaveError> {
        if sleeps(work)? {
            return Err(cannot_migrate());
        }
        if work.stays_paused() {
            work.warn_of_postmigrate("QEMU wrote the file by a migration");
        }
        let changed = work.vm.change_stream_settings(&self.before, &self.ours);
        let sent = changed.map_err(SaveError::from).and_then(|()| self.send(work));
        // Also after an error: some settings may have been changed.
        let put_back =
            work.vm.unstoppable(PUT_BACK_TIMEOUT, |vm| vm.put_back_stream_settings(&self.change));
        let ram_bytes = sent?;
        put_back?;
        super::describe::record(work)?;
        let workers = self.workers.take().expect("a route writes once");
        native_file::complete(work, workers, ram_bytes)
    }

    /// Gives QEMU the file for as long as it writes; returns the length of all RAM in bytes.
    fn send(&self, work: &mut Work<'_>) -> Result<u64, SaveError> {
        let file = work.draft.file().buffered();
        work.guard.keep_open(file.as_fd())?;
        let mut descriptors = vec![reopen(file, OFlags::empty())?];
        if matches!(self.direct_io, DirectIoInUse::Yes { .. }) {
            descriptors.push(reopen(file, OFlags::DIRECT)?);
        }
        let kept = work.vm.keep_file(&descriptors)?;
        drop(descriptors);
        let sent = send_to(work, &kept);
        let dropped = work.vm.unstoppable(PUT_BACK_TIMEOUT, |vm| vm.drop_file(kept));
        let ram_bytes = sent?;
        dropped?;
        Ok(ram_bytes)
    }
}

/// Refuses a disk that has less room than the VM has RAM: how much of it QEMU will write is not
/// known before. QEMU (10.0.2) may crash when its disk fills up, as it may when it is told to stop
/// ([`Vm::cancel_file`]).
fn check_space(vm: &mut Vm, file: &DataFile) -> Result<(), SaveError> {
    let ram: u64 = vm.ram_blocks()?.iter().map(|block| block.used_length).sum();
    refuse_without_space(ram, file)
}

/// Says whether QEMU can write past the page cache.
fn direct_io(settings: &StreamSettings, file: &DataFile) -> DirectIoInUse {
    let no = |reason| DirectIoInUse::No { reason };
    match file.direct() {
        DirectIoInUse::Yes { offset_align, memory_align }
            if *offset_align.max(memory_align) > PAGE_LEN =>
        {
            no(format!("QEMU writes single pages, the file system wants {offset_align} bytes"))
        }
        DirectIoInUse::Yes { .. } if !settings.has_direct_io() => {
            no("this QEMU has no direct I/O".to_owned())
        }
        as_found => as_found.clone(),
    }
}

/// Opens the file once more, for writing only: QEMU picks a descriptor with exactly this access
/// mode.
fn reopen(file: &File, flags: OFlags) -> Result<OwnedFd, SaveError> {
    let flags = i32::try_from(flags.bits()).expect("flags of open have 31 bits");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = OpenOptions::new().write(true).custom_flags(flags).open(path);
    opened.map(OwnedFd::from).map_err(SaveError::Reopen)
}

/// Has QEMU write the VM and waits until it is done; returns the length of all RAM in bytes.
fn send_to(work: &mut Work<'_>, kept: &KeptFile) -> Result<u64, SaveError> {
    match work.vm.send_to_file(kept) {
        Ok(()) => {}
        // A migration that is under way is another client's.
        Err(error) if error.is_refused() => return Err(error.into()),
        Err(error) => return Err(cancel(work.vm, error.into())),
    }
    let mut ram_bytes = 0;
    loop {
        let asked = work.vm.outgoing_ram();
        let (outgoing, ram) = asked.map_err(|error| cancel(work.vm, error.into()))?;
        if let Some(ram) = ram {
            ram_bytes = ram.total_bytes;
            let done_bytes = ram_bytes.saturating_sub(ram.remaining_bytes);
            work.control
                .report(Progress { done_bytes, total_bytes: native_file::total_bytes(ram_bytes) });
        }
        match outgoing {
            Outgoing::Active => {}
            Outgoing::Completed => return wait_until_sent(work.vm).map(|()| ram_bytes),
            other => return Err(migration_error(other)),
        }
        if work.control.is_stopped() {
            return Err(cancel(work.vm, PagesError::Stopped.into()));
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Cancels the migration after `error`, and returns the error to report.
fn cancel(vm: &mut Vm, error: SaveError) -> SaveError {
    match vm.unstoppable(CANCEL_TIMEOUT, |vm| vm.cancel_file(CANCEL_TIMEOUT)) {
        Ok(Outgoing::Active | Outgoing::Held) => {
            SaveError::Migration { reason: "it does not stop".to_owned() }
        }
        Ok(_) | Err(_) => error,
    }
}
