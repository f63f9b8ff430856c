//! A guest is saved and restored, and finds its memory as it left it.

use vmfile::restore::Mode;
use vmfile::save::{After, SaveOptions};
use vmfile::{Backend, DirectIo};
use vmfile_testing::verbs::{self, check_is_clean};
use vmfile_testing::{
    Firmware, Guest, GuestConfig, HugePages, Machine, Mount, Qemu, Ram, TestResult, requires,
};

/// Boots, saves, checks, restores by `map` and by `load`, and lets the guest judge each time.
fn round_trip(qemu: &Qemu, config: &GuestConfig) -> TestResult {
    let saved = config.boot_to(qemu, 2)?.save(&SaveOptions::default())?;
    saved.comes_back(qemu, [Mode::Map, Mode::Load])
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
    // Linux takes memory above 4 GiB first: here there are 2 GiB of it.
    round_trip(&qemu, &Guest::linux(Ram::memfd(5 << 10)).fill_mib(2500).data_share(10))
}

#[test]
fn every_back_end_and_both_kinds_of_io_write_the_same_pages() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(9).boot_to(&qemu, 1)?;
    let mut pages = Vec::new();
    let ways = [
        (Backend::IoUring, DirectIo::Required),
        (Backend::IoUring, DirectIo::Off),
        (Backend::Threads, DirectIo::Required),
        (Backend::Threads, DirectIo::Off),
    ];
    for (io, direct_io) in ways {
        let options = SaveOptions::default().io(io).direct_io(direct_io).after(After::Pause);
        let saved = guest.save(&options)?;
        check_is_clean(&saved.file)?;
        pages.push(verbs::pages(&saved.file, "pc.ram")?);
    }
    assert!(pages.windows(2).all(|pair| pair[0] == pair[1]), "all four are the same");
    Ok(())
}

#[test]
fn the_file_holds_the_bytes_that_qemu_sees() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    for ram in [Ram::private(64), Ram::memfd(64)] {
        let mut guest = Guest::boot_sector(ram).seed(10).boot_to(&qemu, 1)?;
        guest.stop()?;
        // Above 1 MiB the guest's addresses are the block's offsets; below lie ROM and VGA.
        let seen = std::fs::read(guest.pmemsave(1 << 20, 63 << 20)?)?;
        let saved = guest.save(&SaveOptions::default())?;
        let pages = verbs::pages(&saved.file, "pc.ram")?;
        assert!(pages[1 << 20..] == seen[..], "every byte is the same");
    }
    Ok(())
}

#[test]
fn a_vm_that_is_saved_with_resume_runs_on() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(11).boot_to(&qemu, 1)?;
    guest.save(&SaveOptions::default().after(After::Resume))?;
    guest.runs_on(2)
}

#[test]
fn a_paused_vm_is_saved_and_comes_back_paused() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(12).boot_to(&qemu, 1)?;
    guest.stop()?;
    let saved = guest.save(&SaveOptions::default())?;
    drop(guest);
    saved.comes_back_paused_on(&qemu, Mode::Map)
}

#[test]
fn many_clones_run_from_one_file_which_stays_as_it_was() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(64)).seed(13);
    let saved = config.boot_to(&qemu, 1)?.save(&SaveOptions::default())?;
    let clones: Vec<Guest> =
        (0..4).map(|_| saved.restore(&qemu, Mode::Map)).collect::<TestResult<_>>()?;
    for clone in &clones {
        saved.goes_on_in(clone)?;
    }
    check_is_clean(&saved.file)
}

#[test]
fn a_vm_that_was_mapped_is_saved_again() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::memfd(64)).seed(14);
    let first = config.boot_to(&qemu, 1)?.save(&SaveOptions::default())?;
    let second = first.comes_back_on(&qemu, Mode::Map)?.save(&SaveOptions::default())?;
    second.comes_back(&qemu, [Mode::Map])
}

#[test]
fn untouched_ram_far_larger_than_the_host_costs_nothing() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let ram = Ram::private(256 << 10).without_reserve();
    let config = Guest::boot_sector(ram).fill_mib(32).seed(15);
    let saved = config.boot_to(&qemu, 1)?.save(&SaveOptions::default())?;
    assert_eq!(saved.report.pages_total >> 26, 1, "256 GiB of pages");
    assert!(saved.report.bytes_written < 64 << 20, "{} bytes", saved.report.bytes_written);
    saved.comes_back(&qemu, [Mode::Map])
}

#[test]
fn a_file_system_without_direct_io_works_and_the_report_says_so() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mount = requires!(Mount::tmpfs(300));
    let mut guest = Guest::boot_sector(Ram::private(64)).seed(16).boot_to(&qemu, 1)?;
    let required = SaveOptions::default().direct_io(DirectIo::Required);
    let error = guest.save_below(mount.path(), &required).expect_err("tmpfs has no direct I/O");
    let source = error.source().map(ToString::to_string).unwrap_or_default();
    assert!(source.starts_with("direct I/O is not possible: tmpfs"), "{error}: {source}");
    assert_eq!(guest.status()?, "running");

    let saved = guest.save_below(mount.path(), &SaveOptions::default())?;
    drop(guest);
    let direct_io = saved.report.direct_io.to_string();
    assert!(direct_io.starts_with("no: tmpfs is page cache"), "{direct_io}");
    saved.comes_back(&qemu, [Mode::Map])
}
