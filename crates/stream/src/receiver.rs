//! Receives a stream, and writes its pages to a file: for `receive`, and for the routes of a save
//! that use streams.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};
use vmfile_engine::BackendInUse;
use vmfile_format::error::FormatErrorKind;
use vmfile_format::limits::DEVICE_STATE_LEN_MAX;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::decoder::{Event, StreamDecoder};
use vmfile_format::stream::device_state::DeviceState;
use vmfile_format::stream::{multifd, xbzrle};
use vmfile_format::{FormatError, PageBitmap, PageIndex, PageSize, RamLayout};
use vmfile_pages::control::Meter;
use vmfile_pages::draft::{Draft, FileLayout, StreamTail};
use vmfile_pages::lane::{Lane, Workers};
use vmfile_pages::page_writer::{Counts, PAGE_LEN_MIN, PageWriter};
use vmfile_pages::received_ram::ReceivedRam;

use crate::error::ChannelsError;
use crate::error::ReceiveError;
use crate::incoming::{StreamSource, WaitLimits};
use crate::listener::Listener;
use crate::multifd::{Channel, ChannelCounts, Connections, Rounds, StreamRounds};

/// Receives one stream into a draft.
#[derive(Debug)]
pub struct StreamReceiver<'a> {
    /// The file in the making.
    pub draft: &'a Draft,
    /// A thread for the stream and one for each channel.
    pub workers: Workers,
    /// How long to wait for the sender.
    pub limits: WaitLimits<'a>,
    /// How large the sender's pages are if the stream does not say it: 4 KiB for most targets of QEMU.
    pub page_size: PageSize,
}

/// What the stream contained; RAM is in the file already.
#[derive(Debug)]
pub struct Received {
    /// The configuration section: the machine type, and the uuid where there is one.
    pub configuration: Configuration,
    /// Where the pages are in the file.
    pub places: FileLayout,
    /// The pages of each block that have data.
    pub bitmaps: Vec<PageBitmap>,
    /// The back end that wrote them.
    pub backend: BackendInUse,
    /// How much was written.
    pub counts: Counts,
    /// The length of the stream and its channels, in bytes.
    pub stream_bytes: u64,
    state: DeviceState,
    /// The parts of sections other than "ram", and everything from the first device section to the end of
    /// the stream.
    devices: Vec<u8>,
}

impl Received {
    /// Returns what is no RAM in the stream, unchanged.
    pub fn tail(&self) -> StreamTail<'_> {
        let (sections, description) = self.devices.split_at(self.sections_len());
        StreamTail { sections, description, state: Some(&self.state) }
    }

    /// Returns the device state, and the bytes of its sections to be changed.
    pub fn device_state_mut(&mut self) -> (&DeviceState, &mut [u8]) {
        let len = self.sections_len();
        (&self.state, &mut self.devices[..len])
    }

    /// Returns the length of all sections that are not RAM, to EOF.
    fn sections_len(&self) -> usize {
        usize::try_from(self.state.sections_len()).expect("they are in memory")
    }

    /// Returns the run state in which the VM comes back: `running`, `paused`, ...
    pub fn run_state(&self) -> Option<&str> {
        self.state.run_state(self.tail().sections)
    }
}

/// What comes before the first page.
struct Head {
    configuration: Configuration,
    section_id: u32,
    ram: RamLayout,
}

impl StreamReceiver<'_> {
    /// Receives everything from `connections`; calls `at_end` when the last byte of the stream has
    /// come, before the last pages are written.
    pub fn run<E: From<ReceiveError> + Send>(
        self,
        connections: Connections,
        at_end: impl FnOnce() -> Result<(), E> + Send,
    ) -> Result<Received, E> {
        let Connections { stream, begun, channels, listener } = connections;
        let rounds = Rounds::new(self.limits, channels.len());
        let mut source = StreamSource::new(stream, &begun, self.limits, rounds.limits().1);
        let mut decoder = StreamDecoder::with_page_size(self.page_size);
        let head = head(&mut source, &mut decoder)?;
        let (configuration, section_id) = (&head.configuration, head.section_id);
        let places =
            FileLayout::new(configuration, head.ram.clone(), section_id, DEVICE_STATE_LEN_MAX)
                .map_err(ReceiveError::from)?;
        self.draft.reserve(places.tables()).map_err(ReceiveError::from)?;
        let file = self.draft.file().clone();
        let ram = ReceivedRam::new(file, places.blocks(), (places.hashes(), places.key()));
        let backend = self.workers.backend().clone();
        let meter = Meter::new(self.limits.control, head.ram.total_length());
        let channel = |channel| Channel::new(channel, &head.ram, &rounds);
        let shared = Shared { rounds: &rounds, meter: &meter, ram: &ram };
        let channels = channels.into_iter().map(channel).collect();
        let mut ended = None;
        let done = shared.receive(self.workers, channels, |writer| {
            let stream = StreamWork {
                ram: &head.ram,
                writer,
                rounds: StreamRounds::new(&rounds),
                meter: &meter,
                listener,
                devices: Vec::new(),
            };
            stream.receive(&mut source, &mut decoder, || ended = Some(at_end()))
        });
        rounds.into_result()?;
        ended.expect("nothing failed")?;
        let (devices, counts, channel_bytes) = done.expect("nothing failed");
        ram.empty_stale_places().map_err(ReceiveError::write_ram)?;
        Ok(Received {
            state: locate(&devices, decoder.offset(), section_id)?,
            bitmaps: ram.bitmaps(),
            configuration: head.configuration,
            places,
            backend,
            counts,
            stream_bytes: decoder.offset() + channel_bytes,
            devices,
        })
    }
}

/// What the stream and all channels share.
#[derive(Clone, Copy)]
struct Shared<'a> {
    rounds: &'a Rounds<'a>,
    meter: &'a Meter<'a>,
    ram: &'a ReceivedRam,
}

/// What one part has received.
enum ReceivedPart {
    /// By the stream: what follows RAM, and what was written.
    Stream(Vec<u8>, Counts),
    Channel(ChannelCounts),
}

impl<'a> Shared<'a> {
    /// Receives by the stream and by all channels, each in a thread; if one fails or panics, the
    /// others stop.
    ///
    /// Returns what follows RAM, what was written, and the bytes of the channels; `None` if
    /// something failed, which [`Rounds::into_result`] returns.
    fn receive(
        self,
        workers: Workers,
        channels: Vec<Channel<'a>>,
        stream: impl FnOnce(PageWriter<'a>) -> Result<(Vec<u8>, Counts), ReceiveError> + Send,
    ) -> Option<(Vec<u8>, Counts, u64)> {
        assert_eq!(workers.count(), channels.len() + 1, "a thread for each connection");
        let is_alone = channels.is_empty();
        let channels: Vec<_> = channels.into_iter().map(|it| Mutex::new(Some(it))).collect();
        let stream = Mutex::new(Some(stream));
        let work = |number: usize, lane: Lane| {
            let writer = PageWriter::new(self.ram, lane, is_alone);
            self.rounds.take_part(|| match number.checked_sub(1) {
                None => {
                    let received = take_work(&stream)(writer);
                    self.rounds.stream_ends();
                    received.map(|(devices, counts)| ReceivedPart::Stream(devices, counts))
                }
                Some(number) => {
                    let received =
                        take_work(&channels[number]).receive(writer, |bytes| self.meter.add(bytes));
                    let number = u8::try_from(number).expect("at most Channels::MAX");
                    received.map(ReceivedPart::Channel).map_err(|error| error.of_channel(number))
                }
            })
        };
        let received = workers.run(work);
        let received = received.map_err(|error| self.rounds.fail(ReceiveError::write_ram(error)));
        let (mut devices, mut counts, mut channel_bytes) = (None, Counts::default(), 0);
        for part in received.ok()? {
            match part? {
                ReceivedPart::Stream(bytes, pages) => {
                    devices = Some(bytes);
                    counts += pages;
                }
                ReceivedPart::Channel(channel) => {
                    counts += channel.pages;
                    channel_bytes += channel.stream_bytes;
                }
            }
        }
        Some((devices?, counts, channel_bytes))
    }
}

/// Takes the work of a thread, which runs once.
fn take_work<T>(part: &Mutex<Option<T>>) -> T {
    let part = part.lock().unwrap_or_else(PoisonError::into_inner).take();
    part.expect("each thread has its own number")
}

/// Processes the stream after its head.
struct StreamWork<'a> {
    ram: &'a RamLayout,
    writer: PageWriter<'a>,
    rounds: StreamRounds<'a>,
    meter: &'a Meter<'a>,
    /// Where all channels have connected once the first part of "ram" has ended.
    listener: Option<Listener>,
    /// What is no RAM.
    devices: Vec<u8>,
}

impl StreamWork<'_> {
    /// Takes pages until the stream ends; returns what is no RAM, and what was written.
    fn receive(
        mut self,
        source: &mut StreamSource<'_>,
        decoder: &mut StreamDecoder,
        at_end: impl FnOnce(),
    ) -> Result<(Vec<u8>, Counts), ReceiveError> {
        each_event(source, decoder, |event, offset| {
            let bytes = self.take(event, offset)?;
            self.meter.add(bytes);
            Ok(ControlFlow::Continue(()))
        })?;
        at_end();
        self.writer.drain().map_err(ReceiveError::write_ram)?;
        Ok((self.devices, self.writer.counts()))
    }

    /// Processes `event`; returns the length of its page in bytes, or 0.
    fn take(&mut self, event: Event<'_>, offset: u64) -> Result<u64, ReceiveError> {
        let page_of = |block: usize| self.ram.blocks()[block].page_size().bytes();
        let writer = &mut self.writer;
        match event {
            Event::Page { block, page, data } => {
                writer.page(block, page, data).map_err(ReceiveError::write_ram)?;
                return Ok(page_of(block));
            }
            Event::ZeroPage { block, page } => {
                writer.zero_page(block, page).map_err(ReceiveError::write_ram)?;
                return Ok(page_of(block));
            }
            Event::Xbzrle { block, page, delta } => {
                change(writer, (block, page), offset, |data| xbzrle::apply(delta, data))?;
            }
            Event::CompressedPage { block, page, zlib } => {
                change(writer, (block, page), offset, |data| inflate(zlib, data))?;
                return Ok(page_of(block));
            }
            Event::DeviceState(bytes) => self.devices.extend_from_slice(bytes),
            Event::MultifdFlush => {
                writer.drain().map_err(ReceiveError::write_ram)?;
                self.rounds.flush(offset)?;
            }
            Event::RoundEnd => {
                if let Some(listener) = self.listener.take() {
                    self.refuse_more_channels(&listener)?;
                }
                self.writer.drain().map_err(ReceiveError::write_ram)?;
                self.rounds.part_ends(offset)?;
            }
            Event::Command { .. } => {}
            Event::Configuration(_) | Event::RamBlocks { .. } => {
                unreachable!("they come once, at the beginning")
            }
        }
        Ok(0)
    }

    /// Returns an error if the sender has more channels than are expected.
    fn refuse_more_channels(&self, listener: &Listener) -> Result<(), ReceiveError> {
        match (listener.is_awaited()?, self.rounds.channels()) {
            (false, _) => Ok(()),
            (true, 0) => Err(ChannelsError::Unexpected.into()),
            (true, channels) => Err(ChannelsError::More { channels }.into()),
        }
    }
}

/// Reads what comes before the first page.
fn head(source: &mut StreamSource<'_>, decoder: &mut StreamDecoder) -> Result<Head, ReceiveError> {
    let mut found = None;
    let mut head = None;
    each_event(source, decoder, |event, _| {
        match event {
            Event::Configuration(configuration) => found = Some(configuration),
            Event::RamBlocks { section_id, ram } => {
                let configuration = found.take().expect("the configuration comes first");
                head = Some(Head { configuration, section_id, ram });
                return Ok(ControlFlow::Break(()));
            }
            _ => {}
        }
        Ok(ControlFlow::Continue(()))
    })?;
    // A stream that ends sooner is an error above: it has no device state.
    let head = head.expect("the block list comes before the devices");
    let small = head.ram.blocks().iter().find(|block| block.page_size().bytes() < PAGE_LEN_MIN);
    if let Some(block) = small {
        let (what, name) = ("page size", block.page_size().bytes().to_string());
        let kind = FormatErrorKind::Unsupported { what, name };
        return Err(ReceiveError::Stream(FormatError { offset: decoder.offset(), kind }));
    }
    Ok(head)
}

/// Calls `take` with each event and its offset, until it breaks off or the stream ends.
fn each_event(
    source: &mut StreamSource<'_>,
    decoder: &mut StreamDecoder,
    mut take: impl FnMut(Event<'_>, u64) -> Result<ControlFlow<()>, ReceiveError>,
) -> Result<(), ReceiveError> {
    loop {
        let offset = decoder.offset();
        let step = decoder.next(source.bytes()).map_err(refused)?;
        let (consumed, event) = (step.consumed, step.event);
        let is_dry = event.is_none();
        let flow = match event {
            Some(event) => take(event, offset)?,
            None => ControlFlow::Continue(()),
        };
        source.consume(consumed);
        if flow.is_break() {
            return Ok(());
        }
        let waited = |error| ReceiveError::waited(error, decoder.offset());
        if is_dry && !source.fill().map_err(waited)? {
            return decoder.finish().map_err(ReceiveError::Stream);
        }
    }
}

/// Converts an error of the decoder. If the first bytes are multifd's magic number, the sender uses
/// channels, but none are expected.
fn refused(error: FormatError) -> ReceiveError {
    match error.kind {
        FormatErrorKind::NotAStream { found: multifd::MAGIC } => ChannelsError::Unexpected.into(),
        _ => ReceiveError::Stream(error),
    }
}

/// Writes a page after `apply` has changed its current contents.
fn change(
    writer: &mut PageWriter<'_>,
    (block, page): (usize, PageIndex),
    offset: u64,
    apply: impl FnOnce(&mut [u8]) -> Result<(), FormatErrorKind>,
) -> Result<(), ReceiveError> {
    let mut data = writer.current(block, page).map_err(ReceiveError::write_ram)?;
    apply(&mut data).map_err(|kind| ReceiveError::Stream(FormatError { offset, kind }))?;
    writer.page(block, page, &data).map_err(ReceiveError::write_ram)
}

/// Expands a page that the capability `compress` has compressed (QEMU before 9.1).
fn inflate(zlib: &[u8], page: &mut [u8]) -> Result<(), FormatErrorKind> {
    let bad = || FormatErrorKind::Unsupported {
        what: "compressed page",
        name: "not a whole zlib stream of one page".to_owned(),
    };
    let mut inflater = Decompress::new(true);
    let status = inflater.decompress(zlib, page, FlushDecompress::Finish).map_err(|_| bad())?;
    let is_whole = status == Status::StreamEnd && inflater.total_out() == page.len() as u64;
    if is_whole { Ok(()) } else { Err(bad()) }
}

/// Locates the device state; refuses data after its end.
fn locate(devices: &[u8], stream_end: u64, ram_id: u32) -> Result<DeviceState, ReceiveError> {
    let offset = stream_end - devices.len() as u64;
    let state = DeviceState::locate(devices, offset, ram_id).map_err(ReceiveError::Stream)?;
    if state.stream_end == stream_end {
        return Ok(state);
    }
    let (what, name) = ("data after", "the end of the stream".to_owned());
    let kind = FormatErrorKind::Unsupported { what, name };
    Err(ReceiveError::Stream(FormatError { offset: state.stream_end, kind }))
}
