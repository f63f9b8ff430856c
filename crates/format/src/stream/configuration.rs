//! What stands before the first section: magic, version, machine type, capabilities.

use alloc::string::String;
use alloc::vec::Vec;

use super::{MAGIC, VERSION, section};
use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::{CAPABILITIES_MAX, MACHINE_NAME_LEN_MAX};

const CAPABILITIES: &str = "configuration/capabilities";
const PAGE_BITS: &str = "configuration/target-page-bits";
const UUID: &str = "configuration/uuid";

/// The capability that says: RAM lies at fixed offsets.
pub const MAPPED_RAM: &str = "mapped-ram";

/// The prefix of a capability's name that stands for a feature of vmfile.
///
/// A file that QEMU must not load as if it were complete has a capability of this prefix and the
/// feature's name. QEMU (4.0 to 11.1) refuses a capability that it does not know by its name,
/// before it loads a page.
pub const FEATURE_PREFIX: &str = "vmfile-";

/// The stream's header and configuration section.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// The versioned machine type, such as `pc-i440fx-10.0`.
    pub machine: String,
    /// The capabilities that the destination must have on as well: QEMU validates two,
    /// `mapped-ram` and `x-ignore-shared`.
    pub capabilities: Vec<String>,
    /// Log2 of the target page size, where it is above the target's minimum. Absent on x86.
    pub page_bits: Option<u32>,
    /// The VM's uuid, where the capability `validate-uuid` was on.
    pub uuid: Option<[u8; 16]>,
}

impl Configuration {
    /// Decodes header and configuration.
    pub(crate) fn decode(cursor: &mut Cursor<'_>) -> Result<Configuration, FormatError> {
        let offset = cursor.offset();
        let magic = cursor.be32("stream magic")?;
        if magic != MAGIC {
            let kind = FormatErrorKind::NotAStream { found: magic };
            return Err(FormatError::new(offset, kind));
        }
        cursor.expect_be32("stream version", VERSION)?;
        cursor.expect_u8("configuration section", section::CONFIGURATION)?;
        let offset = cursor.offset();
        let len = cursor.be32("length of the machine type")?;
        if len > MACHINE_NAME_LEN_MAX {
            let kind = FormatErrorKind::TooLarge {
                field: "length of the machine type",
                found: len.into(),
                max: MACHINE_NAME_LEN_MAX.into(),
            };
            return Err(FormatError::new(offset, kind));
        }
        let len = usize::try_from(len).expect("at most MACHINE_NAME_LEN_MAX");
        let machine = cursor.text("machine type", len)?;
        let mut configuration = Configuration { machine, ..Configuration::default() };
        while cursor.peek() == Some(section::SUBSECTION) {
            configuration.decode_subsection(cursor)?;
        }
        Ok(configuration)
    }

    fn decode_subsection(&mut self, cursor: &mut Cursor<'_>) -> Result<(), FormatError> {
        cursor.expect_u8("subsection", section::SUBSECTION)?;
        let offset = cursor.offset();
        let name = cursor.counted_text("name of a configuration subsection")?;
        cursor.expect_be32("version of a configuration subsection", 1)?;
        match name.as_str() {
            CAPABILITIES => {
                let offset = cursor.offset();
                let count = cursor.be32("number of capabilities")?;
                if count > CAPABILITIES_MAX {
                    let kind = FormatErrorKind::TooLarge {
                        field: "number of capabilities",
                        found: count.into(),
                        max: CAPABILITIES_MAX.into(),
                    };
                    return Err(FormatError::new(offset, kind));
                }
                for _ in 0..count {
                    self.capabilities.push(cursor.counted_text("capability")?);
                }
            }
            PAGE_BITS => self.page_bits = Some(cursor.be32("target page bits")?),
            UUID => {
                let bytes = cursor.bytes("uuid", 16)?;
                self.uuid = bytes.try_into().ok();
            }
            _ => {
                let what = "configuration subsection";
                return Err(FormatError::new(offset, FormatErrorKind::Unsupported { what, name }));
            }
        }
        Ok(())
    }

    /// Encodes header and configuration as QEMU writes them.
    ///
    /// # Panics
    ///
    /// Panics if a name is longer than its length field allows; names of this type come from QEMU
    /// or from a file that was decoded.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&MAGIC.to_be_bytes());
        bytes.extend_from_slice(&VERSION.to_be_bytes());
        bytes.push(section::CONFIGURATION);
        let len = u32::try_from(self.machine.len()).expect("a machine type is short");
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(self.machine.as_bytes());
        if let Some(bits) = self.page_bits {
            subsection(&mut bytes, PAGE_BITS);
            bytes.extend_from_slice(&bits.to_be_bytes());
        }
        if !self.capabilities.is_empty() {
            subsection(&mut bytes, CAPABILITIES);
            let count = u32::try_from(self.capabilities.len()).expect("few capabilities");
            bytes.extend_from_slice(&count.to_be_bytes());
            for name in &self.capabilities {
                super::encoder::counted_text(&mut bytes, name);
            }
        }
        if let Some(uuid) = self.uuid {
            subsection(&mut bytes, UUID);
            bytes.extend_from_slice(&uuid);
        }
        bytes
    }
}

fn subsection(bytes: &mut Vec<u8>, name: &str) {
    bytes.push(section::SUBSECTION);
    super::encoder::counted_text(bytes, name);
    bytes.extend_from_slice(&1_u32.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use std::string::ToString;
    use std::vec;

    use super::*;

    /// The first 0x4a bytes of a mapped-ram file that QEMU 10.0.2 wrote.
    const GOLDEN: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram";

    #[test]
    fn decodes_and_encodes_what_qemu_writes() {
        let configuration = Configuration::decode(&mut Cursor::new(GOLDEN, 0)).unwrap();
        assert_eq!(configuration.machine, "pc-i440fx-10.0");
        assert_eq!(configuration.capabilities, [MAPPED_RAM]);
        assert_eq!(configuration.encode(), GOLDEN);
    }

    #[test]
    fn every_part_survives_its_encoding() {
        let configuration = Configuration {
            machine: "virt-10.0".to_string(),
            capabilities: vec!["mapped-ram".to_string(), "x-ignore-shared".to_string()],
            page_bits: Some(12),
            uuid: Some([7; 16]),
        };
        let bytes = configuration.encode();
        assert_eq!(Configuration::decode(&mut Cursor::new(&bytes, 0)), Ok(configuration));
    }

    #[test]
    fn a_cut_configuration_is_refused_wherever_it_is_cut() {
        // Cut before the subsection it is whole; anywhere else a field ends early.
        for len in (0..GOLDEN.len()).filter(|&len| len != 0x1b) {
            let error = Configuration::decode(&mut Cursor::new(&GOLDEN[..len], 0)).unwrap_err();
            assert!(matches!(error.kind, FormatErrorKind::Ends { .. }), "{len}: {error}");
        }
    }

    #[test]
    fn an_elf_file_is_not_a_stream() {
        let error = Configuration::decode(&mut Cursor::new(b"\x7fELF....", 0x1000)).unwrap_err();
        let text =
            "at offset 0x1000: not a QEMU migration stream: begins with 0x7f454c46, not \"QEVM\"";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn an_unknown_subsection_is_refused_by_name() {
        let mut bytes = GOLDEN[..0x1b].to_vec();
        bytes.extend_from_slice(b"\x05\x03new\0\0\0\x01");
        let error = Configuration::decode(&mut Cursor::new(&bytes, 0)).unwrap_err();
        let text = "at offset 0x1c: configuration subsection \"new\" is not supported";
        assert_eq!(error.to_string(), text);
    }
}
