//! Formats of disk images by QEMU's names, and by the first bytes of their files.

use std::fs::File;
use std::io::Read as _;

use crate::vm::ProcessInfo;

/// Drivers of files of this host. QEMU reports one of them as the format of an image that has no
/// node of a format.
pub(crate) const FILE_DRIVERS: [&str; 3] = ["file", "host_device", "host_cdrom"];

/// The first bytes of files in qcow2, VMDK (two), QED, LUKS, VHDX and VPC.
const MAGIC_NUMBERS: [&[u8]; 7] =
    [b"QFI\xfb", b"KDMV", b"COWD", b"QED\0", b"LUKS\xba\xbe", b"vhdxfile", b"conectix"];

/// Returns the format for a node over a file: the driver of a file means its bytes as they are.
pub(crate) fn raw_of(format: &str) -> &str {
    if FILE_DRIVERS.contains(&format) { "raw" } else { format }
}

/// Tells whether two names mean the same format.
#[must_use]
pub fn is_same_format(a: &str, b: &str) -> bool {
    raw_of(a) == raw_of(b)
}

/// Tells whether QEMU gives an image `format` if its command line says `on_line`. If that says
/// none, QEMU (7.2 to 11.1) looks at the first bytes and takes what it does not know for `raw`.
/// `find` returns the image as [`ProcessInfo::find`] does; `None` if there is none.
#[must_use]
pub fn gives_format(
    on_line: Option<&str>,
    format: &str,
    find: impl FnOnce() -> Option<File>,
) -> bool {
    match on_line {
        Some(on_line) => is_same_format(on_line, format),
        None => raw_of(format) != "raw" || !find().is_some_and(|file| has_magic_number(&file)),
    }
}

fn has_magic_number(found: &File) -> bool {
    let mut head = [0; 8];
    let read = ProcessInfo::open_found(found).and_then(|mut file| file.read(&mut head));
    read.is_ok() && MAGIC_NUMBERS.iter().any(|magic| head.starts_with(magic))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn file(bytes: &[u8]) -> Option<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Some(file)
    }

    #[test]
    fn a_format_on_the_line_is_compared_by_its_meaning() {
        for (on_line, format, expected) in [
            ("raw", "raw", true),
            ("file", "raw", true),
            ("raw", "host_device", true),
            ("qcow2", "raw", false),
            ("raw", "qcow2", false),
        ] {
            let given = gives_format(Some(on_line), format, || None);
            assert_eq!(given, expected, "{on_line} {format}");
        }
    }

    #[test]
    fn without_a_format_the_first_bytes_tell() {
        assert!(gives_format(None, "raw", || file(b"words")));
        assert!(!gives_format(None, "raw", || file(b"QFI\xfb\0\0\0\x03")));
        assert!(gives_format(None, "qcow2", || file(b"QFI\xfb\0\0\0\x03")));
    }
}
