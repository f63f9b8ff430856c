//! One bit for each page of a block, which several threads set and clear.

use std::sync::atomic::{AtomicU64, Ordering};

use vmfile_format::{PageBitmap, PageCount, PageIndex};

/// Bits for the pages of one RAM block, all clear at first.
///
/// Two threads never change the bit of one page at the same time, and no other access is ordered by
/// a bit: relaxed atomics are enough.
#[derive(Debug)]
pub(crate) struct SharedBitmap {
    words: Vec<AtomicU64>,
    pages: PageCount,
}

impl SharedBitmap {
    pub(crate) fn new(pages: PageCount) -> SharedBitmap {
        let words = (0..pages.0.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        SharedBitmap { words, pages }
    }

    /// Sets the bit of `page`; returns whether it was set before.
    pub(crate) fn set(&self, page: PageIndex) -> bool {
        let (word, bit) = self.place(page);
        word.fetch_or(bit, Ordering::Relaxed) & bit != 0
    }

    /// Clears the bit of `page`; returns whether it was set before.
    pub(crate) fn clear(&self, page: PageIndex) -> bool {
        let (word, bit) = self.place(page);
        word.fetch_and(!bit, Ordering::Relaxed) & bit != 0
    }

    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        let (word, bit) = self.place(page);
        word.load(Ordering::Relaxed) & bit != 0
    }

    /// Returns the pages that are set here and not in `other`.
    pub(crate) fn without(&self, other: &SharedBitmap) -> PageBitmap {
        let pairs = self.words.iter().zip(&other.words);
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        self.bitmap(pairs.map(|(ours, theirs)| load(ours) & !load(theirs)).collect())
    }

    /// Returns the bits as they are now.
    pub(crate) fn snapshot(&self) -> PageBitmap {
        self.bitmap(self.words.iter().map(|word| word.load(Ordering::Relaxed)).collect())
    }

    fn bitmap(&self, words: Vec<u64>) -> PageBitmap {
        let mut bitmap = PageBitmap::new(self.pages);
        bitmap.replace_words(PageIndex(0), &words);
        bitmap
    }

    fn place(&self, page: PageIndex) -> (&AtomicU64, u64) {
        let word = usize::try_from(page.0 / 64).expect("a page of the block");
        (&self.words[word], 1 << (page.0 % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_is_told_as_it_was_before() {
        let bitmap = SharedBitmap::new(PageCount(70));
        assert!(!bitmap.set(PageIndex(69)));
        assert!(bitmap.set(PageIndex(69)));
        assert!(bitmap.contains(PageIndex(69)));
        assert!(bitmap.clear(PageIndex(69)));
        assert!(!bitmap.clear(PageIndex(69)));
        assert!(!bitmap.contains(PageIndex(69)));
    }

    #[test]
    fn what_only_one_has_is_left_without_the_other() {
        let (written, data) =
            (SharedBitmap::new(PageCount(130)), SharedBitmap::new(PageCount(130)));
        for page in [0, 64, 129] {
            written.set(PageIndex(page));
        }
        data.set(PageIndex(64));
        let stale = written.without(&data);
        assert_eq!(stale.data_count(), PageCount(2));
        assert!(stale.contains(PageIndex(0)) && stale.contains(PageIndex(129)));
        assert_eq!(data.snapshot().data_count(), PageCount(1));
    }
}
