//! Files converted there and back: the same pages, the same device sections, the same guest.

use std::path::Path;

use vmfile::convert::{ConvertError, ConvertOptions, Format, convert};
use vmfile::restore::Mode;
use vmfile::save::SaveOptions;
use vmfile::{Control, Snapshot};
use vmfile_testing::migration::{migrate_all, qemu_writes};
use vmfile_testing::verbs::{check_is_clean, pages, restore};
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, Saved, TestResult, requires};

fn to(format: Format, source: &Path, destination: &Path) -> Result<(), ConvertError> {
    let options = ConvertOptions::default();
    convert((source, 0), destination, format, &options, &Control::none()).map(drop)
}

/// Expects that `name`, a conversion beside the saved file, is undamaged, and that the guest counts
/// on from it.
fn comes_back<R>(saved: &Saved<R>, qemu: &Qemu, config: &GuestConfig, name: &str) -> TestResult {
    let file = saved.directory.path().join(name);
    check_is_clean(&file)?;
    saved.goes_on_in(&restore(qemu, config, &file, Mode::Map)?)
}

#[test]
fn there_and_back_every_byte_of_the_vm_is_the_same() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(121);
    let saved = config.boot_to(&qemu, 2)?.save(&SaveOptions::default())?;
    let path = |name: &str| saved.directory.path().join(name);
    to(Format::Stream, &saved.file, &path("stream"))?;
    to(Format::MappedRam, &path("stream"), &path("two"))?;
    let (one, two) = (Snapshot::open(&saved.file, 0)?, Snapshot::open(&path("two"), 0)?);
    assert!(one.device_state()? == two.device_state()?, "device sections, byte for byte");
    assert_eq!(one.structure().ram(), two.structure().ram());
    for block in one.structure().ram().blocks() {
        let name = block.name();
        assert!(pages(&saved.file, name)? == pages(&path("two"), name)?, "{name}");
    }
    comes_back(&saved, &qemu, &config, "two")
}

#[test]
fn the_stream_is_one_that_the_oldest_qemu_loads_and_vmfile_reads_what_it_wrote() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(122).machine_version("7.2");
    let saved = config.boot_to(&qemu, 2)?.save(&SaveOptions::default())?;
    let stream = saved.directory.path().join("stream");
    to(Format::Stream, &saved.file, &stream)?;

    let mut guest = config.incoming(&oldest, &format!("exec:cat {}", stream.display()))?;
    saved.goes_on_in(&guest)?;
    let by_qemu = Saved::by(&mut guest, |guest, file| {
        migrate_all(guest, &format!("exec:cat > {}", file.display()))
    })?;
    drop(guest);
    to(Format::MappedRam, &by_qemu.file, &by_qemu.directory.path().join("again"))?;
    comes_back(&by_qemu, &qemu, &config, "again")
}

#[test]
fn a_mapped_ram_file_of_qemus_becomes_one_that_can_be_mapped() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::boot_sector(Ram::private(64)).seed(123);
    let mut guest = config.boot_to(&qemu, 2)?;
    let by_qemu = Saved::by(&mut guest, |guest, file| {
        qemu_writes(guest, &format!("file:{}", file.display()))
    })?;
    drop(guest);
    let path = |name: &str| by_qemu.directory.path().join(name);
    to(Format::MappedRam, &by_qemu.file, &path("vmf"))?;
    comes_back(&by_qemu, &qemu, &config, "vmf")?;

    let error = to(Format::MappedRam, &path("vmf"), &path("more")).expect_err("nothing to do");
    assert!(error.to_string().ends_with("is a vmfile already"), "{error}");
    assert!(!path("more").exists());
    Ok(())
}

#[test]
fn what_is_neither_is_refused_with_its_first_bytes() -> TestResult {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("text"), "no virtual machine")?;
    for format in [Format::MappedRam, Format::Stream] {
        let error = to(format, &path("text"), &path("new")).expect_err("a text");
        let source = std::error::Error::source(&error).map(ToString::to_string);
        assert!(source.unwrap_or_default().contains("begins with 0x6e6f2076"), "{error}");
        assert!(!path("new").exists());
    }
    Ok(())
}
