//! Why a command line cannot be used.

use std::io;
use std::path::PathBuf;

/// A command line cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandLineError {
    /// An argument is not UTF-8.
    #[error("argument {index} is not UTF-8")]
    NotText {
        /// Which, counted from 1.
        index: usize,
    },
    /// The last option takes a value and has none.
    #[error("option {option} has no value")]
    MissingValue {
        /// The option as written.
        option: String,
    },
    /// A word stands where an option that takes a value is expected.
    #[error("{word:?} is added as an option with a value, and is none")]
    NotAnOption {
        /// The word.
        word: String,
    },
    /// A `-device` is to be changed that is not there.
    #[error("-device number {number}, counted from 0, is to be changed, and there are {count}")]
    NoSuchDevice {
        /// Which one.
        number: usize,
        /// How many there are.
        count: usize,
    },
    /// A property is to be added whose name cannot be one.
    #[error("{key:?} is added as a property of a device, and cannot be the name of one")]
    NotAKey {
        /// The name.
        key: String,
    },
    /// An option's value cannot be parsed.
    #[error("the value of {option} is not JSON")]
    NotJson {
        /// The option as written.
        option: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// A RAM block is to be mapped that no option defines, e.g. a DIMM that was plugged in later.
    #[error("RAM block {block:?} is defined by no option of the command line")]
    NotDefined {
        /// The block.
        block: String,
    },
    /// A RAM block is to be mapped that belongs to a device whose memory is more than its bytes.
    #[error("RAM block {block:?} cannot be mapped: it belongs to a {device} device")]
    NotMappable {
        /// The block.
        block: String,
        /// The device's model.
        device: String,
    },
    /// A RAM block has another size on the command line.
    #[error("RAM block {block:?} has {found} bytes in the file, {expected} on the command line")]
    SizeDiffers {
        /// The block.
        block: String,
        /// Bytes in the file.
        found: u64,
        /// Bytes on the command line.
        expected: u64,
    },
    /// The path of a file that is to be mapped is not UTF-8.
    #[error("the path of RAM block {block:?} is not UTF-8")]
    PathNotText {
        /// The block.
        block: String,
    },
    /// A disk image cannot be replaced.
    #[error("no image can take the place of that of {option}: {what}")]
    ImageInPlace {
        /// The option as written.
        option: String,
        /// Why.
        what: &'static str,
    },
    /// The path of an image that is to take the place of another is not UTF-8.
    #[error("the path of a disk image is not UTF-8")]
    ImageNotText,
    /// A configuration file cannot be read.
    #[error("read {path}, which -readconfig names", path = path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A line of a configuration file cannot be parsed.
    #[error("line {line} of {path}: {what}", path = path.display())]
    ConfigLine {
        /// The file.
        path: PathBuf,
        /// Which line, counted from 1.
        line: usize,
        /// What is wrong with it, without its value.
        what: String,
    },
    /// The sockets in use could not be listed.
    #[error("list the listening sockets")]
    Sockets {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl CommandLineError {
    /// Returns what the user could try, if vmfile knows it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            CommandLineError::NotDefined { .. } => {
                Some("give a command line that defines it, after --")
            }
            CommandLineError::NotMappable { .. } => Some("restore with --mode load"),
            CommandLineError::SizeDiffers { .. } => {
                Some("give the VM the RAM that it had when it was saved")
            }
            _ => None,
        }
    }
}
