//! QEMU's own description of the device sections: JSON that names every field with its length.
//!
//! ```text
//! {"devices":[{"name":..., "instance_id":..., "version":..., "vmsd_name":...,
//!     "fields":[{"size":..., "array_len":...}, ...],
//!     "subsections":[{"vmsd_name":..., "fields":..., "subsections":...}, ...]}, ...], ...}
//! ```
//!
//! A payload is as long as its fields and subsections together. The size of a field includes nested
//! structures and their subsections.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};

use crate::error::FormatErrorKind;
use crate::limits::{DEVICE_SECTIONS_MAX, VM_DESCRIPTION_LEN_MAX};

/// What the VM description says of the device sections, in the order of the stream.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct VmDescription {
    /// The devices; at most [`DEVICE_SECTIONS_MAX`].
    #[serde(deserialize_with = "devices")]
    pub devices: Vec<DescribedDevice>,
}

/// What the VM description says of one device section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedDevice {
    /// The device's name, as in its section.
    pub name: String,
    /// Tells devices of one name apart.
    pub instance: u32,
    /// What QEMU calls the form of the payload. Absent for a few old devices.
    pub vmsd_name: Option<String>,
    /// The version of that form.
    pub version: u32,
    /// Length of the payload, in bytes.
    pub payload_len: u64,
}

impl VmDescription {
    /// Decodes the JSON that follows EOF.
    ///
    /// # Errors
    ///
    /// Returns [`FormatErrorKind`] if it is longer than its limit, is not the JSON that QEMU
    /// writes, or lengths do not fit into 64 bits.
    pub fn decode(json: &[u8]) -> Result<VmDescription, FormatErrorKind> {
        let found = json.len() as u64;
        if found > VM_DESCRIPTION_LEN_MAX {
            let (field, max) = ("length of the VM description", VM_DESCRIPTION_LEN_MAX);
            return Err(FormatErrorKind::TooLarge { field, found, max });
        }
        serde_json::from_slice(json)
            .map_err(|error| FormatErrorKind::BadDescription { message: error.to_string() })
    }
}

#[derive(Deserialize)]
struct Device {
    name: String,
    instance_id: u32,
    vmsd_name: Option<String>,
    version: u32,
    fields: FieldsLen,
    #[serde(default)]
    subsections: SubsectionsLen,
}

#[derive(Deserialize)]
struct Field {
    size: u64,
    array_len: Option<u64>,
}

#[derive(Deserialize)]
struct Subsection {
    vmsd_name: String,
    fields: FieldsLen,
    #[serde(default)]
    subsections: SubsectionsLen,
}

/// Length of all fields of a list, none of which is kept: a short JSON may have many.
#[derive(Default)]
struct FieldsLen(u64);

/// Length of all subsections of a list.
#[derive(Default)]
struct SubsectionsLen(u64);

impl Field {
    fn len(&self) -> Option<u64> {
        self.size.checked_mul(self.array_len.unwrap_or(1))
    }
}

impl Subsection {
    fn len(&self) -> Option<u64> {
        // 05, a counted text, be32 version.
        let header = (self.vmsd_name.len() as u64).checked_add(6)?;
        header.checked_add(self.fields.0)?.checked_add(self.subsections.0)
    }
}

impl<'de> Deserialize<'de> for FieldsLen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FieldsLen, D::Error> {
        fold(deserializer, 0, |sum: u64, field: Field| sum.checked_add(field.len()?)).map(FieldsLen)
    }
}

impl<'de> Deserialize<'de> for SubsectionsLen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SubsectionsLen, D::Error> {
        fold(deserializer, 0, |sum: u64, subsection: Subsection| sum.checked_add(subsection.len()?))
            .map(SubsectionsLen)
    }
}

fn devices<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DescribedDevice>, D::Error> {
    fold(deserializer, Vec::new(), |mut devices: Vec<DescribedDevice>, device: Device| {
        let Device { name, instance_id: instance, vmsd_name, version, fields, subsections } =
            device;
        let payload_len = fields.0.checked_add(subsections.0)?;
        devices.push(DescribedDevice { name, instance, vmsd_name, version, payload_len });
        (devices.len() <= DEVICE_SECTIONS_MAX).then_some(devices)
    })
}

/// Folds a list without keeping its elements; `add` returns `None` if a limit is exceeded.
fn fold<'de, D: Deserializer<'de>, E: Deserialize<'de>, T>(
    deserializer: D,
    start: T,
    add: impl Fn(T, E) -> Option<T>,
) -> Result<T, D::Error> {
    struct Folder<T, F, E>(T, F, core::marker::PhantomData<E>);

    impl<'de, T, F: Fn(T, E) -> Option<T>, E: Deserialize<'de>> Visitor<'de> for Folder<T, F, E> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<T, A::Error> {
            let Folder(mut value, add, _) = self;
            while let Some(element) = list.next_element()? {
                value =
                    add(value, element).ok_or_else(|| A::Error::custom("more than its limit"))?;
            }
            Ok(value)
        }
    }

    deserializer.deserialize_seq(Folder(start, add, core::marker::PhantomData))
}

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    fn payload_len(device: &str) -> Result<u64, FormatErrorKind> {
        let json = format!(
            "{{\"page_size\":4096,\"devices\":[{{\"name\":\"a\",\"instance_id\":0,\
             \"vmsd_name\":\"v\",\"version\":1,{device}}}]}}"
        );
        VmDescription::decode(json.as_bytes()).map(|found| found.devices[0].payload_len)
    }

    #[test]
    fn a_payload_is_its_fields_and_its_subsections() {
        assert_eq!(payload_len(r#""fields":[{"name":"x","type":"uint32","size":4}]"#), Ok(4));
        assert_eq!(payload_len(r#""fields":[{"size":4,"array_len":3},{"size":2}]"#), Ok(14));
        let nested = r#""fields":[{"size":9,"struct":{"fields":[{"size":4}],"subsections":
            [{"vmsd_name":"x","fields":[]}]}}]"#;
        assert_eq!(payload_len(nested), Ok(9));
        let subsections = r#""fields":[{"size":1}],"subsections":[
            {"vmsd_name":"v/one","version":1,"fields":[{"size":2}],
             "subsections":[{"vmsd_name":"v/one/two","version":1,"fields":[{"size":8}]}]}]"#;
        assert_eq!(payload_len(subsections), Ok(1 + 6 + 5 + 2 + 6 + 9 + 8));
    }

    #[test]
    fn lengths_past_64_bits_are_refused() {
        let error = payload_len(r#""fields":[{"size":4294967296,"array_len":4294967296}]"#);
        let text = "the VM description is not readable: more than its limit at line 1 column 138";
        assert_eq!(error.unwrap_err().to_string(), text);
        assert!(payload_len(r#""fields":[{"size":18446744073709551615},{"size":1}]"#).is_err());
        assert!(payload_len(r#""fields":[{"name":"x"}]"#).is_err());
    }

    #[test]
    fn deep_lists_end_the_reading() {
        let open = r#"{"vmsd_name":"v","fields":[],"subsections":["#.repeat(10_000);
        assert!(payload_len(&format!("\"fields\":[],\"subsections\":[{open}")).is_err());
        let json = "[".repeat(10_000);
        assert!(VmDescription::decode(json.as_bytes()).is_err());
    }

    #[test]
    fn too_many_devices_are_refused() {
        let device = r#"{"name":"a","instance_id":0,"version":1,"fields":[]}"#;
        let of = |count: usize| {
            let devices = std::vec![device; count].join(",");
            VmDescription::decode(format!("{{\"devices\":[{devices}]}}").as_bytes())
        };
        assert_eq!(of(DEVICE_SECTIONS_MAX).unwrap().devices.len(), DEVICE_SECTIONS_MAX);
        assert!(of(DEVICE_SECTIONS_MAX + 1).is_err());
    }

    #[test]
    fn a_description_is_as_long_as_its_limit() {
        let mut json = br#"{"devices":[]}"#.to_vec();
        json.resize(usize::try_from(VM_DESCRIPTION_LEN_MAX).unwrap(), b' ');
        assert_eq!(VmDescription::decode(&json), Ok(VmDescription { devices: Vec::new() }));
        json.push(b' ');
        let text = "length of the VM description is 16777217, at most 16777216 is accepted";
        assert_eq!(VmDescription::decode(&json).unwrap_err().to_string(), text);
    }

    #[test]
    fn what_is_no_list_is_refused_as_such() {
        let error = VmDescription::decode(br#"{"devices":1}"#).unwrap_err().to_string();
        assert!(error.contains("expected a list"), "{error}");
    }
}
