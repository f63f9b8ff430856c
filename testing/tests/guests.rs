//! Do the guests report the state of their RAM correctly?
//!
//! All other tests with VMs rely on this: a guest counts on while its memory is as it left it, and
//! reports when a single page is not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use vmfile_testing::{Firmware, Guest, HugePages, Machine, Mount, Ram, TestResult, requires};

const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn the_boot_sector_guest_prints_the_sums_of_its_oracle_on_pc() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let guest = Guest::boot_sector(Ram::private(64)).seed(7).boot_to(&qemu, 3)?;
    guest.judge_counts()
}

#[test]
fn the_boot_sector_guest_prints_the_sums_of_its_oracle_on_q35() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::boot_sector(Ram::private(64)).machine(Machine::Q35).busy();
    let guest = config.boot_to(&qemu, 12)?; // every page has been rewritten once
    guest.judge_counts()
}

#[test]
fn the_boot_sector_guest_fills_a_part_of_more_ram_than_the_host_has() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let ram = Ram::private(256 << 10).without_reserve();
    let guest = Guest::boot_sector(ram).fill_mib(32).boot_to(&qemu, 3)?;
    guest.judge_counts()
}

#[test]
fn qemu_sees_the_pages_that_the_oracle_predicts() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::private(16)).seed(3).boot_to(&qemu, 1)?;
    guest.stop()?;
    let oracle = guest.config().boot_sector_oracle().ok_or("a boot-sector guest")?;

    let saved = fs::read(guest.pmemsave(0x10_0000, 64 * 4096)?)?;

    let last_pass = guest.counts().last().ok_or("a count")?.number;
    for (page, bytes) in (0_u32..).zip(saved.chunks_exact(4096)) {
        // The guest may have been stopped before or after it rewrote this page.
        let before = oracle.page_bytes(page, last_pass);
        let after = oracle.page_bytes(page, last_pass + 1);
        assert!(bytes == before || bytes == after, "page {page} after pass {last_pass}");
    }
    Ok(())
}

#[test]
fn one_wrong_bit_changes_the_sum_of_the_boot_sector_guest() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mut guest = Guest::boot_sector(Ram::tmpfs(64)).boot_to(&qemu, 1)?;
    guest.stop()?;

    // The guest may be about to rewrite a page, which would undo the change. It never rewrites two
    // neighboring pages in one pass.
    flip_a_bit(&guest, 0x180_0123)?;
    flip_a_bit(&guest, 0x180_1123)?;
    guest.resume()?;

    let error = guest.wait_for_passes(2).unwrap_err().to_string();
    assert!(error.contains("the sum must be"), "{error}");
    Ok(())
}

#[test]
fn the_linux_guest_counts_on_pc_with_all_its_devices() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let guest = Guest::linux(Ram::memfd(256)).vcpus(2).virtio().disk(16).boot(&qemu)?;
    let count = guest.wait_for_count(3)?;
    assert_eq!(count.online_cpus(), Some(2));
    for device in ["virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon"] {
        guest.wait_for_line(|line| line == format!("device {device} present"), TIMEOUT)?;
    }
    guest.wait_for_line(|line| line == "hwrng 16 bytes", TIMEOUT)?;
    guest.judge_counts()
}

#[test]
fn the_linux_guest_counts_on_q35_under_uefi() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::linux(Ram::private(256)).machine(Machine::Q35).firmware(Firmware::Ovmf);
    let guest = config.boot_to(&qemu, 3)?;
    guest.judge_counts()
}

#[test]
fn the_linux_guest_uses_all_nodes_and_memory_modules() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::linux(Ram::memfd(256)).numa_nodes(&[128, 128]).vcpus(2).dimm(128);
    // More than the two nodes together have free, so that the memory module is used too.
    let guest = config.fill_mib(220).boot_to(&qemu, 3)?;
    guest.wait_for_line(|line| line == "nodes 2", TIMEOUT)?;
    guest.judge_counts()
}

#[test]
fn the_linux_guest_names_a_page_with_one_wrong_bit() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let config = Guest::linux(Ram::tmpfs(256)).data_share(64);
    let mut guest = config.boot_to(&qemu, 1)?;
    guest.stop()?;

    // The test does not know where the kernel put the memory under test, but recognizes its
    // repeated pages by their bytes.
    let repeated_page = config.repeated_word().repeat(4096 / 8);
    let ram = fs::read(guest.ram_file("pc.ram").ok_or("RAM in a file")?)?;
    let mut pages = (0_u64..).zip(ram.chunks_exact(4096));
    let (page, _) = pages.find(|(_, bytes)| *bytes == repeated_page).ok_or("a repeated page")?;
    flip_a_bit(&guest, page * 4096 + 99)?;
    guest.resume()?;

    let error = guest.wait_for_passes(2).unwrap_err().to_string();
    assert!(error.contains("CORRUPT page"), "{error}");
    Ok(())
}

#[test]
fn ram_of_huge_pages_works_from_a_mount_and_without() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let _pages = requires!(HugePages::reserve(64));
    let mount = requires!(Mount::hugetlbfs());
    for ram in [Ram::file(32, mount.path()), Ram::hugetlb_memfd(32)] {
        Guest::boot_sector(ram).boot_to(&qemu, 2)?;
    }
    Ok(())
}

#[test]
fn file_systems_can_be_made_for_a_test() -> TestResult {
    let qemu = requires!(qemu >= "9.0");
    let mounts =
        [requires!(Mount::tmpfs(64)), requires!(Mount::ext4(64)), requires!(Mount::xfs(320))];
    for mount in mounts {
        let guest = Guest::boot_sector(Ram::file(16, mount.path())).boot_to(&qemu, 1)?;
        assert!(guest.ram_file("pc.ram").is_some_and(|file| file.starts_with(mount.path())));
    }
    Ok(())
}

/// Changes one bit of guest memory while the guest is stopped. RAM is one file, and `address` lies
/// below the hole.
fn flip_a_bit(guest: &Guest, address: u64) -> TestResult {
    let path = guest.ram_file("pc.ram").ok_or("RAM in a file")?;
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, address)?;
    byte[0] ^= 0x10;
    Ok(file.write_all_at(&byte, address)?)
}
