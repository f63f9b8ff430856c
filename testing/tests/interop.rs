//! QEMU reads what vmfile writes, and vmfile reads what QEMU writes.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmfile::check::CheckOptions;
use vmfile::restore::{Destination, Mode, ModeUsed, RestoreOptions};
use vmfile::{Control, FileFormat, RestoreError, Snapshot, Vm};
use vmfile_testing::verbs::{self, check_is_clean, load, save};
use vmfile_testing::{Guest, GuestConfig, Machine, Qemu, Ram, TestResult, requires};

/// How QEMU is told to write or read a mapped-ram file.
#[derive(Clone, Copy, Debug)]
struct Way {
    multifd: bool,
    direct_io: bool,
}

const PLAIN: Way = Way { multifd: false, direct_io: false };
const MULTIFD: Way = Way { multifd: true, direct_io: false };
const MULTIFD_DIRECT: Way = Way { multifd: true, direct_io: true };

fn prepare_qemu(guest: &mut Guest, way: Way) -> TestResult {
    let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
    let list = [capability("mapped-ram", true), capability("multifd", way.multifd)];
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": list }))?;
    let parameters = json!({
        "max-bandwidth": 0,
        "multifd-channels": 2,
        "direct-io": way.direct_io,
    });
    guest.qmp("migrate-set-parameters", parameters)?;
    Ok(())
}

fn wait_for_migration(guest: &mut Guest) -> TestResult {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = guest.qmp("query-migrate", json!({}))?;
        match answer.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(()),
            Some("failed") => return Err(format!("QEMU: {answer}").into()),
            _ if Instant::now() > deadline => return Err(format!("too long: {answer}").into()),
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn uri(file: &Path, offset: u64) -> String {
    format!("file:{},offset={offset}", file.display())
}

/// vmfile saves, QEMU loads the file with nothing of ours, and the guest judges.
fn qemu_restores_ours(qemu: &Qemu, config: &GuestConfig, way: Way) -> TestResult {
    let guest = config.boot(qemu)?;
    let before = guest.wait_for_count(2)?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let file = directory.path().join("vm.vmf");
    save(&guest, &file)?;
    drop(guest);

    let mut guest = config.incoming(qemu, "defer")?;
    prepare_qemu(&mut guest, way)?;
    guest.qmp("migrate-incoming", json!({ "uri": uri(&file, 0) }))?;
    wait_for_migration(&mut guest)?;

    let after = guest.wait_for_passes(2)?;
    assert!(after.number > before.number, "{} after {}", after.number, before.number);
    guest.judge_counts()?;
    check_is_clean(&file)
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
    let mut guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    guest.stop()?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    save(&guest, &file)?;
    drop(guest);
    let mut guest = config.incoming(&qemu, "defer")?;
    prepare_qemu(&mut guest, PLAIN)?;
    guest.qmp("migrate-incoming", json!({ "uri": uri(&file, 0) }))?;
    wait_for_migration(&mut guest)?;
    assert_eq!(guest.status()?, "paused");
    Ok(())
}

/// QEMU saves at `offset` of a file, vmfile looks at it and restores it, and the guest judges.
fn we_restore_qemus(qemu: &Qemu, config: &GuestConfig, way: Way, offset: u64) -> TestResult {
    let mut guest = config.boot(qemu)?;
    let before = guest.wait_for_count(2)?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let file = directory.path().join("vm.mig");
    prepare_qemu(&mut guest, way)?;
    guest.qmp("migrate", json!({ "uri": uri(&file, offset) }))?;
    wait_for_migration(&mut guest)?;
    drop(guest);

    let snapshot = Snapshot::open(&file, offset)?;
    let info = vmfile::info::info(&snapshot)?;
    assert_eq!(info.format, FileFormat::MappedRam);
    assert!(info.device_sections.len() > 10, "{} sections", info.device_sections.len());
    assert!(info.blocks.iter().any(|block| block.name == "pc.ram" && block.pages_data > 0));
    let report = vmfile::check::check(&snapshot, &CheckOptions::default(), &Control::none())?;
    assert_eq!(report.findings, []);

    let waiting = config.incoming(qemu, "defer")?;
    let vm = Vm::connect(&waiting.qmp_path())?;
    let options = RestoreOptions::default();
    let destination = Destination::Waiting(vm);
    let restored = vmfile::restore::restore(&snapshot, destination, &options, &Control::none())?;
    assert_eq!(restored.report.mode, ModeUsed::Load);
    let after = waiting.wait_for_passes(2)?;
    assert!(after.number >= before.number, "{} after {}", after.number, before.number);
    waiting.judge_counts()
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
    let mut guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.mig");
    prepare_qemu(&mut guest, PLAIN)?;
    guest.qmp("migrate", json!({ "uri": uri(&file, 0) }))?;
    wait_for_migration(&mut guest)?;
    drop(guest);

    let error = verbs::restore(&qemu, &config, &file, Mode::Map).unwrap_err();
    let error = error.downcast::<RestoreError>()?;
    assert!(matches!(*error, RestoreError::CannotMap { .. }), "{error}");
    let guest = load(&qemu, &config, &file)?;
    guest.wait_for_passes(2)?;
    guest.judge_counts()
}

#[test]
fn reused_ram_files_are_cleared_where_the_file_has_zero_pages() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::tmpfs(64)).seed(27);
    let guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    save(&guest, &file)?;
    drop(guest);

    let waiting = config.incoming(&qemu, "defer")?;
    let ram = waiting.ram_file("pc.ram").ok_or("no RAM file")?;
    std::fs::File::options().write(true).open(&ram)?.set_len(64 << 20)?;
    let noise = vec![0xaa; 64 << 20];
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(&ram)?,
        &noise,
        0,
    )?;
    let vm = Vm::connect(&waiting.qmp_path())?;
    let snapshot = Snapshot::open(&file, 0)?;
    let options = RestoreOptions::default().paused(true);
    vmfile::restore::restore(&snapshot, Destination::Waiting(vm), &options, &Control::none())?;
    let found = std::fs::read(&ram)?;
    assert!(found == verbs::pages(&file, "pc.ram")?, "RAM is what the file says, byte for byte");
    Ok(())
}
