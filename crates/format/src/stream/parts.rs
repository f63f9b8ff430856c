//! Sections that come in parts, as "ram" does: state that changes while QEMU sends it.
//!
//! A payload ends where its contents say so (QEMU 2.4 to 11.1):
//!
//! ```text
//! spapr/htab                page table of pseries
//!     be32 0, groups        a group: be32 index  be16 valid  be16 invalid, 16 bytes for each valid entry;
//!                           the last one has zeros only
//!     be32 other            nothing follows: in START the size of the table, else -1, which is "no table"
//! s390-storage_attributes   attributes of the pages of s390x
//!     be64 words            flag in the low 12 bits
//!         2 MORE            be64 count, as many bytes
//!         8 DONE            nothing follows
//!         1 EOS             the last word
//! ```

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::{ram_flag, section};
use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::DEVICE_SECTIONS_MAX;

/// What the words of the storage attributes say.
mod attributes_flag {
    pub(super) const EOS: u64 = 1;
    pub(super) const MORE: u64 = 2;
    pub(super) const DONE: u64 = 8;
    /// The bits of the flag; the others are an address.
    pub(super) const MASK: u64 = 0xfff;
}

/// The sections with parts that have begun, except "ram".
#[derive(Debug, Default)]
pub(super) struct PartSections {
    begun: Vec<PartSection>,
}

#[derive(Debug)]
struct PartSection {
    id: u32,
    name: String,
    contents: Contents,
    has_ended: bool,
}

/// A part of a section, as far as it has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    id: u32,
    contents: Contents,
    next: Next,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contents {
    PageTable,
    StorageAttributes,
}

/// What the next byte of a part belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Head,
    Record,
    Data(u64),
    Footer,
}

impl PartSections {
    /// Takes what follows the id in the header of a START, and returns its part.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] if the contents of the section are not known, or if it has begun before.
    pub(super) fn start(&mut self, id: u32, cursor: &mut Cursor<'_>) -> Result<Part, FormatError> {
        // That of the section's first byte: its type and its id have been taken.
        let offset = cursor.offset().saturating_sub(5);
        let name = cursor.counted_text("section name")?;
        let refuse =
            |what, name| Err(FormatError::new(offset, FormatErrorKind::Unsupported { what, name }));
        let contents = match name.as_str() {
            "spapr/htab" => Contents::PageTable,
            "s390-storage_attributes" => Contents::StorageAttributes,
            _ => return refuse("section with parts", name),
        };
        if self.begun.iter().any(|section| section.id == id || section.name == name) {
            return refuse("second section", name);
        }
        cursor.be32("instance of a section with parts")?;
        cursor.be32("version of a section with parts")?;
        self.begun.push(PartSection { id, name, contents, has_ended: false });
        Ok(Part::new(id, contents))
    }

    /// Returns the PART or END of the section `id`; `None` if that has not begun.
    pub(super) fn part(&mut self, id: u32, is_last: bool) -> Option<Part> {
        let section = self.begun.iter_mut().find(|section| section.id == id)?;
        section.has_ended |= is_last;
        Some(Part::new(id, section.contents))
    }

    /// Checks that each section has ended: without its last part, it holds the state of an earlier moment.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] with the name of the first that has not; `offset` is where it should have.
    pub(super) fn have_ended(&self, offset: u64) -> Result<(), FormatError> {
        match self.begun.iter().find(|section| !section.has_ended) {
            None => Ok(()),
            Some(section) => {
                let (what, name) = ("section without an end", section.name.clone());
                Err(FormatError::new(offset, FormatErrorKind::Unsupported { what, name }))
            }
        }
    }
}

impl Part {
    fn new(id: u32, contents: Contents) -> Part {
        let next = match contents {
            Contents::PageTable => Next::Head,
            Contents::StorageAttributes => Next::Record,
        };
        Part { id, contents, next }
    }

    /// Takes the next piece of the part; returns what is left of it, `None` after the footer.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] for what is not valid. `Ends` means that the piece is not whole: nothing of
    /// it counts as taken.
    pub(super) fn advance(self, cursor: &mut Cursor<'_>) -> Result<Option<Part>, FormatError> {
        let next = match (self.next, self.contents) {
            (Next::Footer, _) => {
                cursor.expect_u8("footer", section::FOOTER)?;
                cursor.expect_be32("section id in the footer", self.id)?;
                return Ok(None);
            }
            (Next::Data(left), _) => data(left.saturating_sub(cursor.skip_up_to(left)?)),
            (Next::Head, _) => match cursor.be32("head of a page table")? {
                0 => Next::Record,
                _ => Next::Footer,
            },
            (Next::Record, Contents::PageTable) => entries(cursor)?,
            (Next::Record, Contents::StorageAttributes) => attributes(cursor)?,
        };
        Ok(Some(Part { next, ..self }))
    }
}

/// Takes the head of a group of page table entries.
fn entries(cursor: &mut Cursor<'_>) -> Result<Next, FormatError> {
    const ENTRY_LEN: u64 = 16;
    let index = cursor.be32("index of page table entries")?;
    let valid = cursor.be16("number of valid page table entries")?;
    let invalid = cursor.be16("number of invalid page table entries")?;
    Ok(match (index, valid, invalid) {
        (0, 0, 0) => Next::Footer,
        _ => data(u64::from(valid).saturating_mul(ENTRY_LEN)),
    })
}

/// Takes a word of the storage attributes.
fn attributes(cursor: &mut Cursor<'_>) -> Result<Next, FormatError> {
    let offset = cursor.offset();
    let word = cursor.be64("word of storage attributes")?;
    match word & attributes_flag::MASK {
        attributes_flag::MORE => Ok(data(cursor.be64("number of storage attributes")?)),
        attributes_flag::DONE => Ok(Next::Record),
        attributes_flag::EOS => Ok(Next::Footer),
        flag => {
            let (what, name) = ("flag of storage attributes", format!("{flag:#x}"));
            Err(FormatError::new(offset, FormatErrorKind::Unsupported { what, name }))
        }
    }
}

fn data(left: u64) -> Next {
    if left == 0 { Next::Record } else { Next::Data(left) }
}

/// The parts of all sections but "ram".
pub(super) struct OtherParts {
    /// File offset and length in bytes; neighbors are joined.
    pub(super) places: Vec<(u64, u64)>,
    /// The ids of the sections.
    pub(super) ids: Vec<u32>,
}

/// Takes what stands before the first device section: parts of sections, commands, and empty parts of the
/// section "ram", whose id is `ram_id`.
pub(super) fn before_devices(
    cursor: &mut Cursor<'_>,
    ram_id: u32,
) -> Result<OtherParts, FormatError> {
    let mut sections = PartSections::default();
    let mut places: Vec<(u64, u64)> = Vec::new();
    loop {
        let offset = cursor.offset();
        let kind = cursor.peek();
        let part = match kind {
            Some(section::START | section::PART | section::END) => {
                cursor.u8("section type")?;
                let id = cursor.be32("section id")?;
                match sections.part(id, kind == Some(section::END)) {
                    Some(part) => part,
                    None if kind == Some(section::START) => sections.start(id, cursor)?,
                    None => {
                        empty_part_of_ram(cursor, (id, ram_id))?;
                        continue;
                    }
                }
            }
            Some(section::COMMAND) => {
                cursor.u8("section type")?;
                cursor.be16("command")?;
                let len = cursor.be16("length of a command")?;
                cursor.bytes("command", usize::from(len))?;
                continue;
            }
            _ => break,
        };
        let mut rest = Some(part);
        while let Some(part) = rest {
            rest = part.advance(cursor)?;
        }
        let len = cursor.offset().saturating_sub(offset);
        if let Some(last) = places.last_mut().filter(|last| last.0.saturating_add(last.1) == offset)
        {
            last.1 = last.1.saturating_add(len);
            continue;
        }
        if places.len() == DEVICE_SECTIONS_MAX {
            let max = DEVICE_SECTIONS_MAX as u64;
            let field = "number of places with parts of sections";
            let kind = FormatErrorKind::TooLarge { field, found: max.saturating_add(1), max };
            return Err(FormatError::new(offset, kind));
        }
        places.push((offset, len));
    }
    sections.have_ended(cursor.offset())?;
    let ids = sections.begun.iter().map(|section| section.id).collect();
    Ok(OtherParts { places, ids })
}

/// Takes a part of "ram" after the id that was found, if it has no page.
fn empty_part_of_ram(
    cursor: &mut Cursor<'_>,
    (found, ram_id): (u32, u32),
) -> Result<(), FormatError> {
    if found != ram_id {
        let (found, expected) = (u64::from(found), u64::from(ram_id));
        let kind = FormatErrorKind::Differs { field: "section id", found, expected };
        return Err(FormatError::new(cursor.offset().saturating_sub(4), kind));
    }
    let at = cursor.offset();
    let found = cursor.be64("RAM word")?;
    if found != ram_flag::EOS {
        let (field, expected) = ("RAM word after the block list", ram_flag::EOS);
        let kind = FormatErrorKind::Differs { field, found, expected };
        return Err(FormatError::new(at, kind));
    }
    cursor.expect_u8("footer", section::FOOTER)?;
    cursor.expect_be32("section id in the footer", ram_id)
}
