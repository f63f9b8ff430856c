//! A stream in, pages and devices out: the work of a receive, whoever asked for it.

use std::ops::ControlFlow;
use std::os::fd::OwnedFd;

use flate2::{Decompress, FlushDecompress, Status};
use vmfile_engine::{Backend, BackendInUse};
use vmfile_format::error::FormatErrorKind;
use vmfile_format::limits::DEVICE_STATE_LEN_MAX;
use vmfile_format::stream::configuration::Configuration;
use vmfile_format::stream::decoder::{Event, StreamDecoder};
use vmfile_format::stream::device_state::DeviceState;
use vmfile_format::stream::xbzrle;
use vmfile_format::{FormatError, PageBitmap, PageIndex, RamLayout};

use crate::control::Progress;
use crate::draft::{Draft, Places, Tail};
use crate::jobs::Jobs;
use crate::page_writer::{Counts, PAGE_LEN_MIN, PageWriter, ReceivedRam};
use crate::receive::ReceiveError;
use crate::source::stream::{Patience, StreamSource};

/// A receive at work.
#[derive(Debug)]
pub(crate) struct StreamReceiver<'a> {
    pub(crate) draft: &'a Draft,
    pub(crate) io: Backend,
    pub(crate) patience: Patience<'a>,
}

/// What came; RAM is in the file already.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) configuration: Configuration,
    pub(crate) places: Places,
    pub(crate) bitmaps: Vec<PageBitmap>,
    pub(crate) backend: BackendInUse,
    pub(crate) counts: Counts,
    pub(crate) stream_bytes: u64,
    state: DeviceState,
    /// From the first device section to the end of the stream.
    devices: Vec<u8>,
}

impl Received {
    /// Returns what follows RAM, byte for byte as it came.
    pub(crate) fn tail(&self) -> Tail<'_> {
        let len = usize::try_from(self.state.end - self.state.start).expect("it is in memory");
        let (sections, description) = self.devices.split_at(len);
        Tail { sections, description }
    }

    /// Writes how the VM is to come back; returns whether there is room.
    pub(crate) fn set_run_state(&mut self, state: &str) -> bool {
        self.state.set_run_state(&mut self.devices, state)
    }

    /// Returns whether the VM runs when it comes back: `running`, `paused`, ...
    pub(crate) fn run_state(&self) -> Option<&str> {
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
    /// Receives all of `stream`; `at_end` is called when its last byte has come, before the last
    /// pages are on the disk.
    pub(crate) fn run<E: From<ReceiveError>>(
        &self,
        stream: OwnedFd,
        at_end: impl FnOnce() -> Result<(), E>,
    ) -> Result<Received, E> {
        let mut source = StreamSource::new(stream, self.patience);
        let mut decoder = StreamDecoder::new();
        let head = head(&mut source, &mut decoder)?;
        let Head { configuration, section_id, ram: layout } = head;
        let places = Places::new(&configuration, layout.clone(), section_id, DEVICE_STATE_LEN_MAX)
            .map_err(ReceiveError::from)?;
        self.draft.reserve(places.tables()).map_err(ReceiveError::from)?;
        let file = self.draft.file().clone();
        let ram = ReceivedRam::new(file, places.blocks(), places.hashes());
        let one = Jobs::new(1).expect("1 is a number of jobs");
        let (mut writer, backend) =
            PageWriter::open(&ram, self.io, one).map_err(ReceiveError::write_ram)?;
        let devices = self.pages(&mut source, &mut decoder, &layout, &mut writer)?;
        at_end()?;
        writer.drain().map_err(ReceiveError::write_ram)?;
        ram.empty_stale_places().map_err(ReceiveError::write_ram)?;
        let state = locate(&devices, decoder.offset(), section_id)?;
        Ok(Received {
            configuration,
            bitmaps: ram.bitmaps(),
            places,
            backend,
            counts: writer.counts(),
            stream_bytes: decoder.offset(),
            state,
            devices,
        })
    }

    /// Takes pages until the stream ends; returns what follows them.
    fn pages(
        &self,
        source: &mut StreamSource<'_>,
        decoder: &mut StreamDecoder,
        ram: &RamLayout,
        writer: &mut PageWriter<'_>,
    ) -> Result<Vec<u8>, ReceiveError> {
        let mut devices = Vec::new();
        let total_bytes = ram.total_length();
        let mut done_bytes = 0;
        each_event(source, decoder, |event, offset| {
            let page_of = |block: usize| ram.blocks()[block].page_size().bytes();
            match event {
                Event::Page { block, page, data } => {
                    writer.page(block, page, data).map_err(ReceiveError::write_ram)?;
                    done_bytes += page_of(block);
                }
                Event::ZeroPage { block, page } => {
                    writer.zero_page(block, page).map_err(ReceiveError::write_ram)?;
                    done_bytes += page_of(block);
                }
                Event::Xbzrle { block, page, delta } => {
                    let apply = |data: &mut [u8]| xbzrle::apply(delta, data);
                    change(writer, (block, page), offset, apply)?;
                }
                Event::CompressedPage { block, page, zlib } => {
                    let apply = |data: &mut [u8]| inflate(zlib, data);
                    change(writer, (block, page), offset, apply)?;
                    done_bytes += page_of(block);
                }
                Event::DeviceState(bytes) => devices.extend_from_slice(bytes),
                Event::MultifdFlush => return Err(multifd_refused(offset)),
                Event::RoundEnd | Event::Command { .. } => {}
                Event::Configuration(_) | Event::RamBlocks { .. } => {
                    unreachable!("they come once, at the beginning")
                }
            }
            // A guest that runs sends more than its RAM.
            let done_bytes = done_bytes.min(total_bytes);
            self.patience.control.report(Progress { done_bytes, total_bytes });
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(devices)
    }
}

/// Takes what comes before the first page.
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

/// Hands all events to `take` with their offsets, until it breaks off or the stream ends.
fn each_event(
    source: &mut StreamSource<'_>,
    decoder: &mut StreamDecoder,
    mut take: impl FnMut(Event<'_>, u64) -> Result<ControlFlow<()>, ReceiveError>,
) -> Result<(), ReceiveError> {
    loop {
        let offset = decoder.offset();
        let step = decoder.next(source.bytes()).map_err(ReceiveError::Stream)?;
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

/// Writes a page that is told by how it differs from what it was.
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

/// Expands a page that the capability `compress` made smaller (QEMU before 9.1).
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

fn multifd_refused(offset: u64) -> ReceiveError {
    let kind = FormatErrorKind::Unsupported { what: "capability", name: "multifd".to_owned() };
    ReceiveError::Stream(FormatError { offset, kind })
}

/// Locates the devices, which end where the stream does.
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
