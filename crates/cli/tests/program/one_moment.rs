//! The file of a live save holds the memory of the moment at which the guest stood still.
//!
//! `cargo xtask chaos saves` compares more saves than a test has time for.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Child;

use rustix::process::{Signal, kill_process};
use serde_json::Value;
use vmfile::Snapshot;
use vmfile_format::PageIndex;
use vmfile_testing::{
    Case, Guest, HugePages, Qemu, Ram, Release, TestResult, cases, given, requires,
};

use crate::guests::directory;
use crate::run::{Said, pid, start, vmfile};
use crate::words;

/// How many saves of all guests together are compared.
const SAVES: u64 = 16;

/// RAM of a guest, in MiB.
const SIZE_MIB: u64 = 64;

/// Saves the guest live and has QEMU write its RAM to a file while the guest stands still. The save
/// itself is stopped meanwhile. Returns the report, and the RAM unless the moment was missed.
fn save(guest: &mut Guest, file: &Path, options: &[&str]) -> TestResult<(Value, Option<Vec<u8>>)> {
    let words = words!["save", guest.qmp_path(), file, "--live", "--force", "--json"];
    let mut child = start(words.into_iter().chain(options.iter().map(Into::into)))?;
    let ram = while_paused(guest, &mut child);
    let said = Said::from(child.wait_with_output()?);
    said.assert(0, &[]);
    Ok((said.json()?, ram?))
}

fn while_paused(guest: &mut Guest, child: &mut Child) -> TestResult<Option<Vec<u8>>> {
    while guest.status()? != "paused" {
        if child.try_wait()?.is_some() {
            return Ok(None);
        }
    }
    let save = pid(child.id());
    kill_process(save, Signal::STOP)?;
    // The save may have let the guest run before it stopped.
    let ram = if guest.status()? == "paused" {
        let path = guest.pmemsave(0, SIZE_MIB << 20)?;
        let ram = fs::read(&path)?;
        fs::remove_file(&path)?;
        (guest.status()? == "paused").then_some(ram)
    } else {
        None
    };
    kill_process(save, Signal::CONT)?;
    Ok(ram)
}

/// Compares all pages of `pc.ram` that the guest sees with `ram`; returns how many.
fn compare(file: &Path, ram: &[u8]) -> TestResult<usize> {
    let snapshot = Snapshot::open(file, 0)?;
    let map = &snapshot.manifest().ok_or("no manifest")?.meta.vm.memory_map;
    let placed = snapshot.structure().block("pc.ram").ok_or("no RAM")?;
    let data = snapshot.bitmap(placed)?;
    let mut compared = 0;
    for range in map.iter().flatten().filter(|range| range.block.as_deref() == Some("pc.ram")) {
        for at in (0..range.bytes).step_by(4096) {
            let (address, offset) = (range.guest_address + at, range.offset + at);
            let mut page = [0; 4096];
            if data.contains(PageIndex(offset / 4096)) {
                snapshot.file().read_exact_at(&mut page, placed.pages_offset + offset)?;
            }
            let seen = ram.get(usize::try_from(address)?..).and_then(|ram| ram.get(..4096));
            assert!(seen == Some(&page), "{} at guest address {address:#x}", file.display());
            compared += 1;
        }
    }
    Ok(compared)
}

/// Saves the guest until `saves` files were compared; each is saved by `method`.
fn compare_saves(
    guest: &mut Guest,
    saves: u64,
    (method, options): (&str, &[&str]),
) -> TestResult<u64> {
    let directory = directory()?;
    let file = directory.path().join("vm.vmf");
    let (mut compared, mut tries) = (0, 0);
    while compared < saves {
        assert!(tries < 10 * saves, "the moment was missed {tries} times");
        tries += 1;
        let (report, ram) = save(guest, &file, options)?;
        let used = report["live_method"].as_str().unwrap_or_default();
        assert!(used.starts_with(method), "{report}");
        if let Some(ram) = ram {
            let pages = compare(&file, &ram)?;
            // On a PC, ROMs and graphics memory hide a part of the first MiB.
            assert!(pages > usize::try_from(SIZE_MIB)? * 250, "{pages} pages");
            compared += 1;
        }
    }
    guest.runs_on(1)?;
    Ok(compared)
}

#[test]
fn live_saves_in_a_row_have_the_memory_of_the_moment_they_stopped_the_guest() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let _pages = requires!(HugePages::reserve(2 * SIZE_MIB));
    let saves = given("VMFILE_SAVES").unwrap_or(SAVES).div_ceil(4);
    let mut compared = 0;
    for (seed, ram, vcpus) in [
        (301, Ram::private(SIZE_MIB), 2),
        (302, Ram::memfd(SIZE_MIB), 1),
        (303, Ram::hugetlb_memfd(SIZE_MIB), 1),
    ] {
        let config = Guest::boot_sector(ram).seed(seed).vcpus(vcpus).busy();
        let mut guest = config.boot_to(&qemu, 1)?;
        compared += compare_saves(&mut guest, saves, ("userfault", &[]))?;
    }
    // A guest that was restored by `map` is saved from a copy, and on the file that it came from.
    let config = Guest::boot_sector(Ram::private(SIZE_MIB)).seed(304).fill_mib(48).busy();
    let guest = config.boot_to(&qemu, 1)?;
    let directory = directory()?;
    let template = directory.path().join("template.vmf");
    vmfile(words!["save", guest.qmp_path(), template]).assert(0, &[]);
    drop(guest);
    let prepared = config.prepare(&qemu)?;
    crate::run::restore(&words![template, "--mode", "map"], &prepared.command_line())
        .assert(0, &[]);
    let mut clone = prepared.attach()?;
    clone.wait_for_passes(1)?;
    compared += compare_saves(&mut clone, saves, ("aside", &[]))?;
    cases(compared, Case::Save);
    Ok(())
}
