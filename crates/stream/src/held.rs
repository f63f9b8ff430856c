//! A stream that is read up to its first page, and no further: QEMU then waits for room, with every
//! page but the first few still to be sent.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};
use vmfile_engine::queued_len;
use vmfile_format::stream::decoder::{EVENT_LEN_MAX, Event, StreamDecoder};
use vmfile_format::{PageIndex, RamLayout};
use vmfile_pages::control::Control;

use crate::error::HeldError;

/// How much room the socket has: the kernel's smallest (Linux makes 4608 bytes of it).
const ROOM: usize = 1;

/// How long QEMU may take until it waits for room. It has a few pages to send, and needs a processor.
const FILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a wait looks again.
const LOOK: Duration = Duration::from_micros(50);

/// How often a wait for the sender checks whether it has to stop.
const STOP_INTERVAL: Duration = Duration::from_millis(20);

/// Our end of a connection over which QEMU sends a VM, and what has come so far.
#[derive(Debug)]
pub struct HeldStream {
    socket: OwnedFd,
    decoder: StreamDecoder,
    ram: Option<RamLayout>,
    /// Bytes that were taken from the socket with the first page, and not decoded then.
    taken: Vec<u8>,
    /// How many of these, and of the bytes that lie in the socket after them, have been decoded.
    decoded: usize,
    pages: BTreeSet<(usize, PageIndex)>,
}

impl HeldStream {
    /// Makes a connection; returns our end and the sender's, which has as little room as possible. The
    /// stream ends when the last duplicate of the sender's end is closed.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn pair() -> io::Result<(HeldStream, OwnedFd)> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        sockopt::set_socket_send_buffer_size(&theirs, ROOM)?;
        let held = HeldStream {
            socket: ours.into(),
            decoder: StreamDecoder::new(),
            ram: None,
            taken: Vec::new(),
            decoded: 0,
            pages: BTreeSet::new(),
        };
        Ok((held, theirs.into()))
    }

    /// Reads everything before the first page, and waits until that page has come. Returns the
    /// sender's RAM blocks.
    ///
    /// # Errors
    ///
    /// Returns [`HeldError`] if the stream ends, is not understood, has no page, or if the time is
    /// over.
    pub fn wait_for_page(
        &mut self,
        limit: Duration,
        control: &Control<'_>,
    ) -> Result<&RamLayout, HeldError> {
        let deadline = Instant::now() + limit;
        while self.pages.is_empty() {
            if control.is_stopped() {
                return Err(HeldError::Stopped);
            }
            if Instant::now() >= deadline {
                return Err(HeldError::TimedOut(limit));
            }
            self.wait()?;
            self.look()?;
        }
        self.ram.as_ref().ok_or(HeldError::NoPages)
    }

    /// Waits until the socket is full, so that the sender waits for room; `theirs` is a duplicate of the
    /// sender's end. Returns the pages that may have come as a whole: the block's place in the block
    /// list, and the page. The socket has room for a few of them only.
    ///
    /// # Errors
    ///
    /// [`HeldError::NotFull`] if the sender does not fill the socket within five seconds; otherwise as
    /// for [`HeldStream::wait_for_page`].
    pub fn wait_until_full(
        &mut self,
        theirs: BorrowedFd<'_>,
        control: &Control<'_>,
    ) -> Result<&BTreeSet<(usize, PageIndex)>, HeldError> {
        let deadline = Instant::now() + FILL_TIMEOUT;
        while !is_full(theirs).map_err(HeldError::Read)? {
            if control.is_stopped() {
                return Err(HeldError::Stopped);
            }
            if Instant::now() >= deadline {
                return Err(HeldError::NotFull(FILL_TIMEOUT));
            }
            thread::sleep(LOOK);
        }
        self.look()?;
        // The kernel counts a piece before the piece can be read (Linux 6.18, `unix_stream_sendmsg`): it
        // may be the end of one more page.
        let next = self.pages.last().and_then(|&last| self.after(last));
        self.pages.extend(next);
        Ok(&self.pages)
    }

    /// Returns the page that QEMU sends after this one.
    fn after(&self, (block, page): (usize, PageIndex)) -> Option<(usize, PageIndex)> {
        let blocks = self.ram.as_ref()?.blocks();
        if page.0 + 1 < blocks.get(block)?.page_count().0 {
            Some((block, PageIndex(page.0 + 1)))
        } else {
            blocks.get(block + 1).map(|_| (block + 1, PageIndex(0)))
        }
    }

    /// Looks whether further pages have come; returns whether there are any.
    ///
    /// # Errors
    ///
    /// As for [`HeldStream::wait_for_page`].
    pub fn has_more(&mut self) -> Result<bool, HeldError> {
        let before = self.pages.len();
        self.look()?;
        Ok(self.pages.len() > before)
    }

    /// Tells whether the sender has ended the stream. A QEMU whose migration ends, for whatever reason,
    /// does that before it changes anything else; the bytes that lie in the socket stay there.
    ///
    /// # Errors
    ///
    /// [`HeldError::Cut`] if it has; or the kernel's error.
    pub fn still_held(&self) -> Result<(), HeldError> {
        if has_ended(self.socket.as_fd()).map_err(HeldError::Read)? {
            return Err(HeldError::Cut);
        }
        Ok(())
    }

    /// Waits for a byte that has not been decoded, if none lies in the socket.
    fn wait(&self) -> Result<(), HeldError> {
        let interval = Timespec::try_from(STOP_INTERVAL).expect("a short time");
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&interval)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(HeldError::Read(errno.into())),
        }
    }

    /// Decodes what lies in the socket. Takes it from there up to the first page: the socket has no room
    /// for that page if other bytes stand before it in one piece.
    fn look(&mut self) -> Result<(), HeldError> {
        let is_first = self.pages.is_empty();
        let flags =
            if is_first { RecvFlags::DONTWAIT } else { RecvFlags::PEEK | RecvFlags::DONTWAIT };
        let mut bytes = self.taken.clone();
        let start = bytes.len();
        bytes.resize(start + EVENT_LEN_MAX, 0);
        match recv(&self.socket, &mut bytes[start..], flags) {
            Ok((_, 0)) => return Err(HeldError::Ended),
            Ok((_, len)) => bytes.truncate(start + len),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(errno) => return Err(HeldError::Read(errno.into())),
        }
        loop {
            let step = self.decoder.next(&bytes[self.decoded..])?;
            self.decoded += step.consumed;
            match step.event {
                Some(Event::RamBlocks { ram, .. }) => self.ram = Some(ram),
                Some(Event::Page { block, page, .. } | Event::ZeroPage { block, page }) => {
                    self.pages.insert((block, page));
                }
                Some(Event::DeviceState(_)) => return Err(HeldError::NoPages),
                Some(_) => {}
                None => break,
            }
        }
        if is_first {
            bytes.drain(..self.decoded);
            (self.taken, self.decoded) = (bytes, 0);
        }
        Ok(())
    }
}

/// Tells whether the other end of a connection was shut down or closed.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn has_ended(ours: BorrowedFd<'_>) -> io::Result<bool> {
    let at_once = Timespec::default();
    let mut ends = [PollFd::new(&ours, PollFlags::RDHUP)];
    match poll(&mut ends, Some(&at_once)) {
        Ok(_) => Ok(!ends[0].revents().is_empty()),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a sender by this end has to wait before it can add a byte.
fn is_full(theirs: BorrowedFd<'_>) -> io::Result<bool> {
    let room = sockopt::socket_send_buffer_size(theirs)?;
    Ok(queued_len(theirs)? >= room as u64)
}

impl AsFd for HeldStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<HeldStream> for OwnedFd {
    fn from(held: HeldStream) -> OwnedFd {
        held.socket
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use vmfile_format::stream::configuration::Configuration;
    use vmfile_format::stream::encoder::RamSection;
    use vmfile_format::{PageSize, RamBlock};

    use super::*;

    /// The head and the first page in one piece had no room in the socket, and both sides waited while a
    /// vCPU stood still.
    #[test]
    fn a_first_page_that_comes_with_the_head_is_found_whatever_the_head_is_long() {
        for roms in 0..50 {
            let machine = "pc".to_owned();
            let block = |name: String, pages: u64| {
                RamBlock::new(name, pages << 12, PageSize::KIB_4).unwrap()
            };
            let mut blocks = vec![block("ram".to_owned(), 64)];
            blocks.extend((0..roms).map(|rom| block(format!("/rom@etc/number/{rom}"), 1)));
            let ram = RamLayout::new(blocks.clone()).unwrap();
            let block = &blocks[0];
            let mut bytes = Configuration { machine, ..Configuration::default() }.encode();
            let mut section = RamSection::begin(&mut bytes, 1, &ram);
            for page in 0..64 {
                section.page_header(&mut bytes, (0, block), PageIndex(page));
                bytes.extend([7; 4096]);
            }
            let (mut held, theirs) = HeldStream::pair().unwrap();
            let sent = theirs.try_clone().unwrap();
            let sender = thread::spawn(move || File::from(theirs).write_all(&bytes));
            let limit = Duration::from_secs(20);
            assert_eq!(*held.wait_for_page(limit, &Control::none()).unwrap(), ram);
            let pages = held.wait_until_full(sent.as_fd(), &Control::none()).unwrap().len();
            assert!((2..9).contains(&pages), "{pages} pages, {roms} ROMs");
            assert!(!held.has_more().unwrap());
            drop(held);
            assert!(sender.join().unwrap().is_err(), "the sender waited for room");
        }
    }

    /// vmfile kept a duplicate of the sender's end, and waited for ten minutes for a QEMU that had ended.
    #[test]
    fn a_sender_that_ends_before_its_first_page_is_noticed() {
        let (mut held, theirs) = HeldStream::pair().unwrap();
        let machine = "pc".to_owned();
        let head = Configuration { machine, ..Configuration::default() }.encode();
        File::from(theirs).write_all(&head).unwrap();
        let limit = Duration::from_secs(20);
        let error = held.wait_for_page(limit, &Control::none()).unwrap_err();
        assert!(matches!(error, HeldError::Ended), "{error}");
    }

    /// A sender that did not get a processor for 300 us was taken to wait, and a live save failed when it
    /// sent the next page.
    #[test]
    fn a_sender_that_is_slow_is_not_taken_to_wait() {
        let block = RamBlock::new("ram".to_owned(), 64 << 12, PageSize::KIB_4).unwrap();
        let ram = RamLayout::new(vec![block.clone()]).unwrap();
        let machine = "pc".to_owned();
        let mut head = Configuration { machine, ..Configuration::default() }.encode();
        let mut section = RamSection::begin(&mut head, 1, &ram);
        let (mut held, theirs) = HeldStream::pair().unwrap();
        let sent = theirs.try_clone().unwrap();
        let sender = thread::spawn(move || {
            let mut socket = File::from(theirs);
            socket.write_all(&head)?;
            for page in 0..64 {
                let mut bytes = Vec::new();
                section.zero_page(&mut bytes, (0, &block), PageIndex(page));
                thread::sleep(Duration::from_millis(5));
                socket.write_all(&bytes)?;
            }
            io::Result::Ok(())
        });
        held.wait_for_page(Duration::from_secs(20), &Control::none()).unwrap();
        held.wait_until_full(sent.as_fd(), &Control::none()).unwrap();
        thread::sleep(Duration::from_millis(30));
        assert!(!held.has_more().unwrap());
        drop(held);
        assert!(sender.join().unwrap().is_err(), "the sender waited for room");
    }
}
