//! The proof that a new file can be read back: the last step before it gets its name.
//!
//! ```text
//! make it durable - forget what is cached - structure - parts with checksums - a sample of pages
//! ```
//!
//! After a save QEMU ends, and only the file is left of the VM. If the kernel or the disk reports a
//! write as done and does not do it, a restore notices that too late; the proof notices it while
//! the VM can still go on. What was written past the page cache is read from the disk.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd as _;

use vmfile_engine::begin_reading;
use vmfile_format::manifest::HASH_LEN;
use vmfile_format::{PageBitmap, PageIndex};

use crate::base::{Base, BaseError};
use crate::error::PagesError;
use crate::layers::Layers;
use crate::page_hashes::{Hash, PageHashes, damaged_page, is_page};
use crate::snapshot::{Manifest, Snapshot, SnapshotError};

/// How many pages are compared with their hashes, besides the first and the last of every block.
const SAMPLE_PAGES: u64 = 256;

/// Compares the new file that `snapshot` opens with its own checksums and hashes.
///
/// # Errors
///
/// Returns [`PagesError::NoManifest`], or [`PagesError::NotAsWritten`] for the first difference.
pub(crate) fn prove(snapshot: &Snapshot) -> Result<(), PagesError> {
    let manifest = snapshot.manifest().ok_or(PagesError::NoManifest)?;
    snapshot.verify_parts().map_err(PagesError::NotAsWritten)?;
    let bitmaps = own_pages(snapshot).map_err(PagesError::NotAsWritten)?;
    let sample: Vec<Sample> = sample(&bitmaps, RandomState::new().build_hasher().finish())
        .into_iter()
        .map(|(block, page)| Sample::place(snapshot, manifest, block, page))
        .collect();
    ask_for(snapshot, sample.iter().map(|sample| sample.bytes.clone()))?;
    // Many hashes lie in one page of the file.
    let mut hashes: Vec<u64> =
        sample.iter().map(|sample| sample.hash.start / 4096 * 4096).collect();
    hashes.dedup();
    ask_for(snapshot, hashes.into_iter().map(|start| start..start + 4096))?;
    sample.iter().try_for_each(|sample| sample.verify(snapshot)).map_err(PagesError::NotAsWritten)
}

/// Compares a sample of the pages that the new file has from `base` with their hashes: of these the file
/// itself says nothing, or has the same bytes.
///
/// # Errors
///
/// Returns [`PagesError::Base`] for the first difference, which names the file that has the page.
pub(crate) fn prove_base(snapshot: &Snapshot, base: &Base) -> Result<(), PagesError> {
    let layers = Layers::new(base.snapshot())?;
    let mut numbers = Vec::new();
    let mut bitmaps = Vec::new();
    for (number, placed) in snapshot.structure().blocks.iter().enumerate() {
        if let Some(theirs) = base.snapshot().block_number(&placed.block) {
            numbers.push((number, theirs));
            bitmaps.push(snapshot.bitmap(placed)?.and(base.bitmap(theirs)));
        }
    }
    let (mut ours, mut theirs) = (PageHashes::new(snapshot), PageHashes::new(base.snapshot()));
    let mut kept = Vec::new();
    for (index, page) in sample(&bitmaps, RandomState::new().build_hasher().finish()) {
        let (our_number, number) = numbers[index];
        if ours.recorded(our_number, page)? == theirs.recorded(number, page)? {
            let page_len = layers.placed(number).block.page_size().bytes();
            kept.push((number, page.0 * page_len..(page.0 + 1) * page_len));
        }
    }
    let place = |(number, range): &(usize, Range<u64>)| {
        let start = layers.placed(*number).pages_offset;
        start + range.start..start + range.end
    };
    ask_for(layers.main(), kept.iter().map(place))?;
    for (number, range) in kept {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("a page")];
        layers.read_verified(number, &range, &mut bytes).map_err(BaseError::from)?;
    }
    Ok(())
}

/// Returns the pages of each block whose data are in the file itself.
fn own_pages(snapshot: &Snapshot) -> Result<Vec<PageBitmap>, SnapshotError> {
    let blocks = &snapshot.structure().blocks;
    let bitmaps = blocks.iter().map(|placed| snapshot.bitmap(placed));
    let bitmaps = bitmaps.collect::<Result<Vec<_>, _>>()?;
    let Some(of_base) = snapshot.base_pages()? else { return Ok(bitmaps) };
    Ok(bitmaps.iter().zip(&of_base).map(|(bitmap, of_base)| bitmap.without(of_base)).collect())
}

/// Makes the kernel read many ranges at once: one after the other, they would take longer than the
/// rest of the proof.
fn ask_for(
    snapshot: &Snapshot,
    ranges: impl Iterator<Item = Range<u64>>,
) -> Result<(), PagesError> {
    for range in ranges {
        begin_reading(snapshot.file().as_fd(), range.clone())
            .map_err(|source| unreadable(snapshot, &range, source))?;
    }
    Ok(())
}

fn unreadable(snapshot: &Snapshot, range: &Range<u64>, source: io::Error) -> PagesError {
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let (path, offset) = (snapshot.path().to_path_buf(), range.start);
    PagesError::NotAsWritten(SnapshotError::Read { path, offset, len, source })
}

/// A page that is compared with its hash, and where both lie in the file.
struct Sample {
    block: usize,
    page: PageIndex,
    bytes: Range<u64>,
    hash: Range<u64>,
}

impl Sample {
    fn place(snapshot: &Snapshot, manifest: &Manifest, block: usize, page: PageIndex) -> Sample {
        let placed = &snapshot.structure().blocks[block];
        let page_len = placed.block.page_size().bytes();
        let start = placed.pages_offset + page.0 * page_len;
        let hash = manifest.meta.blocks[block].hashes_offset + page.0 * HASH_LEN;
        Sample { block, page, bytes: start..start + page_len, hash: hash..hash + HASH_LEN }
    }

    fn verify(&self, snapshot: &Snapshot) -> Result<(), SnapshotError> {
        let read = |range: &Range<u64>| snapshot.read(range.start, range.end - range.start);
        let recorded = Hash::try_from(read(&self.hash)?.as_slice()).expect("HASH_LEN bytes");
        if is_page(&read(&self.bytes)?, recorded, snapshot.key()) {
            Ok(())
        } else {
            Err(damaged_page(snapshot, self.block, self.page))
        }
    }
}

/// Chooses pages with data: the first and the last of every block, and some spread over all blocks,
/// one at random from each of equal parts.
fn sample(bitmaps: &[PageBitmap], mut random: u64) -> Vec<(usize, PageIndex)> {
    let counts: Vec<u64> = bitmaps.iter().map(|bitmap| bitmap.data_count().0).collect();
    let total: u64 = counts.iter().sum();
    let parts = SAMPLE_PAGES.min(total);
    let mut start = 0;
    let mut sample = Vec::new();
    for (block, (bitmap, &count)) in bitmaps.iter().zip(&counts).enumerate() {
        let mut ordinals = Vec::new();
        if let Some(last) = count.checked_sub(1) {
            ordinals.extend([0, last]);
        }
        // Parts whose beginning lies in this block; a page past its end belongs to the next.
        let first_part = (start * parts).div_ceil(total.max(1));
        let end_part = ((start + count) * parts).div_ceil(total.max(1));
        for part in first_part..end_part {
            let part = part * total / parts..(part + 1) * total / parts;
            random = step(random);
            let ordinal = part.start + random % (part.end - part.start).max(1);
            ordinals.push(ordinal.saturating_sub(start).min(count - 1));
        }
        ordinals.sort_unstable();
        ordinals.dedup();
        sample.extend(bitmap.nth_data(&ordinals).into_iter().map(|page| (block, page)));
        start += count;
    }
    sample
}

/// Returns the next number of a sequence that looks random (xorshift64; zero would stay zero).
fn step(number: u64) -> u64 {
    let mut number = number | 1;
    number ^= number << 13;
    number ^= number >> 7;
    number ^ (number << 17)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;

    use vmfile_engine::{DirectIo, Existing, Unpublished, page_hash};
    use vmfile_format::manifest::{VmMeta, encode_hash};
    use vmfile_format::stream::configuration::Configuration;
    use vmfile_format::stream::{encoder, section};
    use vmfile_format::{PageCount, PageSize, RamBlock, RamLayout};

    use super::*;
    use crate::draft::{Draft, FileLayout, SaveFacts, StreamTail};

    fn bitmap(pages: u64, has_data: impl Fn(u64) -> bool) -> PageBitmap {
        let mut bitmap = PageBitmap::new(PageCount(pages));
        for page in 0..pages {
            bitmap.set(PageIndex(page), has_data(page));
        }
        bitmap
    }

    const PAGES: u64 = 600;

    /// A finished file of one block, in which every other page has data.
    fn draft(path: &Path) -> Draft {
        let unpublished = Unpublished::create_beside(path, Existing::Refuse).unwrap();
        let draft = Draft::new(unpublished, DirectIo::Preferred).unwrap();
        let block = RamBlock::new("pc.ram".to_owned(), PAGES * 4096, PageSize::KIB_4).unwrap();
        let source = Configuration { machine: "pc-i440fx-10.0".to_owned(), ..Default::default() };
        let mut sections = vec![section::FULL, 0, 0, 0, 7];
        encoder::counted_text(&mut sections, "timer");
        sections.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 2, 0xaa, 0xbb, 0xcc]);
        sections.extend_from_slice(&[section::FOOTER, 0, 0, 0, 7, section::EOF]);
        let mut description = Vec::new();
        encoder::vm_description(&mut description);
        let ram = RamLayout::new(vec![block]).unwrap();
        let tail_len = (sections.len() + description.len()) as u64;
        let places = FileLayout::new(&source, ram, 2, tail_len).unwrap();
        draft.reserve(places.tables()).unwrap();
        let bitmap = bitmap(PAGES, |page| page % 2 == 0);
        let placed = &places.blocks()[0];
        for page in bitmap.data_runs().map(|run| run.start) {
            let bytes = [page.0.to_le_bytes()[0] | 1; 4096];
            draft.put("page", placed.page_offset(page).unwrap(), &bytes).unwrap();
            let hash = encode_hash(page_hash(&bytes, places.key()));
            draft.put("hash", places.hashes()[0] + 16 * page.0, &hash).unwrap();
        }
        let tail = StreamTail { sections: &sections, description: &description, state: None };
        draft.finish(&places, (&[bitmap], &[]), tail, facts()).unwrap();
        draft
    }

    fn facts() -> SaveFacts {
        let vm = VmMeta { run_state: "running".to_owned(), ..VmMeta::of_machine("pc-i440fx-10.0") };
        SaveFacts {
            route: "direct".to_owned(),
            live: Some(false),
            pause_seconds: None,
            saved_at_unix_seconds: None,
            vm,
        }
    }

    /// Without the proof, a write that the disk loses or does wrong is noticed at the restore, long
    /// after QEMU has ended.
    #[test]
    fn a_file_in_which_anything_was_not_written_gets_no_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.vmf");
        draft(&path).prove().unwrap().publish().unwrap();
        let whole = Snapshot::open(&path, 0).unwrap();
        let manifest = whole.manifest().unwrap();
        let (placed, meta) = (&whole.structure().blocks[0], &manifest.meta.blocks[0]);
        let mut offsets = vec![
            ("the first page", placed.pages_offset + 17),
            ("the last page with data", placed.pages_offset + (PAGES - 2) * 4096),
            ("the hash of the first page", meta.hashes_offset),
            ("the metadata", manifest.footer.metadata_offset + 100),
            ("the footer", whole.file_len() - 30),
        ];
        offsets.extend(manifest.meta.extents.iter().map(|part| (&*part.what, part.offset + 3)));
        let lost = directory.path().join("lost.vmf");
        for (what, offset) in offsets {
            let draft = draft(&lost);
            let mut byte = [0];
            draft.file().buffered().read_exact_at(&mut byte, offset).unwrap();
            draft.put("another byte", offset, &[byte[0] ^ 1]).unwrap();
            let error = draft.prove().expect_err(what);
            assert!(matches!(error, PagesError::NotAsWritten(_)), "{what}: {error}");
            assert!(!lost.exists(), "{what}");
        }
        let draft = draft(&lost);
        draft.file().buffered().set_len(whole.file_len() - 64).unwrap();
        assert!(matches!(draft.prove(), Err(PagesError::NotAsWritten(_))));
    }

    #[test]
    fn a_sample_has_the_ends_of_every_block_and_pages_from_everywhere() {
        let bitmaps = [
            bitmap(100_000, |page| page % 3 == 1),
            bitmap(64, |_| false),
            bitmap(3, |_| true),
            bitmap(1, |_| true),
            bitmap(50_000, |page| page >= 40_000),
        ];
        for seed in 0..50 {
            let sample = sample(&bitmaps, seed);
            assert!(sample.is_sorted() && sample.len() >= 256 && sample.len() <= 266);
            assert!(sample.iter().all(|&(block, page)| bitmaps[block].contains(page)));
            let ends = [(0, 1), (0, 99_997), (2, 0), (2, 2), (3, 0), (4, 40_000), (4, 49_999)];
            for (block, page) in ends {
                assert!(sample.contains(&(block, PageIndex(page))), "page {page} of {block}");
            }
            let gap = |block: usize, len: u64| {
                let pages = sample.iter().filter(|place| place.0 == block).map(|place| place.1.0);
                let pages: Vec<u64> = pages.collect();
                assert!(pages.windows(2).all(|pair| pair[1] - pair[0] <= len), "block {block}");
            };
            gap(0, 3 * 2 * 170);
            gap(4, 2 * 170);
        }
        assert_ne!(sample(&bitmaps, 2), sample(&bitmaps, 4), "each save compares other pages");
    }

    #[test]
    fn a_small_vm_is_compared_whole() {
        let bitmaps = [bitmap(40, |page| page % 2 == 0), bitmap(7, |_| true)];
        assert_eq!(sample(&bitmaps, 5).len(), 27);
        assert_eq!(sample(&[bitmap(9, |_| false)], 5), []);
        assert_eq!(sample(&[], 5), []);
    }

    #[test]
    fn the_random_numbers_are_those_of_xorshift64() {
        let numbers = [0, 1, 1_082_269_761].map(step);
        assert_eq!(numbers, [1_082_269_761, 1_082_269_761, 1_152_992_998_833_853_505]);
    }
}
