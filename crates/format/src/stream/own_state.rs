//! Device state of a VMM that is not QEMU: sections of its own, in QEMU's format.
//!
//! A payload has no length in the stream (see [`device_state`](super::device_state)), so a
//! description with all lengths follows, as in QEMU's streams.

use alloc::vec::Vec;

use serde_json::json;

use super::{encoder, section};

/// Device sections and what follows them, as a file holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnState {
    /// The sections, to EOF.
    pub sections: Vec<u8>,
    /// The description.
    pub description: Vec<u8>,
    /// An id that no section has: the section "ram" gets it.
    pub unused_id: u32,
}

impl OwnState {
    /// Makes a section for each of `parts`: a name of 255 bytes at most, and a payload of any kind.
    /// There is at least one part.
    #[must_use]
    pub fn new(parts: &[(&str, &[u8])]) -> OwnState {
        let (mut sections, mut devices) = (Vec::new(), Vec::new());
        let mut unused_id = 0;
        for ((name, payload), id) in parts.iter().zip(0_u32..) {
            let (instance, version) = (0_u32, 1_u32);
            sections.push(section::FULL);
            sections.extend_from_slice(&id.to_be_bytes());
            encoder::counted_text(&mut sections, name);
            sections.extend_from_slice(&instance.to_be_bytes());
            sections.extend_from_slice(&version.to_be_bytes());
            sections.extend_from_slice(payload);
            sections.push(section::FOOTER);
            sections.extend_from_slice(&id.to_be_bytes());
            devices.push(json!({
                "name": name,
                "instance_id": instance,
                "vmsd_name": name,
                "version": version,
                "fields": [{ "name": "state", "type": "buffer", "size": payload.len() }],
            }));
            unused_id = id.saturating_add(1);
        }
        sections.push(section::EOF);
        let json = json!({ "page_size": 4096, "devices": devices, "vmfile": 1 });
        let json = serde_json::to_vec(&json).unwrap_or_default();
        let mut description = Vec::new();
        encoder::begin_vm_description(&mut description, json.len() as u64);
        description.extend_from_slice(&json);
        OwnState { sections, description, unused_id }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::stream::device_state::DeviceState;

    #[test]
    fn parts_are_found_whatever_is_in_them() {
        // The second payload looks like the end of a section.
        let tricky = [section::FOOTER, 0, 0, 0, 1, section::EOF, section::VM_DESCRIPTION];
        let state = OwnState::new(&[("cpu", &[1, 2, 3]), ("bus", &tricky), ("none", &[])]);
        let mut bytes = state.sections.clone();
        bytes.extend_from_slice(&state.description);
        let found = DeviceState::locate(&bytes, 100, state.unused_id).unwrap();
        let names: Vec<&str> = found.sections.iter().map(|section| &*section.name).collect();
        assert_eq!(names, vec!["cpu", "bus", "none"]);
        assert_eq!(found.payload("bus", &state.sections), Some(&tricky[..]));
        assert_eq!(found.payload("none", &state.sections), Some(&[][..]));
        assert_eq!(found.payload("disk", &state.sections), None);
        assert_eq!(found.stream_end, 100 + bytes.len() as u64);
    }
}
