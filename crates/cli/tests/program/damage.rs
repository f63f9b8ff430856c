//! A truncated or changed file is never accepted as whole.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use vmfile::Snapshot;
use vmfile_testing::{Case, Guest, Ram, TestResult, cases, requires};

use crate::guests::saved;
use crate::run::vmfile;
use crate::words;

/// The length of the footer, the last part of a file.
const FOOTER_LEN: u64 = 64;

/// Returns every offset at which a part of the file begins or ends.
fn boundaries(file: &Path) -> TestResult<BTreeSet<u64>> {
    let snapshot = Snapshot::open(file, 0)?;
    let structure = snapshot.structure();
    let manifest = snapshot.manifest().ok_or("a file of ours")?;
    let mut offsets = BTreeSet::from([0, 4, 8, 9, snapshot.file_len()]);
    for placed in &structure.blocks {
        offsets.extend([placed.record_offset, placed.bitmap_offset]);
        offsets.insert(placed.bitmap_offset + placed.bitmap_len());
        offsets.extend([placed.pages_offset, placed.pages_end()]);
    }
    for section in &structure.device_state.sections {
        offsets.extend([section.offset, section.offset + section.len]);
    }
    offsets.extend([structure.device_state.start, structure.device_state.end]);
    offsets.insert(structure.device_state.stream_end);
    for extent in &manifest.meta.extents {
        offsets.extend([extent.offset, extent.offset + extent.bytes]);
    }
    for block in &manifest.meta.blocks {
        let pages = block.bytes / 4096;
        offsets.extend([block.hashes_offset, block.hashes_offset + pages * 16]);
    }
    offsets.insert(manifest.footer.metadata_offset);
    offsets.insert(snapshot.file_len() - FOOTER_LEN);
    Ok(offsets)
}

#[test]
fn a_file_that_was_cut_anywhere_is_refused_with_path_and_offset() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &Guest::boot_sector(Ram::private(16)).seed(21))?;
    let whole = fs::metadata(&saved.file)?.len();
    let cuts: BTreeSet<u64> = boundaries(&saved.file)?
        .into_iter()
        .flat_map(|offset| [offset.saturating_sub(1), offset, offset + 1])
        .filter(|&len| len < whole)
        .collect();
    assert!(cuts.len() > 100, "{} places", cuts.len());
    let name = saved.file.display().to_string();
    let file = File::options().write(true).open(&saved.file)?;
    let mut refused = 0;
    // From the longest to the shortest: each cut shortens the file further.
    for len in cuts.into_iter().rev() {
        file.set_len(len)?;
        for verb in ["info", "check", "restore"] {
            let said = vmfile(words![verb, saved.file]);
            assert_eq!(said.code, Some(4), "{verb} of {len:#x} bytes: {said:?}");
            said.assert(4, &[&name, "offset 0x", "hint: "]);
            refused += 1;
        }
    }
    cases(refused, Case::Truncation);
    Ok(())
}

#[test]
fn a_changed_byte_is_found_wherever_it_is() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &Guest::boot_sector(Ram::private(16)).seed(22))?;
    let whole = fs::metadata(&saved.file)?.len();
    let places: BTreeSet<u64> = boundaries(&saved.file)?
        .into_iter()
        .flat_map(|offset| [offset.saturating_sub(1), offset, offset + 1, offset + 77])
        .filter(|&offset| offset < whole)
        .collect();
    let name = saved.file.display().to_string();
    let file = File::options().read(true).write(true).open(&saved.file)?;
    let mut found = 0;
    for offset in places {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset)?;
        file.write_all_at(&[byte[0] ^ 0x40], offset)?;
        let said = vmfile(words!["check", saved.file]);
        file.write_all_at(&byte, offset)?;
        match said.code {
            Some(1) => said.assert(1, &["file offset 0x", "damaged: "]),
            Some(4) => said.assert(4, &[&name, "0x"]),
            _ => return Err(format!("byte {offset:#x}: {said:?}").into()),
        }
        found += 1;
    }
    cases(found, Case::Flip);
    vmfile(words!["check", saved.file]).assert(0, &["ok: ", "0 findings"]);
    Ok(())
}

#[test]
fn a_changed_page_is_named_by_block_page_and_offset() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let saved = saved(&qemu, &Guest::boot_sector(Ram::private(16)).seed(23))?;
    let snapshot = Snapshot::open(&saved.file, 0)?;
    let placed = snapshot.structure().block("pc.ram").ok_or("pc.ram")?;
    let bitmap = snapshot.bitmap(placed)?;
    let page = bitmap.data_runs().last().ok_or("a page")?.start.0;
    let file = File::options().read(true).write(true).open(&saved.file)?;
    let offset = placed.pages_offset + page * 4096;
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, offset)?;
    bytes[4095] ^= 1;
    file.write_all_at(&bytes, offset)?;

    let text = vmfile(words!["check", saved.file]);
    text.assert(1, &[&format!("page hash: RAM block \"pc.ram\", page {page}, file offset")]);
    let report = vmfile(words!["check", "--json", saved.file]);
    assert_eq!(report.code, Some(1));
    let report = report.json()?;
    assert_eq!(report["findings_total"], 1);
    assert!(report["pages_checked"].as_u64() > Some(100), "{report}");
    let finding = &report["findings"][0];
    assert_eq!(finding["kind"], "page_hash");
    assert_eq!(finding["block"], "pc.ram");
    assert_eq!(finding["page"], page);
    assert_eq!(finding["offset"], offset);
    assert_eq!(vmfile(words!["check", "--quiet", saved.file]).stdout, "");
    // `info` still describes a damaged file.
    vmfile(words!["info", saved.file]).assert(0, &["pc.ram"]);
    Ok(())
}
