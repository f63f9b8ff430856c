//! The metadata that helps other programs to read a file, and features that QEMU must refuse.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::json;
use vmfile::restore::Mode;
use vmfile::save::{After, BaseFile, Route, SaveOptions};
use vmfile::{Snapshot, SnapshotError};
use vmfile_format::manifest::{CpuSectionMeta, MemoryRangeMeta};
use vmfile_format::mapped_ram::PlacedBlock;
use vmfile_format::stream::configuration::{Configuration, FEATURE_PREFIX};
use vmfile_format::stream::encoder;
use vmfile_testing::migration::{set_capability, wait_for_migration};
use vmfile_testing::{
    Guest, GuestConfig, Machine, Qemu, Ram, Release, Saved, TestResult, requires,
};

/// Saves the guest, which stays paused, and compares the guest addresses and CPU registers in the
/// file with those that QEMU reports.
fn addresses_and_registers_are_recorded(
    qemu: &Qemu,
    config: &GuestConfig,
    route: Route,
) -> TestResult {
    let mut guest = config.boot_to(qemu, 1)?;
    let saved = guest.save(&SaveOptions::default().route(route).after(After::Pause))?;
    let snapshot = Snapshot::open(&saved.file, 0)?;
    let meta = &snapshot.manifest().ok_or("no manifest")?.meta;

    let map = meta.vm.memory_map.as_ref().ok_or("no map")?;
    let of_ram = map.iter().filter(|range| range.block.as_deref() == Some("pc.ram"));
    let ram = snapshot.structure().block("pc.ram").ok_or("no RAM")?.block.used_length();
    let mapped: u64 = of_ram.clone().map(|range| range.bytes).sum();
    // On a PC, ROMs and graphics memory hide a part of the first MiB.
    assert!((ram - (1 << 20)..=ram).contains(&mapped), "{mapped} of {ram} bytes are mapped");
    for range in map.iter().filter(|range| range.block.is_some()) {
        let last = range.bytes - 4096;
        for at in [0, last / 2 / 4096 * 4096, last] {
            let page = page_at(&snapshot, range, at)?;
            let seen = fs::read(guest.pmemsave(range.guest_address + at, 4096)?)?;
            assert!(page == seen, "{range:?} at {at:#x}");
        }
    }

    let registers =
        guest.qmp("human-monitor-command", json!({"command-line": "info registers -a"}))?;
    let registers = registers.as_str().ok_or("no text")?;
    assert_eq!(meta.cpu_sections.len(), 2);
    for section in &meta.cpu_sections {
        let (rip, cr3) = rip_and_cr3(&snapshot, section)?;
        let of_cpu = format!("CPU#{}", section.cpu);
        let text = registers.split_once(&of_cpu).ok_or("no such CPU")?.1;
        assert!(is_register(text, "IP=", rip), "rip {rip:#x} in {text}");
        assert!(is_register(text, "CR3=", cr3), "cr3 {cr3:#x} in {text}");
    }
    Ok(())
}

/// Reads the page of the file that lies at offset `at` of `range`.
fn page_at(snapshot: &Snapshot, range: &MemoryRangeMeta, at: u64) -> TestResult<Vec<u8>> {
    let name = range.block.as_deref().ok_or("no block")?;
    let placed = snapshot.structure().block(name).ok_or("no such block")?;
    let mut page = vec![0; 4096];
    snapshot.file().read_exact_at(&mut page, placed.pages_offset + range.offset + at)?;
    Ok(page)
}

/// Reads two registers from the section of an x86 CPU, version 12 (QEMU 2.4 to 11.1).
fn rip_and_cr3(snapshot: &Snapshot, section: &CpuSectionMeta) -> TestResult<(u64, u64)> {
    assert_eq!(section.version, 12);
    let read = |offset: u64| {
        let mut bytes = [0; 8];
        let read = snapshot.file().read_exact_at(&mut bytes, section.offset + offset);
        read.map(|()| u64::from_be_bytes(bytes))
    };
    Ok((read(128)?, read(472)?))
}

/// Whether the first register `name` in `text` has `value`; QEMU prints 8 or 16 digits.
fn is_register(text: &str, name: &str, value: u64) -> bool {
    let digits = text.split_once(name).map_or("", |(_, rest)| rest);
    let digits: String = digits.chars().take_while(char::is_ascii_hexdigit).collect();
    u64::from_str_radix(&digits, 16) == Ok(value)
}

#[test]
fn a_file_says_where_the_guest_sees_its_memory_and_where_its_registers_are() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let config = Guest::linux(Ram::private(256)).vcpus(2);
    addresses_and_registers_are_recorded(&qemu, &config, Route::Direct)?;
    // RAM above 4 GiB: a q35 puts RAM beyond 2 GiB there.
    let config = Guest::linux(Ram::private(3072)).vcpus(2).machine(Machine::Q35);
    addresses_and_registers_are_recorded(&qemu, &config, Route::Native)?;
    let config = Guest::linux(Ram::private(256)).vcpus(2).machine(Machine::Q35);
    addresses_and_registers_are_recorded(&qemu, &config, Route::Stream)
}

/// Adds a vmfile feature to the head of the file. The first block's record and bitmap move up;
/// there is room before its pages.
fn add_feature_to_head(path: &Path, feature: &str) -> TestResult {
    let snapshot = Snapshot::open(path, 0)?;
    let structure = snapshot.structure();
    let mut configuration: Configuration = structure.configuration.clone();
    configuration.capabilities.push(format!("{FEATURE_PREFIX}{feature}"));
    let mut bytes = configuration.encode();
    encoder::start_ram(&mut bytes, structure.device_state.unused_id(), &structure.ram());
    // The section keeps its id, which the end of the section repeats.
    let id_at = bytes.len() - 4 - 4 - 8 - 4 - 4;
    let id = snapshot.read(structure.head_end - (bytes.len() - id_at) as u64, 4)?;
    bytes[id_at..id_at + 4].copy_from_slice(&id);
    let first = structure.blocks.first().ok_or("no block")?;
    let moved = bytes.len() as u64 - structure.head_end;
    let placed = PlacedBlock {
        record_offset: first.record_offset + moved,
        bitmap_offset: first.bitmap_offset + moved,
        ..first.clone()
    };
    bytes.extend(placed.encode_record());
    assert_eq!(bytes.len() as u64, placed.bitmap_offset, "the bitmap follows the record");
    bytes.extend(snapshot.bitmap(first)?.encode());
    File::options().write(true).open(path)?.write_all_at(&bytes, 0)?;
    Ok(())
}

/// Has QEMU load the file without vmfile; returns whether it succeeded.
fn qemu_takes(qemu: &Qemu, path: &Path, config: &GuestConfig) -> TestResult<bool> {
    let mut guest = config.incoming(qemu, "defer")?;
    let uri = if set_capability(&mut guest, "mapped-ram").is_ok() {
        format!("file:{}", path.display())
    } else {
        format!("exec:cat '{}'", path.display())
    };
    guest.qmp("migrate-incoming", json!({ "uri": uri }))?;
    match wait_for_migration(&mut guest) {
        Ok(answer) => Ok(answer["status"] == "completed"),
        // QEMU before 9.1 ends when it refuses a stream.
        Err(_) => guest.wait_for_exit().map(|()| false),
    }
}

/// QEMU would take the pages that the base has for zero pages.
#[test]
fn qemu_refuses_a_thin_file_whatever_its_version() -> TestResult {
    let (qemu, newest) = (requires!(qemu >= "9.0"), requires!(Qemu::of(Release::Newest)));
    let oldest = requires!(Qemu::of(Release::Oldest));
    let config = Guest::boot_sector(Ram::private(64)).machine_version("7.2");
    let mut guest = config.boot_to(&qemu, 1)?;
    let resumed = SaveOptions::default().after(After::Resume);
    let base = guest.save(&resumed)?;
    let thin = resumed.base(Some(BaseFile::File(base.file.clone()))).thin(true);
    let thin = guest.save(&thin)?;
    drop(guest);
    for qemu in [&oldest, &qemu, &newest] {
        let version = qemu.version();
        assert!(!qemu_takes(qemu, &thin.file, &config)?, "QEMU {version} refuses a thin file");
    }
    thin.comes_back(&qemu, [Mode::Load])
}

#[test]
fn qemu_refuses_a_feature_in_the_head_whatever_its_version() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let (oldest, newest) =
        (requires!(Qemu::of(Release::Oldest)), requires!(Qemu::of(Release::Newest)));
    let config = Guest::boot_sector(Ram::private(64)).machine_version("7.2");
    let Saved { file, .. } = &config.boot_to(&qemu, 1)?.save(&SaveOptions::default())?;
    for qemu in [&qemu, &newest] {
        let version = qemu.version();
        assert!(qemu_takes(qemu, file, &config)?, "QEMU {version} takes what is whole");
    }
    add_feature_to_head(file, "woven")?;
    for qemu in [&oldest, &qemu, &newest] {
        let version = qemu.version();
        assert!(!qemu_takes(qemu, file, &config)?, "QEMU {version} refuses the feature");
    }
    let error = Snapshot::open(file, 0).err().ok_or("it was opened")?;
    assert!(matches!(error, SnapshotError::Newer { .. }), "{error}");
    Ok(())
}
