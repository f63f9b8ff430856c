//! Everything saved that is not RAM: the sections that come in parts, then one FULL section after another,
//! up to EOF.
//!
//! ```text
//! 01, 02, 03  be32 id  contents  7e be32 id
//! 04  be32 id  u8-counted name  be32 instance  be32 version  payload...  7e be32 id
//! ...
//! 00  [06 be32 len JSON]
//! ```
//!
//! The stream does not say how long a device's payload is. If QEMU's description follows, the lengths come
//! from there. If not, sections are found by their footers: the bytes `7e id` end a section if a
//! plausible header, or the end, follows, and the chain of sections must end exactly at EOF. A
//! chance match needs nine right bytes in a row; if one leads to a dead end, the search goes back
//! and continues behind it.

use alloc::string::String;
use alloc::vec::Vec;

use super::description::VmDescription;
use super::parts::{OtherParts, before_devices};
use super::section;
use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::{BLOCK_NAME_LEN_MAX, DEVICE_SECTIONS_MAX};

/// How many bytes the search may look at, in lengths of the input: a real file needs one, and a
/// false match takes little more. The limit ends the search in a hostile file.
const SCANNED_LENGTHS_MAX: usize = 4;

/// How many places that look like a description are tried: each may be as long as the input.
const DESCRIPTIONS_TRIED_MAX: usize = 4;

/// EOF and the type of what may follow it.
const DESCRIPTION_BEGINS: [u8; 2] = [section::EOF, section::VM_DESCRIPTION];

/// One device's section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection {
    /// The device's name, such as `0000:00:02.0/vga` or `timer`.
    pub name: String,
    /// Tells devices of one name apart.
    pub instance: u32,
    /// The version of the device's format.
    pub version: u32,
    /// The section's id, unique in its stream.
    pub id: u32,
    /// File offset of the section's first byte.
    pub offset: u64,
    /// Length from the first byte to the end of the footer, in bytes.
    pub len: u64,
    /// Length of what stands before the payload, in bytes.
    header_len: u64,
}

impl DeviceSection {
    /// Returns the payload's offset from the section's first byte and its length, in bytes.
    pub(crate) fn payload(&self) -> (u64, u64) {
        (self.header_len, self.len.saturating_sub(self.header_len).saturating_sub(5))
    }
}

/// What follows the "ram" section's START: device sections, EOF and the description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// File offset and length in bytes of what the sections with parts hold, "ram" apart, which come before
    /// [`DeviceState::start`]: the page table of pseries, the storage attributes of s390x. Neighbors are
    /// joined.
    pub parts: Vec<(u64, u64)>,
    /// The ids of these sections.
    part_ids: Vec<u32>,
    /// The device sections, in the order of the stream.
    pub sections: Vec<DeviceSection>,
    /// File offset of the first FULL section.
    pub start: u64,
    /// File offset one past EOF.
    pub end: u64,
    /// File offset and length in bytes of the description's JSON, where there is one.
    pub vm_description: Option<(u64, u64)>,
    /// File offset one past QEMU's last byte.
    pub stream_end: u64,
}

impl DeviceState {
    /// Locates the device sections in `bytes`, which lie at `offset` in the file and begin right
    /// after a footer of the "ram" section; `ram_id` is that section's id.
    ///
    /// Empty parts of the "ram" section and commands that stand before the first device are
    /// skipped. Bytes after QEMU's last are not looked at.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if a section with parts is not known or has no end, or if the device
    /// sections do not follow one another to EOF.
    pub fn locate(bytes: &[u8], offset: u64, ram_id: u32) -> Result<DeviceState, FormatError> {
        let mut cursor = Cursor::new(bytes, offset);
        let OtherParts { places: parts, ids: part_ids } = before_devices(&mut cursor, ram_id)?;
        let start = cursor.offset();
        let skipped = usize::try_from(start.saturating_sub(offset)).unwrap_or(usize::MAX);
        let rest = bytes.get(skipped..).unwrap_or_default();
        let (sections, eof) = follow_description(rest, start)
            .or_else(|| follow(rest, start))
            .ok_or_else(|| FormatError::new(start, FormatErrorKind::BrokenSections))?;
        let end = start.saturating_add(eof as u64).saturating_add(1);
        let tail = rest.get(eof.saturating_add(1)..).unwrap_or_default();
        let (vm_description, stream_end) = describe(tail, end)?;
        Ok(DeviceState { parts, part_ids, sections, start, end, vm_description, stream_end })
    }

    /// Returns an id that no section has.
    #[must_use]
    pub fn unused_id(&self) -> u32 {
        let is_used = |id| self.sections.iter().any(|section| section.id == id);
        (1..).find(|id| !is_used(*id) && !self.part_ids.contains(id)).unwrap_or(u32::MAX)
    }

    /// Returns the length of [`DeviceState::parts`] in bytes.
    #[must_use]
    pub fn parts_len(&self) -> u64 {
        self.parts.iter().map(|&(_, len)| len).sum()
    }

    /// Returns the length in bytes of all sections that are not RAM: the parts, and the device sections
    /// with EOF.
    #[must_use]
    pub fn sections_len(&self) -> u64 {
        self.parts_len().saturating_add(self.end.saturating_sub(self.start))
    }

    /// Returns the payload of the first device section named `name`. `bytes` are those up to
    /// [`DeviceState::end`], from [`DeviceState::start`] on or with others before them.
    #[must_use]
    pub fn payload<'a>(&self, name: &str, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let section = self.sections.iter().find(|section| section.name == name)?;
        let (start, len) = section.payload();
        let first = self.place(section.offset.checked_add(start)?, bytes)?;
        bytes.get(first..first.checked_add(usize::try_from(len).ok()?)?)
    }

    /// Returns the index of a file offset in `bytes`, which end at [`DeviceState::end`].
    pub(super) fn place(&self, offset: u64, bytes: &[u8]) -> Option<usize> {
        bytes.len().checked_sub(usize::try_from(self.end.checked_sub(offset)?).ok()?)
    }
}

/// Follows the sections by the description after them, as [`follow`] does without one.
///
/// `None` if there is none, or if it does not match these sections: then the footers decide.
fn follow_description(bytes: &[u8], offset: u64) -> Option<(Vec<DeviceSection>, usize)> {
    let mut from = 0;
    for _ in 0..DESCRIPTIONS_TRIED_MAX {
        let (eof, json) = find_description(bytes, from)?;
        let described = VmDescription::decode(json).ok();
        let sections = described.and_then(|it| sections_of(&it, bytes.get(..eof)?, offset));
        if let Some(sections) = sections {
            return Some((sections, eof));
        }
        from = eof.checked_add(1)?;
    }
    None
}

/// Finds an EOF with a description of plausible length, from index `from` on; returns the index of
/// EOF and the JSON.
fn find_description(bytes: &[u8], from: usize) -> Option<(usize, &[u8])> {
    let mut at = from;
    loop {
        let rest = bytes.get(at..)?;
        at = at.checked_add(rest.windows(2).position(|pair| pair == DESCRIPTION_BEGINS)?)?;
        let mut cursor = Cursor::new(bytes.get(at.checked_add(2)?..)?, 0);
        let len = cursor.be32("length of the VM description").ok()?;
        let len = usize::try_from(len).ok()?;
        if let Ok(json) = cursor.bytes("VM description", len) {
            if json.starts_with(b"{\"") && json.ends_with(b"}") {
                return Some((at, json));
            }
        }
        at = at.checked_add(1)?;
    }
}

/// Follows the sections that `described` lists from the first byte of `bytes` to the last.
fn sections_of(described: &VmDescription, bytes: &[u8], offset: u64) -> Option<Vec<DeviceSection>> {
    let mut sections = Vec::new();
    let mut start: usize = 0;
    for device in &described.devices {
        let mut section = header(bytes, start, offset)?;
        let same = section.name == device.name
            && section.instance == device.instance
            && section.version == device.version;
        if !same {
            return None;
        }
        section.len = section.header_len.checked_add(device.payload_len)?.checked_add(5)?;
        let end = start.checked_add(usize::try_from(section.len).ok()?)?;
        let footer = bytes.get(end.checked_sub(5)?..end)?;
        if footer.split_first()? != (&section::FOOTER, section.id.to_be_bytes().as_slice()) {
            return None;
        }
        start = end;
        sections.push(section);
    }
    (start == bytes.len() && !sections.is_empty()).then_some(sections)
}

/// Follows the sections from the first byte of `bytes`; returns them and the index of EOF.
fn follow(bytes: &[u8], offset: u64) -> Option<(Vec<DeviceSection>, usize)> {
    let mut sections: Vec<DeviceSection> = Vec::new();
    // Where in `bytes` the search for each section's footer continues if it has to go back.
    let mut resume: Vec<usize> = Vec::new();
    let mut start = 0;
    let mut budget = bytes.len().saturating_mul(SCANNED_LENGTHS_MAX);
    loop {
        if bytes.get(start) == Some(&section::EOF) && ends_well(bytes.get(start..)?) {
            return Some((sections, start));
        }
        let candidate = (sections.len() < DEVICE_SECTIONS_MAX)
            .then(|| header(bytes, start, offset))
            .flatten()
            .and_then(|section| {
                let from = start.checked_add(usize::try_from(section.header_len).ok()?)?;
                Some((section, from))
            });
        let mut next =
            candidate.and_then(|(section, from)| extend(bytes, start, section, from, &mut budget));
        while next.is_none() {
            // A dead end: the last footer was a false one.
            let section = sections.pop()?;
            let from = resume.pop()?;
            start = usize::try_from(section.offset.checked_sub(offset)?).ok()?;
            next = extend(bytes, start, section, from, &mut budget);
        }
        let (section, end) = next?;
        sections.push(section);
        resume.push(end.checked_sub(4)?);
        start = end;
    }
}

/// Returns whether EOF may be here: the description follows, or nothing.
///
/// A zero byte may not follow, although padding might: section 0 ends in `7e 00000000`, and a
/// number in its payload looks like that footer, an EOF and more zeros once in 256 saves.
fn ends_well(bytes: &[u8]) -> bool {
    match bytes.get(1) {
        None => true,
        Some(&section::VM_DESCRIPTION) => bytes.get(6) == Some(&b'{'),
        Some(_) => false,
    }
}

/// Reads the header of a FULL section at `start`, its length still unknown.
fn header(bytes: &[u8], start: usize, offset: u64) -> Option<DeviceSection> {
    let at = offset.checked_add(start as u64)?;
    let mut cursor = Cursor::new(bytes.get(start..)?, at);
    cursor.expect_u8("section type", section::FULL).ok()?;
    let id = cursor.be32("section id").ok()?;
    let name = cursor.counted_text("section name").ok()?;
    let printable = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
    if !printable || name.len() > BLOCK_NAME_LEN_MAX {
        return None;
    }
    let instance = cursor.be32("instance").ok()?;
    let version = cursor.be32("version").ok()?;
    let header_len = cursor.offset().checked_sub(at)?;
    Some(DeviceSection { name, instance, version, id, offset: at, len: 0, header_len })
}

/// Looks for the footer of `section` from index `from` on; returns the section with its length and
/// the index after it.
fn extend(
    bytes: &[u8],
    start: usize,
    mut section: DeviceSection,
    from: usize,
    budget: &mut usize,
) -> Option<(DeviceSection, usize)> {
    let id = section.id.to_be_bytes();
    let mut at = from;
    loop {
        let rest = bytes.get(at..)?;
        let affordable = rest.get(..rest.len().min(*budget))?;
        let distance = affordable.iter().position(|&byte| byte == section::FOOTER);
        let looked_at = distance.map_or(affordable.len(), |distance| distance.saturating_add(1));
        *budget = budget.saturating_sub(looked_at);
        at = at.checked_add(distance?)?;
        let end = at.checked_add(5)?;
        if bytes.get(at.checked_add(1)?..end)? == id {
            let plausible = match bytes.get(end) {
                Some(&section::EOF) => ends_well(bytes.get(end..)?),
                Some(&section::FULL) => header(bytes, end, 0).is_some(),
                _ => false,
            };
            if plausible {
                section.len = end.checked_sub(start)? as u64;
                return Some((section, end));
            }
        }
        at = at.checked_add(1)?;
    }
}

/// Reads the description that may follow EOF; returns its place and QEMU's end.
fn describe(tail: &[u8], end: u64) -> Result<(Option<(u64, u64)>, u64), FormatError> {
    if tail.first() != Some(&section::VM_DESCRIPTION) {
        return Ok((None, end));
    }
    let mut cursor = Cursor::new(tail, end);
    cursor.u8("section type")?;
    let len = cursor.be32("length of the VM description")?;
    let place = (cursor.offset(), u64::from(len));
    cursor.bytes("VM description", usize::try_from(len).unwrap_or(usize::MAX))?;
    Ok((Some(place), cursor.offset()))
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::super::encoder;
    use super::*;

    fn full(bytes: &mut Vec<u8>, id: u32, name: &str, payload: &[u8]) {
        bytes.push(section::FULL);
        bytes.extend_from_slice(&id.to_be_bytes());
        encoder::counted_text(bytes, name);
        bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend_from_slice(payload);
        bytes.push(section::FOOTER);
        bytes.extend_from_slice(&id.to_be_bytes());
    }

    fn names(state: &DeviceState) -> Vec<&str> {
        state.sections.iter().map(|section| section.name.as_str()).collect()
    }

    fn sample() -> Vec<u8> {
        let mut bytes = Vec::new();
        full(&mut bytes, 0, "timer", &[1, 2, 3]);
        full(&mut bytes, 9, "globalstate", &[0x55; 106]);
        bytes.push(section::EOF);
        bytes
    }

    #[test]
    fn finds_the_sections_and_the_end() {
        let mut bytes = sample();
        encoder::vm_description(&mut bytes);
        let end = bytes.len() as u64;
        bytes.extend_from_slice(b"whatever QEMU ignores");
        let state = DeviceState::locate(&bytes, 0x1000, 1).unwrap();
        assert_eq!(names(&state), ["timer", "globalstate"]);
        assert_eq!(state.stream_end, 0x1000 + end);
        assert_eq!(state.unused_id(), 1);
    }

    #[test]
    fn an_unused_id_is_that_of_no_section() {
        let mut bytes = Vec::new();
        for id in [2, 1, 4] {
            full(&mut bytes, id, "timer", &[]);
        }
        bytes.push(section::EOF);
        assert_eq!(DeviceState::locate(&bytes, 0, 9).unwrap().unused_id(), 3);
    }

    #[test]
    fn a_footer_inside_a_payload_does_not_end_the_section() {
        let mut lure = Vec::new();
        // The payload holds a footer of its own id and a header that looks right but leads nowhere.
        lure.extend_from_slice(&[0x7e, 0, 0, 0, 3, section::FULL, 0, 0, 0, 4, 2]);
        lure.extend_from_slice(b"ab\0\0\0\0\0\0\0\0");
        let mut bytes = Vec::new();
        full(&mut bytes, 3, "lured", &lure);
        full(&mut bytes, 5, "after", &[7; 40]);
        bytes.push(section::EOF);
        let state = DeviceState::locate(&bytes, 0, 1).unwrap();
        assert_eq!(names(&state), ["lured", "after"]);
    }

    /// Sections whose footers lead from the first to a false second one and on to EOF.
    fn lure() -> Vec<u8> {
        let mut bytes = Vec::new();
        full(&mut bytes, 3, "lured", b"\x7e\0\0\0\x03\x04\0\0\0\x04\x02ab\0\0\0\0\0\0\0\0");
        full(&mut bytes, 4, "after", &[7; 40]);
        bytes.push(section::EOF);
        bytes
    }

    fn describe_lure(bytes: &mut Vec<u8>, payload_len: usize) {
        let json = std::format!(
            r#"{{"devices":[
            {{"name":"lured","instance_id":0,"version":1,"fields":[{{"size":{payload_len}}}]}},
            {{"name":"after","instance_id":0,"version":1,"fields":[{{"size":8,"array_len":5}}]}}
            ]}}"#
        );
        bytes.push(section::VM_DESCRIPTION);
        bytes.extend_from_slice(&u32::try_from(json.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(json.as_bytes());
    }

    #[test]
    fn a_description_is_believed_before_footers() {
        let mut bytes = lure();
        let end = bytes.len() as u64;
        let state = DeviceState::locate(&bytes, 0x70, 1).unwrap();
        assert_eq!(names(&state), ["lured", "ab"], "footers alone are not always right");
        describe_lure(&mut bytes, 21);
        let state = DeviceState::locate(&bytes, 0x70, 1).unwrap();
        assert_eq!(names(&state), ["lured", "after"]);
        assert_eq!(state.sections[1].offset, 0x70 + state.sections[0].len);
        assert_eq!(state.end, 0x70 + end);
        assert_eq!(state.stream_end, 0x70 + bytes.len() as u64);
    }

    #[test]
    fn a_description_of_other_sections_is_not_believed() {
        for payload_len in [0, 20, 22, usize::MAX] {
            let mut bytes = lure();
            describe_lure(&mut bytes, payload_len);
            let state = DeviceState::locate(&bytes, 0, 1).unwrap();
            assert_eq!(names(&state), ["lured", "ab"]);
            assert_eq!(state.stream_end, bytes.len() as u64);
        }
        // The lengths are right; the name, the instance or the version is not.
        for (right, wrong) in [("\"lured", "\"lurid"), ("id\":0", "id\":1"), ("n\":1", "n\":2")] {
            let mut bytes = lure();
            describe_lure(&mut bytes, 21);
            let at = bytes.windows(right.len()).position(|part| part == right.as_bytes()).unwrap();
            bytes[at..at + wrong.len()].copy_from_slice(wrong.as_bytes());
            let state = DeviceState::locate(&bytes, 0, 1).unwrap();
            assert_eq!(names(&state), ["lured", "ab"], "{wrong}");
        }
    }

    #[test]
    fn what_only_begins_like_a_description_is_not_tried() {
        let mut payload = b"\x7e\0\0\0\x03\x04\0\0\0\x04\x02ab\0\0\0\0\0\0\0\0".to_vec();
        for _ in 0..DESCRIPTIONS_TRIED_MAX {
            payload.extend_from_slice(b"\0\x06\0\0\0\x02{\"");
        }
        let mut bytes = Vec::new();
        full(&mut bytes, 3, "lured", &payload);
        full(&mut bytes, 4, "after", &[7; 40]);
        bytes.push(section::EOF);
        describe_lure(&mut bytes, payload.len());
        let state = DeviceState::locate(&bytes, 0, 1).unwrap();
        assert_eq!(names(&state), ["lured", "after"]);
    }

    #[test]
    fn empty_ram_parts_and_commands_before_the_devices_are_skipped() {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&[2, 0, 0, 0, 1]);
        encoder::end_part(&mut bytes, 1);
        bytes.extend_from_slice(&[8, 0, 0x0b, 0, 0]);
        bytes.extend_from_slice(&[3, 0, 0, 0, 1]);
        encoder::end_part(&mut bytes, 1);
        let start = bytes.len() as u64;
        bytes.extend_from_slice(&sample());
        let state = DeviceState::locate(&bytes, 0, 1).unwrap();
        assert_eq!(state.start, start);
        assert_eq!(names(&state), ["timer", "globalstate"]);
    }

    #[test]
    fn cut_sections_are_broken() {
        let bytes = sample();
        for len in 0..bytes.len() {
            let error = DeviceState::locate(&bytes[..len], 0, 1).unwrap_err();
            assert_eq!(error.kind, FormatErrorKind::BrokenSections, "{len}");
        }
    }

    #[test]
    fn another_section_with_parts_is_refused_by_name() {
        let bytes = b"\x01\0\0\0\x05\x0cdirty-bitmap";
        let error = DeviceState::locate(bytes, 0x10, 1).unwrap_err();
        let text = "at offset 0x10: section with parts \"dirty-bitmap\" is not supported";
        assert_eq!(error.to_string(), text);
    }

    /// One save in 256 of a guest lost all devices but the first: the low byte of a timer was 0x7e,
    /// and what followed looked like the footer of section 0, EOF and padding.
    #[test]
    fn a_number_that_looks_like_the_footer_of_section_0_does_not_end_it() {
        let mut bytes = Vec::new();
        full(&mut bytes, 0, "timer", &[0, 0, 0, 1, 2, 3, 4, 0x7e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        full(&mut bytes, 9, "globalstate", &[0x55; 106]);
        bytes.push(section::EOF);
        let state = DeviceState::locate(&bytes, 0, 1).unwrap();
        assert_eq!(names(&state), ["timer", "globalstate"]);
        assert_eq!(state.end, bytes.len() as u64);
    }

    /// Each false footer leads to a header without a footer, and without the limit each search for
    /// that goes to the end of the input: 1000 of them and 16 MiB took 15 s. Found by fuzzing.
    #[test]
    fn false_footers_before_a_long_hole_end_the_search() {
        let mut bytes = Vec::new();
        for _ in 0..1000 {
            bytes.extend_from_slice(b"\x04\0\0\0\x03\x01a\0\0\0\0\0\0\0\0\x7e\0\0\0\x03");
        }
        bytes.extend_from_slice(b"\x04\0\0\0\x09\x01a\0\0\0\0\0\0\0\0");
        bytes.resize(16 << 20, 0);
        let error = DeviceState::locate(&bytes, 0, 1).unwrap_err();
        assert_eq!(error.kind, FormatErrorKind::BrokenSections);
    }

    #[test]
    fn hostile_footers_end_the_search() {
        // Every section could end at every place: the search must give up, not go on for ever.
        let mut bytes = Vec::new();
        for _ in 0..3000 {
            bytes.extend_from_slice(b"\x04\0\0\0\x03\x01a\0\0\0\0\0\0\0\0\x7e\0\0\0\x03");
        }
        bytes.push(0x55);
        let error = DeviceState::locate(&bytes, 0, 1).unwrap_err();
        assert_eq!(error.kind, FormatErrorKind::BrokenSections);
    }
}
