//! What the program says when it fails: code, kind, message, hint.

use std::error::Error;
use std::io::ErrorKind;

use vmfile::convert::ConvertError;
use vmfile::error::{BaseError, SaveError};
use vmfile::receive::ReceiveError;
use vmfile::send::SendError;
use vmfile::{
    ChannelsError, CommandLineError, DiscoverError, PagesError, PublishError, RestoreError,
    SnapshotError, VmError,
};
use vmfile_bench::BenchError;

use crate::exit_code::Code;
use crate::hints::{self, Given};

/// A failure, as the user sees it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

/// How long a message may be, in bytes. What a file or QEMU says is quoted in it.
const MESSAGE_LEN_MAX: usize = 16 << 10;

/// Cuts a message that is too long, and says so.
fn shortened(mut message: String) -> String {
    if message.len() <= MESSAGE_LEN_MAX {
        return message;
    }
    let mut ends = (MESSAGE_LEN_MAX - 3..=MESSAGE_LEN_MAX).rev();
    let end = ends.find(|&end| message.is_char_boundary(end)).unwrap_or_default();
    let left_out = message.len() - end;
    message.truncate(end);
    message.push_str(&format!("... ({left_out} bytes left out)"));
    message
}

impl Failure {
    pub(crate) fn new(code: Code, kind: &'static str, error: &dyn Error) -> Failure {
        let mut message = error.to_string();
        let mut source = error.source();
        let mut hint = None;
        while let Some(error) = source {
            message.push_str(": ");
            message.push_str(&error.to_string());
            hint = error.downcast_ref().and_then(hints::limit).or(hint);
            source = error.source();
        }
        Failure { code, kind, message: shortened(message), hint: hint.map(str::to_owned) }
    }

    pub(crate) fn usage(message: String) -> Failure {
        Failure { code: Code::Usage, kind: "usage", message, hint: None }
    }

    /// Returns clap's message about wrong usage, in one line.
    pub(crate) fn of_usage(error: &clap::Error) -> Failure {
        let text = error.render().to_string();
        let what = text.split("\n\nUsage:").next().unwrap_or_default();
        let what = what.split("\n\nFor more information").next().unwrap_or_default();
        let words: Vec<&str> = what.trim_start_matches("error: ").split_whitespace().collect();
        Failure::usage(words.join(" ")).hint("--help says more")
    }

    /// Gives the failure this hint, unless its cause is known to be another one.
    pub(crate) fn hint(mut self, hint: &str) -> Failure {
        if !self.hint.as_deref().is_some_and(hints::is_certain) {
            self.hint = Some(hint.to_owned());
        }
        self
    }

    /// Gives a failure without a hint this one.
    fn or_hint(self, hint: Option<&str>) -> Failure {
        let hint = self.hint.clone().or(hint.map(str::to_owned));
        Failure { hint, ..self }
    }

    fn hint_if(self, hint: Option<&str>) -> Failure {
        match hint {
            Some(hint) => self.hint(hint),
            None => self,
        }
    }

    pub(crate) fn system(what: &str, error: &std::io::Error) -> Failure {
        let message = format!("{what}: {error}");
        Failure { code: Code::System, kind: "io", message, hint: None }
    }
}

impl From<&DiscoverError> for Failure {
    fn from(error: &DiscoverError) -> Failure {
        let failure = match error {
            DiscoverError::Processes { .. } => Failure::new(Code::System, "processes", error),
            _ => Failure::new(Code::Vm, "no_such_vm", error),
        };
        failure.hint_if(error.hint())
    }
}

impl From<&VmError> for Failure {
    fn from(error: &VmError) -> Failure {
        if error.is_stopped() {
            return Failure::new(Code::Interrupted, "stopped", error);
        }
        Failure::new(Code::Vm, "vm", error).hint_if(error.hint())
    }
}

impl From<&SnapshotError> for Failure {
    fn from(error: &SnapshotError) -> Failure {
        match error {
            SnapshotError::Format { .. } => Failure::new(Code::File, "damaged", error)
                .hint("expected a file of `vmfile save`, or of QEMU's migration with mapped-ram"),
            SnapshotError::Newer { .. } => Failure::new(Code::File, "newer", error)
                .hint("`vmfile --version` says which one this is"),
            SnapshotError::DamagedPage { .. } | SnapshotError::DamagedPart { .. } => {
                Failure::new(Code::File, "damaged", error)
                    .hint("`vmfile check FILE` lists everything that is damaged")
            }
            SnapshotError::LostEnd { .. } => Failure::new(Code::File, "truncated", error)
                .hint("the file was cut, or is still being copied"),
            SnapshotError::NotAFile { .. } => Failure::new(Code::File, "not_a_file", error),
            SnapshotError::BaseMissing { .. } => Failure::new(Code::File, "base_missing", error)
                .hint("put the base where it was, or into the directory of the thin file under its name there"),
            SnapshotError::ChainTooLong { .. } | SnapshotError::BaseLacksPages { .. } => {
                Failure::new(Code::File, "base", error)
            }
            SnapshotError::Open { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                Failure::new(Code::System, "io", error).hint(OWNER)
            }
            SnapshotError::TooMuchRam { .. } => Failure::new(Code::System, "no_memory", error),
            _ => Failure::new(Code::System, "io", error),
        }
    }
}

impl From<&BaseError> for Failure {
    fn from(error: &BaseError) -> Failure {
        match error {
            BaseError::Snapshot(error) => Failure::from(error),
            BaseError::ChainTooLong { .. } => Failure::new(Code::Incompatible, "base", error)
                .hint("`vmfile convert FILE NEW --to mapped-ram` makes a whole file of it"),
            _ => Failure::new(Code::Incompatible, "base", error)
                .hint("without --base the whole VM is saved"),
        }
    }
}

impl From<&PublishError> for Failure {
    fn from(error: &PublishError) -> Failure {
        match error {
            PublishError::Exists { path } => {
                let hint = if path.is_dir() {
                    "it is a directory: name a file in it"
                } else {
                    "--force replaces it"
                };
                Failure::new(Code::System, "exists", error).hint(hint)
            }
            PublishError::NotAFile { .. } => {
                Failure::new(Code::System, "not_a_file", error).hint("choose another name")
            }
            PublishError::InUse { .. } => Failure::new(Code::System, "in_use", error)
                .hint("choose another name; --force does not replace what a VM uses, whose QEMU locks its images"),
            PublishError::NotDurable { .. } => Failure::new(Code::System, "not_durable", error).hint(
                "a power failure may take the name away; `sync` on the directory's file system says \
                 whether it can be written now",
            ),
            PublishError::NoName { .. } => {
                Failure::new(Code::Usage, "usage", error).hint("name a file, not a directory")
            }
            PublishError::NoDirectory { .. } => {
                Failure::new(Code::System, "no_directory", error).hint("create the directory first")
            }
            PublishError::Moved { .. } => Failure::new(Code::System, "directory_moved", error)
                .hint("there is no file; leave the directory where it is until it is written"),
            _ => Failure::new(Code::System, "publish", error),
        }
    }
}

impl From<&SaveError> for Failure {
    fn from(error: &SaveError) -> Failure {
        if let Some(failure) = of_options(error).or_else(|| of_a_guest_that_runs(error)) {
            return failure;
        }
        match error {
            SaveError::Vm(VmError::LeftPaused { .. }) => {
                Failure::new(Code::LeftPaused, "left_paused", error).hint(CONT)
            }
            SaveError::Vm(error) => Failure::from(error),
            SaveError::QemuGone { .. } => Failure::new(Code::Vm, "qemu_gone", error)
                .hint("there is no file; what QEMU said is where its standard error goes"),
            SaveError::CutOff { .. } => Failure::new(Code::Vm, "cut_off", error).hint(CUT_OFF),
            SaveError::RunState { found } => {
                Failure::new(Code::Vm, "run_state", error).hint(hints::run_state(found))
            }
            SaveError::Sleeps { .. } => Failure::new(Code::Vm, "sleeps", error)
                .hint("--route direct saves it, or `system_wakeup` wakes it first"),
            SaveError::Blocked { .. } => {
                Failure::new(Code::Vm, "blocked", error).hint(&error.remedies().join("; "))
            }
            SaveError::Changed { .. } => Failure::new(Code::Vm, "changed", error).hint(CHANGED_OK),
            SaveError::Activities { .. } => Failure::new(Code::Vm, "activities", error).hint(BUSY),
            SaveError::NotConfirmed { .. } => {
                Failure::new(Code::Vm, "not_confirmed", error).hint(CHANGED_OK)
            }
            SaveError::NoAddress { .. } => Failure::new(Code::Vm, "no_address", error).hint(
                "--route direct needs a QEMU that prints addresses, 8.0 or later; stream none",
            ),
            SaveError::QemuTooOld { .. } => Failure::new(Code::Vm, "qemu_too_old", error)
                .hint("--route stream works with every QEMU"),
            SaveError::NoDirectIo { .. } => Failure::new(Code::System, "no_direct_io", error),
            SaveError::Migration { .. } => Failure::new(Code::Vm, "migration", error),
            SaveError::NotConnected { .. } => Failure::new(Code::Vm, "not_connected", error)
                .hint("without --channels the stream needs no socket"),
            SaveError::Receive(error) => received(error),
            SaveError::DeviceState(_) | SaveError::NoRunState | SaveError::Block { .. } => {
                Failure::new(Code::Vm, "device_state", error)
            }
            SaveError::NotText { .. } => Failure::new(Code::Vm, "command_line", error).hint(TEXT),
            SaveError::Process(_) => Failure::new(Code::System, "process", error).hint(TRACE),
            SaveError::Pages(error) => Failure::from(error),
            SaveError::Options(_) => Failure::new(Code::Vm, "command_line", error)
                .hint("a restore needs what QEMU was started with: run as the VM's user, or root"),
            SaveError::NoSpace { .. } => {
                Failure::new(Code::System, "no_space", error).hint(NO_SPACE)
            }
            SaveError::LeftOverlays { cause, .. } => with_cause(error, cause, "left_overlays")
                .hint("the VM is sound; `block-commit` on its monitor merges the overlay"),
            SaveError::Disk { .. } => Failure::new(Code::Vm, "disk", error)
                .hint("--with-disks needs images in files, qcow2 or raw; without it keep copies"),
            SaveError::ImageLost { .. } => Failure::new(Code::Vm, "image_lost", error).hint(
                "--after resume saves it all the same; give the images that the VM is to have \
                 on a command line after `--` when it is restored",
            ),
            SaveError::DiskChanged { .. } | SaveError::ChangedMeanwhile { .. } => {
                Failure::new(Code::Vm, "changed_meanwhile", error)
                    .hint("save again once nothing is plugged, and block jobs are done")
            }
            SaveError::Release { .. } if !error.leaves_paused() => {
                Failure::new(Code::Vm, "qemu_gone", error).hint("the file can be restored")
            }
            // The status tells a script that the VM does not run, whatever the cause was.
            SaveError::LeftPaused { .. } | SaveError::Release { .. } => {
                Failure::new(Code::LeftPaused, "left_paused", error).hint(CONT)
            }
            _ => Failure::new(Code::System, "io", error),
        }
    }
}

/// Returns the failure if the guest was to run while it is saved.
fn of_a_guest_that_runs(error: &SaveError) -> Option<Failure> {
    Some(match error {
        SaveError::StoppedMeanwhile { .. } => Failure::new(Code::Vm, "stopped_meanwhile", error)
            .hint(
                "there is no file; save the VM once more: it is saved as it stands, and stays \
                 stopped with --after resume",
            ),
        SaveError::Userfault(_) => Failure::new(Code::Vm, "userfault", error).hint(BY_STREAM),
        SaveError::NotConverged { .. } => Failure::new(Code::Vm, "not_converged", error).hint(
            "--live-timeout waits longer, --max-pause allows a longer pause; \
             without --live the guest is paused",
        ),
        SaveError::DisksGoOn { .. } => Failure::new(Code::Vm, "disks_go_on", error)
            .hint("--with-disks keeps the disks of the saved moment; or save without --live"),
        _ => return None,
    })
}

/// Returns the failure if it concerns the base, or options that exclude one another.
fn of_options(error: &SaveError) -> Option<Failure> {
    Some(match error {
        SaveError::Base(error) => Failure::from(error),
        SaveError::BaseIsDestination { .. } => Failure::new(Code::Usage, "base", error)
            .hint("save to another name: the new file is made beside its base"),
        SaveError::BaseOfAnotherVm { .. } => Failure::new(Code::Incompatible, "base", error)
            .hint("--base auto takes the file that this VM was last saved to or restored from"),
        SaveError::BaseNeedsMemory { .. } => Failure::new(Code::Vm, "base", error)
            .hint("without --base any route saves the whole VM"),
        SaveError::NoChannels => Failure::new(Code::Usage, "usage", error).hint(CHANNELS),
        SaveError::NotDirect { .. } => Failure::new(Code::Vm, "not_direct", error)
            .hint("--route stream saves it, and auto takes that route"),
        SaveError::NotLive => Failure::new(Code::Usage, "usage", error).hint(LIVE),
        SaveError::PathNotText { .. } => Failure::new(Code::Usage, "path", error)
            .hint("save under another name, in another directory"),
        SaveError::ThinWithoutBase => {
            Failure::new(Code::Usage, "usage", error).hint("--thin goes with --base")
        }
        _ => return None,
    })
}

/// The hint for a disk that is full.
const NO_SPACE: &str = "free some space, or save to another file system; a save whose guest runs on needs room for all RAM";

/// The hints for options that exclude one another.
const LIVE: &str = "--live goes with --route auto, direct or stream";
const BY_STREAM: &str = "--live without --base and with --route stream has QEMU send the memory; where memory is \
                         copied aside, a higher --max-pause helps";
const CHANNELS: &str = "--channels goes with --route stream or native";

/// The hint for a command line that is not text.
const TEXT: &str = "the file holds the command line as text: start the VM with UTF-8 only";

/// The hint for a file without the secrets of its command line.
const SECRETS: &str = "--secret ID=FILE gives the value of a secret object; for any other secret, give a \
                       whole command line after `--`. `vmfile save --with-secrets` stores them";

/// The hint if the memory of QEMU's process cannot be read.
const TRACE: &str = "reading another process's memory needs its user and the right to trace it, or \
                     root; --route stream needs neither";

/// The hint for a file that this user may not read.
const OWNER: &str =
    "vmfile makes files that only their owner may read: run as that user, or as root";

/// The hints for a socket to which nothing can be sent.
const SOCKET: &str = "run as the user of the QEMU that listens there, or as root";
const INCOMING: &str = "start a QEMU with -incoming unix:PATH first";

/// The hints for a socket that cannot be made.
const PLACE: &str = "name a socket in a directory where this user may make files";
const LEFT_OVER: &str = "nothing may be there yet, not even a socket that was left over";

/// The hint if the connection to a monitor broke.
const CUT_OFF: &str =
    "there is no file; find out what closes connections between vmfile and QEMU's monitor";

/// The hint for a VM that is not what its command line would make.
const CHANGED_OK: &str =
    "--changed-ok saves and ends it all the same; --after resume lets it run on";

/// The hint for jobs and exports that would end with the VM.
const BUSY: &str = "wait until it is done, or end it; --changed-ok saves and ends the VM all \
                          the same; --after resume lets it run on";

/// The hint for a VM that was left paused.
const CONT: &str = "the process vm-guardian lets the VM run on once QEMU answers; so does `cont` \
                    on another monitor of it, and `kill -CONT` a process that is stopped";

/// Returns the failure for a save that could not receive QEMU's stream; its hints name options of
/// `save`.
fn received(error: &ReceiveError) -> Failure {
    let failure = Failure::from(error);
    match error {
        ReceiveError::Stream(error) if error.to_string().starts_with("page size") => {
            Failure { code: Code::Vm, ..failure }
                .hint("--route native has QEMU write such pages (QEMU 9.1)")
        }
        ReceiveError::Stream(_) | ReceiveError::Channel { .. } => Failure {
            code: Code::Vm,
            hint: Some("QEMU did not send what it should; --route direct needs no stream".into()),
            ..failure
        },
        ReceiveError::Stalled { .. } => {
            failure.hint("QEMU sent nothing: its disks may be slow; --route direct needs no stream")
        }
        ReceiveError::Listen { .. } => failure.hint("without --channels no socket is needed"),
        _ => failure,
    }
}

/// Returns the failure for `cause`, with the message of `error`, which also says what was left.
fn with_cause(error: &SaveError, cause: &SaveError, kind: &'static str) -> Failure {
    let failure = Failure::from(cause);
    let message = Failure::new(failure.code, kind, error).message;
    Failure { message, kind, ..failure }
}

impl From<&ReceiveError> for Failure {
    fn from(error: &ReceiveError) -> Failure {
        match error {
            ReceiveError::Channels(error) => Failure::from(error),
            ReceiveError::Channel { source, .. } => {
                let failure = Failure::from(source.as_ref());
                let message = Failure::new(failure.code, failure.kind, error).message;
                Failure { message, ..failure }
            }
            ReceiveError::Stream(_) => Failure::new(Code::File, "stream", error)
                .hint("expected the migration stream of a QEMU, whole, without mapped-ram"),
            ReceiveError::Stalled { .. } => {
                Failure::new(Code::Vm, "stalled", error).hint("--stall-timeout waits longer")
            }
            ReceiveError::ProcessStopped { .. } => Failure::new(Code::Vm, "process_stopped", error)
                .hint("`kill -CONT` lets QEMU's process go on"),
            ReceiveError::TimedOut { .. } => Failure::new(Code::Vm, "timed_out", error).hint(
                "--timeout waits longer; a guest that writes faster than it is sent never ends",
            ),
            ReceiveError::Listen { source, .. } => {
                let is_denied = source.kind() == ErrorKind::PermissionDenied;
                let hint = if is_denied { PLACE } else { LEFT_OVER };
                Failure::new(Code::System, "listen", error).hint(hint)
            }
            ReceiveError::Pages(error) => Failure::from(error),
            _ => Failure::new(Code::System, "io", error),
        }
    }
}

impl From<&ConvertError> for Failure {
    fn from(error: &ConvertError) -> Failure {
        match error {
            ConvertError::Pages(error) => Failure::from(error),
            ConvertError::Send(error) => Failure::from(error),
            ConvertError::Receive(error) => Failure::from(error),
            ConvertError::IsSource { .. } => {
                Failure::new(Code::Usage, "is_source", error).hint("convert to another name")
            }
            ConvertError::Already { .. } => Failure::new(Code::Usage, "already", error)
                .hint("there is nothing to convert; `cp --sparse=always` makes a copy"),
            _ => Failure::new(Code::System, "io", error),
        }
    }
}

impl From<&ChannelsError> for Failure {
    fn from(error: &ChannelsError) -> Failure {
        match error {
            ChannelsError::NoSocket => Failure::new(Code::Usage, "usage", error),
            ChannelsError::Unexpected => Failure::new(Code::Vm, "channels", error).hint(
                "--channels N receives them, N being QEMU's multifd-channels; \
                 or turn its capability multifd off",
            ),
            ChannelsError::Ended => Failure::new(Code::File, "channels", error),
            _ => Failure::new(Code::Vm, "channels", error).hint(
                "--channels must be QEMU's multifd-channels, and its capability multifd be on",
            ),
        }
    }
}

impl Failure {
    /// Returns the failure of a restore; its hint fits what the user has `given`.
    pub(crate) fn of_restore(error: &RestoreError, given: Given) -> Failure {
        Failure::from(error).or_hint(hints::restore(error, given))
    }
}

impl From<&RestoreError> for Failure {
    fn from(error: &RestoreError) -> Failure {
        match error {
            RestoreError::Pages(error) => Failure::from(error),
            RestoreError::Vm(error) => Failure::from(error),
            RestoreError::Incompatible { .. } => {
                Failure::new(Code::Incompatible, "incompatible", error)
            }
            RestoreError::NoHashes { .. } => Failure::new(Code::Usage, "no_hashes", error).hint(
                "`vmfile convert FILE NEW --to mapped-ram` makes a file that has hashes; \
                 without --verify this one is restored as it is",
            ),
            RestoreError::CannotMap { .. } => Failure::new(Code::Incompatible, "cannot_map", error)
                .hint("--mode load works with every file and every QEMU since 8.0"),
            RestoreError::CannotLoad { .. } => {
                Failure::new(Code::Incompatible, "cannot_load", error)
                    .hint("--mode stream works with every file and every QEMU")
            }
            RestoreError::Untrusted { .. } => Failure::new(Code::Usage, "untrusted", error).hint(
                "`vmfile info -v FILE` shows it; give a command line after `--`, or say --trust-command",
            ),
            RestoreError::NoSavedCommand => Failure::new(Code::Usage, "no_command", error)
                .hint("give QEMU's command line after `--`"),
            RestoreError::NoCommand | RestoreError::NoSuchSecret { .. } => {
                Failure::new(Code::Usage, "command_line", error)
            }
            RestoreError::SecretsLeftOut { .. } => Failure::new(Code::Usage, "secrets", error).hint(SECRETS),
            RestoreError::CannotRecreate { .. } => {
                Failure::new(Code::Usage, "cannot_recreate", error)
                    .hint("give a whole command line after `--`")
            }
            RestoreError::CannotRemake { .. } => {
                Failure::new(Code::Incompatible, "cannot_remake", error)
                    .hint("give a whole command line that makes them after `--`")
            }
            RestoreError::CommandLine(error @ CommandLineError::SizeDiffers { .. }) => {
                Failure::new(Code::Incompatible, "incompatible", error).hint_if(error.hint())
            }
            RestoreError::CommandLine(error) => {
                Failure::new(Code::Usage, "command_line", error).hint_if(error.hint())
            }
            RestoreError::DiskNotNamed { .. } => Failure::new(Code::Usage, "disk", error)
                .hint("give a command line with the disks that the VM is to have, after `--`"),
            RestoreError::DisksChanged { .. } => {
                Failure::new(Code::Incompatible, "disks_changed", error).hint(
                    "the guest would corrupt them: put back the images of that moment; \
                     --disks-changed-ok restores all the same",
                )
            }
            RestoreError::ImageOfFile { .. } => {
                Failure::new(Code::Incompatible, "image_of_file", error)
                    .hint("put an overlay on it: qemu-img create -f qcow2 -b IMAGE -F FORMAT NEW")
            }
            RestoreError::FormatNotSaid { .. } => Failure::new(Code::Usage, "format", error)
                .hint("say it: -drive file=IMAGE,format=qcow2, or raw"),
            RestoreError::NoQemuImg => Failure::new(Code::System, "no_qemu_img", error)
                .hint("Debian has it in the package qemu-utils"),
            RestoreError::Overlay { .. } => Failure::new(Code::System, "overlay", error),
            RestoreError::SocketInUse { .. } => Failure::new(Code::Vm, "socket_in_use", error)
                .hint("the VM that was saved may still run; give other sockets after `--`"),
            RestoreError::Sleeps { .. } => Failure::new(Code::Incompatible, "sleeps", error)
                .hint("restore it in a QEMU 9.0 or later, or wake the guest before it is saved"),
            RestoreError::NotWaiting { .. } => Failure::new(Code::Vm, "run_state", error)
                .hint("start that QEMU with -incoming defer"),
            RestoreError::Launch(_) => Failure::new(Code::Vm, "launch", error),
            RestoreError::QemuGone { .. } => Failure::new(Code::Vm, "qemu_gone", error),
            RestoreError::DeviceState { .. } => Failure::new(Code::Vm, "device_state", error),
            RestoreError::File(_) | RestoreError::Process(_) | RestoreError::Send(_) => {
                Failure::new(Code::System, "io", error)
            }
            _ => Failure::new(Code::Vm, "vm", error),
        }
    }
}

impl From<&SendError> for Failure {
    fn from(error: &SendError) -> Failure {
        match error {
            SendError::Pages(error) => Failure::from(error),
            SendError::Connect { source, .. } => {
                let is_denied = source.kind() == ErrorKind::PermissionDenied;
                let hint = if is_denied { SOCKET } else { INCOMING };
                Failure::new(Code::Vm, "connect", error).hint(hint)
            }
            SendError::PeerClosed { .. } => Failure::new(Code::Vm, "peer_closed", error)
                .hint("QEMU says on its stderr why it refused the stream"),
            SendError::NoSocket => Failure::new(Code::Usage, "usage", error),
            SendError::MachineVersion { .. } => {
                Failure::new(Code::Incompatible, "machine_version", error)
                    .hint("without --channels any machine type can be sent")
            }
            _ => Failure::new(Code::System, "io", error),
        }
    }
}

impl From<&BenchError> for Failure {
    fn from(error: &BenchError) -> Failure {
        match error {
            BenchError::Vm(error) => Failure::from(error),
            BenchError::Qmp(_) | BenchError::Program { .. } => {
                Failure::new(Code::Vm, "bench", error)
            }
            BenchError::NoQemu { .. } => Failure::new(Code::Vm, "no_qemu", error)
                .hint("--qemu names another program; guests need QEMU 8.0 or later"),
            BenchError::NoMemory { .. } => {
                Failure::new(Code::System, "no_memory", error).hint("--size asks for less")
            }
            BenchError::NoRoom { .. } => Failure::new(Code::System, "no_space", error)
                .hint("--dir names another file system, --size asks for less"),
            BenchError::NoWay { .. } => Failure::new(Code::Usage, "no_way", error),
            BenchError::Stopped => Failure::new(Code::Interrupted, "stopped", error),
            _ => Failure::new(Code::System, "io", error),
        }
    }
}

impl From<&PagesError> for Failure {
    fn from(error: &PagesError) -> Failure {
        match error {
            PagesError::Stopped => Failure::new(Code::Interrupted, "stopped", error),
            PagesError::Snapshot(error) => Failure::from(error),
            PagesError::Publish(error) => Failure::from(error),
            PagesError::NotAsWritten(_) | PagesError::NoManifest => {
                Failure::new(Code::System, "does_not_read_back", error).hint(
                    "the kernel or the disk lost what was written: the file was dropped; \
                     look at the kernel's messages, and save to another disk",
                )
            }
            PagesError::ReadRam { .. } => Failure::new(Code::System, "process", error).hint(TRACE),
            PagesError::Base(error) => Failure::from(error),
            PagesError::WriteFile { source, .. } if source.kind() == ErrorKind::StorageFull => {
                Failure::new(Code::System, "no_space", error).hint(NO_SPACE)
            }
            _ => Failure::new(Code::System, "io", error),
        }
    }
}
