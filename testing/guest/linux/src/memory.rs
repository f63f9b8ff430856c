//! The memory under test: it is filled once; each pass checks it with one thread for each CPU, and
//! changes a part of it.

use std::fmt;
use std::num::TryFromIntError;
use std::thread;

use crate::pattern::{PAGE_WORDS, PageContents, sum};

/// Every tenth page is rewritten in each pass.
const CHANGE_STRIDE: u64 = 10;

const PAGES_PER_MIB: usize = 256;
const PAGE_SIZE: usize = 4096;

/// The pages that this guest fills and checks.
#[derive(Debug)]
pub(crate) struct Memory {
    /// One page more than is used, so that `start` can be at a page boundary.
    words: Vec<u64>,
    start: usize,
    page_count: usize,
    seed: u64,
    data_share: u64,
    pass: u64,
}

impl Memory {
    pub(crate) fn filled(
        fill_mib: usize,
        seed: u64,
        data_share: u64,
    ) -> Result<Memory, TryFromIntError> {
        let page_count = fill_mib * PAGES_PER_MIB;
        let words = vec![0; (page_count + 1) * PAGE_WORDS];
        let start = words.as_ptr().align_offset(PAGE_SIZE);
        let mut memory = Memory { words, start, page_count, seed, data_share, pass: 0 };
        memory.write_every(1, 0);
        u64::try_from(page_count)?;
        Ok(memory)
    }

    /// Checks and sums all pages with `thread_count` threads.
    ///
    /// The sum does not depend on the number of threads, because CPUs may come and go.
    pub(crate) fn check(&self, thread_count: usize) -> Result<u64, Damage> {
        let pages = self.pages();
        let pages_per_thread = self.page_count.div_ceil(thread_count.max(1)).max(1);
        let parts = thread::scope(|scope| {
            let threads: Vec<_> = pages
                .chunks(pages_per_thread * PAGE_WORDS)
                .zip((0_u64..).step_by(pages_per_thread))
                .map(|(part, first_page)| scope.spawn(move || self.check_part(part, first_page)))
                .collect();
            threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
        });
        let mut total = 0_u64;
        for part in parts {
            let Ok(part) = part else { return Err(Damage { page: 0, page_count: 0 }) };
            total = total.wrapping_add(part?);
        }
        Ok(total)
    }

    /// Rewrites every tenth page with generation `pass`.
    pub(crate) fn change(&mut self, pass: u64) {
        self.pass = pass;
        self.write_every(CHANGE_STRIDE, pass);
    }

    fn check_part(&self, part: &[u64], first_page: u64) -> Result<u64, Damage> {
        let mut total = 0_u64;
        for (page, index) in part.chunks_exact(PAGE_WORDS).zip(first_page..) {
            let generation = generation(index, self.pass);
            if !PageContents::of(self.seed, index, generation, self.data_share).matches(page) {
                return Err(Damage { page: index, page_count: self.page_count });
            }
            total = total.wrapping_add(sum(index, page));
        }
        Ok(total)
    }

    fn write_every(&mut self, stride: u64, generation: u64) {
        let (seed, data_share) = (self.seed, self.data_share);
        let end = self.start + self.page_count * PAGE_WORDS;
        let pages = self.words[self.start..end].chunks_exact_mut(PAGE_WORDS);
        for (page, index) in pages.zip(0_u64..) {
            if index % stride == generation % stride {
                PageContents::of(seed, index, generation, data_share).write(page);
            }
        }
    }

    fn pages(&self) -> &[u64] {
        &self.words[self.start..self.start + self.page_count * PAGE_WORDS]
    }
}

/// The first page that does not hold what it must.
#[derive(Debug)]
pub(crate) struct Damage {
    page: u64,
    page_count: usize,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {} of {}", self.page, self.page_count)
    }
}

/// Returns the last pass, up to and including `pass`, that wrote the page at `page`; 0 is the first
/// fill.
fn generation(page: u64, pass: u64) -> u64 {
    let passes_since = (pass + CHANGE_STRIDE - page % CHANGE_STRIDE) % CHANGE_STRIDE;
    pass.saturating_sub(passes_since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_as_expected_after_every_pass() {
        let mut memory = Memory::filled(1, 3, 128).unwrap();
        for pass in 1..25 {
            assert_eq!(memory.check(1).unwrap(), memory.check(3).unwrap());
            memory.change(pass);
        }
        assert!(memory.check(2).is_ok());
    }

    #[test]
    fn one_wrong_bit_is_found_and_named() {
        let mut memory = Memory::filled(1, 3, 128).unwrap();
        let word = memory.start + 200 * PAGE_WORDS + 9;
        memory.words[word] ^= 1;
        assert_eq!(memory.check(2).unwrap_err().to_string(), "page 200 of 256");
    }

    #[test]
    fn the_generation_is_the_last_pass_that_wrote_the_page() {
        assert_eq!(generation(3, 0), 0);
        assert_eq!(generation(3, 2), 0);
        assert_eq!(generation(3, 3), 3);
        assert_eq!(generation(3, 12), 3);
        assert_eq!(generation(13, 13), 13);
        assert_eq!(generation(10, 9), 0);
    }
}
