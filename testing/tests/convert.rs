//! Files converted there and back: the same pages, the same device sections, the same guest.

use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::json;
use vmfile::convert::{ConvertError, ConvertOptions, Format, convert};
use vmfile::{Control, Snapshot};
use vmfile_testing::verbs::{check_is_clean, map, pages, save};
use vmfile_testing::{Guest, GuestConfig, Qemu, Ram, Release, TestResult, requires};

fn to(format: Format, source: &Path, destination: &Path) -> Result<(), ConvertError> {
    let options = ConvertOptions::default();
    convert((source, 0), destination, format, &options, &Control::none()).map(drop)
}

fn saved(qemu: &Qemu, config: &GuestConfig, file: &Path) -> TestResult {
    let guest = config.boot(qemu)?;
    guest.wait_for_count(2)?;
    save(&guest, file).map(drop)
}

fn comes_back(qemu: &Qemu, config: &GuestConfig, file: &Path) -> TestResult {
    let guest = map(qemu, config, file)?;
    guest.wait_for_passes(2)?;
    guest.judge_counts()
}

#[test]
fn there_and_back_every_byte_of_the_vm_is_the_same() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(121);
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = |name: &str| directory.path().join(name);
    saved(&qemu, &config, &path("one"))?;
    to(Format::Stream, &path("one"), &path("stream"))?;
    to(Format::MappedRam, &path("stream"), &path("two"))?;
    check_is_clean(&path("two"))?;
    let (one, two) = (Snapshot::open(&path("one"), 0)?, Snapshot::open(&path("two"), 0)?);
    assert!(one.device_state()? == two.device_state()?, "device sections, byte for byte");
    assert_eq!(one.structure().ram(), two.structure().ram());
    for block in one.structure().ram().blocks() {
        let name = block.name();
        assert!(pages(&path("one"), name)? == pages(&path("two"), name)?, "{name}");
    }
    comes_back(&qemu, &config, &path("two"))
}

#[test]
fn the_stream_is_one_that_the_oldest_qemu_loads_and_vmfile_reads_what_it_wrote() -> TestResult {
    let oldest = requires!(Qemu::of(Release::Oldest));
    let qemu = requires!(Qemu::of(Release::Distribution));
    let config = Guest::boot_sector(Ram::private(64)).seed(122).machine_version("7.2");
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = |name: &str| directory.path().join(name);
    saved(&qemu, &config, &path("vmf"))?;
    to(Format::Stream, &path("vmf"), &path("stream"))?;

    let uri = format!("exec:cat {}", path("stream").display());
    let mut guest = config.incoming(&oldest, &uri)?;
    guest.wait_for_passes(2)?;
    guest.judge_counts()?;
    let uri = format!("exec:cat > {}", path("by-qemu").display());
    guest.qmp("migrate", json!({ "uri": uri }))?;
    while guest.qmp("query-migrate", json!({}))?["status"] != "completed" {
        thread::sleep(Duration::from_millis(10));
    }
    drop(guest);
    to(Format::MappedRam, &path("by-qemu"), &path("again"))?;
    check_is_clean(&path("again"))?;
    comes_back(&qemu, &config, &path("again"))
}

#[test]
fn a_mapped_ram_file_of_qemus_becomes_one_that_can_be_mapped() -> TestResult {
    let qemu = requires!(Qemu::of(Release::Newest));
    let config = Guest::boot_sector(Ram::private(64)).seed(123);
    let mut guest = config.boot(&qemu)?;
    guest.wait_for_count(2)?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = |name: &str| directory.path().join(name);
    let capability = json!([{ "capability": "mapped-ram", "state": true }]);
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": capability }))?;
    let uri = format!("file:{}", path("by-qemu").display());
    guest.qmp("migrate", json!({ "uri": uri }))?;
    while guest.qmp("query-migrate", json!({}))?["status"] != "completed" {
        thread::sleep(Duration::from_millis(10));
    }
    drop(guest);
    to(Format::MappedRam, &path("by-qemu"), &path("vmf"))?;
    check_is_clean(&path("vmf"))?;
    comes_back(&qemu, &config, &path("vmf"))?;

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
