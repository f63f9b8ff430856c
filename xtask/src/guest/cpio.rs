//! Archives in the `newc` form of cpio, as the kernel reads an initramfs.
//!
//! An entry is a header of 13 hexadecimal fields, the name with its zero byte, and the contents;
//! name and contents are each padded to a multiple of four bytes. The entry `TRAILER!!!` ends it.
//! The kernel describes the form in `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::io;

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";
const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

/// An archive that grows entry by entry.
#[derive(Debug, Default)]
pub(crate) struct CpioWriter {
    bytes: Vec<u8>,
    entry_count: u32,
}

impl CpioWriter {
    /// Appends an empty directory. Its parents come before it.
    pub(crate) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    /// Appends a file that everybody may read and run.
    pub(crate) fn file(&mut self, name: &str, contents: &[u8]) -> io::Result<()> {
        self.entry(name, EXECUTABLE, contents)
    }

    /// Appends the trailer and returns the archive.
    pub(crate) fn finish(mut self) -> io::Result<Vec<u8>> {
        self.entry(TRAILER, 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        let too_large = || io::Error::other(format!("{name} is too large for a newc archive"));
        let file_size = u32::try_from(contents.len()).map_err(|_| too_large())?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| too_large())?;
        self.entry_count += 1;
        self.bytes.extend_from_slice(MAGIC.as_bytes());
        let (inode, owner, group, links, time) = (self.entry_count, 0, 0, 1, 0);
        let (device_major, device_minor, special_major, special_minor, checksum) = (0, 0, 0, 0, 0);
        for field in [
            inode,
            mode,
            owner,
            group,
            links,
            time,
            file_size,
            device_major,
            device_minor,
            special_major,
            special_minor,
            name_size,
            checksum,
        ] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back as names, modes and contents, the trailer left out.
    fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            let header = std::str::from_utf8(&bytes[at..at + 110]).unwrap();
            assert_eq!(&header[..6], MAGIC);
            let field = |index: usize| {
                u32::from_str_radix(&header[6 + 8 * index..14 + 8 * index], 16).unwrap()
            };
            let (mode, file_size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = &bytes[at + 110..at + 110 + name_size];
            assert_eq!(name.last(), Some(&0));
            let name = String::from_utf8(name[..name_size - 1].to_vec()).unwrap();
            let start = (at + 110 + name_size).next_multiple_of(4);
            at = (start + file_size).next_multiple_of(4);
            if name == TRAILER {
                assert_eq!(at, bytes.len());
                return entries;
            }
            entries.push((name, mode, bytes[start..start + file_size].to_vec()));
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        let mut archive = CpioWriter::default();
        archive.directory("modules").unwrap();
        for len in 0..9 {
            archive.file(&format!("modules/{}", "x".repeat(len)), &vec![7; len]).unwrap();
        }
        let entries = read(&archive.finish().unwrap());
        assert_eq!(entries.len(), 10);
        assert_eq!(entries[0], ("modules".to_owned(), DIRECTORY, vec![]));
        assert_eq!(entries[4], ("modules/xxx".to_owned(), EXECUTABLE, vec![7; 3]));
    }
}
