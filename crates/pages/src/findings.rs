//! What a check finds.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use vmfile_format::PageIndex;
use vmfile_format::mapped_ram::PlacedBlock;

/// How many findings are listed; all are counted.
const FINDINGS_MAX: usize = 1000;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// The file, if it is one below the file that is checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The RAM block, where it concerns one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block: Option<String>,
    /// The page's number in its block, where it concerns one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page: Option<u64>,
    /// The part of the file, where it concerns one that is no page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section: Option<String>,
    /// File offset of the first byte concerned.
    pub offset: u64,
    /// The kernel's error, where it refused to read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Finding {
    fn of_page(kind: FindingKind, block: &PlacedBlock, page: u64) -> Finding {
        let offset = block.page_offset(PageIndex(page)).unwrap_or(u64::MAX);
        let block = Some(block.block.name().to_owned());
        let (file, section, error) = (None, None, None);
        Finding { kind, file, block, page: Some(page), section, offset, error }
    }
}

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FindingKind {
    /// A page, or its recorded hash, is not what was written.
    PageHash,
    /// A zero page's place holds other bytes.
    StalePage,
    /// A zero page has a hash.
    StrayHash,
    /// The base has another page, or none, where a thin file says that its own page is that of the base.
    BasePage,
    /// A part with a checksum is not what was written.
    Checksum,
    /// Bytes that belong to nothing are not zero.
    Padding,
    /// Bytes follow the last byte of the stream that QEMU wrote.
    TrailingBytes,
    /// The manifest and the bitmap disagree on how many pages of a block have data.
    PageCount,
    /// The bytes cannot be read.
    Unreadable,
}

/// Findings, of which only the first are kept.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) list: Vec<Finding>,
    pub(crate) total: u64,
}

impl Findings {
    pub(crate) fn push(&mut self, finding: Finding) {
        self.total += 1;
        if self.list.len() < FINDINGS_MAX {
            self.list.push(finding);
        }
    }

    pub(crate) fn section(&mut self, kind: FindingKind, section: &str, offset: u64) {
        let section = Some(section.to_owned());
        let (file, block, page, error) = (None, None, None, None);
        self.push(Finding { kind, file, block, page, section, offset, error });
    }

    pub(crate) fn page(&mut self, kind: FindingKind, block: &PlacedBlock, page: u64) {
        self.push(Finding::of_page(kind, block, page));
    }

    pub(crate) fn unreadable(&mut self, block: &PlacedBlock, page: u64, error: &io::Error) {
        let error = Some(error.to_string());
        self.push(Finding { error, ..Finding::of_page(FindingKind::Unreadable, block, page) });
    }

    /// Adds what was found in a file below the one that is checked: those that name no file are in
    /// `file`.
    pub(crate) fn append_below(&mut self, file: &Path, below: Vec<Finding>, total: u64) {
        let named = |finding: Finding| {
            let file = finding.file.or_else(|| Some(file.to_path_buf()));
            Finding { file, ..finding }
        };
        self.append(Findings { list: below.into_iter().map(named).collect(), total });
    }

    pub(crate) fn append(&mut self, other: Findings) {
        self.total += other.total;
        let room = FINDINGS_MAX.saturating_sub(self.list.len());
        self.list.extend(other.list.into_iter().take(room));
    }
}
