//! One bit for each page: whether its data are in the file.

use alloc::vec;
use alloc::vec::Vec;

use crate::page::{PageCount, PageIndex, PageRange};

/// A bit for each page of one RAM block; set means that the page's data is in the file.
///
/// On disk it is an array of 64-bit words in the byte order of the machine that QEMU ran on; this
/// crate reads and writes the little-endian form, in which bit `i` is bit `i % 8` of byte `i / 8`.
///
/// # Invariants
///
/// - There are `ceil(page_count / 64)` words, and the bits past the last page are clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    page_count: PageCount,
}

/// Returns how many bytes the bitmap of `pages` pages takes in a file: whole 64-bit words.
#[must_use]
pub fn encoded_len(pages: PageCount) -> u64 {
    pages.0.div_ceil(64).saturating_mul(8)
}

impl PageBitmap {
    /// Returns a bitmap of `pages` pages, all clear.
    ///
    /// # Panics
    ///
    /// Panics if the bitmap does not fit into memory's address range; limits on RAM block lengths
    /// keep numbers from a file far below that.
    #[must_use]
    pub fn new(pages: PageCount) -> PageBitmap {
        let words = usize::try_from(pages.0.div_ceil(64)).expect("bounded by BLOCK_LEN_MAX");
        PageBitmap { words: vec![0; words], page_count: pages }
    }

    /// Decodes the bitmap of `pages` pages, or `None` if `bytes` has another length than
    /// [`encoded_len`] says. Bits past the last page, which mean nothing, are cleared.
    #[must_use]
    pub fn decode(bytes: &[u8], pages: PageCount) -> Option<PageBitmap> {
        if bytes.len() as u64 != encoded_len(pages) {
            return None;
        }
        let mut words: Vec<u64> = bytes.chunks_exact(8).map(le_word).collect();
        if let (Some(last), tail @ 1..) = (words.last_mut(), pages.0 % 64) {
            *last &= low_bits(tail);
        }
        Some(PageBitmap { words, page_count: pages })
    }

    /// Encodes the bitmap as a little-endian QEMU writes it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Sets or clears the bit of `page`.
    ///
    /// # Panics
    ///
    /// Panics if there is no such page: the caller checks a page index that comes from a file.
    pub fn set(&mut self, page: PageIndex, has_data: bool) {
        assert!(page.0 < self.page_count.0, "page {page} of {}", self.page_count);
        let (word, bit) = position(page);
        let word = self.words.get_mut(word).expect("the page is within the bitmap");
        if has_data {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }

    /// Replaces 64 bits at a time: `words` are the bits of the pages from `first` on.
    ///
    /// # Panics
    ///
    /// Panics if `first` is not a multiple of 64 or if a bit past the last page would be set.
    pub fn replace_words(&mut self, first: PageIndex, words: &[u64]) {
        assert!(first.0 % 64 == 0, "words begin at multiples of 64 pages, not at {first}");
        let start = position(first).0;
        let end = start.saturating_add(words.len());
        let target = self.words.get_mut(start..end).expect("the words lie within the bitmap");
        target.copy_from_slice(words);
        if let (Some(last), tail @ 1..) = (self.words.last(), self.page_count.0 % 64) {
            assert!(last & !low_bits(tail) == 0, "a bit past the last page is set");
        }
    }

    /// Returns whether `page` has its bit set; pages past the end have not.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        let (word, bit) = position(page);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Returns the pages that are set here and in `other`, which has as many.
    #[must_use]
    pub fn and(&self, other: &PageBitmap) -> PageBitmap {
        self.combined(other, |ours, theirs| ours & theirs)
    }

    /// Returns the pages that are set here and not in `other`, which has as many.
    #[must_use]
    pub fn without(&self, other: &PageBitmap) -> PageBitmap {
        self.combined(other, |ours, theirs| ours & !theirs)
    }

    fn combined(&self, other: &PageBitmap, both: impl Fn(u64, u64) -> u64) -> PageBitmap {
        assert_eq!(self.page_count, other.page_count, "bitmaps of one block");
        let words = self.words.iter().zip(&other.words).map(|(&ours, &theirs)| both(ours, theirs));
        PageBitmap { words: words.collect(), page_count: self.page_count }
    }

    /// Returns how many pages the block has.
    #[must_use]
    pub fn page_count(&self) -> PageCount {
        self.page_count
    }

    /// Returns how many bits are set.
    #[must_use]
    pub fn data_count(&self) -> PageCount {
        PageCount(self.words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Returns the pages with data that have the numbers `ordinals`, when all pages with data are
    /// counted from 0.
    ///
    /// The ordinals are in ascending order. Those past the last page with data are left out.
    #[must_use]
    pub fn nth_data(&self, ordinals: &[u64]) -> Vec<PageIndex> {
        let mut pages = Vec::with_capacity(ordinals.len());
        let mut ordinals = ordinals.iter().copied().peekable();
        let mut before = 0_u64;
        for (index, &word) in (0_u64..).zip(&self.words) {
            let end = before.saturating_add(word.count_ones().into());
            while let Some(ordinal) = ordinals.next_if(|&ordinal| ordinal < end) {
                let bit = nth_bit(word, ordinal.saturating_sub(before));
                pages.push(PageIndex(index.saturating_mul(64).saturating_add(bit)));
            }
            before = end;
        }
        pages
    }

    /// Returns the runs of pages with data, in order.
    pub fn data_runs(&self) -> Runs<'_> {
        self.runs_within(PageRange::new(0, self.page_count.0))
    }

    /// Returns the runs of pages with data within `pages`, in order.
    #[must_use]
    pub fn runs_within(&self, pages: PageRange) -> Runs<'_> {
        let end = pages.end.0.min(self.page_count.0);
        Runs { bitmap: self, next: pages.start.0, end }
    }

    /// Returns the first page with data within `pages`.
    #[must_use]
    pub fn first_within(&self, pages: PageRange) -> Option<PageIndex> {
        let end = pages.end.0.min(self.page_count.0);
        self.find(pages.start.0, end, true).map(PageIndex)
    }

    /// Returns the runs of pages without data within `pages`, in order.
    pub fn gaps_within(&self, pages: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let end = pages.end.0.min(self.page_count.0);
        let mut next = pages.start.0;
        core::iter::from_fn(move || {
            let start = self.find(next, end, false)?;
            next = self.find(start, end, true).unwrap_or(end);
            Some(PageRange::new(start, next))
        })
    }

    /// Returns the first page at or after `from` and before `end` whose bit is `value`.
    fn find(&self, from: u64, end: u64, value: bool) -> Option<u64> {
        let mut page = from;
        while page < end {
            let (index, _) = position(PageIndex(page));
            let word_start = page & !63;
            let word = self.words.get(index).copied()?;
            let word = if value { word } else { !word };
            let candidates = word & !low_bits(page % 64);
            if candidates != 0 {
                let first = word_start.checked_add(candidates.trailing_zeros().into())?;
                return (first < end).then_some(first);
            }
            page = word_start.checked_add(64)?;
        }
        None
    }
}

/// The runs of pages with data: see [`PageBitmap::data_runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    bitmap: &'a PageBitmap,
    next: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let start = self.bitmap.find(self.next, self.end, true)?;
        let end = self.bitmap.find(start, self.end, false).unwrap_or(self.end);
        self.next = end;
        Some(PageRange::new(start, end))
    }
}

/// Returns the number of the set bit of `word` below which `n` others are set.
fn nth_bit(word: u64, n: u64) -> u64 {
    let without_lowest = |word: u64, _| word & word.wrapping_sub(1);
    (0..n).fold(word, without_lowest).trailing_zeros().into()
}

/// Returns the word's index and the bit's mask.
fn position(page: PageIndex) -> (usize, u64) {
    // A page index beyond `usize` has no word: `get` returns `None`.
    (usize::try_from(page.0 / 64).unwrap_or(usize::MAX), 1 << (page.0 % 64))
}

/// Returns a word whose lowest `count` bits are set; `count` is below 64.
fn low_bits(count: u64) -> u64 {
    (1_u64 << (count % 64)).wrapping_sub(1)
}

fn le_word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(<[u8; 8]>::try_from(bytes).expect("chunks of 8 bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn decodes_the_bitmap_qemu_writes() {
        // The first bytes of pc.ram's bitmap in a file that QEMU 10.0.2 wrote.
        let bytes = [0x41, 0x00, 0x7f, 0x80, 0x01, 0x00, 0x00, 0x00];
        let bitmap = PageBitmap::decode(&bytes, PageCount(64)).unwrap();
        let runs: Vec<PageRange> = bitmap.data_runs().collect();
        let expected =
            [(0, 1), (6, 7), (16, 23), (31, 33)].map(|(start, end)| PageRange::new(start, end));
        assert_eq!(runs, expected);
        assert_eq!(bitmap.data_count(), PageCount(11));
    }

    #[test]
    fn bits_past_the_last_page_are_cleared() {
        let bitmap = PageBitmap::decode(&[0xff; 8], PageCount(3)).unwrap();
        assert_eq!(bitmap.data_count(), PageCount(3));
        assert!(!bitmap.contains(PageIndex(3)));
        assert!(!bitmap.contains(PageIndex(u64::MAX)));
    }

    #[test]
    fn a_bitmap_of_another_length_is_refused() {
        assert_eq!(PageBitmap::decode(&[0; 8], PageCount(65)), None);
        assert_eq!(PageBitmap::decode(&[0; 9], PageCount(64)), None);
    }

    proptest! {
        #[test]
        fn runs_are_those_of_a_naive_loop(
            bits in proptest::collection::vec(any::<bool>(), 0..400),
            from in 0_u64..420,
            to in 0_u64..420,
        ) {
            let mut bitmap = PageBitmap::new(PageCount(bits.len() as u64));
            for (page, &bit) in bits.iter().enumerate() {
                bitmap.set(PageIndex(page as u64), bit);
            }
            let from_runs: Vec<u64> = bitmap
                .runs_within(PageRange::new(from, to))
                .flat_map(|run| run.start.0..run.end.0)
                .collect();
            let naive: Vec<u64> = (from..to)
                .filter(|&page| bits.get(usize::try_from(page).unwrap()) == Some(&true))
                .collect();
            let first = bitmap.first_within(PageRange::new(from, to));
            prop_assert_eq!(first.map(|page| page.0), naive.first().copied());
            prop_assert_eq!(from_runs, naive);
            let from_gaps: Vec<u64> = bitmap
                .gaps_within(PageRange::new(from, to))
                .flat_map(|gap| gap.start.0..gap.end.0)
                .collect();
            let naive: Vec<u64> = (from..to)
                .filter(|&page| bits.get(usize::try_from(page).unwrap()) == Some(&false))
                .collect();
            prop_assert_eq!(from_gaps, naive);
            let decoded = PageBitmap::decode(&bitmap.encode(), bitmap.page_count());
            prop_assert_eq!(decoded.as_ref(), Some(&bitmap));
            std::println!("cases: 1 mutations");
        }

        #[test]
        fn pages_with_data_are_numbered_in_order(
            bits in proptest::collection::vec(any::<bool>(), 0..400),
        ) {
            let mut bitmap = PageBitmap::new(PageCount(bits.len() as u64));
            for (page, &bit) in bits.iter().enumerate() {
                bitmap.set(PageIndex(page as u64), bit);
            }
            let naive: Vec<PageIndex> = (0..).zip(&bits).filter(|(_, bit)| **bit).map(|(page, _)| PageIndex(page)).collect();
            let all: Vec<u64> = (0..naive.len() as u64 + 3).collect();
            prop_assert_eq!(bitmap.nth_data(&all), naive.clone());
            let odd: Vec<u64> = (0..naive.len() as u64).filter(|n| n % 2 == 1).collect();
            let expected: Vec<PageIndex> = naive.into_iter().skip(1).step_by(2).collect();
            prop_assert_eq!(bitmap.nth_data(&odd), expected);
            std::println!("cases: 1 mutations");
        }

        #[test]
        fn words_replace_the_bits_they_stand_for(words in proptest::collection::vec(any::<u64>(), 1..5)) {
            let mut bitmap = PageBitmap::new(PageCount(64 * 8));
            bitmap.replace_words(PageIndex(64 * 2), &words);
            let set: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
            prop_assert_eq!(bitmap.data_count(), PageCount(set));
            prop_assert_eq!(bitmap.contains(PageIndex(128)), words[0] & 1 == 1);
            std::println!("cases: 1 mutations");
        }
    }
}
