//! One multifd channel: packets in, pages out.

use std::fmt;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, readv};
use vmfile_format::error::FormatErrorKind;
use vmfile_format::stream::multifd::{Compression, INIT_LEN, Packet, PacketPages, packet_len};
use vmfile_format::{FormatError, PageIndex, PageSize, RamBlock, RamLayout};

use super::inflater::Inflater;
use super::rounds::Rounds;
use crate::page_writer::{Counts, PageWriter};
use crate::receive::ReceiveError;
use crate::source::stream::{Patience, Pulse, WaitError};

/// A channel whose init packet was read.
pub(crate) struct Channel<'a> {
    fd: OwnedFd,
    ram: &'a RamLayout,
    page_size: PageSize,
    rounds: &'a Rounds<'a>,
    /// What has been read, in bytes.
    offset: u64,
    inflater: Option<Inflater>,
    /// Compressed data of a packet.
    data: Vec<u8>,
}

/// What came by a channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChannelCounts {
    pub(crate) pages: Counts,
    pub(crate) stream_bytes: u64,
}

impl<'a> Channel<'a> {
    /// Takes the channel `fd`, reading from which does not block, for pages of `ram`.
    pub(crate) fn new(fd: OwnedFd, ram: &'a RamLayout, rounds: &'a Rounds<'a>) -> Channel<'a> {
        let page_size = ram.blocks().first().map_or(PageSize::KIB_4, RamBlock::page_size);
        let (offset, inflater, data) = (INIT_LEN as u64, None, Vec::new());
        Channel { fd, ram, page_size, rounds, offset, inflater, data }
    }

    /// Receives all that comes; `done` hears of each packet's pages, in bytes.
    pub(crate) fn receive(
        mut self,
        mut writer: PageWriter<'_>,
        done: impl Fn(u64),
    ) -> Result<ChannelCounts, ReceiveError> {
        while let Some(packet) = self.packet()? {
            if let Some(pages) = &packet.pages {
                self.pages(&packet, pages, &mut writer)?;
                let count = pages.normal.len() + pages.zero.len();
                done(count as u64 * self.page_size.bytes());
            }
            if packet.sync {
                writer.drain().map_err(ReceiveError::write_ram)?;
                self.rounds.channel_syncs(self.offset)?;
            }
        }
        writer.drain().map_err(ReceiveError::write_ram)?;
        self.rounds.channel_ends();
        Ok(ChannelCounts { pages: writer.counts(), stream_bytes: self.offset })
    }

    /// Reads the next packet up to its data; `None` at the end.
    fn packet(&mut self) -> Result<Option<Packet>, ReceiveError> {
        let (patience, pulse) = self.rounds.patience();
        patience.check(pulse).map_err(|error| ReceiveError::waited(error, self.offset))?;
        let offset = self.offset;
        let mut bytes = vec![0; packet_len(self.page_size)];
        let needed = bytes.len();
        let found = self.read(&mut [IoSliceMut::new(&mut bytes)])?;
        if found == 0 {
            return Ok(None);
        }
        self.whole("multifd packet", needed, found)?;
        let decoded = Packet::decode(&bytes, offset, self.ram).map_err(ReceiveError::Stream)?;
        Ok(Some(decoded.expect("so long is a packet").0))
    }

    /// Takes the pages of a packet, whose data come next.
    fn pages(
        &mut self,
        packet: &Packet,
        pages: &PacketPages,
        writer: &mut PageWriter<'_>,
    ) -> Result<(), ReceiveError> {
        for &page in &pages.zero {
            writer.zero_page(pages.block, page).map_err(ReceiveError::write_ram)?;
        }
        if pages.normal.is_empty() {
            return Ok(());
        }
        let mut buffer = writer.buffer().map_err(ReceiveError::write_ram)?;
        let page_len = usize::try_from(self.page_size.bytes()).expect("64 KiB at most");
        let order = Order::of(pages, buffer.len() / page_len).map_err(|kind| self.refused(kind))?;
        let room = &mut buffer[..order.len() * page_len];
        match packet.compression {
            Compression::None if order.is_wire => {
                let (needed, mut slices) = (room.len(), [IoSliceMut::new(room)]);
                let found = self.read(&mut slices)?;
                self.whole("pages of a multifd packet", needed, found)?;
            }
            Compression::None => {
                let needed = pages.normal.len() * page_len;
                let mut slices: Vec<_> = order.slots(room).map(IoSliceMut::new).collect();
                let found = self.read(&mut slices)?;
                self.whole("pages of a multifd packet", needed, found)?;
            }
            compression => self.inflate(compression, packet.data_len, order.slots(room))?,
        }
        writer.pages(pages.block, &order.places, buffer).map_err(ReceiveError::write_ram)
    }

    /// Reads `data_len` bytes of data and expands them into `pages`.
    fn inflate<'b>(
        &mut self,
        compression: Compression,
        data_len: u32,
        pages: impl Iterator<Item = &'b mut [u8]>,
    ) -> Result<(), ReceiveError> {
        let offset = self.offset;
        let needed = usize::try_from(data_len).expect("the decoder has a limit");
        let mut data = std::mem::take(&mut self.data);
        data.resize(needed, 0);
        let found = self.read(&mut [IoSliceMut::new(&mut data)])?;
        self.whole("data of a multifd packet", needed, found)?;
        let refused = |kind| ReceiveError::Stream(FormatError { offset, kind });
        if self.inflater.as_ref().is_none_or(|inflater| !inflater.is_for(compression)) {
            self.inflater = Inflater::new(compression).map_err(refused)?;
        }
        let inflater = self.inflater.as_mut().expect("the data are compressed");
        inflater.fill(&data, pages).map_err(refused)?;
        self.data = data;
        Ok(())
    }

    /// Fills `slices`; returns how many bytes came, which are fewer at the end of the channel.
    fn read(&mut self, slices: &mut [IoSliceMut<'_>]) -> Result<usize, ReceiveError> {
        let (patience, pulse) = self.rounds.patience();
        let found = read_all(self.fd.as_fd(), slices, patience, pulse)
            .map_err(|error| ReceiveError::waited(error, self.offset))?;
        self.offset += found as u64;
        Ok(found)
    }

    /// Refuses what the channel's end has cut.
    fn whole(&self, field: &'static str, needed: usize, found: usize) -> Result<(), ReceiveError> {
        if found == needed {
            return Ok(());
        }
        let (needed, found) = (needed as u64, found as u64);
        Err(self.refused(FormatErrorKind::Ends { field, needed, found }))
    }

    fn refused(&self, kind: FormatErrorKind) -> ReceiveError {
        ReceiveError::Stream(FormatError { offset: self.offset, kind })
    }
}

impl fmt::Debug for Channel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("offset", &self.offset).finish_non_exhaustive()
    }
}

/// Fills `slices` from `fd`, which does not block; returns how many bytes came, which are fewer only
/// at the end.
pub(super) fn read_all(
    fd: BorrowedFd<'_>,
    mut slices: &mut [IoSliceMut<'_>],
    patience: &Patience<'_>,
    pulse: &Pulse,
) -> Result<usize, WaitError> {
    let mut found = 0;
    while !slices.is_empty() {
        match readv(fd, slices) {
            Ok(0) => break,
            Ok(len) => {
                pulse.beat();
                found += len;
                IoSliceMut::advance_slices(&mut slices, len);
            }
            Err(Errno::AGAIN) => patience.wait(fd, pulse)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(WaitError::Io(errno.into())),
        }
    }
    Ok(found)
}

/// The pages of a packet in ascending order, where they stand in a buffer, and how they come.
#[derive(Debug)]
struct Order {
    /// Each page with its place in the buffer, in pages.
    places: Vec<(usize, PageIndex)>,
    /// For each page as it comes, its number in `places`.
    wire: Vec<usize>,
    /// Whether they come as they stand in the buffer.
    is_wire: bool,
}

impl Order {
    /// Orders the pages with data of a packet for a buffer of `room` pages, which has room for them.
    ///
    /// Zero pages that the packet names have their places between them, as far as there is room: then
    /// all can be written at once. Nobody else has those pages in this round.
    fn of(packet: &PacketPages, room: usize) -> Result<Order, FormatErrorKind> {
        let pages = &packet.normal;
        let mut sorted: Vec<usize> = (0..pages.len()).collect();
        sorted.sort_by_key(|&index| pages[index]);
        let mut zero = packet.zero.clone();
        zero.sort_unstable();
        let mut places: Vec<(usize, PageIndex)> = Vec::with_capacity(pages.len());
        let mut wire = vec![0; pages.len()];
        for (number, &index) in sorted.iter().enumerate() {
            let (page, left) = (pages[index], sorted.len() - number);
            let place = match places.last() {
                Some(&(_, last)) if last == page => {
                    let (what, name) = ("multifd packet with twice the page", page.0.to_string());
                    return Err(FormatErrorKind::Unsupported { what, name });
                }
                Some(&(before, last)) => {
                    let gap = zeros_between(&zero, last, page);
                    let gap = gap.filter(|gap| before + 1 + gap + left <= room);
                    before + 1 + gap.unwrap_or(0)
                }
                None => 0,
            };
            wire[index] = number;
            places.push((place, page));
        }
        let is_wire = wire.is_sorted() && places.last().is_none_or(|last| last.0 < pages.len());
        Ok(Order { places, wire, is_wire })
    }

    /// Returns how many pages of a buffer are taken.
    fn len(&self) -> usize {
        self.places.last().map_or(0, |last| last.0 + 1)
    }

    /// Cuts `room`, as long as this says, into places for pages as they come.
    fn slots<'a>(&self, room: &'a mut [u8]) -> impl Iterator<Item = &'a mut [u8]> + use<'_, 'a> {
        let page_len = room.len() / self.len();
        let mut slots: Vec<Option<&mut [u8]>> = room.chunks_exact_mut(page_len).map(Some).collect();
        let place = |&number: &usize| self.places[number].0;
        self.wire.iter().map(move |number| slots[place(number)].take().expect("a page of its own"))
    }
}

/// Returns how many pages lie between two, if all of them are among `zero`, which is in order.
fn zeros_between(zero: &[PageIndex], before: PageIndex, after: PageIndex) -> Option<usize> {
    let start = zero.partition_point(|page| *page <= before);
    let end = zero.partition_point(|page| *page < after);
    let gap = usize::try_from(after.0 - before.0 - 1).ok()?;
    // A page that the packet names twice is counted twice: then nothing is bridged, or not all of it.
    (zero[start..end].windows(2).all(|pair| pair[0] < pair[1]) && end - start == gap).then_some(gap)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(normal: &[u64], zero: &[u64], room: usize) -> Result<Order, FormatErrorKind> {
        let list = |pages: &[u64]| pages.iter().copied().map(PageIndex).collect();
        Order::of(&PacketPages { block: 0, normal: list(normal), zero: list(zero) }, room)
    }

    fn places(order: &Order) -> Vec<(usize, u64)> {
        order.places.iter().map(|&(place, page)| (place, page.0)).collect()
    }

    #[test]
    fn pages_that_come_in_any_order_find_their_places() {
        let found = order(&[7, 2, 5], &[], 9).expect("three pages");
        assert_eq!(places(&found), [(0, 2), (1, 5), (2, 7)]);
        assert!(!found.is_wire);
        let mut room = [0; 6];
        for (slot, byte) in found.slots(&mut room).zip(*b"abc") {
            slot.fill(byte);
        }
        assert_eq!(&room, b"bbccaa");
        assert!(order(&[2, 5, 7], &[], 9).expect("three pages").is_wire);
    }

    #[test]
    fn zero_pages_of_the_packet_have_their_places_between_where_there_is_room() {
        let found = order(&[9, 2, 5, 7], &[4, 3, 6], 9).expect("four pages");
        assert_eq!(places(&found), [(0, 2), (3, 5), (5, 7), (6, 9)]);
        assert_eq!((found.len(), found.is_wire), (7, false));
        let mut room = [0; 7];
        for (slot, byte) in found.slots(&mut room).zip(*b"abcd") {
            slot.fill(byte);
        }
        assert_eq!(&room, b"b\0\0c\0da");
        // The second gap has no room, and the first one has.
        let found = order(&[2, 5, 7, 9], &[3, 4, 6], 6).expect("four pages");
        assert_eq!(places(&found), [(0, 2), (3, 5), (4, 7), (5, 9)]);
        assert!(!found.is_wire);
        // A page twice is not two pages.
        let found = order(&[2, 5], &[4, 4], 9).expect("two pages");
        assert_eq!(places(&found), [(0, 2), (1, 5)]);
    }

    #[test]
    fn a_packet_with_a_page_twice_is_refused() {
        let error = order(&[7, 2, 7], &[], 9).expect_err("7 comes twice");
        let text = "multifd packet with twice the page \"7\" is not supported";
        assert_eq!(error.to_string(), text);
    }
}
