//! Sends a stream with multifd channels beside it: pages have connections of their own.
//!
//! ```text
//! stream      header, START  | zero pages | END | device sections, description
//! channels    init           | pages      |     |
//!                            SYNC         SYNC  SYNC
//! ```
//!
//! END and what follows it are sent only after every channel has sent its last page. If a channel
//! meets a page that differs from its hash, the stream ends before END, and QEMU refuses it.
//!
//! The stream connects first, and each connection sends its first bytes at once: QEMU 7.2 and later
//! read them, to tell a stream from a channel, before they accept the next connection. Older
//! versions take the first connection for the stream. Where a part of "ram" ends, QEMU waits for a
//! SYNC on every channel, so that no page comes before its block has its length.
//!
//! Zero pages go into the stream. Packets can name them since QEMU 9.0, but QEMU does not write
//! such a page the first time: it takes its RAM to be zero already.

use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmfile_engine::{BackendInUse, beside};
use vmfile_format::stream::multifd::{Compression, Init, PACKET_PAGES_LEN, Packet, PacketPages};
use vmfile_format::{PageIndex, RamLayout};
use vmfile_pages::PagesError;
use vmfile_pages::control::{Control, Progress};
use vmfile_pages::lane::{Lane, on_lanes};

use crate::channels::Channels;
use crate::contents::{StreamContents, Window};
use crate::error::{SendError, reading};
use crate::outlet::Outlet;
use crate::pages_in_order::PagesInOrder;
use crate::stream_writer::{COUNTED_PARTS, Parts, Source, StreamWriter};

/// Sends all of `contents` over one connection and `channels` more, each of which `connect` makes;
/// returns the back end and how many bytes were sent.
///
/// `parts` says how this machine's QEMU waits for its channels.
///
/// # Errors
///
/// Returns the error of the connection that failed first.
pub fn write_channels(
    contents: &StreamContents<'_>,
    source: &Source,
    connect: &dyn Fn() -> Result<OwnedFd, SendError>,
    (channels, parts): (Channels, Parts),
    control: &Control<'_>,
) -> Result<(BackendInUse, u64), SendError> {
    let failed = AtomicBool::new(false);
    let is_stopped = || control.is_stopped() || failed.load(Ordering::Relaxed);
    let open = || Outlet::new(connect()?, &is_stopped).map_err(SendError::Descriptor);
    let mut outlet = open()?;
    let mut counts = vec![outlet.sent()];
    let stream = StreamWriter::begin(contents, &mut outlet, parts)?;
    let mut outlets = Vec::new();
    for channel in (0..channels.count().get()).rev() {
        let mut outlet = open()?;
        outlet.send(&Init { uuid: uuid(contents), channel }.encode())?;
        counts.push(outlet.sent());
        outlets.push(outlet);
    }
    // The other connections then end with `Stopped`; this error is the cause.
    let fail = |_: &SendError| failed.store(true, Ordering::Relaxed);
    let senders = Senders::new(contents, outlets, control);
    let width = (source.io, usize::from(channels.count().get()));
    let work = |lane| senders.work(lane).inspect_err(fail);
    let both = beside(
        || zero_pages(stream).inspect_err(fail),
        |_| {
            on_lanes(&source.file, width, work)
                .map_err(|source| reading(source).into())
                .inspect_err(fail)
        },
    );
    let (streamed, sent) = both.map_err(SendError::Thread)?;
    let (results, backend) = sent?;
    let (stream, error) = match streamed {
        Ok(stream) => (Some(stream), None),
        Err(error) => (None, Some(error)),
    };
    let errors = results.into_iter().filter_map(Result::err).chain(error);
    if let Some(error) =
        errors.min_by_key(|error| matches!(error, SendError::Pages(PagesError::Stopped)))
    {
        return Err(error);
    }
    stream.expect("it did not fail").finish()?;
    let sent = counts.iter().map(|count| count.load(Ordering::Relaxed)).sum();
    Ok((backend, sent))
}

/// Returns the VM's uuid, by which QEMU knows its channels; zeros if it has none.
fn uuid(contents: &StreamContents<'_>) -> [u8; 16] {
    let manifest = contents.snapshot().manifest();
    let text = manifest.and_then(|manifest| manifest.meta.vm.uuid.as_deref());
    let known = text.and_then(parse_uuid).or(contents.configuration().uuid);
    known.unwrap_or_default()
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    let number = u128::from_str_radix(&digits, 16).ok()?;
    (digits.len() == 32).then(|| number.to_be_bytes())
}

/// Writes the zero pages; the caller writes what follows RAM.
fn zero_pages<'w, 'o>(mut stream: StreamWriter<'w, 'o>) -> Result<StreamWriter<'w, 'o>, SendError> {
    for window in stream.contents().windows() {
        stream.pages(&window, None)?;
    }
    Ok(stream)
}

/// What all channels share.
struct Senders<'a, I> {
    contents: &'a StreamContents<'a>,
    ram: RamLayout,
    outlets: Mutex<Vec<Outlet<'a>>>,
    windows: Mutex<I>,
    /// Packets are counted over all channels.
    packets: AtomicU64,
    done_bytes: AtomicU64,
    total_bytes: u64,
    control: &'a Control<'a>,
}

impl<'a> Senders<'a, ()> {
    fn new(
        contents: &'a StreamContents<'a>,
        outlets: Vec<Outlet<'a>>,
        control: &'a Control<'a>,
    ) -> Senders<'a, impl Iterator<Item = Window> + Send + use<'a>> {
        Senders {
            contents,
            ram: contents.snapshot().structure().ram(),
            outlets: Mutex::new(outlets),
            windows: Mutex::new(contents.windows()),
            packets: AtomicU64::new(0),
            done_bytes: AtomicU64::new(0),
            total_bytes: contents.data().1,
            control,
        }
    }
}

impl<I: Iterator<Item = Window> + Send> Senders<'_, I> {
    /// Sends windows on one channel until none is left, and its SYNCs.
    fn work(&self, lane: Lane) -> Result<(), SendError> {
        let outlet = self.outlets.lock().expect("no panic").pop();
        let mut outlet = outlet.expect("as many lanes as channels");
        let next = std::iter::from_fn(|| self.windows.lock().expect("no panic").next());
        let mut pages = PagesInOrder::new(self.contents, lane, next);
        self.sync(&mut outlet, 1)?;
        while let Some((window, read)) = pages.next()? {
            self.send_window(&mut outlet, &window, read.as_ref())?;
            let len = self.contents.data_len(&window);
            let done_bytes = self.done_bytes.fetch_add(len, Ordering::Relaxed) + len;
            self.control.report(Progress { done_bytes, total_bytes: self.total_bytes });
        }
        self.sync(&mut outlet, COUNTED_PARTS - 1)
    }

    fn sync(&self, outlet: &mut Outlet<'_>, times: usize) -> Result<(), SendError> {
        for _ in 0..times {
            outlet.send(&self.packet(None, 0).encode(&self.ram))?;
        }
        Ok(())
    }

    fn packet(&self, pages: Option<PacketPages>, data_len: u32) -> Packet {
        let number = self.packets.fetch_add(1, Ordering::Relaxed);
        Packet { sync: pages.is_none(), compression: Compression::None, number, pages, data_len }
    }

    /// Sends the pages with data of a window; `bytes` are the window's bytes, from the first such
    /// page to the last.
    fn send_window(
        &self,
        outlet: &mut Outlet<'_>,
        window: &Window,
        bytes: &[u8],
    ) -> Result<(), SendError> {
        let block = &self.contents.blocks[window.block];
        let page_len = block.placed.block.page_size().bytes();
        let pages_max = usize::try_from(PACKET_PAGES_LEN / page_len).expect("few");
        let runs = block.bitmap.runs_within(window.pages);
        let pages: Vec<u64> = runs.flat_map(|run| run.start.0..run.end.0).collect();
        for pages in pages.chunks(pages_max) {
            let place = |page: u64| {
                let start = usize::try_from(page * page_len - window.bytes.start);
                start.expect("inside a window")
            };
            let runs = runs_of(pages).map(|run| place(run.start)..place(run.end));
            let normal = pages.iter().copied().map(PageIndex).collect();
            let pages_len = u32::try_from(pages.len() as u64 * page_len).expect("512 KiB");
            let listed = PacketPages { block: block.index, normal, zero: Vec::new() };
            let header = self.packet(Some(listed), pages_len).encode(&self.ram);
            let mut slices = vec![IoSlice::new(&header)];
            slices.extend(runs.map(|run| IoSlice::new(&bytes[run])));
            outlet.send_all(&mut slices)?;
        }
        Ok(())
    }
}

/// Returns the runs of consecutive numbers.
fn runs_of(numbers: &[u64]) -> impl Iterator<Item = Range<u64>> + '_ {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    runs.map(|run| run[0]..run[run.len() - 1] + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_sixteen_bytes_in_the_order_of_its_digits() {
        let uuid = parse_uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        assert_eq!(uuid[..3], [0x00, 0x11, 0x22]);
        assert_eq!(uuid[15], 0xff);
        assert_eq!(parse_uuid("0011"), None);
        assert_eq!(parse_uuid(""), None);
    }

    #[test]
    fn consecutive_pages_are_one_run() {
        assert_eq!(runs_of(&[1, 2, 3, 7, 9, 10]).collect::<Vec<_>>(), [1..4, 7..8, 9..11]);
        assert_eq!(runs_of(&[]).count(), 0);
    }
}
