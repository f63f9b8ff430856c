//! What each page of the guest's memory must hold.
//!
//! A page is zero, repeated (all such pages of a guest are alike) or data (random words). Its kind
//! depends on its generation too, so that zero pages become data and the other way round.

/// Words in a page.
pub(crate) const PAGE_WORDS: usize = 512;

/// How many of 256 pages are repeated.
const REPEATED_SHARE: u64 = 26;

/// The contents of one page.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PageContents {
    Zero,
    Repeated { word: u64 },
    Data { state: u64 },
}

impl PageContents {
    /// Returns what the page at `page` holds when it was last written in pass `generation`.
    pub(crate) fn of(seed: u64, page: u64, generation: u64, data_share: u64) -> PageContents {
        let state = mix(seed ^ mix(page ^ mix(generation)));
        let kind = state >> 56;
        if kind < data_share {
            PageContents::Data { state }
        } else if kind < data_share + REPEATED_SHARE {
            PageContents::Repeated { word: mix(seed) | 1 }
        } else {
            PageContents::Zero
        }
    }

    /// Writes the page.
    pub(crate) fn write(self, page: &mut [u64]) {
        match self {
            PageContents::Zero => page.fill(0),
            PageContents::Repeated { word } => page.fill(word),
            PageContents::Data { mut state } => {
                for word in page {
                    state = next(state);
                    *word = state;
                }
            }
        }
    }

    /// Reports whether `page` is as [`PageContents::write`] leaves it.
    pub(crate) fn matches(self, page: &[u64]) -> bool {
        match self {
            PageContents::Zero => page.iter().fold(0, |all, word| all | word) == 0,
            PageContents::Repeated { word: expected } => {
                page.iter().fold(0, |all, word| all | (word ^ expected)) == 0
            }
            PageContents::Data { mut state } => {
                let mut differing_bits = 0;
                for word in page {
                    state = next(state);
                    differing_bits |= word ^ state;
                }
                differing_bits == 0
            }
        }
    }
}

/// Sums one page; words that change places change the sum.
pub(crate) fn sum(page_index: u64, page: &[u64]) -> u64 {
    page.iter().fold(mix(page_index), |sum, word| {
        (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

fn next(state: u64) -> u64 {
    state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
}

/// Spreads every bit of `x` over the result; different inputs give different results.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_page_matches_itself_and_nothing_else() {
        let mut kinds = [0; 3];
        for index in 0..64 {
            let mut page = vec![7; PAGE_WORDS];
            let contents = PageContents::of(1, index, 0, 128);
            contents.write(&mut page);
            assert!(contents.matches(&page));
            page[17] ^= 1 << 40;
            assert!(!contents.matches(&page));
            kinds[match contents {
                PageContents::Zero => 0,
                PageContents::Repeated { .. } => 1,
                PageContents::Data { .. } => 2,
            }] += 1;
        }
        assert!(kinds.iter().all(|&count| count > 0), "{kinds:?}");
    }

    #[test]
    fn exchanged_words_change_the_sum() {
        let mut page = vec![0; PAGE_WORDS];
        page[3] = 1;
        let before = sum(0, &page);
        page.swap(3, 4);
        assert_ne!(before, sum(0, &page));
    }
}
