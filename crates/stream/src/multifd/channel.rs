//! One multifd channel: packets in, pages out.

use std::fmt;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, readv};
use vmfile_format::error::FormatErrorKind;
use vmfile_format::stream::multifd::{Compression, INIT_LEN, Packet, PacketPages, packet_len};
use vmfile_format::{FormatError, PageSize, RamBlock, RamLayout};
use vmfile_pages::page_writer::{Counts, PageWriter};

use super::inflater::Inflater;
use super::order::Order;
use super::rounds::Rounds;
use crate::error::ReceiveError;
use crate::incoming::{Activity, WaitError, WaitLimits};

/// A channel whose init packet was read.
pub struct Channel<'a> {
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

/// What a channel has received.
#[derive(Clone, Copy, Debug)]
pub struct ChannelCounts {
    /// The pages.
    pub pages: Counts,
    /// The length of the channel's data, in bytes.
    pub stream_bytes: u64,
}

impl<'a> Channel<'a> {
    /// Returns the channel of `fd`, which must not block, for pages of `ram`.
    pub fn new(fd: OwnedFd, ram: &'a RamLayout, rounds: &'a Rounds<'a>) -> Channel<'a> {
        let page_size = ram.blocks().first().map_or(PageSize::KIB_4, RamBlock::page_size);
        let (offset, inflater, data) = (INIT_LEN as u64, None, Vec::new());
        Channel { fd, ram, page_size, rounds, offset, inflater, data }
    }

    /// Receives until the channel ends; calls `done` with the length of each packet's pages, in
    /// bytes.
    pub fn receive(
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
        let (limits, activity) = self.rounds.limits();
        limits.check(activity).map_err(|error| ReceiveError::waited(error, self.offset))?;
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

    /// Reads the data of a packet's pages, which come next, and writes the pages.
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
            Compression::None => {
                let needed = pages.normal.len() * page_len;
                let mut slices: Vec<_> = match order.is_wire {
                    true => vec![IoSliceMut::new(room)],
                    false => order.slots(room).map(IoSliceMut::new).collect(),
                };
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

    /// Fills `slices`; returns how many bytes came: fewer only at the end of the channel.
    fn read(&mut self, slices: &mut [IoSliceMut<'_>]) -> Result<usize, ReceiveError> {
        let (limits, activity) = self.rounds.limits();
        let found = read_all(self.fd.as_fd(), slices, limits, activity)
            .map_err(|error| ReceiveError::waited(error, self.offset))?;
        self.offset += found as u64;
        Ok(found)
    }

    /// Returns an error if the channel ended inside `field`.
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

/// Fills `slices` from `fd`, which must not block; returns how many bytes came: fewer only at the
/// end.
pub(crate) fn read_all(
    fd: BorrowedFd<'_>,
    mut slices: &mut [IoSliceMut<'_>],
    limits: &WaitLimits<'_>,
    activity: &Activity,
) -> Result<usize, WaitError> {
    let mut found = 0;
    while !slices.is_empty() {
        match readv(fd, slices) {
            Ok(0) => break,
            Ok(len) => {
                activity.note();
                found += len;
                IoSliceMut::advance_slices(&mut slices, len);
            }
            Err(Errno::AGAIN) => limits.wait(fd, activity)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(WaitError::Io(errno.into())),
        }
    }
    Ok(found)
}
