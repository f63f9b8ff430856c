//! The command line of vmfile itself.

mod bench;

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use self::bench::{BenchArguments, RamMode};

const EVERY_VERB: &str = "Options of every verb";

const EXIT_STATUS: &str = "\
Exit status:
    0  done
    1  check found something
    2  wrong usage
    3  no such VM, or the VM or QEMU refused
    4  the file is damaged or not one of ours
    5  the operating system refused: space, permission, I/O
    6  the file and the VM do not fit: machine type, RAM size, QEMU version
    7  the VM was left paused, whatever the cause
  129, 130, 131, 143  stopped by SIGHUP, SIGINT, SIGQUIT, SIGTERM
An unknown status means failure.";

/// Saves a running QEMU virtual machine to a file and brings it back.
#[derive(Debug, Parser)]
#[command(
    name = "vmfile",
    version,
    max_term_width = 100,
    arg_required_else_help = true,
    after_long_help = EXIT_STATUS
)]
pub(crate) struct Arguments {
    /// Print JSON instead of text: sizes in bytes, times in seconds; errors as JSON on stderr
    #[arg(long, global = true, help_heading = EVERY_VERB)]
    pub(crate) json: bool,
    /// Print nothing but errors
    #[arg(long, short, global = true, conflicts_with = "json", help_heading = EVERY_VERB)]
    pub(crate) quiet: bool,
    /// Print more: `info` also lists device sections and the command line
    #[arg(long, short, global = true, help_heading = EVERY_VERB)]
    pub(crate) verbose: bool,
    /// How to show progress, on stderr; SIGUSR1 prints one line
    #[arg(
        long,
        global = true,
        value_name = "HOW",
        default_value = "auto",
        help_heading = EVERY_VERB
    )]
    pub(crate) progress: ProgressMode,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressMode {
    /// A bar on a terminal, nothing elsewhere
    Auto,
    /// A bar
    Bar,
    /// One JSON object a line
    Json,
    /// Nothing
    Off,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Save a running VM to a file
    ///
    /// The guest is paused, its memory written and made durable, and the file given its name; then
    /// QEMU quits, unless --after says otherwise. If anything fails the VM runs on as it did and
    /// there is no file. The disks are not in the file: keep them as they are, or use --with-disks.
    #[command(after_help = "Examples:
  vmfile save /run/vm.sock vm.vmf
  vmfile save web1 web1.vmf --after resume
  vmfile save web1 web1.vmf --live
  vmfile save web1 web1.vmf --live --with-disks
  vmfile save 4711 vm.vmf --json")]
    Save(SaveArguments),
    /// Start a QEMU from a file and let the guest run on
    ///
    /// Without a command line after --, the saved one is used. RAM is mapped from the file if
    /// possible (QEMU 8.2 and later), so that the guest runs within milliseconds; the file must
    /// then stay as it is while the VM lives.
    #[command(after_help = "Examples:
  vmfile restore vm.vmf
  vmfile restore vm.vmf -- qemu-system-x86_64 -m 4G -qmp unix:/run/two.sock,server=on,wait=off
  vmfile restore vm.vmf --qmp /run/waiting.sock")]
    Restore(RestoreArguments),
    /// Write a migration stream to a file
    ///
    /// Every page goes to its fixed place, and one that comes again overwrites it, so that the file
    /// is no longer than the VM's RAM. Any QEMU can send: over standard input, to a socket that
    /// this command makes, or on a descriptor. If anything fails there is no file, and the guest
    /// that was sent runs on.
    #[command(after_help = "Examples:
  migrate \"exec:vmfile receive /var/lib/vms/vm.vmf\"     in QEMU's monitor
  vmfile receive vm.vmf --listen unix:/run/vm.mig       and there: migrate unix:/run/vm.mig
  vmfile receive vm.vmf --listen unix:/run/vm.mig --channels 4
  vmfile receive vm.vmf < saved-by-qemu.mig")]
    Receive(ReceiveArguments),
    /// Send a file as a migration stream that any QEMU accepts
    ///
    /// The stream goes to standard output, to a socket on which QEMU listens, or into a descriptor.
    /// The report goes to stderr, except with --connect, which leaves stdout free for it. Only QEMU
    /// says whether it accepted the stream. A guest that ran when it was saved runs on at once if
    /// QEMU was not started with -S.
    #[command(after_help = "Examples:
  qemu-system-x86_64 -m 4G ... -incoming \"exec:vmfile send vm.vmf\"
  vmfile send vm.vmf --connect unix:/run/incoming.sock
  vmfile send vm.vmf --connect unix:/run/incoming.sock --channels 4
  vmfile send vm.vmf > vm.stream")]
    Send(SendArguments),
    /// Convert a file between fixed places and a stream
    ///
    /// `mapped-ram` is the format of this program and of QEMU 9.0 and later; `stream` is what
    /// `exec:cat` writes, which every QEMU reads. A mapped-ram file that QEMU wrote becomes a
    /// vmfile, which can be mapped and checked.
    #[command(after_help = "Examples:
  vmfile convert old.mig vm.vmf --to mapped-ram
  vmfile convert vm.vmf for-qemu-7.mig --to stream
  vmfile convert file:saved-by-qemu.img,offset=1M vm.vmf --to mapped-ram")]
    Convert(ConvertArguments),
    /// Say what is in a file, without reading a page
    #[command(after_help = "Examples:
  vmfile info vm.vmf
  vmfile info vm.vmf --verbose
  vmfile info file:saved-by-qemu.img,offset=1M --json")]
    Info(InfoArguments),
    /// Check a file: its structure, then every byte
    ///
    /// Lists what is damaged: which page of which RAM block, or which part of the file, and at
    /// which offset. The status is 1 if anything is damaged, and 4 if the damage hides where things
    /// lie. A file that QEMU wrote has no checksums: only its structure is checked.
    #[command(after_help = "Examples:
  vmfile check vm.vmf
  vmfile check vm.vmf --json")]
    Check(CheckArguments),
    /// Measure saves and restores side by side: vmfile, QEMU alone, virsh, and the disk's limit
    ///
    /// Guests are started, filled and paused for it, and each is saved and restored in every way
    /// that this host has, in turn, round by round. Each time ends when the file is durable. What
    /// cannot be measured is listed with the reason. Guests and files are removed in the end; they
    /// need as much memory as two guests of each size, and several times their data on the disk.
    #[command(after_help = "Examples:
  vmfile bench
  vmfile bench --size 1G,4G --ram private,shared --html bench.html
  vmfile bench --dir /mnt/fast --sweep --json > bench.json
  vmfile bench --vm test1")]
    Bench(BenchArguments),
    /// List the VMs that run on this host and how each could be saved
    #[command(after_help = "Examples:
  vmfile list
  vmfile list --json")]
    List,
}

/// Reads the name of a file to write. `-` means standard output elsewhere, and a saved VM cannot go there: its
/// pages have places.
fn new_file() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path.as_os_str() == "-" {
        true => {
            Err("a saved VM does not go into a pipe, `vmfile send` writes one there; ./- is a file")
        }
        false => Ok(path),
    })
}

#[derive(Debug, Args)]
pub(crate) struct SaveArguments {
    /// The VM: a QMP socket, a process id, or a name that `vmfile list` prints
    pub(crate) vm: String,
    /// The file to write, readable by its owner only
    #[arg(value_parser = new_file())]
    pub(crate) file: PathBuf,
    /// What becomes of the VM once the file is durable [default: quit; with --live: resume]
    #[arg(long, value_name = "WHAT")]
    pub(crate) after: Option<AfterMode>,
    /// Let the guest run while its memory is written; the file holds one moment
    #[arg(long)]
    pub(crate) live: bool,
    /// With --live: give up after so long, if the guest writes faster than it is saved
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "live", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) live_timeout: u64,
    /// With --live: how long the guest should stand still at most while memory is copied, or for the last
    /// part. A lower number makes vmfile take pre-copy sooner, which cannot have a --base
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 300, requires = "live")]
    pub(crate) max_pause: u64,
    /// Keep the disks of the saved moment: the guest then writes to overlays on top of them
    #[arg(long)]
    pub(crate) with_disks: bool,
    /// Store the secrets on QEMU's command line, such as passwords of disks; otherwise a restore needs them
    #[arg(long)]
    pub(crate) with_secrets: bool,
    /// Keep the pages of this file that have not changed; auto: the file that the VM was last saved to or
    /// restored from. The new file is whole on XFS and btrfs; elsewhere it is thin, and needs this one and all
    /// files below it, unchanged
    #[arg(long, value_name = "FILE")]
    pub(crate) base: Option<PathBuf>,
    /// With --base: a thin file, even if the file system shares pages
    #[arg(long, requires = "base")]
    pub(crate) thin: bool,
    /// End the VM even if it is not what its command line makes, or a block job ends with it
    #[arg(long)]
    pub(crate) changed_ok: bool,
    /// How RAM gets from the VM into the file
    #[arg(long, value_name = "ROUTE", default_value = "auto")]
    pub(crate) route: RouteMode,
    /// Threads of QEMU that send (route stream, 1 to 16) or write (native; 2 if not given); the
    /// route direct has none
    #[arg(long, value_name = "N", conflicts_with = "live", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) channels: Option<u8>,
    /// Replace an existing file
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
}

/// What becomes of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AfterMode {
    /// QEMU ends
    Quit,
    /// The guest runs on
    Resume,
    /// The guest stays paused
    Pause,
}

/// How RAM gets from the VM into the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RouteMode {
    /// `direct` if possible, else `stream`
    Auto,
    /// From the memory of QEMU's process
    Direct,
    /// From QEMU's migration stream: any QEMU, and only its monitor is needed
    Stream,
    /// By QEMU itself (9.1 and later): it writes the pages, vmfile the rest
    Native,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArguments {
    /// The file: PATH, file:PATH or file:PATH,offset=N
    pub(crate) file: String,
    /// How RAM gets from the file into QEMU
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub(crate) mode: RestoreMode,
    /// Restore into a QEMU that waits with -incoming defer, at this QMP socket
    #[arg(long, value_name = "SOCK", conflicts_with = "command")]
    pub(crate) qmp: Option<PathBuf>,
    /// Restore although disk images have changed since the save: the guest may corrupt them
    #[arg(long)]
    pub(crate) disks_changed_ok: bool,
    /// Compare mapped pages with their hashes before the guest runs; pages that are read always are
    #[arg(long)]
    pub(crate) verify: bool,
    /// Run the command line in the file, and the program that it names, although another user may have
    /// written it: one who owns a file or the program, or as whom the VM ran
    #[arg(long, conflicts_with_all = ["qmp", "command"])]
    pub(crate) trust_command: bool,
    /// Give QEMU's secret object ID the value in this file, in the format that the object has (raw if it says
    /// none; a line feed counts): a saved VM has no secrets of the command line, unless it was saved with them
    #[arg(long, value_name = "ID=FILE", value_parser = secret, conflicts_with_all = ["qmp", "command"])]
    pub(crate) secret: Vec<(String, PathBuf)>,
    /// Leave the guest paused
    #[arg(long)]
    pub(crate) paused: bool,
    /// Stay with QEMU and end with its status; SIGTERM is passed on to it
    #[arg(long, conflicts_with = "qmp")]
    pub(crate) foreground: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
    /// QEMU's command line; without it, the saved one
    #[arg(last = true, value_name = "QEMU")]
    pub(crate) command: Vec<String>,
}

/// How RAM gets from the file into QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RestoreMode {
    /// Mapped if possible, else loaded, else streamed
    Auto,
    /// Mapped from the file, copy-on-write
    Map,
    /// Read into the new process
    Load,
    /// Sent as QEMU's own stream, which any QEMU accepts
    Stream,
}

#[derive(Debug, Args)]
pub(crate) struct SendArguments {
    /// The file: PATH, file:PATH or file:PATH,offset=N
    pub(crate) file: String,
    /// Send to QEMU at this Unix socket, unix:PATH
    #[arg(long, value_name = "ADDRESS", conflicts_with = "fd")]
    pub(crate) connect: Option<String>,
    /// Send into this open descriptor
    #[arg(long, value_name = "N")]
    pub(crate) fd: Option<i32>,
    /// Multifd channels besides the stream, as many as QEMU was told, 1 to 16
    #[arg(long, value_name = "N", requires = "connect", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) channels: Option<u8>,
    /// Leave zero pages out: the destination's RAM is all zero, not a file that was used before
    #[arg(long)]
    pub(crate) assume_zeroed: bool,
    /// Whether pages go past the page cache
    #[arg(long, value_name = "WHEN", default_value = "preferred")]
    pub(crate) direct_io: DirectIoMode,
    /// Which I/O back end is used
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    pub(crate) io: IoMode,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArguments {
    /// The file to write, readable by its owner only
    #[arg(value_parser = new_file())]
    pub(crate) file: PathBuf,
    /// Receive from the QEMU that connects to this Unix socket, unix:PATH
    #[arg(long, value_name = "ADDRESS", conflicts_with = "fd")]
    pub(crate) listen: Option<String>,
    /// Receive from this open descriptor
    #[arg(long, value_name = "N")]
    pub(crate) fd: Option<i32>,
    /// Multifd channels besides the stream, as many as QEMU's multifd-channels, 1 to 16; 0: none
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        requires = "listen",
        value_parser = clap::value_parser!(u8).range(..=16)
    )]
    pub(crate) channels: u8,
    /// Replace an existing file
    #[arg(long)]
    pub(crate) force: bool,
    /// Store the secrets on the command line of a QEMU that sends; otherwise a restore needs them
    #[arg(long)]
    pub(crate) with_secrets: bool,
    /// Give up if the sender sends nothing for so long; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) stall_timeout: u64,
    /// Give up if the stream has not ended after so long
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
    /// Whether pages go past the page cache
    #[arg(long, value_name = "WHEN", default_value = "preferred")]
    pub(crate) direct_io: DirectIoMode,
    /// Which I/O back end is used
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    pub(crate) io: IoMode,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArguments {
    /// The file to read: PATH, file:PATH or file:PATH,offset=N
    pub(crate) source: String,
    /// The file to write, readable by its owner only
    #[arg(value_parser = new_file())]
    pub(crate) destination: PathBuf,
    /// What the new file is to be
    #[arg(long, value_name = "FORMAT")]
    pub(crate) to: FormatMode,
    /// Replace an existing file
    #[arg(long)]
    pub(crate) force: bool,
    /// Whether pages go past the page cache
    #[arg(long, value_name = "WHEN", default_value = "preferred")]
    pub(crate) direct_io: DirectIoMode,
    /// Which I/O back end is used
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    pub(crate) io: IoMode,
}

/// What a file is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatMode {
    /// Every page at a fixed place
    MappedRam,
    /// One thing after another
    Stream,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArguments {
    /// The file: PATH, file:PATH or file:PATH,offset=N
    pub(crate) file: String,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// The file: PATH, file:PATH or file:PATH,offset=N
    pub(crate) file: String,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
}

#[derive(Debug, Args)]
pub(crate) struct EngineArguments {
    /// Whether pages go past the page cache
    #[arg(long, value_name = "WHEN", default_value = "preferred")]
    pub(crate) direct_io: DirectIoMode,
    /// Which I/O back end is used
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    pub(crate) io: IoMode,
    /// Threads that work at once, 1 to 16 [default: one per processor, at most 4]
    #[arg(long, value_name = "N", value_parser = jobs)]
    pub(crate) jobs: Option<vmfile::Jobs>,
}

/// Whether pages go past the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DirectIoMode {
    /// Direct I/O or an error
    Required,
    /// Direct I/O if possible and if it helps
    Preferred,
    /// Through the page cache
    Off,
}

/// Which I/O back end is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum IoMode {
    /// io_uring if the kernel has it, else threads
    Auto,
    /// io_uring or an error
    IoUring,
    /// pread and pwrite in threads
    Threads,
}

fn jobs(text: &str) -> Result<vmfile::Jobs, String> {
    let range = format!("expected a number from 1 to {}", vmfile::Jobs::MAX);
    text.parse().ok().and_then(vmfile::Jobs::new).ok_or(range)
}

impl From<DirectIoMode> for vmfile::DirectIo {
    fn from(mode: DirectIoMode) -> vmfile::DirectIo {
        match mode {
            DirectIoMode::Required => vmfile::DirectIo::Required,
            DirectIoMode::Preferred => vmfile::DirectIo::Preferred,
            DirectIoMode::Off => vmfile::DirectIo::Off,
        }
    }
}

impl From<IoMode> for vmfile::Backend {
    fn from(mode: IoMode) -> vmfile::Backend {
        match mode {
            IoMode::Auto => vmfile::Backend::Auto,
            IoMode::IoUring => vmfile::Backend::IoUring,
            IoMode::Threads => vmfile::Backend::Threads,
        }
    }
}

impl EngineArguments {
    pub(crate) fn direct_io(&self) -> vmfile::DirectIo {
        self.direct_io.into()
    }

    pub(crate) fn io(&self) -> vmfile::Backend {
        self.io.into()
    }

    pub(crate) fn jobs(&self) -> vmfile::Jobs {
        self.jobs.unwrap_or_default()
    }
}

/// A file as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileName {
    pub(crate) path: PathBuf,
    pub(crate) offset: u64,
}

impl FileName {
    /// Parses `PATH`, `file:PATH` and `file:PATH,offset=N`, as QEMU writes them.
    pub(crate) fn parse(text: &str) -> Result<FileName, String> {
        let Some(rest) = text.strip_prefix("file:") else {
            return Ok(FileName { path: text.into(), offset: 0 });
        };
        let Some((path, offset)) = rest.split_once(",offset=") else {
            return Ok(FileName { path: rest.into(), offset: 0 });
        };
        let offset = size(offset)
            .ok_or_else(|| format!("offset {offset:?} is no size such as 4096, 0x1000 or 1M"))?;
        Ok(FileName { path: path.into(), offset })
    }
}

/// Parses `ID=FILE`.
fn secret(text: &str) -> Result<(String, PathBuf), String> {
    let (id, file) = text.split_once('=').ok_or("expected ID=FILE, for example s0=/root/s0.key")?;
    Ok((id.to_owned(), PathBuf::from(file)))
}

/// Parses a size as QEMU does: decimal or hexadecimal, with a suffix that counts in 1024.
fn size(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok();
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" | "b" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_file_is_named_as_qemu_names_it() {
        let name = |path: &str, offset| Ok(FileName { path: path.into(), offset });
        assert_eq!(FileName::parse("vm.vmf"), name("vm.vmf", 0));
        assert_eq!(FileName::parse("file:/a/b"), name("/a/b", 0));
        assert_eq!(FileName::parse("file:/a,offset=0x1000"), name("/a", 4096));
        assert_eq!(FileName::parse("file:/a,offset=5M"), name("/a", 5 << 20));
        assert!(FileName::parse("file:/a,offset=five").is_err());
        assert!(FileName::parse("file:/a,offset=").is_err());
        assert!(FileName::parse("file:/a,offset=99999999999T").is_err());
    }
}
