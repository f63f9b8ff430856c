//! The boot-sector guest, seen from outside: its disk image, and the sums it must print.
//!
//! The guest fills pages from 1 MiB upwards. A page's contents follow from the seed, its index and
//! its generation, which is the last pass that wrote it: all zero, all the same word, or random
//! words. In pass N it sums all pages, prints the sum, and rewrites the pages whose index is N
//! modulo 10.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::TestResult;

const PAGE_WORDS: u32 = 1024;
const PAGES_PER_MIB: u32 = 256;
const CHANGE_STRIDE: u32 = 10;
const SUM_MULTIPLIER: u32 = 0x9e37_79b1;

/// Where the parameter block begins in the image.
const PARAMETERS_OFFSET: usize = 512;
const PARAMETERS_MAGIC: &[u8; 8] = b"VMFGUEST";

/// The size of the image. A BIOS computes a disk's geometry from it, and does not boot from a disk
/// that has no whole cylinder.
const IMAGE_LEN: usize = 0x10_0000;

/// What a boot-sector guest does, and so what it must print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BootSector {
    /// The seed from which the contents of all pages follow.
    pub seed: u32,
    /// The MiB that are filled and summed, from 1 MiB upwards.
    pub fill_mib: u32,
    /// Pages with random words, of 256.
    pub data_share: u32,
    /// Pages that are all alike, of 256. The rest is zero.
    pub repeated_share: u32,
    /// How long the guest halts after each pass, in ticks of 1/18.2 s; 0: not at all.
    pub pause_ticks: u32,
}

impl BootSector {
    /// Returns the sum that the guest must print in pass `pass`, counted from 1. A test judges each pass
    /// again and again, so sums are kept: each takes as long as the guest's own.
    #[must_use]
    pub fn sum(&self, pass: u32) -> u32 {
        static SUMS: Mutex<Option<HashMap<(BootSector, u32), u32>>> = Mutex::new(None);
        let key = (*self, pass);
        let sums = || SUMS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&sum) = sums().get_or_insert_default().get(&key) {
            return sum;
        }
        let sum = self.compute_sum(pass);
        sums().get_or_insert_default().insert(key, sum);
        sum
    }

    fn compute_sum(&self, pass: u32) -> u32 {
        let mut sum = 0;
        for page in 0..self.fill_mib * PAGES_PER_MIB {
            sum = mix_in(sum, page);
            match self.page(page, generation(page, pass.saturating_sub(1))) {
                Page::Uniform { word } => {
                    for _ in 0..PAGE_WORDS {
                        sum = mix_in(sum, word);
                    }
                }
                Page::Data { mut state } => {
                    for _ in 0..PAGE_WORDS {
                        state = next(state);
                        sum = mix_in(sum, state);
                    }
                }
            }
        }
        sum
    }

    /// Returns the bytes of the page at `page` (0 is at 1 MiB) when pass `pass` sums it.
    #[must_use]
    pub fn page_bytes(&self, page: u32, pass: u32) -> Vec<u8> {
        let mut words = Vec::new();
        match self.page(page, generation(page, pass.saturating_sub(1))) {
            Page::Uniform { word } => words.resize(PAGE_WORDS as usize, word),
            Page::Data { mut state } => {
                for _ in 0..PAGE_WORDS {
                    state = next(state);
                    words.push(state);
                }
            }
        }
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// Writes the disk image: `program` with these parameters in it.
    pub(crate) fn write_image(&self, program: &Path, image: &Path) -> TestResult {
        let mut bytes = fs::read(program)?;
        bytes.resize(IMAGE_LEN, 0);
        let block = bytes.get_mut(PARAMETERS_OFFSET..).unwrap_or_default();
        if !block.starts_with(PARAMETERS_MAGIC) {
            return Err(format!("{} has no parameter block", program.display()).into());
        }
        let parameters = [
            self.seed,
            self.fill_mib * PAGES_PER_MIB,
            self.data_share,
            self.repeated_share,
            self.pause_ticks,
        ];
        for (place, value) in block[PARAMETERS_MAGIC.len()..].chunks_exact_mut(4).zip(parameters) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        Ok(fs::write(image, bytes)?)
    }

    fn page(&self, page: u32, generation: u32) -> Page {
        let state = spread(
            self.seed ^ page.wrapping_mul(0x9e37_79b1) ^ generation.wrapping_mul(0x85eb_ca6b),
        );
        let kind = state & 0xff;
        if kind < self.data_share {
            Page::Data { state }
        } else if kind - self.data_share < self.repeated_share {
            Page::Uniform { word: self.seed | 1 }
        } else {
            Page::Uniform { word: 0 }
        }
    }
}

/// The contents of one page.
enum Page {
    Uniform { word: u32 },
    Data { state: u32 },
}

fn mix_in(sum: u32, word: u32) -> u32 {
    (sum ^ word).rotate_left(5).wrapping_mul(SUM_MULTIPLIER)
}

fn next(state: u32) -> u32 {
    state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)
}

fn spread(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Returns the last pass, up to and including `pass`, that wrote the page; 0 is the first fill.
fn generation(page: u32, pass: u32) -> u32 {
    let passes_since = (pass + CHANGE_STRIDE - page % CHANGE_STRIDE) % CHANGE_STRIDE;
    pass.saturating_sub(passes_since)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: BootSector =
        BootSector { seed: 7, fill_mib: 1, data_share: 128, repeated_share: 26, pause_ticks: 0 };

    #[test]
    fn a_page_changes_only_in_its_tenth_of_the_passes() {
        // Pass 3 rewrites the pages 3, 13, 23 and so on, after it has summed them.
        for page in 0..30 {
            let changed = SMALL.page_bytes(page, 3) != SMALL.page_bytes(page, 4);
            assert!(!changed || page % 10 == 3, "page {page}");
        }
        assert!((3..256).step_by(10).any(|p| SMALL.page_bytes(p, 3) != SMALL.page_bytes(p, 4)));
    }

    #[test]
    fn sums_differ_by_seed_and_by_pass() {
        assert_ne!(SMALL.sum(1), SMALL.sum(2));
        assert_ne!(SMALL.sum(1), BootSector { seed: 8, ..SMALL }.sum(1));
    }

    #[test]
    fn an_image_needs_a_program_with_a_parameter_block() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        fs::write(&program, vec![0; 4608]).unwrap();
        let error = SMALL.write_image(&program, &directory.path().join("image")).unwrap_err();
        assert!(error.to_string().ends_with("has no parameter block"));
    }
}
