//! QEMU reads what vmfile writes, and vmfile reads what QEMU writes.

use std::path::Path;

use serde_json::json;
use vmfile::check::CheckOptions;
use vmfile::restore::{Mode, ModeUsed, RestoreOptions};
use vmfile::save::SaveOptions;
use vmfile::{Control, FileFormat, RestoreError, Snapshot};
use vmfile_testing::migration::{migrate_all, set_capability, wait_until_complete};
use vmfile_testing::verbs::{self, check_is_clean, restore_into};
use vmfile_testing::{Guest, GuestConfig, Machine, Qemu, Ram, Saved, TestResult, requires};

/// QEMU's settings for writing or reading a mapped-ram file.
#[derive(Clone, Copy, Debug)]
struct Way {
    multifd: bool,
    direct_io: bool,
}

const PLAIN: Way = Way { multifd: false, direct_io: false };
const MULTIFD: Way = Way { multifd: true, direct_io: false };
const MULTIFD_DIRECT: Way = Way { multifd: true, direct_io: true };

fn prepare_qemu(guest: &mut Guest, way: Way) -> TestResult {
    set_capability(guest, "mapped-ram")?;
    if way.multifd {
        set_capability(guest, "multifd")?;
    }
    let parameters = json!({
        "max-bandwidth": 0,
        "multifd-channels": 2,
        "direct-io": way.direct_io,
    });
    guest.qmp("migrate-set-parameters", parameters).map(drop)
}

fn uri(file: &Path, offset: u64) -> String {
    format!("file:{},offset={offset}", file.display())
}

/// Has QEMU load a file of vmfile without vmfile.
fn qemu_loads(qemu: &Qemu, config: &GuestConfig, file: &Path, way: Way) -> TestResult<Guest> {
    let mut guest = config.incoming(qemu, "defer")?;
    prepare_qemu(&mut guest, way)?;
    guest.qmp("migrate-incoming", json!({ "uri": uri(file, 0) }))?;
    wait_until_complete(&mut guest)?;
    Ok(guest)
}

/// Saves with vmfile, loads the file with QEMU, and lets the guest judge.
fn qemu_restores_ours(qemu: &Qemu, config: &GuestConfig, way: Way) -> TestResult {
    let saved = config.boot_to(qemu, 2)?.save(&SaveOptions::default())?;
    saved.goes_on_in(&qemu_loads(qemu, config, &saved.file, way)?)?;
    check_is_clean(&saved.file)
}

#[test]
fn qemu_alone_restores_our_file() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    qemu_restores_ours(&qemu, &Guest::boot_sector(Ram::private(64)).seed(21), PLAIN)
}

#[test]
fn qemu_alone_restores_our_file_with_multifd() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::memfd(64)).seed(22).machine(Machine::Q35);
    qemu_restores_ours(&qemu, &config, MULTIFD)
}

#[test]
fn qemu_alone_restores_our_file_with_multifd_and_direct_io() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let config = Guest::linux(Ram::private(256)).vcpus(2).virtio();
    qemu_restores_ours(&qemu, &config, MULTIFD_DIRECT)
}

#[test]
fn qemu_alone_leaves_a_paused_vm_paused() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(64)).seed(23);
    let mut guest = config.boot_to(&qemu, 1)?;
    guest.stop()?;
    let saved = guest.save(&SaveOptions::default())?;
    drop(guest);
    assert_eq!(qemu_loads(&qemu, &config, &saved.file, PLAIN)?.status()?, "paused");
    Ok(())
}

/// Has QEMU save the guest at `offset` of a file.
fn qemu_saves(qemu: &Qemu, config: &GuestConfig, way: Way, offset: u64) -> TestResult<Saved<()>> {
    let mut guest = config.boot_to(qemu, 2)?;
    prepare_qemu(&mut guest, way)?;
    Saved::by(&mut guest, |guest, file| migrate_all(guest, &uri(file, offset)))
}

/// Has QEMU save at `offset` of a file, checks and restores it with vmfile, and lets the guest
/// judge.
fn we_restore_qemus(qemu: &Qemu, config: &GuestConfig, way: Way, offset: u64) -> TestResult {
    let saved = qemu_saves(qemu, config, way, offset)?;
    let snapshot = Snapshot::open(&saved.file, offset)?;
    let info = vmfile::info::info(&snapshot)?;
    assert_eq!(info.format, FileFormat::MappedRam);
    assert!(info.device_sections.len() > 10, "{} sections", info.device_sections.len());
    assert!(info.blocks.iter().any(|block| block.name == "pc.ram" && block.pages_data > 0));
    let report = vmfile::check::check(&snapshot, &CheckOptions::default(), &Control::none())?;
    assert_eq!(report.findings, []);

    let waiting = config.incoming(qemu, "defer")?;
    let restored = restore_into(&waiting, &snapshot, &RestoreOptions::default())?;
    assert_eq!(restored.report.mode, ModeUsed::Load);
    saved.goes_on_in(&waiting)
}

#[test]
fn we_restore_a_file_that_qemu_wrote() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    we_restore_qemus(&qemu, &Guest::boot_sector(Ram::private(64)).seed(24), PLAIN, 0)
}

#[test]
fn we_restore_a_file_that_qemu_wrote_with_multifd_at_an_odd_offset() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::memfd(64)).seed(25).machine(Machine::Q35);
    we_restore_qemus(&qemu, &config, MULTIFD, 0x1_1921)
}

#[test]
fn we_restore_a_live_save_of_qemus_with_stale_bytes() -> TestResult {
    let qemu = requires!(qemu >= "9.1");
    let config = Guest::linux(Ram::memfd(256)).vcpus(2).virtio().busy();
    we_restore_qemus(&qemu, &config, MULTIFD_DIRECT, 4096)
}

#[test]
fn a_file_that_qemu_wrote_is_never_mapped() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(64)).seed(26);
    let saved = qemu_saves(&qemu, &config, PLAIN, 0)?;
    let error = saved.restore(&qemu, Mode::Map).unwrap_err().downcast::<RestoreError>()?;
    assert!(matches!(*error, RestoreError::CannotMap { .. }), "{error}");
    saved.comes_back_on(&qemu, Mode::Load).map(drop)
}

#[test]
fn reused_ram_files_are_cleared_where_the_file_has_zero_pages() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::tmpfs(64)).seed(27);
    let saved = config.boot_to(&qemu, 1)?.save(&SaveOptions::default())?;
    let waiting = config.incoming(&qemu, "defer")?;
    let ram = waiting.ram_file("pc.ram").ok_or("no RAM file")?;
    std::fs::File::options().write(true).open(&ram)?.set_len(64 << 20)?;
    let noise = vec![0xaa; 64 << 20];
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(&ram)?,
        &noise,
        0,
    )?;
    saved.restore_into(&waiting, &RestoreOptions::default().paused(true))?;
    let found = std::fs::read(&ram)?;
    assert!(
        found == verbs::pages(&saved.file, "pc.ram")?,
        "RAM is what the file says, byte for byte"
    );
    Ok(())
}
