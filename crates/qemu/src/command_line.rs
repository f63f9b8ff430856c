//! A QEMU command line, understood enough to start the VM again.
//!
//! Only QEMU's arguments say how it was started. They are kept word for word; only what must change
//! for a restore is parsed.

mod config_file;
mod devices;
mod drives;
mod error;
mod images;
mod incoming;
mod input_files;
mod keys;
mod lost;
mod outside;
mod secrets;
mod sockets;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub(crate) use devices::value_in_json;
pub use devices::{LineDevice, Pin};
pub use drives::{LineDrive, LineImage};
pub use error::CommandLineError;
pub use images::Medium;
use keys::Keys;
pub use outside::EmptiedFile;
pub(crate) use secrets::REDACTED;
pub use secrets::redact_image;

use crate::size::parse_size;

/// The id of the monitor that [`Launch`](crate::Launch) adds for vmfile.
pub(crate) const CONTROL_ID: &str = "vmfile-control";

/// A RAM block that lies in a file and shall be mapped from there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedBlock {
    /// QEMU's name of the block, e.g. `pc.ram`.
    pub block_name: String,
    /// Its length in bytes.
    pub size: u64,
    /// The file; `/proc/self/fd/N` for a descriptor that QEMU inherits.
    pub path: PathBuf,
    /// Where the block starts in the file, in bytes.
    pub offset: u64,
}

/// The arguments of a QEMU, without the program's own name.
///
/// They may hold secrets: `Debug` shows the options only.
#[derive(Clone, PartialEq, Eq)]
pub struct CommandLine {
    arguments: Vec<Argument>,
}

/// One option with its value, or a disk image without an option.
#[derive(Clone, PartialEq, Eq)]
struct Argument {
    /// The option as written, with its dashes; or the image.
    written: String,
    value: Option<String>,
}

/// The options that take no value, in QEMU up to 11.1 for any architecture, without dashes.
///
/// Everything else takes one. Removed options stay: an old QEMU's command line may be read.
const OPTIONS_WITHOUT_VALUE: [&str; 51] = [
    "S",
    "alt-grab",
    "async-teardown",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "localtime",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-kqemu",
    "no-kvm",
    "no-kvm-irqchip",
    "no-kvm-pit",
    "no-kvm-pit-reinjection",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "nouserconfig",
    "old-param",
    "only-migratable",
    "perfmap",
    "jitdump",
    "portrait",
    "preconfig",
    "rtc-td-hack",
    "s",
    "sdl",
    "semihosting",
    "show-cursor",
    "singlestep",
    "snapshot",
    "tdf",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-create",
    "xen-domid-restrict",
];

impl CommandLine {
    /// Reads arguments, without the program's own name.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::MissingValue`] when the last option takes a value and has none.
    pub fn new<I>(arguments: I) -> Result<CommandLine, CommandLineError>
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let mut words = arguments.into_iter().map(Into::into);
        let mut arguments = Vec::new();
        while let Some(written) = words.next() {
            let mut argument = Argument { written, value: None };
            if argument.takes_value() {
                let value = words.next();
                let option = || argument.written.clone();
                let value =
                    value.ok_or_else(|| CommandLineError::MissingValue { option: option() })?;
                argument.value = Some(value);
            }
            arguments.push(argument);
        }
        Ok(CommandLine { arguments })
    }

    /// Reads the arguments of a process, its own name first, as
    /// [`ProcessInfo`](crate::ProcessInfo) has them.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::NotText`] when one is not UTF-8; otherwise as for [`CommandLine::new`].
    pub fn from_process(arguments: &[OsString]) -> Result<CommandLine, CommandLineError> {
        let mut words = Vec::new();
        for (index, argument) in arguments.iter().enumerate().skip(1) {
            let word = argument.to_str().ok_or(CommandLineError::NotText { index: index + 1 })?;
            words.push(word.to_owned());
        }
        CommandLine::new(words)
    }

    /// Adds an option of this program's own and its value at the end, where QEMU lets the last one win.
    /// An option that was read from somewhere goes through [`CommandLine::add`].
    pub fn push(&mut self, option: &'static str, value: Option<&str>) {
        let argument = Argument { written: option.to_owned(), value: value.map(str::to_owned) };
        assert!(
            argument.takes_value() == argument.value.is_some(),
            "{option} is an option, with a value where it takes one"
        );
        self.arguments.push(argument);
    }

    /// Adds options that are read from somewhere, each followed by its value.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::NotAnOption`] and [`CommandLineError::MissingValue`]; then nothing was added.
    pub fn add(&mut self, words: &[String]) -> Result<(), CommandLineError> {
        self.arguments.extend(devices::pairs(words)?);
        Ok(())
    }

    /// Returns the arguments as the operating system takes them.
    #[must_use]
    pub fn to_arguments(&self) -> Vec<String> {
        let words = |argument: &Argument| {
            std::iter::once(argument.written.clone()).chain(argument.value.clone())
        };
        self.arguments.iter().flat_map(words).collect()
    }

    /// Returns the arguments quoted for a POSIX shell. They may hold secrets.
    #[must_use]
    pub fn to_shell(&self) -> String {
        let words: Vec<String> = self.to_arguments().iter().map(|word| quote(word)).collect();
        words.join(" ")
    }

    /// Returns the VM's name from `-name`.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        let value = self.values_of(&["name"]).last()?;
        Some(Keys::parse(value, "guest").get("guest")?.to_owned()).filter(|name| !name.is_empty())
    }

    /// Returns the length of the machine's RAM from `-m`, in bytes, where it says one: rounded up to
    /// 8 KiB, as QEMU does (7.2 to 11.1).
    #[must_use]
    pub fn memory_size(&self) -> Option<u64> {
        let value = self.values_of(&["m"]).last()?;
        let size = Keys::parse(value, "size").get("size")?.to_owned();
        // A bare number counts in MiB.
        let size = match size.parse::<u64>() {
            Ok(mebibytes) => mebibytes.checked_mul(1 << 20),
            // QEMU appends the M to a hexadecimal number too.
            Err(_) if size.ends_with(|last: char| last.is_ascii_hexdigit()) => None,
            Err(_) => parse_size(&size),
        };
        size?.checked_next_multiple_of(8192)
    }

    /// Returns the paths of the Unix sockets on which this QEMU serves QMP, as written.
    #[must_use]
    pub fn qmp_sockets(&self) -> Vec<PathBuf> {
        sockets::qmp_sockets(self)
    }

    /// Returns the numbers of the inherited listening sockets on which this QEMU serves QMP, as
    /// libvirt arranges it.
    #[must_use]
    pub fn qmp_descriptors(&self) -> Vec<u32> {
        sockets::qmp_descriptors(self)
    }

    /// Tells whether this QEMU has a monitor for libvirt alone, which [`CommandLine::qmp_sockets`]
    /// and [`CommandLine::qmp_descriptors`] leave out.
    #[must_use]
    pub fn has_libvirt_monitor(&self) -> bool {
        sockets::has_libvirt(self)
    }

    /// Returns those sockets of this command line that a process already listens on.
    ///
    /// A QEMU that was started with them would take the paths away from the VM that has them.
    /// `directory` is what relative paths refer to.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::Sockets`] when `/proc` cannot be read.
    pub fn sockets_in_use(&self, directory: &Path) -> Result<Vec<PathBuf>, CommandLineError> {
        sockets::in_use(self, directory)
    }

    /// Has QEMU start without waiting for a client at any of its sockets; returns the options that made it
    /// wait. The clients of the old VM are not those of the new one.
    pub fn stop_waiting(&mut self) -> Vec<String> {
        sockets::stop_waiting(self)
    }

    /// Has QEMU append to log files instead of emptying them at its start, where it can; returns the files
    /// that it empties all the same.
    pub fn keep_logs(&mut self) -> Vec<EmptiedFile> {
        outside::keep_logs(self)
    }

    /// Returns the options that use the terminal in which QEMU is started.
    #[must_use]
    pub fn on_terminal(&self) -> Vec<String> {
        outside::on_terminal(self)
    }

    /// Returns the properties of the machine's memory that are lost where the blocks `ram` are mapped
    /// from a file, by option and key.
    #[must_use]
    pub fn lost_by_mapping(&self, ram: &[MappedBlock]) -> Vec<String> {
        lost::lost_by_mapping(self, ram)
    }

    /// Returns the command line for a QEMU that waits for a stream, with the RAM blocks `ram`
    /// mapped from their files, copy on write.
    ///
    /// The other RAM blocks keep their options.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::NotDefined`] for a block that no option defines,
    /// [`CommandLineError::NotMappable`], and [`CommandLineError::SizeDiffers`].
    pub fn for_incoming(&self, ram: &[MappedBlock]) -> Result<CommandLine, CommandLineError> {
        incoming::for_incoming(self, ram)
    }

    /// Replaces configuration files (`-readconfig`) and `-set` by the options that they stand for.
    ///
    /// QEMU treats a group of a file not quite as the option of its name: it ignores some groups,
    /// and a `[netdev]`, `[nic]` or `[net]` does not switch its default network off, as the options
    /// do. That network is written out too: as `-net nic`, and as `-net user` if
    /// `has_user_network`, i.e. if QEMU was built with user networking.
    ///
    /// `read` gets the path as written and returns the file's text.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::ConfigFile`] and [`CommandLineError::ConfigLine`].
    pub fn expand_config(
        &mut self,
        has_user_network: bool,
        read: impl FnMut(&Path) -> io::Result<String>,
    ) -> Result<(), CommandLineError> {
        config_file::expand(self, has_user_network, read)
    }

    /// Returns the configuration files that it names, as written.
    #[must_use]
    pub fn config_files(&self) -> Vec<PathBuf> {
        input_files::config_files(self)
    }

    /// Returns the files other than images that QEMU reads at its start, as written, each with its
    /// option: the kernel and what comes with it, and the contents of `-fw_cfg`.
    ///
    /// Firmware and option ROMs are not among them: QEMU looks for those in its own directories
    /// too.
    #[must_use]
    pub fn input_files(&self) -> Vec<(String, PathBuf)> {
        input_files::input_files(self)
    }

    /// Returns the drives that this command line makes, with the images that it names for them.
    ///
    /// They do not include empty drives that a machine makes by itself, nor drives in a
    /// configuration file that was not expanded.
    #[must_use]
    pub fn drives(&self) -> Vec<LineDrive> {
        drives::drives(self)
    }

    /// Returns the devices that this command line makes, in the order in which QEMU makes them.
    #[must_use]
    pub fn devices(&self) -> Vec<LineDevice> {
        devices::devices(self)
    }

    /// Tells whether an option defines a drive, node, netdev, object or the like with this id.
    #[must_use]
    pub fn defines(&self, id: &str) -> bool {
        devices::defines(self, id)
    }

    /// Adds properties to devices.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::NotJson`], [`CommandLineError::NoSuchDevice`] and
    /// [`CommandLineError::NotAKey`].
    pub fn pin_devices(&mut self, pins: &[Pin]) -> Result<(), CommandLineError> {
        devices::pin(self, pins)
    }

    /// Leaves out the `-device` options of these numbers, counted from 0, and the back ends that
    /// nothing else uses.
    ///
    /// # Errors
    ///
    /// [`CommandLineError::NoSuchDevice`]; then nothing was left out.
    pub fn leave_out_devices(&mut self, numbers: &[usize]) -> Result<(), CommandLineError> {
        devices::leave_out(self, numbers)
    }

    /// Checks that a block of this name can be mapped from a file.
    ///
    /// # Errors
    ///
    /// As for [`CommandLine::for_incoming`].
    pub fn check_mappable(&self, block_name: &str) -> Result<(), CommandLineError> {
        incoming::check_mappable(self, block_name)
    }

    /// Tells whether another process shares the guest's RAM, as vhost-user back ends do.
    ///
    /// Such RAM must not be mapped copy on write: the other process would see other bytes.
    #[must_use]
    pub fn needs_shared_ram(&self) -> bool {
        let starts = |value: &str, key| {
            Keys::parse(value, key).get(key).is_some_and(|model| model.starts_with("vhost-user"))
        };
        self.values_of(&["device"]).any(|value| starts(value, "driver"))
            || self.values_of(&["netdev", "nic", "net"]).any(|value| starts(value, "type"))
    }

    /// Returns what in this command line depends on the process that used it, and is lost when that
    /// ends: one sentence each, without values.
    #[must_use]
    pub fn what_cannot_be_recreated(&self) -> Vec<String> {
        lost::what_cannot_be_recreated(self)
    }

    /// Replaces the secrets of the host by a mark: the values of secret objects, and passwords and the like
    /// for disks, SPICE and iSCSI. Returns where they were, by option and key.
    ///
    /// What the guest can read is no secret of the host: its memory holds it anyway.
    pub fn redact(&mut self) -> Vec<String> {
        secrets::redact(self)
    }

    /// Returns where [`CommandLine::redact`] has replaced secrets, by option and key.
    #[must_use]
    pub fn redacted(&self) -> Vec<String> {
        secrets::redacted(self)
    }

    /// Returns the secrets that [`CommandLine::redact`] would replace.
    #[must_use]
    pub fn secrets(&self) -> Vec<String> {
        secrets::secrets(self)
    }

    /// Has the secret object `id` read its value from a file; returns whether the command line has such an
    /// object.
    pub fn give_secret(&mut self, id: &str, file: &Path) -> bool {
        secrets::give(self, id, file)
    }

    /// Returns the values of the options of these names, in order.
    fn values_of<'a>(&'a self, names: &'a [&str]) -> impl Iterator<Item = &'a str> {
        self.arguments
            .iter()
            .filter(|argument| argument.name().is_some_and(|name| names.contains(&name)))
            .filter_map(|argument| argument.value.as_deref())
    }
}

impl fmt::Debug for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |argument: &Argument| argument.name().map(|name| format!("-{name}"));
        f.debug_list().entries(self.arguments.iter().filter_map(shown)).finish()
    }
}

impl Argument {
    /// Returns the option's name without its dashes; `None` for a bare disk image.
    ///
    /// QEMU takes one dash or two for every option.
    fn name(&self) -> Option<&str> {
        let name = self.written.strip_prefix('-')?;
        Some(name.strip_prefix('-').unwrap_or(name))
    }

    fn takes_value(&self) -> bool {
        self.name().is_some_and(|name| !OPTIONS_WITHOUT_VALUE.contains(&name))
    }
}

/// Reads a value as JSON; `None` if it is not written as JSON.
fn parse_json(option: &str, value: &str) -> Result<Option<Value>, CommandLineError> {
    if !value.trim_start().starts_with('{') {
        return Ok(None);
    }
    let not_json = |source| CommandLineError::NotJson { option: option.to_owned(), source };
    serde_json::from_str(value).map(Some).map_err(not_json)
}

/// Quotes a word for a POSIX shell where it needs it.
fn quote(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./=,:+@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Tells whether an argument is the name of a program that vmfile takes for QEMU.
pub(crate) fn is_program(argument: &OsStr) -> bool {
    Path::new(argument).file_name().is_some_and(crate::proc::is_qemu_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> CommandLine {
        CommandLine::new(words.iter().copied()).unwrap()
    }

    #[test]
    fn words_come_back_as_they_were() {
        let words = [
            "disk.img",
            "--nodefaults",
            "-m",
            "64M",
            "-S",
            "-append",
            "",
            "-name",
            "a,,b",
            "-drive",
            "file=x y.img",
        ];
        assert_eq!(parse(&words).to_arguments(), words);
    }

    #[test]
    fn a_value_that_looks_like_an_option_stays_a_value() {
        let line = parse(&["-append", "-S", "-m", "64M"]);
        assert_eq!(line.arguments.len(), 2);
    }

    #[test]
    fn an_option_without_its_value_is_refused_by_name() {
        let error = CommandLine::new(["-S", "-qmp"]).unwrap_err();
        assert_eq!(error.to_string(), "option -qmp has no value");
    }

    #[test]
    fn a_process_without_text_is_refused_by_position() {
        use std::os::unix::ffi::OsStringExt;
        let bad = OsString::from_vec(vec![0xff]);
        let error = CommandLine::from_process(&["qemu".into(), "-S".into(), bad]).unwrap_err();
        assert_eq!(error.to_string(), "argument 3 is not UTF-8");
    }

    #[test]
    fn the_name_is_read_in_both_forms_and_the_last_one_counts() {
        assert_eq!(parse(&["-name", "db1"]).name().as_deref(), Some("db1"));
        assert_eq!(parse(&["-name", "a,,b"]).name().as_deref(), Some("a,b"));
        let line = parse(&["-name", "old", "-name", "guest=db2,debug-threads=on"]);
        assert_eq!(line.name().as_deref(), Some("db2"));
        assert_eq!(parse(&["-S"]).name(), None);
    }

    #[test]
    fn the_size_of_the_machine_s_ram_is_read_in_every_form() {
        for (value, expected) in [
            ("64", Some(64 << 20)),
            ("64M", Some(64 << 20)),
            ("size=4G,slots=2,maxmem=8G", Some(4 << 30)),
            ("0.5G", None),
            ("0x40", None),
        ] {
            assert_eq!(parse(&["-m", value]).memory_size(), expected, "{value}");
        }
        assert_eq!(parse(&["-S"]).memory_size(), None);
    }

    #[test]
    fn debug_shows_no_value() {
        let line = parse(&["-object", "secret,id=s0,data=hunter2", "-S"]);
        assert_eq!(format!("{line:?}"), r#"["-object", "-S"]"#);
    }

    #[test]
    fn shell_words_are_quoted_where_they_must_be() {
        let line = parse(&["-append", "root=/dev/vda it's", "-m", "64M", "-name", ""]);
        assert_eq!(line.to_shell(), r"-append 'root=/dev/vda it'\''s' -m 64M -name ''");
    }

    #[test]
    fn vhost_user_needs_shared_ram() {
        for words in [
            ["-netdev", "vhost-user,id=n0,chardev=c0"],
            ["-device", "vhost-user-fs-pci,tag=x,chardev=c0"],
            ["-device", r#"{"driver":"vhost-user-blk-pci","chardev":"c0"}"#],
        ] {
            assert!(parse(&words).needs_shared_ram(), "{words:?}");
        }
        assert!(!parse(&["-netdev", "user,id=vhost-user"]).needs_shared_ram());
    }
}
