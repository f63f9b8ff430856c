//! Why bytes are not valid, and where.

use alloc::string::String;
use core::error::Error;
use core::fmt;

/// Bytes that are not valid.
///
/// `offset` is the file offset of the field at fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    /// File offset of the field at fault, in bytes.
    pub offset: u64,
    /// What is wrong with it.
    pub kind: FormatErrorKind,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatErrorKind {
    /// The file does not begin as a QEMU migration stream.
    NotAStream {
        /// The first four bytes.
        found: u32,
    },
    /// The bytes end before the field does.
    Ends {
        /// The field.
        field: &'static str,
        /// Bytes that the field needs.
        needed: u64,
        /// Bytes that are left.
        found: u64,
    },
    /// A field has another value than the only one it may have.
    Differs {
        /// The field.
        field: &'static str,
        /// The value in the file.
        found: u64,
        /// The value it must have.
        expected: u64,
    },
    /// A field is above its limit.
    TooLarge {
        /// The field.
        field: &'static str,
        /// The value in the file.
        found: u64,
        /// The largest value accepted.
        max: u64,
    },
    /// A field is not a multiple of its alignment.
    Misaligned {
        /// The field.
        field: &'static str,
        /// The value in the file.
        found: u64,
        /// The alignment.
        alignment: u64,
    },
    /// A page size that is zero, no power of two, or out of range.
    BadPageSize {
        /// The value in the file.
        found: u64,
    },
    /// A text that is not UTF-8.
    NotText {
        /// The field.
        field: &'static str,
    },
    /// Two RAM blocks have one name.
    RepeatedBlock {
        /// The name.
        name: String,
    },
    /// A page of a RAM block that the block list does not have.
    UnknownBlock {
        /// The block's name.
        name: String,
    },
    /// The lengths of the RAM blocks do not add up to the total.
    WrongTotal {
        /// The sum of the lengths.
        found: u64,
        /// The total in the file.
        expected: u64,
    },
    /// A part of the file overlaps another or lies outside the file.
    Outside {
        /// The part.
        field: &'static str,
        /// Its end, exclusive.
        end: u64,
        /// Where it must have ended.
        limit: u64,
    },
    /// Something that is valid for QEMU and that this crate does not support.
    Unsupported {
        /// The thing.
        what: &'static str,
        /// Its name or number in the file.
        name: String,
    },
    /// A footer of a newer version.
    NewerFooter {
        /// The version in the file.
        found: u32,
        /// The newest version that is read.
        max: u32,
    },
    /// An incompatible feature, of a version of vmfile that is newer than this crate.
    UnknownFeature {
        /// Its name.
        name: String,
    },
    /// The device sections cannot be followed from the first to the last.
    BrokenSections,
    /// The VM description is not JSON of the expected form.
    BadDescription {
        /// What the parser said.
        message: String,
    },
    /// A checksum does not match.
    Checksum {
        /// What the checksum covers.
        field: &'static str,
    },
    /// The manifest is not JSON of the expected form.
    BadManifest {
        /// What the parser said: it names fields and positions, not contents.
        message: String,
    },
}

impl FormatError {
    pub(crate) fn new(offset: u64, kind: FormatErrorKind) -> FormatError {
        FormatError { offset, kind }
    }

    /// Returns whether the only fault is that a newer version of vmfile wrote the file.
    #[must_use]
    pub fn is_of_newer_version(&self) -> bool {
        matches!(
            self.kind,
            FormatErrorKind::NewerFooter { .. } | FormatErrorKind::UnknownFeature { .. }
        )
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at offset {:#x}: {}", self.offset, self.kind)
    }
}

impl fmt::Display for FormatErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FormatErrorKind::NotAStream { found } => {
                write!(f, "not a QEMU migration stream: begins with {found:#010x}, not \"QEVM\"")
            }
            FormatErrorKind::Ends { field, needed, found } => {
                write!(f, "{field} needs {needed} bytes, {found} are left")
            }
            FormatErrorKind::Differs { field, found, expected } => {
                write!(f, "{field} is {found:#x}, expected {expected:#x}")
            }
            FormatErrorKind::TooLarge { field, found, max } => {
                write!(f, "{field} is {found}, at most {max} is accepted")
            }
            FormatErrorKind::Misaligned { field, found, alignment } => {
                write!(f, "{field} is {found:#x}, not a multiple of {alignment}")
            }
            FormatErrorKind::BadPageSize { found } => {
                write!(f, "page size {found} is not a power of two from 512 to 65536")
            }
            FormatErrorKind::NotText { field } => write!(f, "{field} is not UTF-8"),
            FormatErrorKind::RepeatedBlock { name } => {
                write!(f, "RAM block {name:?} occurs twice")
            }
            FormatErrorKind::UnknownBlock { name } => {
                write!(f, "RAM block {name:?} is not in the block list")
            }
            FormatErrorKind::WrongTotal { found, expected } => {
                write!(f, "RAM blocks add up to {found} bytes, expected {expected}")
            }
            FormatErrorKind::Outside { field, end, limit } => {
                write!(f, "{field} ends at {end:#x}, past {limit:#x}")
            }
            FormatErrorKind::Unsupported { what, name } => {
                write!(f, "{what} {name:?} is not supported")
            }
            FormatErrorKind::NewerFooter { found, max } => {
                write!(f, "the footer has version {found}, at most {max} is read")
            }
            FormatErrorKind::UnknownFeature { name } => {
                write!(f, "the file has the feature {name:?}, which is not known")
            }
            FormatErrorKind::BrokenSections => {
                f.write_str("the device sections do not follow one another to their end")
            }
            FormatErrorKind::BadDescription { message } => {
                write!(f, "the VM description is not readable: {message}")
            }
            FormatErrorKind::Checksum { field } => {
                write!(f, "the checksum of the {field} does not match")
            }
            FormatErrorKind::BadManifest { message } => {
                write!(f, "the manifest is not readable: {message}")
            }
        }
    }
}

impl Error for FormatError {}

impl Error for FormatErrorKind {}

/// Why something could not be read by a caller's function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadError<E> {
    /// The bytes were read, but are not valid.
    Format(FormatError),
    /// The caller's function failed.
    Source(E),
}

impl<E> From<FormatError> for ReadError<E> {
    fn from(error: FormatError) -> ReadError<E> {
        ReadError::Format(error)
    }
}
