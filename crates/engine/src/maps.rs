//! `/proc/PID/maps`, parsed.
//!
//! ```text
//! 7f5c40000000-7f5c80000000 rw-s 00000000 00:01 1033      /memfd:ram (deleted)
//! range                     prot offset   dev   inode     name
//! ```
//!
//! See `proc_pid_maps(5)`, and `show_map_vma` in Linux's `fs/proc/task_mmu.c`.

use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

/// What a process may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// It may read it.
    pub read: bool,
    /// It may write it.
    pub write: bool,
    /// It may execute it.
    pub execute: bool,
}

/// The device that a file is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// The major number.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
}

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses in that process.
    pub range: Range<u64>,
    /// What the process may do with it.
    pub permissions: Permissions,
    /// Whether other processes see what is written to it (`MAP_SHARED`).
    pub shared: bool,
    /// Where in the file it starts, in bytes; 0 if it has no file.
    pub file_offset: u64,
    /// The device of its file.
    pub device: Device,
    /// The inode of its file; 0 if it has none.
    pub inode: u64,
    /// The file's path, or a name like `[heap]`, or nothing; a newline is written `\012`.
    pub name: OsString,
}

impl Mapping {
    /// Says whether the mapping is of a file; a memfd and shared anonymous memory are files too.
    #[must_use]
    pub fn has_file(&self) -> bool {
        self.inode != 0
    }
}

/// Parses the whole of `/proc/PID/maps`.
pub(crate) fn parse(bytes: &[u8]) -> io::Result<Vec<Mapping>> {
    bytes
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_line(line).ok_or_else(|| {
                let line = String::from_utf8_lossy(line);
                io::Error::new(io::ErrorKind::InvalidData, format!("no line of maps: {line:?}"))
            })
        })
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    let (range, rest) = field(line)?;
    let (permissions, rest) = field(rest)?;
    let (file_offset, rest) = field(rest)?;
    let (device, rest) = field(rest)?;
    let (inode, name) = field(rest)?;

    let (start, end) = range.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let &[read, write, execute, shared] = permissions.as_bytes() else { return None };
    let (major, minor) = device.split_once(':')?;
    let mapping = Mapping {
        range: start..end,
        permissions: Permissions {
            read: flag(read, b'r')?,
            write: flag(write, b'w')?,
            execute: flag(execute, b'x')?,
        },
        shared: match shared {
            b's' => true,
            b'p' => false,
            _ => return None,
        },
        file_offset: hex(file_offset)?,
        device: Device {
            major: u32::from_str_radix(major, 16).ok()?,
            minor: u32::from_str_radix(minor, 16).ok()?,
        },
        inode: inode.parse().ok()?,
        // The kernel pads with spaces up to the name; a name itself may hold any.
        name: OsStr::from_bytes(name.trim_ascii_start()).to_owned(),
    };
    (start < end).then_some(mapping)
}

/// Splits off everything up to the next space, and the space.
fn field(line: &[u8]) -> Option<(&str, &[u8])> {
    let end = line.iter().position(|&byte| byte == b' ').unwrap_or(line.len());
    let (field, rest) = line.split_at(end);
    if field.is_empty() {
        return None;
    }
    let rest = rest.strip_prefix(b" ").unwrap_or(rest);
    Some((std::str::from_utf8(field).ok()?, rest))
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

fn flag(found: u8, set: u8) -> Option<bool> {
    match found {
        b'-' => Some(false),
        found if found == set => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_shared_memfd_is_parsed_field_by_field() {
        let line = b"7f5c40000000-7f5c80000000 rw-s 40000000 00:01 1033                       \
            /memfd:the ram (deleted)\n";
        let mappings = parse(line).unwrap();
        assert_eq!(
            mappings,
            [Mapping {
                range: 0x7f5c_4000_0000..0x7f5c_8000_0000,
                permissions: Permissions { read: true, write: true, execute: false },
                shared: true,
                file_offset: 0x4000_0000,
                device: Device { major: 0, minor: 1 },
                inode: 1033,
                name: "/memfd:the ram (deleted)".into(),
            }]
        );
    }

    #[test]
    fn an_anonymous_mapping_has_no_file_and_no_name() {
        let mappings =
            parse(b"7f00-8000 ---p 00000000 00:00 0 \n8000-9000 rw-p 00000000 00:00 0\n");
        let mappings = mappings.unwrap();
        assert_eq!(mappings.len(), 2);
        assert!(mappings.iter().all(|mapping| !mapping.has_file() && mapping.name.is_empty()));
    }

    #[test]
    fn device_numbers_are_hexadecimal_and_the_inode_is_not() {
        let mappings = parse(b"1000-2000 r-xp 00000000 fd:1f 99999 /bin/x\n").unwrap();
        assert_eq!(mappings[0].device, Device { major: 0xfd, minor: 0x1f });
        assert_eq!(mappings[0].inode, 99_999);
    }

    #[test]
    fn the_last_page_of_the_address_space_is_no_trouble() {
        let mappings =
            parse(b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n").unwrap();
        assert_eq!(mappings[0].range.start, 0xffff_ffff_ff60_0000);
        assert_eq!(mappings[0].name, "[vsyscall]");
    }

    #[test]
    fn what_is_no_line_of_maps_is_refused() {
        for line in [
            "1000 rw-p 0 00:00 0",
            "2000-1000 rw-p 0 00:00 0",
            "1000-2000 rw- 0 00:00 0",
            "1000-2000 rwzp 0 00:00 0",
            "1000-2000 rw-p 0 0000 0",
            "1000-2000 rw-p 0 00:00 x",
            "1000-2000 rw-p 0 00:00",
        ] {
            let error = parse(line.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{line}");
        }
    }

    #[test]
    fn our_own_maps_are_parsed() {
        let mappings = parse(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        assert!(mappings.iter().any(|mapping| mapping.name == "[stack]"));
        assert!(mappings.is_sorted_by_key(|mapping| mapping.range.start));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
            println!("cases: 1 mutations");
        }
    }
}
