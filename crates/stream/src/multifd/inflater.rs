//! The compressed data of a channel: one stream, of which each packet has a piece.

use flate2::{Decompress, FlushDecompress};
use vmfile_format::error::FormatErrorKind;
use vmfile_format::stream::multifd::Compression;
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};

/// The longest zstd window that is accepted, as a power of two: that of level 20, the highest that
/// QEMU allows. Each channel may need that much memory: 32 MiB.
const WINDOW_LOG_MAX: u32 = 25;

/// Expands the data of a channel.
pub(crate) enum Inflater {
    Zlib(Decompress),
    Zstd(Decoder<'static>),
}

/// How many bytes of the input were taken, and how many were put out.
type Step = (usize, usize);

impl Inflater {
    /// Returns an inflater for data with this compression; `None` if they are not compressed.
    pub(crate) fn new(compression: Compression) -> Result<Option<Inflater>, FormatErrorKind> {
        Ok(match compression {
            Compression::None => None,
            Compression::Zlib => Some(Inflater::Zlib(Decompress::new(true))),
            Compression::Zstd => {
                let mut decoder = Decoder::new().map_err(|_| bad("zstd"))?;
                let limit = DParameter::WindowLogMax(WINDOW_LOG_MAX);
                decoder.set_parameter(limit).map_err(|_| bad("zstd"))?;
                Some(Inflater::Zstd(decoder))
            }
        })
    }

    /// Returns whether this expands data with `compression`.
    pub(crate) fn is_for(&self, compression: Compression) -> bool {
        match self {
            Inflater::Zlib(_) => compression == Compression::Zlib,
            Inflater::Zstd(_) => compression == Compression::Zstd,
        }
    }

    /// Expands `data`, the next piece of the stream, which must fill `pages` and no more.
    pub(crate) fn fill<'a>(
        &mut self,
        data: &[u8],
        pages: impl Iterator<Item = &'a mut [u8]>,
    ) -> Result<(), FormatErrorKind> {
        let mut rest = data;
        for page in pages {
            let mut filled = 0;
            while filled < page.len() {
                let (taken, put) = self.step(rest, &mut page[filled..])?;
                if (taken, put) == (0, 0) {
                    return Err(self.bad());
                }
                rest = &rest[taken..];
                filled += put;
            }
        }
        // The rest of the packet flushes the compressed stream, and must expand to nothing.
        loop {
            let (taken, put) = self.step(rest, &mut [0])?;
            if put > 0 || taken == 0 && !rest.is_empty() {
                return Err(self.bad());
            }
            rest = &rest[taken..];
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, FormatErrorKind> {
        let step = match self {
            Inflater::Zlib(zlib) => {
                let before = (zlib.total_in(), zlib.total_out());
                let status = zlib.decompress(input, output, FlushDecompress::Sync);
                let grown = |now: u64, before: u64| usize::try_from(now - before).ok();
                let taken = grown(zlib.total_in(), before.0);
                status.ok().and(taken.zip(grown(zlib.total_out(), before.1)))
            }
            Inflater::Zstd(zstd) => {
                let mut from = InBuffer::around(input);
                let mut into = OutBuffer::around(output);
                let status = zstd.run(&mut from, &mut into);
                status.ok().map(|_| (from.pos(), into.pos()))
            }
        };
        step.ok_or_else(|| self.bad())
    }

    fn bad(&self) -> FormatErrorKind {
        bad(match self {
            Inflater::Zlib(_) => "zlib",
            Inflater::Zstd(_) => "zstd",
        })
    }
}

fn bad(name: &str) -> FormatErrorKind {
    let name = format!("{name} data that do not expand to exactly its pages");
    FormatErrorKind::Unsupported { what: "multifd packet with", name }
}
