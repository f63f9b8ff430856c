//! All page arithmetic. Numbers of pages have types of their own, so that they are not mixed with
//! bytes.

use core::fmt;

/// The size of a guest page, in bytes: a power of two from 512 to 65536.
///
/// Every guest of QEMU's has pages of 1 KiB to 64 KiB as far as migration is concerned; x86 has
/// 4096. Huge pages are made of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSize(u64);

impl PageSize {
    /// Pages of 4096 bytes: the target page of x86, s390x, and most others.
    pub const KIB_4: PageSize = PageSize(4096);

    /// Returns `bytes` as a page size, or `None` if no guest has such pages.
    #[must_use]
    pub fn new(bytes: u64) -> Option<PageSize> {
        let valid = bytes.is_power_of_two() && (512..=65536).contains(&bytes);
        valid.then_some(PageSize(bytes))
    }

    /// Returns the size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Returns the number of pages in `len` bytes, or `None` if those are not whole pages.
    #[must_use]
    pub fn pages_in(self, len: u64) -> Option<PageCount> {
        let (pages, rest) = (len.checked_div(self.0)?, len.checked_rem(self.0)?);
        (rest == 0).then_some(PageCount(pages))
    }
}

/// The number of a page within its RAM block, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Returns the offset of the page's first byte in its RAM block, or `None` past `u64`.
    #[must_use]
    pub fn block_offset(self, size: PageSize) -> Option<u64> {
        self.0.checked_mul(size.0)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How many pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageCount(pub u64);

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A half-open range of pages of one RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// The first page.
    pub start: PageIndex,
    /// One past the last page.
    pub end: PageIndex,
}

impl PageRange {
    /// Returns the pages from `start` up to, not including, `end`.
    #[must_use]
    pub fn new(start: u64, end: u64) -> PageRange {
        PageRange { start: PageIndex(start), end: PageIndex(end) }
    }

    /// Returns how many pages the range has; an inverted range has none.
    #[must_use]
    pub fn count(self) -> PageCount {
        PageCount(self.end.0.saturating_sub(self.start.0))
    }

    /// Returns whether the range has no page.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.count().0 == 0
    }

    /// Returns the pages that both ranges have.
    #[must_use]
    pub fn intersection(self, other: PageRange) -> PageRange {
        let start = self.start.max(other.start);
        PageRange { start, end: self.end.min(other.end).max(start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_that_guests_have_are_page_sizes() {
        assert_eq!(PageSize::new(4096), Some(PageSize::KIB_4));
        for bytes in [0, 1, 256, 4095, 6144, 1 << 20, u64::MAX] {
            assert_eq!(PageSize::new(bytes), None, "{bytes}");
        }
    }

    #[test]
    fn a_length_that_ends_inside_a_page_has_no_page_count() {
        assert_eq!(PageSize::KIB_4.pages_in(8192), Some(PageCount(2)));
        assert_eq!(PageSize::KIB_4.pages_in(8193), None);
    }

    #[test]
    fn ranges_that_do_not_meet_have_an_empty_intersection() {
        let pages = PageRange::new(0, 4).intersection(PageRange::new(7, 9));
        assert!(pages.is_empty());
        assert_eq!(PageRange::new(2, 6).intersection(PageRange::new(4, 9)), PageRange::new(4, 6));
    }

    #[test]
    fn a_block_offset_past_the_end_of_u64_is_none() {
        assert_eq!(PageIndex(u64::MAX).block_offset(PageSize::KIB_4), None);
    }
}
