//! Reads a migration stream as it comes, in pieces of any size, without I/O.
//!
//! ```text
//! header, configuration
//! 01 START "ram"  MEM_SIZE word, block list, EOS word, footer
//! 02 PART, 03 END of "ram"  words of pages, EOS word, footer      any number, END may be absent
//! 01, 02, 03 of others      state of pseries and s390x            between those of "ram", or after them
//! 08 COMMAND                                                      between sections
//! device sections, EOF, description                               as they are, to the end
//! ```
//!
//! The decoder keeps the block list, which block was named last and which other sections have begun, and no
//! byte of its input.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::configuration::Configuration;
use super::parts::{Part, PartSections};
use super::ram_word::{self, PageForm, RamWord};
use super::{RAM_SECTION_VERSION, command, ram_flag, section};
use crate::cursor::Cursor;
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::{
    BLOCK_LEN_MAX, BLOCK_NAME_LEN_MAX, BLOCKS_MAX, COMPRESSED_EXTRA_LEN_MAX, CONFIGURATION_LEN_MAX,
    DEVICE_STATE_LEN_MAX,
};
use crate::page::{PageIndex, PageSize};
use crate::ram_block::{RamBlock, RamLayout, at};

/// How many bytes [`StreamDecoder::next`] may need at once. With this many, it always goes on.
pub const EVENT_LEN_MAX: usize = 128 << 10;

// The longest events: a page that does not compress, with all that stands before it, and the
// configuration with the byte after it.
const _: () =
    assert!(8 + 1 + BLOCK_NAME_LEN_MAX + 4 + 65536 + COMPRESSED_EXTRA_LEN_MAX < EVENT_LEN_MAX);
const _: () = assert!(CONFIGURATION_LEN_MAX < EVENT_LEN_MAX);

/// What [`StreamDecoder::next`] made of the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// How many bytes were used: the next call gets those after them.
    pub consumed: usize,
    /// What they contain. `None` if more bytes are needed: the next call gets those that were not
    /// consumed, and further ones.
    pub event: Option<Event<'a>>,
}

/// One item of a stream.
///
/// `block` is a place in the list of [`Event::RamBlocks`], and `page` lies in that block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Header and configuration: the first event. The configuration has no capability.
    Configuration(Configuration),
    /// The block list, which comes before the first page.
    RamBlocks {
        /// The id of the section "ram".
        section_id: u32,
        /// The blocks.
        ram: RamLayout,
    },
    /// A page. Pages may come again; the last one counts.
    Page {
        /// The block.
        block: usize,
        /// The page.
        page: PageIndex,
        /// Its bytes.
        data: &'a [u8],
    },
    /// A page of zeros.
    ZeroPage {
        /// The block.
        block: usize,
        /// The page.
        page: PageIndex,
    },
    /// A change to a page that came before: see [`super::xbzrle`].
    Xbzrle {
        /// The block.
        block: usize,
        /// The page.
        page: PageIndex,
        /// What is different, at most one page.
        delta: &'a [u8],
    },
    /// A page that the capability `compress` has compressed (QEMU before 9.1).
    CompressedPage {
        /// The block.
        block: usize,
        /// The page.
        page: PageIndex,
        /// A whole zlib stream, which was not decompressed yet.
        zlib: &'a [u8],
    },
    /// What follows comes after all that the multifd channels carry up to their next SYNC.
    MultifdFlush,
    /// The words of a part of "ram" end. With machine types of QEMU 8.0 and older the multifd
    /// channels send SYNC here.
    ///
    /// The footer may still be missing: such a QEMU keeps it back until the channels have been read
    /// up to their SYNC and beyond.
    RoundEnd,
    /// A command that has no meaning in a file.
    Command {
        /// Its code, [`command::SWITCHOVER_START`].
        code: u16,
        /// What it carries.
        payload: &'a [u8],
    },
    /// The next bytes of what is no RAM: of other sections with parts, each between two parts of "ram" or
    /// after them, and of all that follows from the first device section on. They come in pieces, as the
    /// input does.
    DeviceState(&'a [u8]),
}

/// Decodes a migration stream that is not mapped RAM.
///
/// It does not panic, whatever the bytes are. What it keeps is bounded by the limits on blocks.
/// After an error, every call returns that error.
#[derive(Debug)]
pub struct StreamDecoder {
    offset: u64,
    state: State,
    page_size: PageSize,
    ram_id: u32,
    blocks: Vec<RamBlock>,
    /// Places in `blocks` by name.
    places: BTreeMap<String, usize>,
    /// The block that was named last; it stays named in the next section.
    named: Option<usize>,
    /// Other sections that come in parts.
    others: PartSections,
    /// How many more bytes of device state are accepted.
    left: u64,
    /// The error of the last piece that was not whole, and the `offset` for which it holds.
    missing: Option<(u64, FormatError)>,
    /// The error that ended the decoding.
    refused: Option<FormatError>,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    /// A section or a command begins; "ram" has come as far as `Ram` says.
    Boundary(Ram),
    /// A record of the block list, which goes on for `rest` of `total` bytes of RAM.
    BlockList {
        total: u64,
        rest: u64,
    },
    /// A word of "ram", in a part after which it will have come as far as `Ram` says.
    Words(Ram),
    /// The footer of such a part.
    Footer(Ram),
    /// A part of another section.
    Part(Part, Ram),
    /// What follows RAM.
    Devices,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ram {
    Awaited,
    Started,
    Ended,
}

/// How many bytes were taken, what they said if anything, and what comes next.
type Taken<'a> = (usize, Option<Event<'a>>, State);

impl StreamDecoder {
    /// Returns a decoder for the stream's first byte.
    #[must_use]
    pub fn new() -> StreamDecoder {
        StreamDecoder::with_page_size(PageSize::KIB_4)
    }

    /// Returns a decoder for the stream of a QEMU whose pages have this size if the stream names none:
    /// QEMU names it only for targets with pages of several sizes.
    #[must_use]
    pub fn with_page_size(page_size: PageSize) -> StreamDecoder {
        StreamDecoder {
            offset: 0,
            state: State::Head,
            page_size,
            ram_id: 0,
            blocks: Vec::new(),
            places: BTreeMap::new(),
            named: None,
            others: PartSections::default(),
            left: DEVICE_STATE_LEN_MAX,
            missing: None,
            refused: None,
        }
    }

    /// Decodes the next event from `bytes`, which begin right after those consumed before.
    ///
    /// The events are the same however the stream is cut into pieces, except for the lengths of
    /// [`Event::DeviceState`]. With [`EVENT_LEN_MAX`] bytes there is always an event or an error,
    /// or some of them are consumed.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] with the offset in the stream of what is not valid, or what a file
    /// made of this stream could not hold.
    pub fn next<'a>(&mut self, bytes: &'a [u8]) -> Result<Step<'a>, FormatError> {
        if let Some(error) = &self.refused {
            return Err(error.clone());
        }
        let mut rest = bytes;
        let event = loop {
            match self.step(rest) {
                Ok((len, event, state)) => {
                    self.state = state;
                    self.offset = self.offset.saturating_add(len as u64);
                    rest = rest.get(len..).unwrap_or_default();
                    if let Some(Event::DeviceState(piece)) = event {
                        self.left = self.left.saturating_sub(piece.len() as u64);
                    }
                    if event.is_some() {
                        break event;
                    }
                }
                Err(error) if matches!(error.kind, FormatErrorKind::Ends { .. }) => {
                    self.missing = Some((self.offset, error));
                    break None;
                }
                Err(error) => {
                    self.refused = Some(error.clone());
                    return Err(error);
                }
            }
        };
        Ok(Step { consumed: bytes.len().saturating_sub(rest.len()), event })
    }

    /// Returns the offset in the stream of the next byte that [`StreamDecoder::next`] needs.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Says whether the input may end here.
    ///
    /// It may once the device state has begun;
    /// [`DeviceState::locate`](super::device_state::DeviceState::locate) finds out whether that is
    /// whole.
    ///
    /// # Errors
    ///
    /// Returns [`FormatError`] with what was expected, and where, or what was refused before.
    pub fn finish(&self) -> Result<(), FormatError> {
        if let Some(error) = &self.refused {
            return Err(error.clone());
        }
        let field = match self.state {
            State::Devices => return Ok(()),
            State::Head => "header of the stream",
            State::Boundary(Ram::Awaited) => "section \"ram\"",
            State::Boundary(_) => "section",
            State::BlockList { .. } => "block list",
            State::Words(_) => "RAM word",
            State::Footer(_) => "footer",
            State::Part(..) => "part of a section",
        };
        match &self.missing {
            Some((offset, error)) if *offset == self.offset => Err(error.clone()),
            _ => {
                let kind = FormatErrorKind::Ends { field, needed: 1, found: 0 };
                Err(FormatError::new(self.offset, kind))
            }
        }
    }

    /// Takes the next piece; `Ends` means that it is not whole. Changes nothing then.
    fn step<'a>(&mut self, bytes: &'a [u8]) -> Result<Taken<'a>, FormatError> {
        match self.state {
            State::Words(ram) => self.word(bytes, ram),
            State::Footer(ram) => self.footer(bytes, ram),
            State::Head => self.head(bytes),
            State::Boundary(ram) => self.boundary(bytes, ram),
            State::BlockList { total, rest } => self.block_list(bytes, total, rest),
            State::Part(part, ram) => self.piece(bytes, part, ram),
            State::Devices => self.device_state(bytes),
        }
    }

    fn head<'a>(&mut self, bytes: &'a [u8]) -> Result<Taken<'a>, FormatError> {
        let limited = bytes.get(..CONFIGURATION_LEN_MAX).unwrap_or(bytes);
        let mut cursor = Cursor::new(limited, self.offset);
        let configuration = Configuration::decode(&mut cursor).and_then(|configuration| {
            // The next byte tells whether another subsection follows.
            cursor.clone().u8("section type")?;
            Ok(configuration)
        });
        let configuration = configuration.map_err(|error| match error.kind {
            FormatErrorKind::Ends { .. } if limited.len() == CONFIGURATION_LEN_MAX => {
                let max = CONFIGURATION_LEN_MAX as u64;
                let (field, found) = ("length of the configuration", max.saturating_add(1));
                FormatError::new(error.offset, FormatErrorKind::TooLarge { field, found, max })
            }
            _ => error,
        })?;
        if let Some(name) = configuration.capabilities.first() {
            return Err(self.refuse("capability", name.as_str()));
        }
        if let Some(bits) = configuration.page_bits {
            let found = 1_u64.checked_shl(bits).unwrap_or(0);
            let size = PageSize::new(found).ok_or(FormatErrorKind::BadPageSize { found });
            self.page_size = at(self.offset, size)?;
        }
        let event = Event::Configuration(configuration);
        Ok((self.taken(&cursor), Some(event), State::Boundary(Ram::Awaited)))
    }

    fn boundary<'a>(&mut self, bytes: &'a [u8], ram: Ram) -> Result<Taken<'a>, FormatError> {
        let mut cursor = Cursor::new(bytes, self.offset);
        match (cursor.u8("section type")?, ram) {
            (section::START, _) => self.start((bytes, cursor), ram),
            (kind @ (section::PART | section::END), _) => self.part((bytes, cursor), kind, ram),
            (section::COMMAND, _) => self.command(cursor, ram),
            (section::FULL, _) => self.first_device(cursor, ram),
            (section::EOF, Ram::Started | Ram::Ended) => Ok((0, None, State::Devices)),
            (found, _) => Err(self.refuse("section type", format!("{found:#04x}"))),
        }
    }

    /// Takes the header of a section with parts; of "ram" also the word that announces the block list.
    fn start<'a>(
        &mut self,
        (bytes, mut cursor): (&'a [u8], Cursor<'a>),
        ram: Ram,
    ) -> Result<Taken<'a>, FormatError> {
        let section_id = cursor.be32("section id")?;
        let after_id = cursor.clone();
        let name = cursor.counted_text("section name")?;
        match (name.as_str(), ram) {
            ("ram", Ram::Awaited) => {}
            ("ram", _) => return Err(self.refuse("second section", name)),
            (_, Ram::Awaited) => return Err(self.refuse("section before \"ram\"", name)),
            _ => {
                cursor = after_id;
                let part = self.others.start(section_id, &mut cursor)?;
                return self.device_piece(bytes, &cursor, State::Part(part, ram));
            }
        }
        cursor.expect_be32("instance of the RAM section", 0)?;
        cursor.expect_be32("version of the RAM section", RAM_SECTION_VERSION)?;
        let offset = cursor.offset();
        let (flags, total) = ram_word::split(cursor.be64("MEM_SIZE word")?, self.page_size);
        if flags != ram_flag::MEM_SIZE {
            let (field, expected) = ("flags of the first RAM word", ram_flag::MEM_SIZE);
            let kind = FormatErrorKind::Differs { field, found: flags, expected };
            return Err(FormatError::new(offset, kind));
        }
        let max = BLOCK_LEN_MAX.saturating_mul(BLOCKS_MAX as u64);
        if total > max {
            let kind = FormatErrorKind::TooLarge { field: "total of the RAM", found: total, max };
            return Err(FormatError::new(offset, kind));
        }
        self.ram_id = section_id;
        Ok((self.taken(&cursor), None, State::BlockList { total, rest: total }))
    }

    /// Takes one record of the block list: a long list comes in pieces, too.
    fn block_list<'a>(
        &mut self,
        bytes: &'a [u8],
        total: u64,
        rest: u64,
    ) -> Result<Taken<'a>, FormatError> {
        if rest == 0 {
            let ram = at(self.offset, RamLayout::new(self.blocks.clone()))?;
            let names = ram.blocks().iter().map(|block| block.name().to_string());
            self.places = names.zip(0..).collect();
            let event = Event::RamBlocks { section_id: self.ram_id, ram };
            return Ok((0, Some(event), State::Words(Ram::Started)));
        }
        let mut cursor = Cursor::new(bytes, self.offset);
        let name = cursor.counted_text("name of a RAM block")?;
        let used_length = cursor.be64("length of a RAM block")?;
        let block = at(self.offset, RamBlock::new(name, used_length, self.page_size))?;
        let Some(rest) = rest.checked_sub(used_length) else {
            let found = total.saturating_sub(rest).saturating_add(used_length);
            let kind = FormatErrorKind::WrongTotal { found, expected: total };
            return Err(FormatError::new(self.offset, kind));
        };
        if self.blocks.len() >= BLOCKS_MAX {
            let (found, max) = (BLOCKS_MAX.saturating_add(1) as u64, BLOCKS_MAX as u64);
            let kind = FormatErrorKind::TooLarge { field: "number of RAM blocks", found, max };
            return Err(FormatError::new(self.offset, kind));
        }
        self.blocks.push(block);
        Ok((self.taken(&cursor), None, State::BlockList { total, rest }))
    }

    /// Takes the header of a PART or END.
    fn part<'a>(
        &mut self,
        (bytes, mut cursor): (&'a [u8], Cursor<'a>),
        kind: u8,
        ram: Ram,
    ) -> Result<Taken<'a>, FormatError> {
        let id = cursor.be32("section id")?;
        let is_last = kind == section::END;
        if id == self.ram_id && ram == Ram::Started {
            let after = if is_last { Ram::Ended } else { Ram::Started };
            return Ok((self.taken(&cursor), None, State::Words(after)));
        }
        match self.others.part(id, is_last) {
            Some(part) => self.device_piece(bytes, &cursor, State::Part(part, ram)),
            None => Err(self.refuse("part of unknown section", id.to_string())),
        }
    }

    /// Takes the next piece of another section's part.
    fn piece<'a>(&self, bytes: &'a [u8], part: Part, ram: Ram) -> Result<Taken<'a>, FormatError> {
        let mut cursor = Cursor::new(bytes, self.offset);
        let rest = part.advance(&mut cursor)?;
        let state = rest.map_or(State::Boundary(ram), |part| State::Part(part, ram));
        self.device_piece(bytes, &cursor, state)
    }

    /// Returns what `cursor` has taken of `bytes` as device state.
    fn device_piece<'a>(
        &self,
        bytes: &'a [u8],
        cursor: &Cursor<'_>,
        state: State,
    ) -> Result<Taken<'a>, FormatError> {
        let len = self.taken(cursor);
        if len as u64 > self.left {
            return Err(self.too_much_device_state());
        }
        let piece = bytes.get(..len).unwrap_or_default();
        Ok((len, Some(Event::DeviceState(piece)), state))
    }

    fn command<'a>(&self, mut cursor: Cursor<'a>, ram: Ram) -> Result<Taken<'a>, FormatError> {
        let code = cursor.be16("command")?;
        // What to turn off, and the command's name.
        let (what, name) = match code {
            command::SWITCHOVER_START => {
                let len = cursor.be16("length of a command")?;
                let payload = cursor.bytes("command", usize::from(len))?;
                let event = Event::Command { code, payload };
                return Ok((self.taken(&cursor), Some(event), State::Boundary(ram)));
            }
            command::OPEN_RETURN_PATH => ("return-path command", "open return path"),
            command::PING => ("return-path command", "ping"),
            command::POSTCOPY_ADVISE => ("postcopy-ram command", "postcopy advise"),
            command::POSTCOPY_LISTEN => ("postcopy-ram command", "postcopy listen"),
            command::POSTCOPY_RUN => ("postcopy-ram command", "postcopy run"),
            command::POSTCOPY_RAM_DISCARD => ("postcopy-ram command", "postcopy RAM discard"),
            command::PACKAGED => ("postcopy-ram command", "packaged"),
            command::POSTCOPY_RESUME => ("postcopy-ram command", "postcopy resume"),
            command::RECV_BITMAP => ("postcopy-ram command", "receive bitmap"),
            command::ENABLE_COLO => ("x-colo command", "enable COLO"),
            _ => return Err(self.refuse("command", code.to_string())),
        };
        Err(self.refuse(what, name))
    }

    /// Looks at the first device section without taking it.
    fn first_device<'a>(&self, mut cursor: Cursor<'a>, ram: Ram) -> Result<Taken<'a>, FormatError> {
        cursor.be32("section id")?;
        let name = cursor.counted_text("section name")?;
        // virtio-mem sends a section among the START sections, before RAM's pages, since machine
        // type 8.0. If END is missing (background-snapshot), such a section could be early or not.
        let early = ram != Ram::Ended && name.contains("virtio-mem");
        if early || ram == Ram::Awaited {
            return Err(self.refuse("early device section", name));
        }
        Ok((0, None, State::Devices))
    }

    fn word<'a>(&mut self, bytes: &'a [u8], ram: Ram) -> Result<Taken<'a>, FormatError> {
        let mut cursor = Cursor::new(bytes, self.offset);
        let word = cursor.be64("RAM word")?;
        match at(self.offset, RamWord::decode(word, self.page_size))? {
            RamWord::Page { form, continues, block_offset } => {
                let block = if continues { self.named } else { Some(self.place(&mut cursor)?) };
                let event = self.page(&mut cursor, block, form, block_offset)?;
                self.named = block;
                Ok((self.taken(&cursor), Some(event), State::Words(ram)))
            }
            RamWord::MultifdFlush => {
                Ok((self.taken(&cursor), Some(Event::MultifdFlush), State::Words(ram)))
            }
            RamWord::End => Ok((self.taken(&cursor), Some(Event::RoundEnd), State::Footer(ram))),
        }
    }

    fn footer<'a>(&self, bytes: &'a [u8], ram: Ram) -> Result<Taken<'a>, FormatError> {
        let mut cursor = Cursor::new(bytes, self.offset);
        cursor.expect_u8("footer", section::FOOTER)?;
        cursor.expect_be32("section id in the footer", self.ram_id)?;
        Ok((self.taken(&cursor), None, State::Boundary(ram)))
    }

    /// Takes the name of a block; returns its place in the list.
    fn place(&self, cursor: &mut Cursor<'_>) -> Result<usize, FormatError> {
        let offset = cursor.offset();
        let name = cursor.counted_text("name of a RAM block")?;
        match self.places.get(&name) {
            Some(&place) => Ok(place),
            None => Err(FormatError::new(offset, FormatErrorKind::UnknownBlock { name })),
        }
    }

    /// Takes what follows a page's word and name.
    fn page<'a>(
        &self,
        cursor: &mut Cursor<'a>,
        block: Option<usize>,
        form: PageForm,
        block_offset: u64,
    ) -> Result<Event<'a>, FormatError> {
        let named = block.and_then(|block| Some((block, self.blocks.get(block)?)));
        let Some((block, ram_block)) = named else {
            return Err(self.refuse("first page with the RAM flag", "CONTINUE"));
        };
        let page = at(self.offset, ram_block.page_at(block_offset))?;
        let page_len = self.page_size.bytes();
        match form {
            PageForm::Raw => {
                let data = cursor.bytes("page", usize::try_from(page_len).unwrap_or(usize::MAX))?;
                Ok(Event::Page { block, page, data })
            }
            PageForm::Zero => {
                cursor.expect_u8("fill byte of a zero page", 0)?;
                Ok(Event::ZeroPage { block, page })
            }
            PageForm::Xbzrle => {
                cursor.expect_u8("kind of an XBZRLE page", 1)?;
                let offset = cursor.offset();
                let len = u64::from(cursor.be16("length of an XBZRLE page")?);
                let len = at(offset, limited("length of an XBZRLE page", len, page_len))?;
                Ok(Event::Xbzrle { block, page, delta: cursor.bytes("XBZRLE page", len)? })
            }
            PageForm::Compressed => {
                let offset = cursor.offset();
                let len = u64::from(cursor.be32("length of a compressed page")?);
                let max = page_len.saturating_add(COMPRESSED_EXTRA_LEN_MAX as u64);
                let len = at(offset, limited("length of a compressed page", len, max))?;
                let zlib = cursor.bytes("compressed page", len)?;
                Ok(Event::CompressedPage { block, page, zlib })
            }
        }
    }

    fn device_state<'a>(&self, bytes: &'a [u8]) -> Result<Taken<'a>, FormatError> {
        if bytes.is_empty() {
            let kind = FormatErrorKind::Ends { field: "device state", needed: 1, found: 0 };
            return Err(FormatError::new(self.offset, kind));
        }
        if self.left == 0 {
            return Err(self.too_much_device_state());
        }
        let piece = bytes.get(..usize::try_from(self.left).unwrap_or(usize::MAX)).unwrap_or(bytes);
        Ok((piece.len(), Some(Event::DeviceState(piece)), State::Devices))
    }

    fn too_much_device_state(&self) -> FormatError {
        let max = DEVICE_STATE_LEN_MAX;
        let (field, found) = ("length of the device state", max.saturating_add(1));
        FormatError::new(self.offset, FormatErrorKind::TooLarge { field, found, max })
    }

    fn refuse(&self, what: &'static str, name: impl Into<String>) -> FormatError {
        let kind = FormatErrorKind::Unsupported { what, name: name.into() };
        FormatError::new(self.offset, kind)
    }

    /// Returns how many bytes `cursor`, which began at the decoder's offset, has taken.
    fn taken(&self, cursor: &Cursor<'_>) -> usize {
        usize::try_from(cursor.offset().saturating_sub(self.offset)).unwrap_or(usize::MAX)
    }
}

impl Default for StreamDecoder {
    fn default() -> StreamDecoder {
        StreamDecoder::new()
    }
}

fn limited(field: &'static str, found: u64, max: u64) -> Result<usize, FormatErrorKind> {
    let len = usize::try_from(found).ok().filter(|_| found <= max);
    len.ok_or(FormatErrorKind::TooLarge { field, found, max })
}
