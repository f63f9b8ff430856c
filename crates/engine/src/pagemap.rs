//! Which pages a process has, from `/proc/PID/pagemap`.
//!
//! See Linux's `Documentation/admin-guide/mm/pagemap.rst`.

#![expect(unsafe_code, reason = "the PAGEMAP_SCAN ioctl has no safe wrapper")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr;

use crate::process_memory::ProcessMemory;

impl ProcessMemory {
    /// Returns the parts of `range` of which the process has a page, present or swapped out, in
    /// order, merged, clipped to `range`, and else page-aligned.
    ///
    /// Everything else in private anonymous memory reads as zeros. It does *not* in a shared file,
    /// whose pages other processes may have mapped, or none: use [`DataSeeker`](crate::DataSeeker)
    /// there. Pages that are the kernel's shared zero page are left out where the kernel can tell.
    ///
    /// Uses the `PAGEMAP_SCAN` ioctl (Linux 6.7), which skips what has no page tables, else reads 8
    /// bytes a page from `/proc/PID/pagemap`. The list has as many ranges as the guest likes: ask
    /// for bounded ranges.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn touched(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        find(self.pagemap(), Pages::Touched, &range)
    }

    /// As [`ProcessMemory::touched`], without the pages of a file that are mapped: in a private
    /// mapping of a file, what the process has written.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn own(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        find(self.pagemap(), Pages::Own, &range)
    }

    /// Returns the first byte of `range` that [`ProcessMemory::own`] would report.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn first_own(&self, range: &Range<u64>) -> io::Result<Option<u64>> {
        first(self.pagemap(), Pages::Own, range)
    }

    /// Returns the first byte of `range` that [`ProcessMemory::touched`] would report, by one ioctl
    /// that skips memory without page tables, however long that is (Linux 6.7).
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn first_touched(&self, range: &Range<u64>) -> io::Result<Option<u64>> {
        first(self.pagemap(), Pages::Touched, range)
    }
}

/// Which pages are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// Present or swapped out, but not the kernel's zero page.
    Touched,
    /// The same, without those of a file.
    Own,
}

/// Returns the parts of `range` with such pages.
fn find(pagemap: &File, pages: Pages, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    if range.is_empty() {
        return Ok(Vec::new());
    }
    match find_by_scan(pagemap, pages, range) {
        // The kernel is older than the ioctl.
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
            find_by_entries(pagemap, pages, range)
        }
        result => result,
    }
}

/// Returns the first byte of `range` with such a page.
fn first(pagemap: &File, pages: Pages, range: &Range<u64>) -> io::Result<Option<u64>> {
    if range.is_empty() {
        return Ok(None);
    }
    let found = match first_by_scan(pagemap, pages, range) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
            first_by_entries(pagemap, pages, range)
        }
        result => result,
    };
    Ok(found?.map(|page| page.max(range.start)))
}

/// `struct pm_scan_arg` of Linux's `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`, in the same file.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArguments>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);

/// `_IOWR('f', 16, struct pm_scan_arg)`, with the bits as all but four architectures lay them out.
const PAGEMAP_SCAN: u64 = (3 << 30) | (96 << 16) | (0x66 << 8) | 16;

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Regions that the kernel fills in per call: 96 KiB of answers.
const REGIONS_PER_SCAN: usize = 4096;

fn find_by_scan(pagemap: &File, pages: Pages, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let (mut at, end) = whole_pages(range);
    // No two regions touch, so this is enough for a small range.
    let regions_max = usize::try_from((end - at) / page_size() / 2 + 1).unwrap_or(usize::MAX);
    let mut regions = vec![PageRegion::default(); REGIONS_PER_SCAN.min(regions_max)];
    let mut found = Vec::new();
    while at < end {
        let count = scan(pagemap, (pages, 0), at..end, &mut regions)?;
        for region in &regions[..count] {
            push_merged(&mut found, clip(region.start..region.end, range));
        }
        // Not at the `walk_end` that the kernel (6.18) returns: if it filled its own buffer of 512
        // regions on the way, that is where it did so, and the regions after it would come again.
        at = match regions[..count].last() {
            Some(last) if count == regions.len() => last.end,
            _ => end,
        };
    }
    Ok(found)
}

fn first_by_scan(pagemap: &File, pages: Pages, range: &Range<u64>) -> io::Result<Option<u64>> {
    let (start, end) = whole_pages(range);
    let mut region = [PageRegion::default()];
    let count = scan(pagemap, (pages, 1), start..end, &mut region)?;
    Ok((count > 0).then_some(region[0].start))
}

/// Scans once, up to `pages_max` pages that are found, 0 for any number; returns how many of
/// `regions` were filled in. The scan ends early only if all were.
fn scan(
    pagemap: &File,
    (pages, pages_max): (Pages, u64),
    range: Range<u64>,
    regions: &mut [PageRegion],
) -> io::Result<usize> {
    let excluded = match pages {
        Pages::Touched => PAGE_IS_PFNZERO,
        Pages::Own => PAGE_IS_PFNZERO | PAGE_IS_FILE,
    };
    let mut arguments = ScanArguments {
        size: size_of::<ScanArguments>() as u64,
        start: range.start,
        end: range.end,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: regions.len() as u64,
        max_pages: pages_max,
        // None of the excluded ones, and present or swapped.
        category_inverted: excluded,
        category_mask: excluded,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..ScanArguments::default()
    };
    // The request's type is `c_int` with some C libraries and `c_ulong` with others.
    let request = PAGEMAP_SCAN as libc::Ioctl;
    // SAFETY:
    // - `arguments` has the kernel's layout, sizes asserted above, and says its own size.
    // - `vec` and `vec_len` are those of `regions`, which is borrowed for writing and outlives
    //   the call; the kernel keeps neither.
    let result =
        unsafe { libc::ioctl(pagemap.as_raw_fd(), request, ptr::from_mut(&mut arguments)) };
    match usize::try_from(result) {
        Ok(count) => Ok(count.min(regions.len())),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Entries of `/proc/PID/pagemap` that are read at a time: 64 KiB, for 32 MiB of memory.
const ENTRIES_PER_READ: usize = 1 << 13;

/// Bits of an entry, from Linux's `Documentation/admin-guide/mm/pagemap.rst`.
const ENTRY_PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
const ENTRY_FILE: u64 = 1 << 61;

fn find_by_entries(
    pagemap: &File,
    pages: Pages,
    range: &Range<u64>,
) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    each_entry(pagemap, pages, range, |page| {
        push_merged(&mut found, clip(page..page + page_size(), range));
        true
    })?;
    Ok(found)
}

fn first_by_entries(pagemap: &File, pages: Pages, range: &Range<u64>) -> io::Result<Option<u64>> {
    let mut first = None;
    each_entry(pagemap, pages, range, |page| {
        first = Some(page);
        false
    })?;
    Ok(first)
}

/// Calls `found` with the address of each such page, until it returns `false`.
fn each_entry(
    pagemap: &File,
    pages: Pages,
    range: &Range<u64>,
    mut found: impl FnMut(u64) -> bool,
) -> io::Result<()> {
    const ENTRY: usize = size_of::<u64>();
    let page_size = page_size();
    let (mut at, end) = whole_pages(range);
    let count = |at: u64| usize::try_from((end - at) / page_size).unwrap_or(usize::MAX);
    let mut bytes = vec![0; count(at).min(ENTRIES_PER_READ) * ENTRY];
    while at < end {
        let len = count(at).min(ENTRIES_PER_READ) * ENTRY;
        let len = pagemap.read_at(&mut bytes[..len], at / page_size * ENTRY as u64)?;
        if len < ENTRY {
            // Past the last address a process can have.
            break;
        }
        for entry in bytes[..len].chunks_exact(ENTRY) {
            let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
            let is_excluded = pages == Pages::Own && entry & ENTRY_FILE != 0;
            if entry & ENTRY_PRESENT_OR_SWAPPED != 0 && !is_excluded && !found(at) {
                return Ok(());
            }
            at += page_size;
        }
    }
    Ok(())
}

/// Tests whether the kernel has the ioctl, on this process's own memory.
pub(crate) fn probe() -> io::Result<()> {
    let pagemap = File::open(Path::new("/proc/self/pagemap"))?;
    let mut regions = [PageRegion::default()];
    scan(&pagemap, (Pages::Touched, 0), 0..page_size(), &mut regions).map(|_| ())
}

fn push_merged(found: &mut Vec<Range<u64>>, next: Range<u64>) {
    match found.last_mut() {
        _ if next.is_empty() => {}
        Some(last) if last.end == next.start => last.end = next.end,
        _ => found.push(next),
    }
}

fn clip(found: Range<u64>, asked: &Range<u64>) -> Range<u64> {
    found.start.max(asked.start)..found.end.min(asked.end)
}

/// Rounds outwards to whole pages; the end saturates at the last page of the address space.
fn whole_pages(range: &Range<u64>) -> (u64, u64) {
    let page_size = page_size();
    let start = range.start - range.start % page_size;
    let end = range.end.checked_next_multiple_of(page_size);
    (start, end.unwrap_or(u64::MAX - (page_size - 1)))
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_pieces_are_merged_and_clipped() {
        let mut found = Vec::new();
        for piece in [0x0000..0x2000, 0x2000..0x3000, 0x5000..0x6000, 0x9000..0xa000] {
            push_merged(&mut found, clip(piece, &(0x1800..0x5100)));
        }
        assert_eq!(found, [0x1800..0x3000, 0x5000..0x5100]);
    }

    #[test]
    fn pages_are_rounded_outwards_up_to_the_last_one() {
        let page_size = page_size();
        assert_eq!(whole_pages(&(1..page_size + 1)), (0, 2 * page_size));
        assert_eq!(whole_pages(&(0..u64::MAX)).1, u64::MAX - (page_size - 1));
    }

    #[test]
    fn both_ways_of_asking_find_the_same_pages() {
        let memory = rustix::param::page_size() * 64;
        let mut bytes = vec![0_u8; memory];
        for page in [3, 4, 9, 63] {
            bytes[page * rustix::param::page_size()] = 1;
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let start = bytes.as_ptr().addr() as u64;
        let range = start..start + memory as u64;
        let by_entries = find_by_entries(&pagemap, Pages::Touched, &range).unwrap();
        match find_by_scan(&pagemap, Pages::Touched, &range) {
            Ok(by_scan) => assert_eq!(by_scan, by_entries),
            Err(error) => println!("skipped: PAGEMAP_SCAN: {error}"),
        }
        for start in (range.start..range.end).step_by(4096) {
            let rest = start..range.end;
            let first = first_by_entries(&pagemap, Pages::Touched, &rest).unwrap();
            let expected = find_by_entries(&pagemap, Pages::Touched, &rest).unwrap();
            let expected = expected.first().map(|found| whole_pages(found).0);
            assert_eq!(first, expected);
            if let Ok(by_scan) = first_by_scan(&pagemap, Pages::Touched, &rest) {
                assert_eq!(by_scan, first);
            }
        }
        assert!(!by_entries.is_empty());
        drop(bytes);
    }
}
