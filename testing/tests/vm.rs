//! A guest is saved and restored, and finds its memory as it left it.

use vmfile::save::{After, SaveOptions};
use vmfile::{Backend, DirectIo};
use vmfile_testing::verbs::{self, check_is_clean, load, map, save, save_with};
use vmfile_testing::{
    Firmware, Guest, GuestConfig, HugePages, Machine, Mount, Qemu, Ram, TestResult, requires,
};

/// Boots, saves, checks, restores by `map` and by `load`, and lets the guest judge each time.
fn round_trip(qemu: &Qemu, config: &GuestConfig) -> TestResult {
    let guest = config.boot(qemu)?;
    let before = guest.wait_for_count(2)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    save(&guest, &file)?;
    drop(guest);
    check_is_clean(&file)?;

    for restore in [map, load] {
        let guest = restore(qemu, config, &file)?;
        let after = guest.wait_for_passes(2)?;
        assert!(after.number > before.number, "{} after {}", after.number, before.number);
        guest.judge_counts()?;
    }
    Ok(())
}

#[test]
fn private_ram_on_pc_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    round_trip(&qemu, &Guest::boot_sector(Ram::private(64)).seed(1))
}

#[test]
fn private_ram_on_q35_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    round_trip(&qemu, &Guest::boot_sector(Ram::private(64)).seed(2).machine(Machine::Q35))
}

#[test]
fn a_memfd_on_pc_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    round_trip(&qemu, &Guest::boot_sector(Ram::memfd(64)).seed(3))
}

#[test]
fn a_memfd_on_q35_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    round_trip(&qemu, &Guest::boot_sector(Ram::memfd(64)).seed(4).machine(Machine::Q35))
}

#[test]
fn huge_pages_come_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let _pages = requires!(HugePages::reserve(256));
    round_trip(&qemu, &Guest::boot_sector(Ram::hugetlb_memfd(64)).seed(5))
}

#[test]
fn a_file_on_hugetlbfs_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let _pages = requires!(HugePages::reserve(256));
    let mount = requires!(Mount::hugetlbfs());
    round_trip(&qemu, &Guest::boot_sector(Ram::file(64, mount.path())).seed(6))
}

#[test]
fn a_file_on_tmpfs_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    round_trip(&qemu, &Guest::boot_sector(Ram::tmpfs(64)).seed(7).machine(Machine::Q35))
}

#[test]
fn a_file_on_a_disk_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    round_trip(&qemu, &Guest::boot_sector(Ram::file(64, directory.path())).seed(8))
}

#[test]
fn a_linux_guest_with_its_devices_comes_back_on_pc() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    round_trip(&qemu, &Guest::linux(Ram::private(256)).vcpus(2).virtio().disk(16))
}

#[test]
fn a_linux_guest_with_its_devices_comes_back_on_q35() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::linux(Ram::memfd(256)).machine(Machine::Q35).vcpus(2).virtio().disk(16);
    round_trip(&qemu, &config)
}

#[test]
fn a_linux_guest_under_uefi_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::linux(Ram::memfd(512)).machine(Machine::Q35).firmware(Firmware::Ovmf);
    round_trip(&qemu, &config)
}

#[test]
fn two_numa_nodes_come_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::linux(Ram::memfd(384)).vcpus(2).numa_nodes(&[256, 128]).fill_mib(200);
    round_trip(&qemu, &config)
}

#[test]
fn a_dimm_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    round_trip(&qemu, &Guest::linux(Ram::private(256)).dimm(128).fill_mib(200))
}

#[test]
fn memory_above_four_gib_comes_back() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    round_trip(&qemu, &Guest::linux(Ram::memfd(5 << 10)).fill_mib(4500).data_share(10))
}

#[test]
fn every_back_end_and_both_kinds_of_io_write_the_same_pages() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let guest = Guest::boot_sector(Ram::private(64)).seed(9).boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let mut pages = Vec::new();
    let ways = [
        (Backend::IoUring, DirectIo::Required),
        (Backend::IoUring, DirectIo::Off),
        (Backend::Threads, DirectIo::Required),
        (Backend::Threads, DirectIo::Off),
    ];
    for (number, (io, direct_io)) in ways.into_iter().enumerate() {
        let file = directory.path().join(format!("{number}.vmf"));
        let after = After::Pause;
        save_with(&guest, &file, &SaveOptions::default().io(io).direct_io(direct_io).after(after))?;
        check_is_clean(&file)?;
        pages.push(verbs::pages(&file, "pc.ram")?);
    }
    assert!(pages.windows(2).all(|pair| pair[0] == pair[1]), "all four are the same");
    Ok(())
}

#[test]
fn the_file_holds_the_bytes_that_qemu_sees() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    for ram in [Ram::private(64), Ram::memfd(64)] {
        let mut guest = Guest::boot_sector(ram).seed(10).boot(&qemu)?;
        guest.wait_for_count(1)?;
        guest.stop()?;
        // Above 1 MiB the guest's addresses are the block's offsets; below lie ROM and VGA.
        let seen = std::fs::read(guest.pmemsave(1 << 20, 63 << 20)?)?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("vm.vmf");
        save(&guest, &file)?;
        let pages = verbs::pages(&file, "pc.ram")?;
        assert!(pages[1 << 20..] == seen[..], "every byte is the same");
    }
    Ok(())
}

#[test]
fn a_vm_that_is_saved_with_resume_runs_on() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(11).boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let options = SaveOptions::default().after(After::Resume);
    save_with(&guest, &directory.path().join("vm.vmf"), &options)?;
    assert_eq!(guest.status()?, "running");
    guest.wait_for_passes(2)?;
    guest.judge_counts()
}

#[test]
fn a_paused_vm_is_saved_and_comes_back_paused() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(64)).seed(12);
    let mut guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    guest.stop()?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    save(&guest, &file)?;
    drop(guest);

    let mut guest = map(&qemu, &config, &file)?;
    assert_eq!(guest.status()?, "paused");
    guest.resume()?;
    guest.wait_for_passes(2)?;
    guest.judge_counts()
}

#[test]
fn many_clones_run_from_one_file_which_stays_as_it_was() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(64)).seed(13);
    let guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    save(&guest, &file)?;
    drop(guest);
    let clones: Vec<Guest> =
        (0..4).map(|_| map(&qemu, &config, &file)).collect::<TestResult<_>>()?;
    for clone in &clones {
        clone.wait_for_passes(2)?;
        clone.judge_counts()?;
    }
    check_is_clean(&file)
}

#[test]
fn a_vm_that_was_mapped_is_saved_again() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::memfd(64)).seed(14);
    let guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let (first, second) = (directory.path().join("1.vmf"), directory.path().join("2.vmf"));
    save(&guest, &first)?;
    drop(guest);
    let guest = map(&qemu, &config, &first)?;
    guest.wait_for_passes(2)?;
    save(&guest, &second)?;
    drop(guest);
    check_is_clean(&second)?;
    let guest = map(&qemu, &config, &second)?;
    guest.wait_for_passes(2)?;
    guest.judge_counts()
}

#[test]
fn untouched_ram_far_larger_than_the_host_costs_nothing() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let ram = Ram::private(256 << 10).without_reserve();
    let config = Guest::boot_sector(ram).fill_mib(32).seed(15);
    let guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vm.vmf");
    let report = save(&guest, &file)?;
    drop(guest);
    assert_eq!(report.pages_total >> 26, 1, "256 GiB of pages");
    assert!(report.bytes_written < 64 << 20, "{} bytes", report.bytes_written);
    check_is_clean(&file)?;
    let guest = map(&qemu, &config, &file)?;
    guest.wait_for_passes(2)?;
    guest.judge_counts()
}

#[test]
fn a_file_system_without_direct_io_works_and_the_report_says_so() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mount = requires!(Mount::tmpfs(300));
    let config = Guest::boot_sector(Ram::private(64)).seed(16);
    let mut guest = config.boot(&qemu)?;
    guest.wait_for_count(1)?;
    let file = mount.path().join("vm.vmf");
    let required = SaveOptions::default().direct_io(DirectIo::Required);
    let error = save_with(&guest, &file, &required).expect_err("tmpfs has no direct I/O");
    let source = error.source().map(ToString::to_string).unwrap_or_default();
    assert!(source.starts_with("direct I/O is not possible: tmpfs"), "{error}: {source}");
    assert_eq!(guest.status()?, "running");

    let report = save(&guest, &file)?;
    drop(guest);
    assert!(
        report.direct_io.to_string().starts_with("no: tmpfs is page cache"),
        "{}",
        report.direct_io
    );
    check_is_clean(&file)?;
    let guest = map(&qemu, &config, &file)?;
    guest.wait_for_passes(2)?;
    guest.judge_counts()
}
